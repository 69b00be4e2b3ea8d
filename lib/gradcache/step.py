"""The gradient-cached step: embed every chunk, take the loss over the whole batch, run backward chunk by chunk.

Gradients are those of plain autograd over all N pairs, at the activation memory of one chunk.
Source: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup (GradCache), 2021.

Letters: K chunks of C pairs on this rank, B = all pairs of this rank, N = W * B pairs over W ranks.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lib.backends.precision import full_float32
from lib.distributed import gather_rows, rank_and_world_size, sum_over_ranks
from lib.gradcache.first_pass import EmbeddedBatch, Recompute, Recomputed, embed_chunks
from lib.gradcache.inputs import Chunks, Inputs, StepBatch, text_count
from lib.gradcache.prefetch import on_device
from lib.gradcache.random_state import RandomState, batch_norm_statistics, mean_over_ranks, restore_statistics
from lib.gradcache.surrogate import Surrogate
from lib.losses import Loss, LossShare, Pairs
from lib.losses.positives import Ids


@dataclass(frozen=True)
class StepResult:
    """What a step leaves besides the gradients on the parameters."""

    loss: Tensor
    """(), the loss of the global batch, the same on every rank."""
    fresh: Pairs
    """All N pairs of the step, embedded before the update, detached, in rank order."""
    replay_difference: Tensor
    """(), largest |pass 1 - pass 2| over this rank's recomputed embeddings; 0 where the replay is exact."""


def cached_step(
    towers: nn.Module,
    chunks: Chunks,
    loss: Loss,
    remembered: Pairs | None,
    *,
    device: torch.device,
    backward: Callable[[Tensor], None] = torch.Tensor.backward,
    no_sync: Callable[[], AbstractContextManager] = nullcontext,
    keep_graphs: int = 0,
    negatives: Sequence[Inputs] = (),
    image_recompute: Recompute = "all",
    text_recompute: Recompute = "all",
    share: bool = False,
    between_chunks: Callable[[], None] = lambda: None,
) -> StepResult:
    """Accumulate on the parameters of `towers` the gradient of `loss` over the N pairs of all ranks.

    `towers` is the (possibly DDP-wrapped) TwoTowers; `chunks` are this rank's, as many on every rank, and are taken one
    after another, each embedded before the next is asked for. `no_sync` suspends the reduction across ranks: only the
    last backward runs outside it, so there is one reduction per step. The graphs of the first `keep_graphs` forwards
    are kept from pass 1 instead of being recomputed; as many as chunks: all. With `share` every distinct text of this
    rank is encoded once, which is exact while the text tower draws nothing at random. `negatives` are texts that fit no
    image, the same on every rank: each rank encodes them all for its own images. `between_chunks` is called where all
    ranks alike can give a step up, as often on each: for every chunk of both passes but the first, while no reduction
    is under way. What it raises leaves gradients behind, and batch-norm statistics of pass 1.
    """
    batch = StepBatch(chunks, negatives, share, pin=device.type == "cuda")
    again = Recomputed(image_recompute=image_recompute, text_recompute=text_recompute)
    all_kept = keep_graphs >= len(chunks)
    embedded = embed_chunks(
        towers,
        batch.forwards(),
        device,
        again,
        keep_graphs=None if all_kept else keep_graphs,
        no_sync=no_sync,
        between_chunks=between_chunks,
    )
    passes = embedded.passes
    keep_graphs = len(passes) if all_kept else keep_graphs

    # As pass 1 left them: two passes must not update them twice.
    statistics = mean_over_ranks(batch_norm_statistics(towers))
    with full_float32():
        fresh, gradients = _loss_over_all_ranks(embedded, sum(map(text_count, negatives)), batch, loss, remembered)
    surrogate = Surrogate(passes, gradients)

    difference = torch.zeros((), device=device)
    if keep_graphs:  # one backward for all of them: the reducer must meet every parameter once
        with nullcontext() if all_kept else no_sync():
            values = [surrogate(i, passes[i].output, final=all_kept and i == 0) for i in range(keep_graphs)]
            backward(sum(values, start=torch.zeros((), device=device)))
    after_pass_1 = RandomState.capture(device)
    recomputed = list(enumerate(passes))[keep_graphs:]
    for (index, of_pass_1), inputs in on_device(recomputed, lambda each: each[1].inputs_of_pass_2(again), device):
        last = index == len(passes) - 1
        if of_pass_1.is_chunk:
            between_chunks()
        with nullcontext() if last else no_sync():
            of_pass_1.random_state.restore()  # dropout draws the masks of pass 1
            output = towers(**inputs)
            difference = torch.maximum(difference, of_pass_1.distance(output))
            value = surrogate(index, output, final=last)
            if value.requires_grad:  # not so where all that the chunk has is frozen
                backward(value)
        del inputs, output, value
    after_pass_1.restore()
    restore_statistics(statistics)
    return StepResult(gradients.loss, replace(fresh, negative_texts=None), difference)


@torch.no_grad()
def _loss_over_all_ranks(
    embedded: EmbeddedBatch, negatives: int, batch: StepBatch, loss: Loss, remembered: Pairs | None
) -> tuple[Pairs, LossShare]:
    """Gather all embeddings, and return them with the loss and the gradients for what this rank embedded.

    negatives: so many of the first texts belong to no pair.
    """
    scale, bias = embedded.passes[0].output.logit_scale.detach(), embedded.passes[0].output.logit_bias.detach()
    images, texts, device = embedded.images, embedded.texts[negatives:], scale.device
    text_row = None if batch.text_row is None else batch.text_row.to(device, non_blocking=True)
    fresh = Pairs(
        gather_rows(images),
        gather_rows(texts if text_row is None else texts[text_row]),
        *gather_ids(batch.ids, device),
        embedded.texts[:negatives] if negatives else None,
    )
    rank, world_size = rank_and_world_size()
    per_rank = len(fresh) // world_size
    rows = slice(rank * per_rank, (rank + 1) * per_rank)
    share = loss(fresh, remembered, scale, bias, rows)
    total, d_scale, d_bias = sum_over_ranks(torch.stack([share.loss, share.logit_scale, share.logit_bias]))
    d_texts = sum_over_ranks(share.text_embeds)[rows]
    if text_row is not None:
        d_texts = torch.zeros_like(texts).index_add_(0, text_row, d_texts.to(texts.dtype))
    return fresh, LossShare(total, share.image_embeds, d_texts, d_scale, d_bias, share.negative_texts)


def gather_ids(parts: Sequence[Ids], device: torch.device) -> Ids:
    """The ids of all ranks' pairs in rank order, (N,) each, from this rank's, chunk by chunk: in one collective."""
    columns = [
        torch.cat([part.to(device, non_blocking=True) for part in column]) for column in zip(*parts, strict=True)
    ]
    return Ids(*gather_rows(torch.stack(columns, dim=1)).T.contiguous())
