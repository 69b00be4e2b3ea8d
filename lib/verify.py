"""--verify-gradients: the cached step against plain autograd, on the user's own model, data, precision and ranks."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from lib.cached_step import RandomState
from lib.collectives import gather_rows, rank_and_world_size, sum_over_ranks
from lib.data import Chunk
from lib.objective import DenseLoss

TOLERANCE = {"no": 1e-3, "fp16": 5e-2, "bf16": 1e-1}  # relative to the largest gradient of a part
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
    towers: nn.Module, cached: Callable[[], None], plain: Callable[[], None], device: torch.device
) -> dict[str, float]:
    """Largest relative difference between the gradients that two ways leave, per tower and for scale and bias.

    Both start from the same random state and from no gradients, and leave none behind.
    """
    state = RandomState.capture(device)
    gradients = []
    for run in (cached, plain):
        state.restore()
        towers.zero_grad(set_to_none=True)
        run()
        gradients.append({n: p.grad.detach().clone() for n, p in towers.named_parameters() if p.grad is not None})
    towers.zero_grad(set_to_none=True)
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


def plain_autograd(
    wrapped: nn.Module,
    towers: nn.Module,
    chunks: Sequence[Chunk],
    dense: DenseLoss,
    pairwise: bool,
    device: torch.device,
) -> None:
    """Leave on `towers` the gradient of the N x N loss over all ranks' chunks, with all graphs kept."""
    with getattr(wrapped, "no_sync", nullcontext)():
        outputs = [wrapped(**chunk.to(device).inputs) for chunk in chunks]
    images = torch.cat([output.image_embeds for output in outputs])
    texts = torch.cat([output.text_embeds for output in outputs])
    group = gather_rows(torch.cat([chunk.group for chunk in chunks]).to(device))
    if pairwise:
        group = torch.arange(len(group), device=device)
    rank, world_size = rank_and_world_size()
    rows = slice(rank * len(images), (rank + 1) * len(images))
    value = dense(
        _own_rows(gather_rows(images.detach()), images, rows),
        _own_rows(gather_rows(texts.detach()), texts, rows),
        group,
        outputs[0].logit_scale,
        outputs[0].logit_bias,
    )
    value.backward()
    for name, parameter in towers.named_parameters():
        if parameter.grad is not None:
            sum_over_ranks(parameter.grad)
            if name in ("logit_scale", "logit_bias"):  # every rank holds the whole gradient of these
                parameter.grad /= world_size


def _own_rows(everything: Tensor, own: Tensor, rows: slice) -> Tensor:
    """All ranks' embeddings as constants, but this rank's with their graph."""
    return torch.cat([everything[: rows.start], own.to(everything.dtype), everything[rows.stop :]])
