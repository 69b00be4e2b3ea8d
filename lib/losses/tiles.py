"""Blocks of logits, visited in tiles, and the gradients that accumulate over them; never the N x N logits as a whole.

Everything is computed for some *rows* of the global batch. Over any partition of the batch into rows the shares add up
to the loss and gradients of the whole batch, so the losses know nothing of ranks.
Letters: N fresh pairs of the global batch, B rows of it, Q remembered pairs, P negative texts, D embedding dimension.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lib.losses.positives import NOBODY, Ids, Pairs, SameText, masks, numbered, occurrences

TILE = 1024  # rows and columns of a tile on a CPU: its buffers fit a core's share of the cache
ACCELERATOR_TILE = 4096  # fewer and longer kernels: launching one costs as much as a small tile


@dataclass(frozen=True)
class LossShare:
    """The rows' share of the loss, (), and of its gradients; summed over all rows they are those of the whole batch.

    image_embeds: (B, D), complete. text_embeds: (N, D), for *all* fresh texts. logit_scale: (), for the multiplier, not
    its logarithm. logit_bias: (). negative_texts: (P, D).
    """

    loss: Tensor
    image_embeds: Tensor
    text_embeds: Tensor
    logit_scale: Tensor
    logit_bias: Tensor
    negative_texts: Tensor | None = None


Loss = Callable[..., LossShare]
"""(fresh, remembered, logit_scale, logit_bias, rows, *, tile=None) -> LossShare.

tile: rows and columns of the logits that are held at a time; None: as suits the device. It changes no result.
"""


class Block(NamedTuple):
    """Anchors (A, D) of a tower against others (M, D) of the other tower, and where their gradients accumulate."""

    tower: Literal["image", "text"]
    anchors: Tensor
    others: Tensor
    ids: Ids
    other_ids: Ids
    d_anchors: Tensor
    d_others: Tensor | None  # None: remembered, which take no gradients
    rows: slice  # the anchors that are visited


class Tile(NamedTuple):
    """Rows r and columns c of a block. Logits, spare and positive are buffers, which the next tile overwrites."""

    block: Block
    r: slice
    c: slice
    logits: Tensor
    """scale * anchors @ others.T + bias; of excluded pairs so low that no softmax or sigmoid notices"""
    spare: Tensor
    positive: Tensor | None
    """1 for positives, else 0"""
    excluded: Tensor | None


class Logits:
    """All logits of some rows, block by block, and the loss and gradients that accumulate over their tiles.

    Everything is float32 at least, whatever the towers' precision (float64 stays float64).
    """

    def __init__(
        self,
        fresh: Pairs,
        remembered: Pairs | None,
        scale: Tensor,
        bias: Tensor | None,
        rows: slice,
        same_text: SameText,
        side: int | None = None,
    ) -> None:
        """side: rows and columns of a tile; None: as suits the device."""
        dtype = torch.promote_types(fresh.image_embeds.dtype, torch.float32)
        images, texts = fresh.image_embeds[rows].to(dtype), fresh.text_embeds.to(dtype)
        self.scale, self.bias, self.same_text = scale.to(dtype), None if bias is None else bias.to(dtype), same_text
        wide = wide_type(scale.device)
        self.side = side or tile_side(scale.device)
        self.loss, self.d_scale, self.d_bias = (torch.zeros((), dtype=wide, device=scale.device) for _ in "abc")
        self.d_images, self.d_texts = torch.zeros_like(images), torch.zeros_like(texts)
        negatives = texts[:0] if fresh.negative_texts is None else fresh.negative_texts.to(dtype)
        nobody = Ids(*(column.new_full((negatives.shape[-2],), NOBODY) for column in fresh.ids))
        everyone, nobody, old = numbered([fresh.ids, nobody, nobody if remembered is None else remembered.ids])
        self._count = sum(len(ids.group) for ids in (everyone, nobody, old))
        own, every = everyone.rows(rows), slice(0, len(images))
        self.fresh = Block("image", images, texts, own, everyone, self.d_images, self.d_texts, every)
        self.blocks, self.d_negatives = [self.fresh], None
        if fresh.negative_texts is not None:
            self.d_negatives = torch.zeros_like(negatives)
            self.blocks.append(Block("image", images, negatives, own, nobody, self.d_images, self.d_negatives, every))
        if remembered is not None:
            # The memory adds candidates to the anchors of both towers and no anchors: earlier weights embedded it, so
            # there is nothing that gradients could flow to.
            old_images, old_texts = remembered.image_embeds.to(dtype), remembered.text_embeds.to(dtype)
            of_images = Block("image", images, old_texts, own, old, self.d_images, None, every)
            of_texts = Block("text", texts, old_images, everyone, old, self.d_texts, None, rows)
            self.blocks += [of_images, of_texts]

    def tiles(self) -> Iterator[Tile]:
        """Every tile of every block."""
        occur = iter(self._occur)
        for block in self.blocks:
            for r in _slices(block.rows, self.side):
                anchors = block.anchors[r]
                self._scaled, self._dots = anchors * self.scale, torch.zeros_like(anchors)
                for c in _slices(slice(0, len(block.others)), self.side):
                    shape = len(anchors), len(block.others[c])
                    logits, spare, ones = (buffer[: math.prod(shape)].view(shape) for buffer in self._buffers)
                    torch.mm(self._scaled, block.others[c].T, out=logits)
                    if self.bias is not None:
                        logits += self.bias
                    found, excluded = self._mask(block, r, c, logits, next(occur))
                    # From bytes: the conversion of bool takes ten times as long.
                    positive = None if found is None else ones.copy_(found.view(torch.uint8))
                    yield Tile(block, r, c, logits, spare, positive, excluded)
                self.d_scale += wide_sum(self._dots * anchors)  # sum of slope * <anchor, other> over the row of tiles
                block.d_anchors[r].addcmul_(self._dots, self.scale)

    @cached_property
    def _occur(self) -> list[list[bool]]:
        """For each of `tiles`, in their order: what `masks` has to compare. A GPU is waited for here, once."""
        tables = [
            occurrences(block.ids, block.other_ids, list(_slices(block.rows, self.side)), self.side, self._count)
            for block in self.blocks
        ]
        found: list[list[bool]] = torch.cat([table.flatten(0, 1) for table in tables]).tolist()
        return found

    @cached_property
    def _buffers(self) -> Tensor:
        """Three tiles, the same memory for all: fresh memory would cost more than the arithmetic in it."""
        largest = max(min(self.side, len(block.others)) for block in self.blocks)
        return self.d_images.new_empty(3, min(self.side, len(self.d_images)) * largest)

    def _mask(
        self, block: Block, r: slice, c: slice, logits: Tensor, occur: Sequence[bool] = (True, True, True)
    ) -> tuple[Tensor | None, Tensor | None]:
        """Positives and excluded pairs of a tile, as `masks`; its excluded logits become very low, in place."""
        ids = block.ids.rows(r), block.other_ids.rows(c)
        positive, excluded = masks(*ids, self.same_text, remembered=block.d_others is None, occur=occur)
        if excluded is not None:
            logits.masked_fill_(excluded, torch.finfo(logits.dtype).min / 2)  # not -inf, which times 0 is not 0
        return positive, excluded

    def add(self, t: Tile, slope: Tensor, slope_of_others: Tensor | None = None) -> None:
        """Accumulate the gradients of a part of the loss whose d loss / d logits is `slope`, of the tile's shape.

        slope_of_others: of a further part, whose gradients reach the others alone, as those of `slope` the anchors.
        """
        block = t.block
        self._dots.addmm_(slope, block.others[t.c])
        if slope_of_others is not None and block.d_others is not None:
            of_others = slope_of_others.T @ self._scaled
            block.d_others[t.c].add_(of_others)
            self.d_scale += wide_sum(of_others * block.others[t.c]) / self.scale
        elif block.d_others is not None:
            block.d_others[t.c].addmm_(slope.T, self._scaled)
        if self.bias is not None:
            self.d_bias += wide_sum(slope)

    def share(self, norm: float) -> LossShare:
        """The loss and gradients accumulated so far, divided by `norm`."""
        sums = (self.loss, self.d_images, self.d_texts, self.d_scale, self.d_bias, self.d_negatives)
        return LossShare(*(each.div_(norm).to(self.scale.dtype) for each in sums if each is not None))

    def dense(self, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        """The whole block as one tile, differentiable: logits, positives (1, else 0) and excluded, each (A, M)."""
        # Negative texts may be (W, P, D), where each of W ranks encodes them for its own images.
        others = block.others if block.others.ndim == 3 else block.others[None]
        logits = ((block.anchors * self.scale).unflatten(0, (len(others), -1)) @ others.mT).flatten(0, 1)
        logits = logits if self.bias is None else logits + self.bias
        positive, excluded = self._mask(block, slice(None), slice(None), logits)
        assert positive is not None
        return logits, positive.to(logits), torch.zeros_like(positive) if excluded is None else excluded


def tile_side(device: torch.device) -> int:
    """Rows and columns of a tile on this device."""
    return TILE if device.type == "cpu" else ACCELERATOR_TILE


def wide_type(device: torch.device) -> torch.dtype:
    """The type in which sums over all pairs accumulate: in float32 a loss of N^2 terms would keep three digits."""
    return torch.float32 if device.type == "mps" else torch.float64


def wide_sum(matrix: Tensor) -> Tensor:
    """Sum of all elements as a `wide_type`: (). A row adds up in its own type, since a wide copy would cost more."""
    return matrix.sum(1).sum(dtype=wide_type(matrix.device))


def _slices(rows: slice, side: int) -> Iterator[slice]:
    return (slice(start, min(start + side, rows.stop)) for start in range(rows.start, rows.stop, side))
