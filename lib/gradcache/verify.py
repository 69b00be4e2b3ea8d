"""--verify-gradients: compare the cached step with plain autograd, on the run's model, data, precision and ranks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.backends import Backend
from lib.backends.precision import full_float32
from lib.data import Chunk
from lib.distributed import gather_objects, gather_rows, rank_and_world_size
from lib.errors import RunError
from lib.gradcache.distinct_texts import TEXT_INPUTS
from lib.gradcache.prefetch import Inputs
from lib.gradcache.random_state import RandomState, batch_norm_statistics, restore_statistics
from lib.gradcache.step import GradCache, cached_step, gather_ids
from lib.losses import Pairs
from lib.losses.objective import DenseLoss, Objective
from lib.losses.positives import Ids

TOLERANCE = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 1e-1}  # relative to the largest gradient of a part
FP16_SCALE = 2.0**10
PAIRS, CHUNKS = 16, 4  # of each rank, at most about so many: small enough for all graphs at once

PART_OF = {"image": "image tower", "text": "text tower", "logit_scale": "logit_scale", "logit_bias": "logit_bias"}


class Extras(NamedTuple):
    """Everything of a step except its chunks that a run may use."""

    negatives: Sequence[Inputs] = ()
    """texts that belong to no pair, in chunks"""
    remembered: Pairs | None = None
    tile: int | None = None
    """rows and columns of the logits that are held at a time; None: as the run has them, so that one holds all"""
    keep_graphs: int = 0


EXTRAS = {
    "negatives": "negative prompts",
    "remembered": "a memory",
    "tile": "more than one tile of logits",
    "keep_graphs": "kept graphs",
}
"""Names of the extras in messages, in the order in which a fault is searched."""


@dataclass(frozen=True)
class Comparison:
    """Differences between the gradients of two ways."""

    differences: dict[str, float]
    """The largest of each part of the model, relative to its largest gradient."""
    faults: list[str]
    """Gradients that cannot be compared, named."""

    def within(self, tolerance: float) -> bool:
        return not self.faults and all(difference <= tolerance for difference in self.differences.values())


def verify_gradients(
    cache: GradCache,
    backend: Backend,
    objective: Objective,
    chunks: Sequence[Chunk],
    has_memory: bool,
    say: Callable[[str], None],
) -> None:
    """Compare both ways on a few pairs, with all that the run uses, and print the differences by `say`.

    Raises RunError for differences above the tolerance. Leaves statistics and random state as they were.
    """
    device, tolerance = cache.device, TOLERANCE[backend.precision.name]
    statistics, random_state = batch_norm_statistics(cache.towers), RandomState.capture(device)
    few, kept = _few_pairs(chunks), cache.keep_graphs
    extras = Extras(
        negatives=[{name: tensor[: PAIRS // CHUNKS] for name, tensor in each.items()} for each in cache.negatives[:2]],
        remembered=_near_memory(cache, few) if has_memory else None,
        tile=max(1, 2 * sum(map(len, few)) // 5),  # not a divisor: the last tile is smaller
        keep_graphs=len(few) if kept >= len(chunks) else min(kept, len(few) - 1),
    )

    def compare(extras: Extras) -> Comparison:
        with_extras = replace(cache, keep_graphs=extras.keep_graphs, negatives=extras.negatives)
        loss = partial(objective.loss, tile=extras.tile)
        cached = partial(cached_step, with_extras, few, loss, extras.remembered)
        plain = partial(_plain_autograd, backend, few, extras, objective.dense, device)
        return _compare_gradients(backend, cached, plain, device)

    with full_float32():
        where, found = _first_faulty(compare, extras, tolerance)
    restore_statistics(statistics)
    random_state.restore()
    say(
        "verify-gradients: largest relative difference "
        + ", ".join(f"{part} {difference:.1e}" for part, difference in found.differences.items())
    )
    if not found.within(tolerance):
        raise RunError(
            f"--verify-gradients: the cached step's gradients differ from plain autograd's"
            f"{f' with {where}, and not without' * bool(where)}: "
            f"{'; '.join([*found.faults, f'largest relative differences {found.differences}'])}, allowed {tolerance}; "
            "batch norm in training mode and layers that depend on the chunk do this, otherwise it is a bug here"
        )


def _few_pairs(chunks: Sequence[Chunk]) -> list[Chunk]:
    """The first pairs of a step's first chunks, of which some share their group and some their text alone."""
    some = chunks[:CHUNKS]
    size = -(-PAIRS // len(some))
    return [_recurring(chunk.rows(0, min(size, len(chunk)))) for chunk in some]


def _recurring(chunk: Chunk) -> Chunk:
    """The same pairs, but the second has the group of the first and the last its text."""
    if len(chunk) < 3:
        return chunk
    rows, group = torch.arange(len(chunk)), chunk.group.clone()
    rows[-1], group[1] = 0, group[0]
    texts = {name: tensor[rows] for name, tensor in chunk.inputs.items() if name in TEXT_INPUTS}
    return replace(chunk, **texts, text_id=chunk.text_id[rows], group=group)


@torch.no_grad()
def _near_memory(cache: GradCache, chunks: Sequence[Chunk]) -> Pairs:
    """Remember as many pairs as there are fresh ones on all ranks, near enough to compete with them.

    In turn they are an older copy of a fresh sample, of its group and text alone, of its text alone, and of nothing.
    """
    outputs = [cache.towers(**chunk.to(cache.device).inputs) for chunk in chunks]
    images = gather_rows(torch.cat([output.image_embeds for output in outputs])).float()
    texts = gather_rows(torch.cat([output.text_embeds for output in outputs])).float()
    ids = gather_ids([Ids.of(chunk) for chunk in chunks], cache.device)
    kind = torch.arange(len(images), device=cache.device) % 4
    largest_logit = outputs[0].logit_scale.float().expand(len(images))
    return Pairs(
        F.normalize(images + images.roll(1, 0) / 2, dim=1),
        F.normalize(texts + texts.roll(1, 0) / 2, dim=1),
        torch.where(kind < 2, ids.group, ~ids.group),  # the complement of an id is no other pair's
        torch.where(kind < 1, ids.sample_id, ~ids.sample_id),
        torch.where(kind < 3, ids.text_id, ~ids.text_id),
        image_normalizer=largest_logit,
        text_normalizer=largest_logit,
    )


def _first_faulty(compare: Callable[[Extras], Comparison], extras: Extras, tolerance: float) -> tuple[str, Comparison]:
    """Compare with all extras; where that fails, add one after another and name the first that makes a difference.

    Returns "" for a cached step that is wrong without any, or where nothing is wrong.
    """
    found = compare(extras)
    if found.within(tolerance):
        return "", found
    if not (again := compare(Extras())).within(tolerance):
        return "", again
    used = [name for name in EXTRAS if getattr(extras, name)]
    for count in range(1, len(used)):
        added = Extras(**{name: getattr(extras, name) for name in used[:count]})
        if not (again := compare(added)).within(tolerance):
            return EXTRAS[used[count - 1]], again
    return EXTRAS[used[-1]], found


def _compare_gradients(
    backend: Backend, cached: Callable[[], object], plain: Callable[[], object], device: torch.device
) -> Comparison:
    """Compare the gradients that two ways leave; of the ranks' differences the largest counts.

    Both start from the same random state and from no gradients, and leave none behind.
    """
    state, gradients = RandomState.capture(device), []
    with _moderate_loss_scale(backend):
        for run in (cached, plain):
            state.restore()
            with backend.gradients_of_a_step():
                run()
            gradients.append(backend.gradients())
            backend.forget_gradients()
    state.restore()
    every = gather_objects(_compared(*gradients))
    return Comparison(
        {
            part: max(found.differences[part] for found in every if part in found.differences)
            for part in dict.fromkeys(part for found in every for part in found.differences)
        },
        list(dict.fromkeys(fault for found in every for fault in found.faults)),
    )


def _compared(ours: dict[str, Tensor], twin: dict[str, Tensor]) -> Comparison:
    """Compare the gradients of this rank, by parameter name."""
    ways = {"the cached step": ours, "plain autograd": twin}
    names = list(twin | ours)
    missing = {name: way for way, found in ways.items() for name in names if name not in found}
    broken = {
        name: way for way, found in ways.items() for name, each in found.items() if not bool(each.isfinite().all())
    }
    faults = [f"{name} has no gradient in {way}" for name, way in missing.items()]
    faults += [f"the gradient of {name} is not finite in {way}" for name, way in broken.items()]
    differences: dict[str, float] = {}
    for part, words in PART_OF.items():
        whole = [n for n in names if n.split(".")[0] == part and n not in missing and n not in broken]
        if whole:
            largest = max(twin[name].abs().max().item() for name in whole)
            difference = max((ours[name] - twin[name]).abs().max().item() for name in whole)
            differences[words] = difference / max(largest, 1e-12)
    return Comparison(differences, faults)


def _plain_autograd(
    backend: Backend, chunks: Sequence[Chunk], extras: Extras, dense: DenseLoss, device: torch.device
) -> None:
    """Leave on the towers the gradient of the loss of all ranks' chunks, with all logits and all graphs at once.

    The backend takes the mean over ranks, so the loss is multiplied by W: each rank's graph is that of its own rows. In
    scale and bias every rank has the whole gradient, of which it gives a part in W.
    """
    with backend.no_sync():
        negatives = [backend.wrapped(**inputs).text_embeds for inputs in extras.negatives]
    outputs = []
    for index, chunk in enumerate(chunks):
        # One backward follows, which reduces if the last forward says so.
        with nullcontext() if index == len(chunks) - 1 else backend.no_sync():
            outputs.append(backend.wrapped(**chunk.to(device).inputs))
    world_size = rank_and_world_size()[1]
    fresh = Pairs(
        _of_all_ranks(torch.cat([output.image_embeds for output in outputs])),
        _of_all_ranks(torch.cat([output.text_embeds for output in outputs])),
        *gather_ids([Ids.of(chunk) for chunk in chunks], device),
        # Each rank encodes them all for its own images, with dropout of its own.
        _of_all_ranks(torch.cat(negatives)).unflatten(0, (world_size, -1)) if negatives else None,
    )
    scale, bias = (_part_of_gradient(each, world_size) for each in (outputs[0].logit_scale, outputs[0].logit_bias))
    backend.backward(world_size * dense(fresh, extras.remembered, scale, bias))


def _of_all_ranks(own: Tensor) -> Tensor:
    """Gather all ranks' embeddings as constants, except this rank's, which keep their graph."""
    rank, rows = rank_and_world_size()[0], len(own)
    everything = gather_rows(own.detach())
    return torch.cat([everything[: rank * rows], own, everything[(rank + 1) * rows :]])


def _part_of_gradient(scalar: Tensor, parts: int) -> Tensor:
    """Keep the value and divide its gradient by `parts`."""
    return scalar / parts + (1 - 1 / parts) * scalar.detach()


@contextmanager
def _moderate_loss_scale(backend: Backend) -> Iterator[None]:
    """fp16 training finds its loss scale by overflows; a comparison needs one that surely has none."""
    if backend.loss_scale is None:
        yield
        return
    before, backend.loss_scale.value = backend.loss_scale.value, FP16_SCALE
    try:
        yield
    finally:
        backend.loss_scale.value = before
