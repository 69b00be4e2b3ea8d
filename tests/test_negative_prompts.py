"""Negative prompts: further negatives of every image, with exact gradients through the text tower; 1 and 2 ranks."""

import json
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from naive import naive_infonce, naive_sigmoid
from ranks import on_ranks
from small_runs import losses, moved, train
from torch.nn.parallel import DistributedDataParallel
from toy import VOCABULARY, ToyTowers, toy_chunks

import train_siglip
from lib.distributed import logsumexp_over_ranks, rank_and_world_size
from lib.errors import InputError
from lib.gradcache.step import GradCache, cached_step
from lib.losses import Pairs, infonce, sigmoid
from lib.losses.positives import Ids

CPU, COUNT = torch.device("cpu"), 12
LOSSES = {
    "infonce": (partial(infonce, merge_logsumexp=logsumexp_over_ranks), naive_infonce),
    "sigmoid": (sigmoid, naive_sigmoid),
}


def negatives() -> list[dict[str, torch.Tensor]]:
    """Five texts in two chunks."""
    input_ids = torch.randint(VOCABULARY, (5, 4), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in input_ids.split(3)]


def gradients(towers: ToyTowers) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in towers.named_parameters() if p.grad is not None}


def cached(loss: str, keep_graphs: int, dropout: float = 0.0, share: bool = False) -> dict[str, torch.Tensor]:
    rank, world_size = rank_and_world_size()
    towers = ToyTowers(dropout)
    wrapped = DistributedDataParallel(towers) if world_size > 1 else towers
    torch.manual_seed(100 + rank)
    cache = GradCache(
        wrapped,
        CPU,
        no_sync=getattr(wrapped, "no_sync", nullcontext),
        keep_graphs=keep_graphs,
        share_texts=share,
        negatives=negatives(),
    )
    result = cached_step(cache, toy_chunks(COUNT, 2, 4, rank, world_size), LOSSES[loss][0], None)
    assert result.fresh.negative_texts is None and result.replay_difference == 0
    return gradients(towers)


def at_once(loss: str, dropout: float = 0.0, with_negatives: bool = True) -> dict[str, torch.Tensor]:
    """All graphs at once, a double loop as loss."""
    towers = ToyTowers(dropout)
    torch.manual_seed(100)
    texts = [towers(**each).text_embeds for each in negatives()]
    chunks = toy_chunks(COUNT, 2, 4)
    outputs = [towers(**chunk.inputs) for chunk in chunks]
    fresh = Pairs(
        torch.cat([output.image_embeds for output in outputs]),
        torch.cat([output.text_embeds for output in outputs]),
        *(torch.cat(column) for column in zip(*map(Ids.of, chunks), strict=True)),
        torch.cat(texts) if with_negatives else None,
    )
    LOSSES[loss][1](fresh, None, outputs[0].logit_scale, outputs[0].logit_bias).backward()
    return gradients(towers)


def largest_error(found: dict, expected: dict) -> float:
    assert found.keys() == expected.keys()
    return max(
        ((found[n] - value).abs().max() / value.abs().max().clamp(min=1e-3)).item() for n, value in expected.items()
    )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("keep_graphs", [0, 1, 4, 99])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_equal_plain_autograd(loss, keep_graphs, dropout):
    found = cached(loss, keep_graphs, dropout)
    assert largest_error(found, at_once(loss, dropout)) <= 1e-10
    assert largest_error(found, at_once(loss, dropout, with_negatives=False)) > 0.01


def on_this_rank(loss: str):
    return [cached(loss, keep) for keep in (0, 3, 99)]


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_two_ranks_give_the_gradients_of_one(loss):
    for found in on_ranks(2, on_this_rank, loss):
        assert largest_error(found, at_once(loss)) <= 1e-10


def write(folder, *texts: str) -> str:
    file = folder / "hard.yaml"
    file.write_text("".join(f"- {json.dumps(text)}\n" for text in texts))
    return f"--negative-prompts={file}"


def test_a_run_has_them_as_candidates_and_stores_their_outputs(tmp_path, capsys):
    flag = write(tmp_path, "no digit {} at all", "a letter")
    without = train(tmp_path / "without")
    run = train(tmp_path / "run", flag)
    assert "11 negative prompts more" in capsys.readouterr().out
    assert losses(run)[0] > losses(without)[0] + 0.1
    stored = ("--freeze", "text.trunk", f"--cache-dir={tmp_path}")
    kept, again = train(tmp_path / "kept", flag, *stored), train(tmp_path / "again", flag, *stored[:2])
    assert losses(kept) == pytest.approx(losses(again), rel=1e-5)
    assert any("text" in name for name in moved(run))


def test_frozen_texts_and_scale_leave_the_image_tower_to_learn(tmp_path):
    run = train(tmp_path / "run", write(tmp_path, "a letter"), "--freeze", "text", "scale")
    assert moved(run) and not any("text" in name for name in moved(run))


@pytest.mark.parametrize(
    ("texts", "fault"),
    [
        (["a photo of {}"], "is a prompt of a class too"),
        ([], "must hold a list of texts"),
        (None, "cannot be read"),
    ],
)
def test_unusable_files_are_refused(tmp_path, texts, fault):
    flag = write(tmp_path, *texts) if texts is not None else f"--negative-prompts={tmp_path / 'none.yaml'}"
    with pytest.raises(InputError, match=f"--negative-prompts .*{fault}"):
        train_siglip.main([flag, "--prompts=simple", f"--output-dir={tmp_path / 'run'}", "--steps=1"])
