"""Blocks of logits, visited in tiles, and the gradients that accumulate over them; never the N x N logits as a whole.

Everything is computed for some *rows* of the global batch. Over any partition of the batch into rows the shares add up
to the loss and gradients of the whole batch, so the losses know nothing of ranks.
Letters: N fresh pairs of the global batch, B rows of it, Q remembered pairs, P negative texts, D embedding dimension.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lib.losses.positives import NOBODY, Ids, Pairs, SameText, ids_in_common, masks
from lib.losses.xbm import aligned

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
    image_normalizer: Tensor | None = None
    text_normalizer: Tensor | None = None
    """(B,) and (N,): see Pairs; of InfoNCE alone, and no gradients"""


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
    weights: "Weights"


class Weights(NamedTuple):
    """Factors of a block's terms: in the embeddings' gradients; in the value, and the gradients of scale and bias."""

    embeddings: float = 1.0
    value: float = 1.0


FULL = Weights()


class Tile(NamedTuple):
    """Rows r and columns c of a block. Logits and spare are buffers, which the next tile overwrites."""

    block: Block
    r: slice
    c: slice
    logits: Tensor
    """scale * anchors @ others.T + bias; of excluded pairs so low that no softmax or sigmoid notices"""
    spare: Tensor
    positive: Tensor | None
    """1 for positives, else 0, in bytes; None in most tiles: there the losses need fewer passes"""
    excluded: Tensor | None


class Logits:
    """All logits of some rows, block by block, and the loss and gradients that accumulate over their tiles.

    Everything is float32 at least, whatever the towers' precision (float64 stays float64). tile: as in Loss.
    """

    def __init__(
        self,
        fresh: Pairs,
        remembered: Pairs | None,
        scale: Tensor,
        bias: Tensor | None,
        rows: slice,
        same_text: SameText,
        tile: int | None = None,
        of_fresh: Weights = FULL,
        of_remembered: Weights = FULL,
    ) -> None:
        dtype = torch.promote_types(fresh.image_embeds.dtype, torch.float32)
        images, texts = fresh.image_embeds[rows].to(dtype), fresh.text_embeds.to(dtype)
        self.scale, self.bias, self.same_text = scale.to(dtype), None if bias is None else bias.to(dtype), same_text
        self.side, wide = tile or tile_side(scale.device), wide_type(scale.device)
        self.loss, self.d_scale, self.d_bias = torch.zeros(3, dtype=wide, device=scale.device)
        self.d_images, self.d_texts = torch.zeros_like(images), torch.zeros_like(texts)
        own, every = fresh.ids.rows(rows), slice(0, len(images))
        self.fresh = Block("image", images, texts, own, fresh.ids, self.d_images, self.d_texts, every, of_fresh)
        self.blocks, self.d_negatives = [self.fresh], None
        if fresh.negative_texts is not None:
            negatives = fresh.negative_texts.to(dtype)
            self.d_negatives = torch.zeros_like(negatives)
            nobody = Ids(*own.group.new_full((3, negatives.shape[-2]), NOBODY))
            d_images, d_negatives = self.d_images, self.d_negatives
            self.blocks.append(Block("image", images, negatives, own, nobody, d_images, d_negatives, every, FULL))
        if remembered is not None:
            # Earlier weights embedded the memory: there is nothing that gradients could flow to.
            old_images = aligned(remembered.image_embeds.to(dtype), fresh.image_embeds.to(dtype))
            old_texts, ids = aligned(remembered.text_embeds.to(dtype), texts), remembered.ids
            of_images = Block("image", images, old_texts, own, ids, self.d_images, None, every, of_remembered)
            of_texts = Block("text", texts, old_images, fresh.ids, ids, self.d_texts, None, rows, of_remembered)
            self.blocks += [of_images, of_texts]

    def compared(self, block: Block) -> tuple[bool, bool, bool]:
        """Group, sample and text of two pairs matter in this block, or do not."""
        return True, block.d_others is None, self.same_text != "negative"

    @cached_property
    def _in_common(self) -> Sequence[Tensor]:
        """For each block (3, R, C) bool on the host: the tiles' anchors and others share a group, a sample, a text."""
        tables = [ids_in_common(b.ids.rows(b.rows), b.other_ids, self.compared(b), self.side) for b in self.blocks]
        # All blocks at once, as the host waits for the device here.
        return torch.cat(tables, 2).cpu().split([table.shape[2] for table in tables], 2)

    @cached_property
    def _buffers(self) -> Tensor:
        """Two tiles, the same memory for all: fresh memory would cost more than the arithmetic in it."""
        largest = max(min(self.side, len(b.anchors)) * min(self.side, len(b.others)) for b in self.blocks)
        return self.d_images.new_empty(2, largest)

    def tiles(self) -> Iterator[Tile]:
        """Every tile of every block."""
        for block, in_common in zip(self.blocks, self._in_common, strict=True):
            for i, r in enumerate(_slices(block.rows, self.side)):
                anchors = block.anchors[r]
                self._scaled, self._dots = anchors * self.scale, torch.zeros_like(anchors)
                for j, c in enumerate(_slices(slice(0, len(block.others)), self.side)):
                    others = block.others[c]
                    logits, spare = (x[: len(anchors) * len(others)].view(len(anchors), -1) for x in self._buffers)
                    if self.bias is None:
                        torch.mm(self._scaled, others.T, out=logits)
                    else:  # the product adds it at once; after the product it would be another pass over the tile
                        torch.addmm(self.bias.repeat(len(others)), self._scaled, others.T, out=logits)
                    ids, other_ids = block.ids.rows(r), block.other_ids.rows(c)
                    positive, excluded = masks(ids, other_ids, self.same_text, in_common[:, i, j].tolist())
                    if excluded is not None:
                        logits.masked_fill_(excluded, lowest(logits))
                    # Bytes, as arithmetic with bool takes ten times as long.
                    positive = None if positive is None else positive.view(torch.uint8)
                    yield Tile(block, r, c, logits, spare, positive, excluded)
                weights = block.weights
                # sum of slope * <anchor, other> over the row of tiles
                self.d_scale += weights.value * wide_sum(self._dots * anchors)
                block.d_anchors[r].addcmul_(self._dots, self.scale, value=weights.embeddings)

    def add(self, t: Tile, slope: Tensor) -> None:
        """Accumulate the gradients of a part of the loss whose d loss / d logits is `slope`, of the tile's shape."""
        block, weights = t.block, t.block.weights
        self._dots.addmm_(slope, block.others[t.c])
        if block.d_others is not None:
            block.d_others[t.c].addmm_(slope.T, self._scaled, alpha=weights.embeddings)
        if self.bias is not None:
            self.d_bias += weights.value * wide_sum(slope)

    def share(self, norm: float) -> LossShare:
        """The loss and gradients accumulated so far, divided by `norm`."""
        sums = (self.loss, self.d_images, self.d_texts, self.d_scale, self.d_bias, self.d_negatives)
        return LossShare(*(each.div_(norm).to(self.scale.dtype) for each in sums if each is not None))


def lowest(logits: Tensor) -> float:
    """A logit of excluded pairs: not -inf, which times 0 is not 0."""
    return torch.finfo(logits.dtype).min / 2


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
