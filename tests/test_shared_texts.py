"""Distinct texts are encoded once, and the gradients are those of encoding every pair; 1 and 2 ranks, float64."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from naive import naive_infonce, naive_sigmoid, random_pairs
from ranks import on_ranks
from torch.nn.parallel import DistributedDataParallel
from toy import VOCABULARY, ToyTowers, toy_chunks

import train_siglip
from lib.data import Chunk
from lib.distributed import logsumexp_over_ranks, rank_and_world_size
from lib.gradcache.distinct_texts import TEXT_INPUTS, DistinctTexts, same_every_time
from lib.gradcache.step import GradCache, cached_step, forwards_of
from lib.losses import Pairs, infonce, sigmoid
from lib.losses.positives import Ids
from lib.runs.reporter import read_metrics

CPU, COUNT, DIM = torch.device("cpu"), 12, 6
LOSSES = {
    "infonce": (partial(infonce, merge_logsumexp=logsumexp_over_ranks), naive_infonce),
    "sigmoid": (sigmoid, naive_sigmoid),
}


def prompted_chunks(size: int, texts: int, rank: int = 0, world_size: int = 1) -> list[Chunk]:
    """Toy chunks whose pairs have one of a few texts; rows of another rank differ in how often each comes."""
    generator = torch.Generator().manual_seed(9)
    table = torch.randint(VOCABULARY, (texts, 4), generator=generator)
    text_id = torch.randint(texts, (COUNT,), generator=generator)
    own = text_id[rank * COUNT // world_size : (rank + 1) * COUNT // world_size].split(size)
    chunks = toy_chunks(COUNT, size, texts, rank, world_size)
    return [replace(c, input_ids=table[ids], text_id=ids + 100) for c, ids in zip(chunks, own, strict=True)]


def towers_with_image_dropout(text_dropout: bool = False) -> ToyTowers:
    towers = ToyTowers(0.3)
    if not text_dropout:
        towers.text_trunk.eval(), towers.text_head.eval()
    return towers


def gradients(towers: ToyTowers) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in towers.named_parameters() if p.grad is not None}


def pair_by_pair(loss: str, size: int, texts: int, world_size: int, text_dropout: bool) -> dict[str, torch.Tensor]:
    """Every pair's text encoded, all graphs at once, a double loop as loss."""
    towers, outputs, chunks = towers_with_image_dropout(text_dropout), [], []
    for rank in range(world_size):
        torch.manual_seed(100 + rank)
        own = prompted_chunks(size, texts, rank, world_size)
        outputs += [towers(**chunk.inputs) for chunk in own]
        chunks += own
    fresh = Pairs(
        torch.cat([output.image_embeds for output in outputs]),
        torch.cat([output.text_embeds for output in outputs]),
        *(torch.cat(column) for column in zip(*map(Ids.of, chunks), strict=True)),
    )
    memory = random_pairs(5, DIM, seed=1, groups=texts, first_id=9)
    LOSSES[loss][1](fresh, memory, outputs[0].logit_scale, outputs[0].logit_bias).backward()
    return gradients(towers)


def shared(loss: str, size: int, texts: int, keep_graphs: int, text_dropout: bool = False):
    """The cached step with shared texts on this rank; and how many rows went through the text tower."""
    rank, world_size = rank_and_world_size()
    towers = towers_with_image_dropout(text_dropout)
    wrapped = DistributedDataParallel(towers) if world_size > 1 else towers
    rows: list[int] = []
    towers.text_trunk.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    torch.manual_seed(100 + rank)
    no_sync = getattr(wrapped, "no_sync", nullcontext)
    result = cached_step(
        GradCache(wrapped, CPU, no_sync=no_sync, keep_graphs=keep_graphs, share_texts=True),
        prompted_chunks(size, texts, rank, world_size),
        LOSSES[loss][0],
        random_pairs(5, DIM, seed=1, groups=texts, first_id=9),
    )
    return gradients(towers), rows, result.replay_difference.item()


def largest_error(found: dict, expected: dict) -> float:
    assert found.keys() == expected.keys()
    return max(
        ((found[n] - value).abs().max() / value.abs().max().clamp(min=1e-3)).item() for n, value in expected.items()
    )


@pytest.mark.parametrize("keep_graphs", [0, 1, 3])
@pytest.mark.parametrize(("size", "texts"), [(4, 3), (5, 3), (2, 3), (12, 4), (1, 2)])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_equal_encoding_every_pair(loss, size, texts, keep_graphs):
    found, rows, difference = shared(loss, size, texts, keep_graphs)
    assert largest_error(found, pair_by_pair(loss, size, texts, 1, False)) <= 1e-10
    kept = min(keep_graphs, -(-COUNT // size))
    assert texts <= sum(rows) <= 2 * texts and (kept or sum(rows) == 2 * texts)
    assert difference == 0


@pytest.mark.parametrize("keep_graphs", [0, 2, 6])
def test_a_step_can_be_given_up_as_often_whatever_the_texts(monkeypatch, keep_graphs):
    """Ranks agree there by a reduction: one that asked less often than another would wait for ever."""
    monkeypatch.setattr("test_shared_texts.towers_with_image_dropout", lambda _: ToyTowers(0.0))
    counts = set()
    for texts in (1, 3, 5, COUNT):
        asked: list[int] = []
        counted = partial(cached_step, between_chunks=partial(asked.append, 1))
        with monkeypatch.context() as patch:
            patch.setattr("test_shared_texts.cached_step", counted)
            shared("infonce", 2, texts, keep_graphs)
        counts.add(len(asked))
    assert counts == {2 * (COUNT // 2) - 1 - min(keep_graphs, COUNT // 2)}


def on_this_rank(loss: str):
    return [shared(loss, size, 3, keep)[0] for size, keep in ((2, 0), (4, 1), (6, 0))]


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_ranks_may_have_different_texts(loss):
    for (size, _), found in zip(((2, 0), (4, 1), (6, 0)), on_ranks(2, on_this_rank, loss), strict=True):
        assert largest_error(found, pair_by_pair(loss, size, 3, 2, False)) <= 1e-10


def test_negative_control_with_dropout_in_the_text_tower():
    """One mask for all pairs of a text is another model than a mask for each."""
    found, *_ = shared("infonce", 4, 3, 0, text_dropout=True)
    assert largest_error(found, pair_by_pair("infonce", 4, 3, 1, True)) > 0.05
    inputs = prompted_chunks(4, 3)[0].inputs
    texts = {name: tensor for name, tensor in inputs.items() if name in TEXT_INPUTS}
    assert not same_every_time(towers_with_image_dropout(text_dropout=True), texts)
    assert same_every_time(towers_with_image_dropout(), texts)
    assert not same_every_time(towers_with_image_dropout(), inputs)


def test_texts_of_several_lengths_are_the_same_texts():
    """Chunks pad to their longest text: what is added has a zero mask and the row's last token."""
    chunks = prompted_chunks(6, 3)
    short, long = chunks[0], chunks[1]
    padded = torch.cat([long.input_ids, torch.full((6, 2), 7)], dim=1)
    mask = torch.cat([long.attention_mask, torch.zeros(6, 2, dtype=torch.int64)], dim=1)
    long = replace(long, input_ids=padded, attention_mask=mask, text_id=long.text_id + 50)
    distinct = DistinctTexts(pin=False)
    inputs, text_row = [forward.inputs for forward in forwards_of([short, long], (), distinct)], distinct.row
    texts = torch.cat([each["input_ids"] for each in inputs if "input_ids" in each])
    masks = torch.cat([each["attention_mask"] for each in inputs if "input_ids" in each])
    for place, pair in enumerate([*short.input_ids, *long.input_ids[:, :4]]):
        assert torch.equal(texts[text_row[place]][:4], pair)
        assert masks[text_row[place]].tolist() == [1, 1, 1, 1, 0, 0]


def test_images_do_not_wait_for_the_texts_of_later_chunks():
    """Each chunk's images are a forward before the next chunk is asked for; the last forward has both towers."""
    asked = []

    class Slow(list):
        def __iter__(self):
            for number, chunk in enumerate(super().__iter__()):
                asked.append(number)
                yield chunk

    forwards = forwards_of(Slow(prompted_chunks(3, 5)), (), DistinctTexts(pin=False))
    given = [(list(forward.inputs), forward.last, len(asked)) for forward in forwards]
    assert given[:3] == [(["pixel_values"], False, 1), (["pixel_values"], False, 2), (["pixel_values"], False, 3)]
    assert given[3] == (["input_ids", "attention_mask"], False, 4)
    assert given[4] == (["pixel_values", "input_ids", "attention_mask"], True, 4) and len(given) == 5


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_with_class_prompts_is_the_run_that_encodes_every_pair(tmp_path, cached, monkeypatch):
    flags = ["--effective-batch=128", "--chunk-size=32", "--xbm-size=0", "--steps=4"]
    flags += ["--eval-every=0", "--save-every=0"]
    if cached:
        flags += ["--freeze", "text.trunk", f"--cache-dir={tmp_path}"]
    losses = {}
    for choice in ("once", "each"):
        train_siglip.main([*flags, f"--output-dir={tmp_path / choice}"])
        losses[choice] = [line["loss"] for line in read_metrics(tmp_path / choice)]
        monkeypatch.setattr("lib.setup.build.shares_texts", lambda *_: False)
    assert losses["once"] == pytest.approx(losses["each"], rel=1e-5)
