"""--verify-gradients: the cached step against plain autograd, on the user's own model, data, precision and ranks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from lib.backends import Backend
from lib.cached_step import gather_ids
from lib.collectives import gather_rows, rank_and_world_size
from lib.data import Chunk
from lib.objective import DenseLoss
from lib.relation import Ids
from lib.replay import RandomState

TOLERANCE = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 1e-1}  # relative to the largest gradient of a part
FP16_SCALE = 2.0**10
PAIRS, CHUNKS = 16, 2  # of each rank: small enough for all graphs at once

PART_OF = {
    "image": "image tower",
    "text": "text tower",
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
}


def small_chunks(chunks: Sequence[Chunk]) -> list[Chunk]:
    """The first pairs of a step, dealt into two chunks."""
    first = chunks[0]
    count = min(PAIRS, len(first))
    size = max(1, count // CHUNKS)
    return [first.rows(start, min(start + size, count)) for start in range(0, count, size)]


def compare_gradients(
    backend: Backend, cached: Callable[[], object], plain: Callable[[], object], device: torch.device
) -> dict[str, float]:
    """Largest relative difference between the gradients that two ways leave, per tower and for scale and bias.

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
    ours, twin = gradients
    worst: dict[str, float] = {}
    for part, words in PART_OF.items():
        names = [name for name in twin if name.split(".")[0] == part]
        if names:
            largest = max(twin[name].abs().max().item() for name in names)
            difference = max((ours[name] - twin[name]).abs().max().item() for name in names)
            worst[words] = difference / max(largest, 1e-12)
    return worst


def plain_autograd(backend: Backend, chunks: Sequence[Chunk], dense: DenseLoss, device: torch.device) -> None:
    """Leave on the towers the gradient of the N x N loss over all ranks' chunks, with all graphs kept.

    The backend takes the mean over ranks, so the loss is multiplied by W: each rank's graph is that of its own rows. In
    scale and bias every rank has the whole gradient, of which it gives a part in W.
    """
    outputs = []
    for index, chunk in enumerate(chunks):
        # One backward follows, which reduces if the last forward says so.
        with nullcontext() if index == len(chunks) - 1 else backend.no_sync():
            outputs.append(backend.wrapped(**chunk.to(device).inputs))
    images = torch.cat([output.image_embeds for output in outputs])
    texts = torch.cat([output.text_embeds for output in outputs])
    rank, world_size = rank_and_world_size()
    rows = slice(rank * len(images), (rank + 1) * len(images))
    value = dense(
        _own_rows(gather_rows(images.detach()), images, rows),
        _own_rows(gather_rows(texts.detach()), texts, rows),
        gather_ids([Ids.of(chunk) for chunk in chunks], device),
        _part_of_gradient(outputs[0].logit_scale, world_size),
        _part_of_gradient(outputs[0].logit_bias, world_size),
    )
    backend.backward(world_size * value)


def _own_rows(everything: Tensor, own: Tensor, rows: slice) -> Tensor:
    """All ranks' embeddings as constants, but this rank's with their graph."""
    return torch.cat([everything[: rows.start], own.to(everything.dtype), everything[rows.stop :]])


def _part_of_gradient(scalar: Tensor, parts: int) -> Tensor:
    """The same value, whose gradient is one of so many equal parts."""
    return scalar / parts + (1 - 1 / parts) * scalar.detach()


@contextmanager
def _moderate_loss_scale(backend: Backend) -> Iterator[None]:
    """fp16 training finds its scale by overflows; a comparison needs one that surely has none."""
    if backend.loss_scale is None:
        yield
        return
    before, backend.loss_scale.value = backend.loss_scale.value, FP16_SCALE
    try:
        yield
    finally:
        backend.loss_scale.value = before
