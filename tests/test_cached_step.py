"""The cached step's gradients equal plain autograd over the whole batch, in float64, on 1, 2 and 4 ranks."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from naive import naive_infonce, naive_sigmoid, random_pairs
from ranks import on_ranks
from torch.nn.parallel import DistributedDataParallel
from toy import ToyTowers, toy_chunks

from lib.data import Chunk
from lib.distributed import logsumexp_over_ranks, rank_and_world_size
from lib.gradcache import step as gradcache_step
from lib.gradcache.random_state import RandomState
from lib.gradcache.step import GradCache, cached_step
from lib.losses import Pairs, infonce, sigmoid
from lib.losses.positives import Ids
from lib.losses.xbm import CrossBatchMemory

CPU = torch.device("cpu")
COUNT, DIM, TEXTS, DROPOUT, RATE = 12, 6, 5, 0.3, 0.1
LOSSES = {
    "infonce": (partial(infonce, merge_logsumexp=logsumexp_over_ranks), naive_infonce),
    "sigmoid": (sigmoid, naive_sigmoid),
}
MEMORIES = {"empty": [], "part-filled": [5], "wrapped": [5, 6]}
MATRIX = list(
    product(
        LOSSES,
        ["divides", "does not divide", "whole"],
        MEMORIES,
        [None, 4],
        ["none", "some", "all"],
    )
)
SAME_TEXT = list(
    product(LOSSES, ["does not divide"], ["empty", "wrapped"], [None, 4], ["some"], ["exclude", "positive"])
)
MATRIX += SAME_TEXT  # where a case does not say it, equal texts are negatives


def chunk_size_of(kind: str, per_rank: int) -> int:
    return {"divides": max(1, per_rank // 3), "does not divide": max(1, per_rank - 1), "whole": per_rank}[kind]


def chunks_of(case, rank: int = 0, world_size: int = 1) -> list[Chunk]:
    """A rank's chunks, whose pairs have one of a few texts in turn."""
    size = chunk_size_of(case[1], COUNT // world_size)
    text_id = (torch.arange(COUNT) % TEXTS)[rank * COUNT // world_size :].split(size)
    chunks = toy_chunks(COUNT, size, case[3], rank, world_size)
    return [replace(chunk, text_id=ids[: len(chunk)]) for chunk, ids in zip(chunks, text_id, strict=False)]


def same_text_of(case) -> str:
    return case[5] if len(case) > 5 else "negative"


def memory_of(kind: str, groups: int | None) -> Pairs | None:
    """Eight slots; some remembered pairs are stale copies of the batch's own samples."""
    memory = CrossBatchMemory(8, DIM, dtype=torch.float64)
    for step, size in enumerate(MEMORIES[kind]):
        pairs = random_pairs(size, DIM, seed=step, groups=groups, first_id=9 + 20 * step, texts=TEXTS)
        memory.enqueue(pairs, step)
    return memory.pairs()


def parameters_after(towers) -> dict[str, torch.Tensor]:
    """All parameters after one SGD step, and their gradients."""
    gradients = {f"grad {n}": p.grad.clone() for n, p in towers.named_parameters() if p.grad is not None}
    torch.optim.SGD(towers.parameters(), RATE).step()
    return gradients | {n: p.detach().clone() for n, p in towers.named_parameters()}


def by_plain_autograd(case, world_size: int, dropout=DROPOUT, freeze=()) -> dict[str, torch.Tensor]:
    """All ranks' chunks in one process, all graphs at once, a double loop as loss, one backward."""
    loss, _, memory, groups = case[:4]
    towers = prepared_towers(dropout, freeze)
    outputs, chunks = [], []
    for rank in range(world_size):
        torch.manual_seed(100 + rank)
        own = chunks_of(case, rank, world_size)
        outputs += [towers(c.pixel_values, c.input_ids, c.attention_mask) for c in own]
        chunks += own
    fresh = Pairs(
        torch.cat([o.image_embeds for o in outputs]),
        torch.cat([o.text_embeds for o in outputs]),
        *(torch.cat(column) for column in zip(*map(Ids.of, chunks), strict=True)),
    )
    naive = partial(LOSSES[loss][1], same_text=same_text_of(case))
    value = naive(fresh, memory_of(memory, groups), outputs[0].logit_scale, outputs[0].logit_bias)
    value.backward()
    return parameters_after(towers) | {"loss": value.detach()}


def by_cached_step(case, dropout=DROPOUT, freeze=(), reductions: list | None = None, **recompute):
    loss, _, memory, groups, kept = case[:5]
    rank, world_size = rank_and_world_size()
    towers = prepared_towers(dropout, freeze)
    wrapped, no_sync = towers, nullcontext
    if world_size > 1:
        wrapped = DistributedDataParallel(towers)
        no_sync = wrapped.no_sync
        if reductions is not None:
            wrapped.register_comm_hook(reductions, counting_reduction)
    chunks = chunks_of(case, rank, world_size)
    torch.manual_seed(100 + rank)
    keep_graphs = {"none": 0, "some": 1, "all": len(chunks)}[kept]
    result = cached_step(
        GradCache(wrapped, CPU, no_sync=no_sync, keep_graphs=keep_graphs, **recompute),
        chunks,
        partial(LOSSES[loss][0], same_text=same_text_of(case)),
        memory_of(memory, groups),
    )
    return parameters_after(towers) | {"loss": result.loss}


def prepared_towers(dropout: float, freeze=()) -> ToyTowers:
    towers = ToyTowers(dropout)
    for part in freeze:
        getattr(towers, part).requires_grad_(False).eval()
    return towers


def counting_reduction(counts: list, bucket):
    """A DDP communication hook: average as DDP does, and count."""
    counts.append(1)
    future = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0] / torch.distributed.get_world_size())


def largest_error(result: dict, twin: dict) -> float:
    assert result.keys() == twin.keys()
    return max(
        ((result[name] - value).abs().max() / value.abs().max().clamp(min=1e-3)).item() for name, value in twin.items()
    )


@pytest.mark.parametrize("case", MATRIX, ids=lambda case: "-".join(map(str, case)))
def test_gradients_equal_plain_autograd_on_one_process(case):
    assert largest_error(by_cached_step(case), by_plain_autograd(case, 1)) <= 1e-10


def all_cases_on_this_rank():
    """Every case of the matrix on this rank: {case: (result of the cached step, reductions)}."""
    results = {}
    for case in MATRIX:
        reductions = []
        result = by_cached_step(case, reductions=reductions)
        results[case] = (result, len(reductions))
    return results


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_gradients_equal_plain_autograd_on_several_ranks_with_one_reduction(world_size):
    for case, (result, reductions) in on_ranks(world_size, all_cases_on_this_rank).items():
        assert largest_error(result, by_plain_autograd(case, world_size)) <= 1e-10, case
        assert reductions == 1, case


@pytest.mark.parametrize("case", SAME_TEXT, ids=lambda case: "-".join(map(str, case)))
def test_negative_control_without_the_texts(case):
    assert largest_error(by_cached_step(case), by_plain_autograd(case[:5], 1)) > 0.01


CASE = ("infonce", "divides", "wrapped", 4, "none")


@pytest.mark.parametrize("kept", ["none", "some"])
@pytest.mark.parametrize("loss", LOSSES)
def test_negative_control_without_replay_of_the_random_state(monkeypatch, loss, kept):
    case = (loss, *CASE[1:4], kept)
    monkeypatch.setattr(RandomState, "restore", lambda self: None)
    assert largest_error(by_cached_step(case), by_plain_autograd(case, 1)) > 0.05


def scale_gradient_per_chunk(forward, output, gradients, final):
    return original_surrogate(forward, output, gradients, True)


original_surrogate = gradcache_step.surrogate


def test_negative_control_scale_gradient_in_every_chunk(monkeypatch):
    monkeypatch.setattr(gradcache_step, "surrogate", scale_gradient_per_chunk)
    result, twin = by_cached_step(CASE), by_plain_autograd(CASE, 1)
    assert result["grad logit_scale"] == pytest.approx(3 * twin["grad logit_scale"].item())


def rank_local_negatives():
    """Result of a loss over this rank's own rows only."""

    def local(fresh, remembered, scale, bias, rows, same_text):
        own = Pairs(fresh.image_embeds[rows], fresh.text_embeds[rows], *fresh.ids.rows(rows))
        share = sigmoid(own, remembered, scale, bias, slice(0, len(own)), same_text=same_text)
        whole = torch.zeros_like(fresh.text_embeds)
        whole[rows] = share.text_embeds
        return type(share)(share.loss, share.image_embeds, whole, share.logit_scale, share.logit_bias)

    LOSSES["sigmoid"] = (local, naive_sigmoid)
    return by_cached_step(("sigmoid", *CASE[1:]))


def test_negative_control_rank_local_negatives():
    twin = by_plain_autograd(("sigmoid", *CASE[1:]), 2)
    assert largest_error(on_ranks(2, rank_local_negatives), twin) > 0.05


@pytest.mark.parametrize("kept", ["none", "some", "all"])
@pytest.mark.parametrize(
    ("freeze", "recompute", "image_forwards"),
    [
        (("image_trunk", "image_head"), {"image_recompute": "none"}, 3),
        (("image_trunk",), {"image_recompute": "head"}, 3),
        (
            ("image_trunk", "image_head", "text_trunk", "text_head"),
            {"image_recompute": "none", "text_recompute": "none"},
            3,
        ),
    ],
)
def test_frozen_parts_run_once_and_gradients_stay_exact(monkeypatch, freeze, recompute, image_forwards, kept):
    case = (*CASE[:4], kept)
    towers = prepared_towers(DROPOUT, freeze)
    monkeypatch.setattr("test_cached_step.prepared_towers", lambda dropout, freeze: towers)
    result = by_cached_step(case, freeze=freeze, **recompute)
    assert towers.forwards["image"] == image_forwards
    monkeypatch.undo()
    assert largest_error(result, by_plain_autograd(case, 1, freeze=freeze)) <= 1e-10


def test_batch_norm_statistics_are_updated_once():
    towers, twin = ToyTowers(0.0, batch_norm=True), ToyTowers(0.0, batch_norm=True)
    chunks = toy_chunks(COUNT, 4, None)
    cached_step(GradCache(towers, CPU, keep_graphs=1), chunks, sigmoid, None)
    for chunk in chunks:
        twin(chunk.pixel_values)
    for (name, value), (_, expected) in zip(towers.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.equal(value, expected), name


def test_the_replay_difference_is_zero_here_and_shows_a_replay_that_is_not():
    chunks = toy_chunks(COUNT, 4, None)
    exact = cached_step(GradCache(ToyTowers(DROPOUT), CPU), chunks, sigmoid, None)
    assert exact.replay_difference == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RandomState, "restore", lambda self: None)
        other = cached_step(GradCache(ToyTowers(DROPOUT), CPU), chunks, sigmoid, None)
    assert other.replay_difference > 0.01


def test_the_random_state_after_a_step_does_not_depend_on_kept_graphs():
    states = []
    for kept in (0, 1, 3):
        towers = ToyTowers(DROPOUT)
        torch.manual_seed(3)
        cached_step(GradCache(towers, CPU, keep_graphs=kept), toy_chunks(COUNT, 4, None), sigmoid, None)
        states.append(torch.get_rng_state())
    assert all(torch.equal(states[0], state) for state in states)
