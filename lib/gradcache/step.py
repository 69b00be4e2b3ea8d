"""The gradient-cached step: embed every chunk, take the loss over the whole batch, run backward chunk by chunk.

Gradients equal those of plain autograd over all N pairs, at the activation memory of one chunk.
Source: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup (GradCache), 2021.

Letters: K chunks of C pairs on this rank, B = all pairs of this rank, N = W * B pairs over W ranks, D dimensions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from lib.backends.precision import full_float32
from lib.data import Chunk, StepChunks
from lib.distributed import gather_rows, rank_and_world_size, sum_over_ranks
from lib.gradcache.distinct_texts import DistinctTexts, text_count
from lib.gradcache.prefetch import Inputs, on_device
from lib.gradcache.random_state import RandomState, batch_norm_statistics, mean_over_ranks, restore_statistics
from lib.losses import Loss, LossShare, Pairs
from lib.losses.positives import Ids
from lib.towers import TowerOutput

Chunks = StepChunks | Sequence[Chunk]

Recompute = Literal["all", "head", "none"]
"""Parts of a tower that run again in pass 2: all of it, only its head (frozen trunk), or nothing (frozen tower)."""


@dataclass(frozen=True)
class GradCache:
    """Settings of the cached step that hold for the whole run."""

    towers: nn.Module
    """TwoTowers as the backend wrapped them (DDP, FSDP2, ZeRO), or bare"""
    device: torch.device
    backward: Callable[[Tensor], None] = torch.Tensor.backward
    """Runs backward from a scalar: the backend's, which multiplies with the fp16 loss scale."""
    no_sync: Callable[[], AbstractContextManager] = nullcontext
    """Context in which gradients are accumulated without reducing them over ranks."""
    keep_graphs: int = 0
    """The first so many forwards keep their graph and are not recomputed; K or more: all of them."""
    image_recompute: Recompute = "all"
    text_recompute: Recompute = "all"
    share_texts: bool = False
    """Encode each distinct text of this rank once; exact while the text tower uses no dropout."""
    negatives: Sequence[Inputs] = ()
    """Texts that fit no image, in chunks, the same on every rank: each rank encodes them all for its own images."""


@dataclass(frozen=True)
class StepResult:
    """Loss and embeddings of a step; its gradients are on the parameters."""

    loss: Tensor
    """(), the loss of the global batch, the same on every rank."""
    fresh: Pairs
    """All N pairs of the step, embedded before the update, detached, in rank order."""
    replay_difference: Tensor
    """(), largest |pass 1 - pass 2| over this rank's recomputed embeddings; 0 where the replay is exact."""


@dataclass
class Forward:
    """One forward of pass 1, and everything that pass 2 needs to repeat it."""

    inputs: Inputs
    """on the host; after pass 1 those of pass 2, which are fewer where towers or trunks are frozen"""
    ids: Ids | None = None
    """of the chunk whose images it has; None: texts alone"""
    last: bool = False
    """no other follows in this step"""
    random_state: RandomState = field(init=False)
    """before pass 1"""
    output: TowerOutput = field(init=False)
    """with its graph where that is kept; otherwise views of the rows of Embedded"""
    d_images: Tensor = field(init=False)
    d_texts: Tensor = field(init=False)
    """the cached gradients of the loss for its embeddings, each (C, D), without rows where it has none"""


@dataclass(frozen=True)
class Embedded:
    """Results of pass 1 on this rank."""

    forwards: list[Forward]
    kept: int
    """so many of the first forwards have their graph"""
    images: Tensor
    """(B, D), detached, in the order of the chunks"""
    texts: Tensor
    """(P + B, D), detached: P negative texts first; with shared texts only the distinct ones follow"""
    negatives: int
    """P"""
    text_row: Tensor | None
    """(B,), row of each pair's text among the distinct texts; None: each pair has its own"""


def cached_step(
    cache: GradCache,
    chunks: Chunks,
    loss: Loss,
    remembered: Pairs | None,
    between_chunks: Callable[[], None] = lambda: None,
) -> StepResult:
    """Accumulate on the parameters the gradient of `loss` over the N pairs of all ranks.

    chunks: of this rank, as many on every rank; each is embedded before the next is asked for.
    remembered: pairs of the memory bank, further candidates without gradient.
    between_chunks: called for every chunk of both passes but the first, equally often on all ranks, while no reduction
    is under way. It may raise to abandon the step; gradients and the batch-norm statistics of pass 1 are left behind.
    """
    embedded = embed(cache, chunks, between_chunks)
    # Batch norm updates its running statistics in every forward: pass 2 must not update them a second time.
    statistics = mean_over_ranks(batch_norm_statistics(cache.towers))
    fresh, gradients = loss_and_gradients(embedded, loss, remembered)
    difference = backward(cache, embedded, gradients, between_chunks)
    restore_statistics(statistics)
    return StepResult(gradients.loss, replace(fresh, negative_texts=None), difference)


def embed(cache: GradCache, chunks: Chunks, between_chunks: Callable[[], None]) -> Embedded:
    """Pass 1: embed every chunk as soon as it is ready, without graph except for the first `keep_graphs` forwards."""
    all_kept = cache.keep_graphs >= len(chunks)
    texts = DistinctTexts(pin=cache.device.type == "cuda") if cache.share_texts else None
    coming, forwards = forwards_of(chunks, cache.negatives, texts), list[Forward]()
    for forward, inputs in on_device(coming, lambda forward: forward.inputs, cache.device):
        if forward.ids and any(earlier.ids for earlier in forwards):
            between_chunks()
        keeps_graph = all_kept or len(forwards) < cache.keep_graphs
        forward.random_state = RandomState.capture(cache.device)
        # DDP decides in forward whether the backward of this graph reduces. One graph alone may do so, of the last
        # forward: here where all graphs are kept, otherwise in pass 2.
        reduces = all_kept and forward.last
        with nullcontext() if reduces else cache.no_sync(), nullcontext() if keeps_graph else torch.no_grad():
            output: TowerOutput = cache.towers(**inputs)
        forward.inputs = {} if keeps_graph else _inputs_of_pass_2(cache, forward.inputs, output)
        forward.output = output._replace(image_pooled=None, text_pooled=None)
        forwards.append(forward)
        del inputs, output  # on the device they would stay next to those of the next chunk
    kept = len(forwards) if all_kept else cache.keep_graphs
    images, text_embeds = (_in_one_tensor(forwards, name, kept) for name in ("image_embeds", "text_embeds"))
    negatives = sum(map(text_count, cache.negatives))
    return Embedded(forwards, kept, images, text_embeds, negatives, texts.row if texts else None)


def forwards_of(chunks: Chunks, negatives: Sequence[Inputs], texts: DistinctTexts | None) -> Iterator[Forward]:
    """Yield the forwards of a step: negative texts, then each chunk as soon as it is ready.

    With `texts` a chunk's forward has its images alone, and the distinct texts of all chunks follow. The last forward
    always has both towers: ranks synchronize in its backward, where every parameter must take part.
    """
    for inputs in negatives:
        yield Forward(inputs)
    for number, chunk in enumerate(chunks, start=1):
        inputs, last = chunk.inputs, number == len(chunks)
        if texts:
            inputs = texts.take(chunk)
            if last:
                *blocks, final = texts.blocks()
                yield from map(Forward, blocks)
                inputs |= final
        yield Forward(inputs, Ids(chunk.group, chunk.sample_id, chunk.text_id), last)


def _inputs_of_pass_2(cache: GradCache, inputs: Inputs, output: TowerOutput) -> Inputs:
    """Select the inputs that have to run again: of the whole tower, of its head, or none."""
    again: Inputs = {}
    for recompute, of_trunk, of_head, pooled in (
        (cache.image_recompute, ("pixel_values",), "image_pooled", output.image_pooled),
        (cache.text_recompute, ("input_ids", "attention_mask"), "text_pooled", output.text_pooled),
    ):
        if recompute == "all":
            again |= {name: inputs[name] for name in of_trunk if name in inputs}
        elif recompute == "head" and pooled is not None:
            again[of_head] = pooled
    return again


def _in_one_tensor(forwards: list[Forward], name: str, kept: int) -> Tensor:
    """Concatenate the embeddings of one tower; forwards without a graph then hold views of it instead of copies."""
    embeds = [getattr(forward.output, name) for forward in forwards]
    everything = torch.cat([rows.detach() for rows in embeds if rows is not None])
    views = everything.split([_rows(rows) for rows in embeds])
    for forward, view in list(zip(forwards, views, strict=True))[kept:]:
        if len(view):
            forward.output = forward.output._replace(**{name: view})
    return everything


@torch.no_grad()
def loss_and_gradients(embedded: Embedded, loss: Loss, remembered: Pairs | None) -> tuple[Pairs, LossShare]:
    """Gather the embeddings of all ranks; return them with the loss and its gradients for this rank's embeddings.

    The embeddings are leaves here: their gradients are what GradCache caches, and all that pass 2 needs of the loss.
    Remembered pairs enter nowhere else: they are candidates in the loss, but no graph leads to them.
    """
    output = embedded.forwards[0].output
    scale, bias = output.logit_scale.detach(), output.logit_bias.detach()
    own_texts = embedded.texts[embedded.negatives :]
    text_row = None if embedded.text_row is None else embedded.text_row.to(scale.device, non_blocking=True)
    fresh = Pairs(
        gather_rows(embedded.images),
        gather_rows(own_texts if text_row is None else own_texts[text_row]),
        *gather_ids([forward.ids for forward in embedded.forwards if forward.ids], scale.device),
        embedded.texts[: embedded.negatives] if embedded.negatives else None,
    )
    rank, world_size = rank_and_world_size()
    per_rank = len(fresh) // world_size
    rows = slice(rank * per_rank, (rank + 1) * per_rank)
    with full_float32():
        share = loss(fresh, remembered, scale, bias, rows)
    total, d_scale, d_bias = sum_over_ranks(torch.stack([share.loss, share.logit_scale, share.logit_bias]))
    # Every rank's rows of images meet all texts: a text's gradient is a sum over ranks, an image's is complete.
    d_texts = sum_over_ranks(share.text_embeds)[rows]
    if text_row is not None:  # the gradient of a shared text is the sum over its pairs
        d_texts = torch.zeros_like(own_texts).index_add_(0, text_row, d_texts.to(own_texts.dtype))
    _cache(embedded.forwards, share.image_embeds, d_texts, share.negative_texts)
    if share.image_normalizer is not None:
        normalizers = gather_rows(share.image_normalizer), share.text_normalizer
        fresh = replace(fresh, image_normalizer=normalizers[0], text_normalizer=normalizers[1])
    return fresh, replace(share, loss=total, text_embeds=d_texts, logit_scale=d_scale, logit_bias=d_bias)


def _cache(forwards: list[Forward], d_images: Tensor, d_texts: Tensor, d_negatives: Tensor | None) -> None:
    """Give each forward the gradients for its embeddings."""
    if d_negatives is not None:
        d_texts = torch.cat([d_negatives.to(d_texts.dtype), d_texts])
    of_images = d_images.split([_rows(forward.output.image_embeds) for forward in forwards])
    of_texts = d_texts.split([_rows(forward.output.text_embeds) for forward in forwards])
    for forward, its_images, its_texts in zip(forwards, of_images, of_texts, strict=True):
        forward.d_images, forward.d_texts = its_images, its_texts


def backward(cache: GradCache, embedded: Embedded, gradients: LossShare, between_chunks: Callable[[], None]) -> Tensor:
    """Pass 2: run every chunk again with its graph, and backward of its surrogate; return the replay difference, ()."""
    kept, recomputed = embedded.forwards[: embedded.kept], embedded.forwards[embedded.kept :]
    difference = torch.zeros((), device=cache.device)
    if kept:  # one backward for all kept graphs: DDP's reducer must meet every parameter once
        with cache.no_sync() if recomputed else nullcontext():
            values = [surrogate(forward, forward.output, gradients, final=forward.last) for forward in kept]
            cache.backward(sum(values, start=torch.zeros((), device=cache.device)))
    after_pass_1 = RandomState.capture(cache.device)
    for forward, inputs in on_device(recomputed, lambda forward: forward.inputs, cache.device):
        if forward.ids:
            between_chunks()
        # Gradients accumulate on each rank; only the last backward reduces them, so there is one reduction per step.
        with nullcontext() if forward.last else cache.no_sync():
            # Dropout must draw the masks of pass 1: the cached gradients are those of exactly these embeddings.
            forward.random_state.restore()
            output = cache.towers(**inputs)
            difference = torch.maximum(difference, _difference(forward.output, output))
            value = surrogate(forward, output, gradients, final=forward.last)
            if value.requires_grad:  # not where everything that the chunk has is frozen
                cache.backward(value)
        del inputs, output, value
    after_pass_1.restore()  # the next step's dropout does not depend on which chunks ran twice
    return difference


def surrogate(forward: Forward, output: TowerOutput, gradients: LossShare, final: bool) -> Tensor:
    """The scalar sum(embeds * their cached gradient), whose gradient on the weights is that of the loss: ().

    `final` adds scale and bias; it is set for exactly one forward, inside the backward that synchronizes.
    """
    # DDP averages over W ranks. Each rank's embeddings contribute a part of the gradient, to be summed: hence the
    # factor W. Scale and bias have the full gradient on every rank already, so their average is right as it is.
    world_size = rank_and_world_size()[1]
    value = float(final) * (output.logit_scale * gradients.logit_scale + output.logit_bias * gradients.logit_bias)
    for embeds, gradient in ((output.image_embeds, forward.d_images), (output.text_embeds, forward.d_texts)):
        if embeds is not None:
            value = value + world_size * (embeds * gradient).sum()
    return value


@torch.no_grad()
def _difference(first: TowerOutput, again: TowerOutput) -> Tensor:
    """Largest absolute difference between the embeddings of two passes: ()."""
    both = ((first.image_embeds, again.image_embeds), (first.text_embeds, again.text_embeds))
    differences = [(b - a).abs().max().float() for a, b in both if a is not None and b is not None]
    return torch.stack(differences).max() if differences else torch.zeros((), device=first.logit_scale.device)


def _rows(embeds: Tensor | None) -> int:
    """A forward has no texts where they are shared and in another, and no images where it has texts alone."""
    return 0 if embeds is None else len(embeds)


def gather_ids(parts: Sequence[Ids], device: torch.device) -> Ids:
    """Gather the ids of all ranks' pairs in rank order, (N,) each, from this rank's chunks, in one collective."""
    columns = [
        torch.cat([part.to(device, non_blocking=True) for part in column]) for column in zip(*parts, strict=True)
    ]
    return Ids(*gather_rows(torch.stack(columns, dim=1)).T.contiguous())
