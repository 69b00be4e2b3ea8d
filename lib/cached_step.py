"""The gradient-cached step: embed every chunk, take the loss over the whole batch, run backward chunk by chunk.

Gradients are those of plain autograd over all N pairs, at the activation memory of one chunk.
Source: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup (GradCache), 2021.

Letters: K chunks of C pairs on this rank, B = all pairs of this rank, N = W * B pairs over W ranks.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from lib.collectives import gather_rows, rank_and_world_size, sum_over_ranks
from lib.losses import Loss, LossShare, Pairs
from lib.shared_texts import Inputs, share_texts

Recompute = Literal["all", "head", "none"]
"""What of a tower runs again in pass 2: all of it, only its head (frozen trunk), or nothing (frozen tower)."""


class TowerChunk(Protocol):
    """One tower forward's worth of pairs (see lib.data.Chunk): group and sample_id (C,), and what the forward takes.

    `inputs` names pixel_values, or image_pooled where the image trunk is frozen and its output stored; and input_ids
    with attention_mask, or text_pooled. Pairs of one `text_id` (C,) have the same text.
    """

    inputs: Inputs
    group: Tensor
    sample_id: Tensor
    text_id: Tensor | None


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
    chunks: Sequence[TowerChunk],
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

    `towers` is the (possibly DDP-wrapped) TwoTowers; `chunks` are this rank's, as many on every rank. `no_sync`
    suspends the reduction across ranks: only the last backward runs outside it, so there is one reduction per step.
    The graphs of the first `keep_graphs` chunks are kept from pass 1 instead of being recomputed. With `share` every
    distinct text of this rank is encoded once, which is exact while the text tower draws nothing at random.
    `negatives` are texts that fit no image, the same on every rank: each rank encodes them all for its own images.
    `between_chunks` is called where all ranks alike can give a step up: before every forward but the first, while no
    reduction is under way. What it raises leaves gradients behind, and batch-norm statistics of pass 1.
    """
    inputs, text_row = share_texts(chunks) if share else ([chunk.inputs for chunk in chunks], None)
    inputs = [*negatives, *inputs]  # in front: ranks synchronize in the last backward, which has to have both towers
    all_kept = keep_graphs >= len(chunks)
    keep_graphs = len(inputs) if all_kept else keep_graphs
    passes: list[_ChunkPass] = []
    for index, of_chunk in enumerate(inputs):
        kept = index < keep_graphs
        # DDP decides in forward whether its backward will reduce: a kept graph reduces only if no other follows.
        last = all_kept and index == len(inputs) - 1
        if index:
            between_chunks()
        with nullcontext() if last else no_sync(), nullcontext() if kept else torch.no_grad():
            passes.append(_embed(towers, of_chunk, device, kept, image_recompute, text_recompute))

    statistics = _batch_norm_statistics(towers)
    fresh, gradients = _loss_over_all_ranks(passes, len(negatives), chunks, text_row, loss, remembered)
    surrogate = _Surrogate(passes, len(negatives), gradients)

    difference = torch.zeros((), device=device)
    if keep_graphs:  # one backward for all of them: the reducer must meet every parameter once
        with nullcontext() if all_kept else no_sync():
            backward(sum(surrogate(i, passes[i].output, final=all_kept and i == 0) for i in range(keep_graphs)))
    after_pass_1 = RandomState.capture(device)
    for index in range(keep_graphs, len(inputs)):
        last = index == len(inputs) - 1
        between_chunks()
        with nullcontext() if last else no_sync():
            output = passes[index].again(towers, device, image_recompute, text_recompute)
            difference = torch.maximum(difference, passes[index].distance(output))
            of_chunk = surrogate(index, output, final=last)
            if of_chunk.requires_grad:  # not so where all that the chunk has is frozen
                backward(of_chunk)
    after_pass_1.restore()
    _restore(statistics)
    return StepResult(gradients.loss, replace(fresh, negative_texts=None), difference)


@dataclass
class _ChunkPass:
    """A chunk's inputs, what pass 1 made of them, and the random state that it started from."""

    inputs: Inputs
    output: object
    random_state: "RandomState"
    image_pooled: Tensor | None
    text_pooled: Tensor | None

    def again(self, towers: nn.Module, device, image: Recompute, text: Recompute):
        """Pass 2: what has to run again, with the random state of pass 1, so that dropout draws the same masks."""
        self.random_state.restore()
        inputs = _on(device, self.inputs)
        return towers(
            pixel_values=inputs.get("pixel_values") if image == "all" else None,
            input_ids=inputs.get("input_ids") if text == "all" else None,
            attention_mask=inputs.get("attention_mask") if text == "all" else None,
            image_pooled=self.image_pooled if image == "head" else None,
            text_pooled=self.text_pooled if text == "head" else None,
        )

    @torch.no_grad()
    def distance(self, output) -> Tensor:
        distances = [
            (again.detach() - first).abs().max().float()
            for first, again in (
                (self.output.image_embeds, output.image_embeds),
                (self.output.text_embeds, output.text_embeds),
            )
            if again is not None
        ]
        return torch.stack(distances).max() if distances else torch.zeros((), device=self.output.logit_scale.device)


def _count(embeds: Tensor | None) -> int:
    return 0 if embeds is None else len(embeds)


def _on(device: torch.device, inputs: Inputs) -> Inputs:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}


def _embed(towers, inputs: Inputs, device, kept: bool, image: Recompute, text: Recompute) -> _ChunkPass:
    """Pass 1 of one chunk; a graph is kept where gradients are enabled."""
    random_state = RandomState.capture(device)
    output = towers(**_on(device, inputs))
    image_pooled = output.image_pooled if image == "head" and not kept else None
    text_pooled = output.text_pooled if text == "head" and not kept else None
    output = output._replace(image_pooled=None, text_pooled=None)  # held only where pass 2 starts from them
    return _ChunkPass(inputs, output, random_state, image_pooled, text_pooled)


@torch.no_grad()
def _loss_over_all_ranks(
    passes: Sequence[_ChunkPass],
    negatives: int,
    chunks: Sequence[TowerChunk],
    text_row: Tensor | None,
    loss: Loss,
    remembered: Pairs | None,
) -> tuple[Pairs, LossShare]:
    """Gather all embeddings, and return them with the loss and the gradients for what this rank embedded.

    negatives: so many of the first passes have texts that belong to no pair.
    text_row: (B,), which of the embedded texts each pair has; None: its own.
    """
    first = passes[0].output
    device = first.logit_scale.device
    outputs = [p.output for p in passes]
    texts = torch.cat([o.text_embeds.detach() for o in outputs[negatives:] if o.text_embeds is not None])
    text_row = None if text_row is None else text_row.to(device)
    fresh = Pairs(
        gather_rows(torch.cat([o.image_embeds.detach() for o in outputs[negatives:]])),
        gather_rows(texts if text_row is None else texts[text_row]),
        gather_rows(torch.cat([chunk.group for chunk in chunks]).to(device)),
        gather_rows(torch.cat([chunk.sample_id for chunk in chunks]).to(device)),
        torch.cat([o.text_embeds.detach() for o in outputs[:negatives]]) if negatives else None,
    )
    rank, world_size = rank_and_world_size()
    per_rank = len(fresh) // world_size
    rows = slice(rank * per_rank, (rank + 1) * per_rank)
    share = loss(fresh, remembered, first.logit_scale.detach(), first.logit_bias.detach(), rows)
    total, d_scale, d_bias = sum_over_ranks(torch.stack([share.loss, share.logit_scale, share.logit_bias]))
    d_texts = sum_over_ranks(share.text_embeds)[rows]
    if text_row is not None:
        d_texts = torch.zeros_like(texts).index_add_(0, text_row, d_texts.to(texts.dtype))
    return fresh, LossShare(total, share.image_embeds, d_texts, d_scale, d_bias, share.negative_texts)


class _Surrogate:
    """The scalar whose gradient is the loss's: sum(embeds * their gradient), chunk by chunk.

    DDP averages over ranks. Each rank's tower part is its own share, so it is multiplied by W; scale and bias carry
    the full gradient on every rank already, and enter once.
    """

    def __init__(self, passes: Sequence[_ChunkPass], negatives: int, gradients: LossShare) -> None:
        of_texts = gradients.text_embeds  # (B or the distinct texts, D), the negative texts' before them
        if negatives:
            of_texts = torch.cat([gradients.negative_texts.to(of_texts.dtype), of_texts])
        # A chunk has no texts where they are shared and elsewhere, and no images where they are negatives.
        self.image_gradients = gradients.image_embeds.split([_count(p.output.image_embeds) for p in passes])
        self.text_gradients = of_texts.split([_count(p.output.text_embeds) for p in passes])
        self.d_scale, self.d_bias = gradients.logit_scale, gradients.logit_bias
        self.world_size = rank_and_world_size()[1]

    def __call__(self, index: int, output, final: bool) -> Tensor:
        """`final` adds scale and bias; it is set for exactly one chunk, inside the backward that synchronizes."""
        once = float(final)
        value = once * (output.logit_scale * self.d_scale + output.logit_bias * self.d_bias)
        for embeds, gradient in (
            (output.image_embeds, self.image_gradients[index]),
            (output.text_embeds, self.text_gradients[index]),
        ):
            if embeds is not None:
                value = value + self.world_size * (embeds * gradient).sum()
        return value


@dataclass(frozen=True)
class RandomState:
    """The generators that dropout draws from: the CPU's and the accelerator's."""

    cpu: Tensor
    accelerator: Tensor | None
    device: torch.device

    @classmethod
    def capture(cls, device: torch.device) -> "RandomState":
        module = None if device.type == "cpu" else torch.get_device_module(device)
        return cls(torch.get_rng_state(), module and module.get_rng_state(device), device)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)


def _batch_norm_statistics(towers: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Running statistics of batch norms in training mode, as pass 1 left them, averaged over ranks.

    Two passes must not update them twice, and ranks must agree on them.
    """
    buffers = [
        buffer
        for module in towers.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
        for buffer in module.buffers(recurse=False)
    ]
    world_size = rank_and_world_size()[1]
    saved = []
    for buffer in buffers:
        value = sum_over_ranks(buffer.detach().clone())
        saved.append((buffer, value / world_size if value.is_floating_point() else value // world_size))
    return saved


@torch.no_grad()
def _restore(statistics: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, value in statistics:
        buffer.copy_(value)
