"""The gradient-cached step: embed every chunk, take the loss over the whole batch, run backward chunk by chunk.

Gradients are those of plain autograd over all N pairs, at the activation memory of one chunk.
Source: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup (GradCache), 2021.

Letters: K chunks of C pairs on this rank, B = all pairs of this rank, N = W * B pairs over W ranks.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypedDict

import torch
from torch import Tensor, nn

from lib.collectives import gather_rows, rank_and_world_size, sum_over_ranks
from lib.copies import on_device
from lib.losses import Loss, LossShare, Pairs
from lib.replay import RandomState, batch_norm_statistics, mean_over_ranks, restore_statistics
from lib.shared_texts import Inputs, share_texts
from lib.towers import TowerOutput

Recompute = Literal["all", "head", "none"]
"""What of a tower runs again in pass 2: all of it, only its head (frozen trunk), or nothing (frozen tower)."""


class Recomputed(TypedDict):
    """What of each tower runs again in pass 2, by the names that `cached_step` has for it."""

    image_recompute: Recompute
    text_recompute: Recompute


class TowerChunk(Protocol):
    """One tower forward's worth of pairs (see lib.data.Chunk): group and sample_id (C,), and what the forward takes.

    `inputs` names pixel_values, or image_pooled where the image trunk is frozen and its output stored; and input_ids
    with attention_mask, or text_pooled. Pairs of one `text_id` (C,) have the same text.
    """

    @property
    def inputs(self) -> Inputs: ...
    @property
    def group(self) -> Tensor: ...
    @property
    def sample_id(self) -> Tensor: ...
    @property
    def text_id(self) -> Tensor | None: ...


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
    together: int = 1,
) -> StepResult:
    """Accumulate on the parameters of `towers` the gradient of `loss` over the N pairs of all ranks.

    `towers` is the (possibly DDP-wrapped) TwoTowers; `chunks` are this rank's, as many on every rank. `no_sync`
    suspends the reduction across ranks: only the last backward runs outside it, so there is one reduction per step.
    The graphs of the first `keep_graphs` chunks are kept from pass 1 instead of being recomputed. With `share` every
    distinct text of this rank is encoded once, which is exact while the text tower draws nothing at random.
    `negatives` are texts that fit no image, the same on every rank: each rank encodes them all for its own images.
    `between_chunks` is called where all ranks alike can give a step up, as often on each: for every chunk of both
    passes but the first, while no reduction is under way. What it raises leaves gradients behind, and batch-norm
    statistics of pass 1. Pass 1 embeds up to `together` chunks in one forward, as it stores no activations: exact
    while neither tower draws anything at random nor has a batch norm that trains.
    """
    inputs, text_row = share_texts(chunks) if share else ([chunk.inputs for chunk in chunks], None)
    inputs = [*negatives, *inputs]  # in front: ranks synchronize in the last backward, which has to have both towers
    all_kept = keep_graphs >= len(chunks)
    keep_graphs = len(inputs) if all_kept else keep_graphs
    passes: list[_ChunkPass] = []
    moved = on_device(inputs, device)
    for block in _blocks(inputs, keep_graphs, together):
        kept = block.start < keep_graphs
        # DDP decides in forward whether its backward will reduce: a kept graph reduces only if no other follows.
        last = all_kept and block.stop == len(inputs)
        for index in block:  # for each chunk: ranks may have different blocks, but as many chunks
            if index:
                between_chunks()
        with nullcontext() if last else no_sync(), nullcontext() if kept else torch.no_grad():
            of_block = [next(moved) for _ in block]
            passes += _embed(
                towers, inputs[block.start : block.stop], of_block, device, kept, image_recompute, text_recompute
            )

    # As pass 1 left them: two passes must not update them twice.
    statistics = mean_over_ranks(batch_norm_statistics(towers))
    fresh, gradients = _loss_over_all_ranks(passes, len(negatives), chunks, text_row, loss, remembered)
    surrogate = _Surrogate(passes, gradients)

    difference = torch.zeros((), device=device)
    if keep_graphs:  # one backward for all of them: the reducer must meet every parameter once
        with nullcontext() if all_kept else no_sync():
            values = [surrogate(i, passes[i].output, final=all_kept and i == 0) for i in range(keep_graphs)]
            backward(sum(values, start=torch.zeros((), device=device)))
    after_pass_1 = RandomState.capture(device)
    again = [each.inputs_of_pass_2(image_recompute, text_recompute) for each in passes[keep_graphs:]]
    for index, of_chunk in enumerate(on_device(again, device), start=keep_graphs):
        last = index == len(inputs) - 1
        between_chunks()
        with nullcontext() if last else no_sync():
            passes[index].random_state.restore()  # dropout draws the masks of pass 1
            output = towers(**of_chunk)
            difference = torch.maximum(difference, passes[index].distance(output))
            value = surrogate(index, output, final=last)
            if value.requires_grad:  # not so where all that the chunk has is frozen
                backward(value)
    after_pass_1.restore()
    restore_statistics(statistics)
    return StepResult(gradients.loss, replace(fresh, negative_texts=None), difference)


@dataclass
class _ChunkPass:
    """A chunk's inputs, what pass 1 made of them, and the random state that it started from."""

    inputs: Inputs
    output: TowerOutput
    random_state: RandomState
    image_pooled: Tensor | None
    text_pooled: Tensor | None

    def inputs_of_pass_2(self, image: Recompute, text: Recompute) -> Inputs:
        """What has to run again."""
        wanted = {
            "pixel_values": image == "all",
            "input_ids": text == "all",
            "attention_mask": text == "all",
        }
        inputs = {name: tensor for name, tensor in self.inputs.items() if wanted.get(name)}
        pooled = {"image_pooled": self.image_pooled, "text_pooled": self.text_pooled}
        return inputs | {name: tensor for name, tensor in pooled.items() if tensor is not None}

    @torch.no_grad()
    def distance(self, output: TowerOutput) -> Tensor:
        distances = [
            (again.detach() - first).abs().max().float()
            for first, again in (
                (self.output.image_embeds, output.image_embeds),
                (self.output.text_embeds, output.text_embeds),
            )
            if first is not None and again is not None
        ]
        return torch.stack(distances).max() if distances else torch.zeros((), device=self.output.logit_scale.device)


def _blocks(inputs: Sequence[Inputs], keep_graphs: int, together: int) -> list[range]:
    """Which chunks pass 1 embeds in one forward: kept ones alone, of the others neighbours of the same form."""
    forms = [{name: tensor.shape[1:] for name, tensor in each.items()} for each in inputs]
    blocks: list[range] = []
    for index, form in enumerate(forms):
        joins = blocks and index > keep_graphs and len(blocks[-1]) < together and forms[index - 1] == form
        if joins:
            blocks[-1] = range(blocks[-1].start, index + 1)
        else:
            blocks.append(range(index, index + 1))
    return blocks


def _embed(
    towers: nn.Module,
    inputs: Sequence[Inputs],
    moved: Sequence[Inputs],
    device: torch.device,
    kept: bool,
    image: Recompute,
    text: Recompute,
) -> list[_ChunkPass]:
    """Pass 1 of some chunks in one forward; a graph is kept where gradients are enabled.

    moved: the inputs on the device.
    """
    random_state = RandomState.capture(device)
    output: TowerOutput = towers(**_joined(moved))
    # What the trunks gave is held only where pass 2 starts from it.
    images = output.image_embeds, output.image_pooled if image == "head" and not kept else None
    texts = output.text_embeds, output.text_pooled if text == "head" and not kept else None
    passes, image_row, text_row = [], 0, 0
    for of_chunk in inputs:
        image_rows = slice(image_row, image_row := image_row + _count(of_chunk, "pixel_values", "image_pooled"))
        text_rows = slice(text_row, text_row := text_row + _count(of_chunk, "input_ids", "text_pooled"))
        image_embeds, image_pooled = (None if part is None else part[image_rows] for part in images)
        text_embeds, text_pooled = (None if part is None else part[text_rows] for part in texts)
        own = output._replace(image_embeds=image_embeds, text_embeds=text_embeds, image_pooled=None, text_pooled=None)
        passes.append(_ChunkPass(of_chunk, own, random_state, image_pooled, text_pooled))
    return passes


def _joined(chunks: Sequence[Inputs]) -> Inputs:
    if len(chunks) == 1:
        return chunks[0]
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _count(inputs: Inputs, *names: str) -> int:
    """Pairs of a chunk for one tower; 0 where it has none for it."""
    return next((len(inputs[name]) for name in names if name in inputs), 0)


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
    images, texts = _image_embeds(outputs[negatives:]), _text_embeds(outputs[negatives:])
    text_row = None if text_row is None else text_row.to(device)
    fresh = Pairs(
        gather_rows(images),
        gather_rows(texts if text_row is None else texts[text_row]),
        gather_rows(torch.cat([chunk.group for chunk in chunks]).to(device)),
        gather_rows(torch.cat([chunk.sample_id for chunk in chunks]).to(device)),
        _text_embeds(outputs[:negatives]) if negatives else None,
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


def _image_embeds(outputs: Sequence[TowerOutput]) -> Tensor:
    return torch.cat([o.image_embeds.detach() for o in outputs if o.image_embeds is not None])


def _text_embeds(outputs: Sequence[TowerOutput]) -> Tensor:
    return torch.cat([o.text_embeds.detach() for o in outputs if o.text_embeds is not None])


def _rows(embeds: Tensor | None) -> int:
    return 0 if embeds is None else len(embeds)


class _Surrogate:
    """The scalar whose gradient is the loss's: sum(embeds * their gradient), chunk by chunk.

    DDP averages over ranks. Each rank's tower part is its own share, so it is multiplied by W; scale and bias carry
    the full gradient on every rank already, and enter once.
    """

    def __init__(self, passes: Sequence[_ChunkPass], gradients: LossShare) -> None:
        of_texts = gradients.text_embeds  # (B or the distinct texts, D), the negative texts' before them
        if gradients.negative_texts is not None:
            of_texts = torch.cat([gradients.negative_texts.to(of_texts.dtype), of_texts])
        # A chunk has no texts where they are shared and elsewhere, and no images where they are negatives.
        self.image_gradients = gradients.image_embeds.split([_rows(p.output.image_embeds) for p in passes])
        self.text_gradients = of_texts.split([_rows(p.output.text_embeds) for p in passes])
        self.d_scale, self.d_bias = gradients.logit_scale, gradients.logit_bias
        self.world_size = rank_and_world_size()[1]

    def __call__(self, index: int, output: TowerOutput, final: bool) -> Tensor:
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
