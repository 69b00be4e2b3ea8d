"""InfoNCE and the pairwise sigmoid loss, computed in tiles: the value and the gradients, never the N x N logits.

Both take this rank's *rows* of the global batch and return those rows' share of the loss. Over any partition of the
batch into rows the shares add up to the loss and gradients of the whole batch, so nothing here knows about ranks.

Letters: N fresh pairs of the global batch, B rows of it, Q remembered pairs, P negative texts, D embedding dimension.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 1024  # rows and columns of a block of logits: 4 MiB in float32, about what a core's cache holds

RememberedPositives = Literal["use", "ignore"]
PosWeight = float | Literal["balanced"]
"""A number, or as many times as there are negatives for each positive among the fresh pairs."""


@dataclass(frozen=True)
class Pairs:
    """Embedded pairs: `image_embeds` and `text_embeds` (N, D), unit norm; `group` and `sample_id` (N,) int64.

    `negative_texts` (P, D) belong to no pair: further candidates, and no positives, of every image.
    """

    image_embeds: Tensor
    text_embeds: Tensor
    group: Tensor
    sample_id: Tensor
    negative_texts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.group)


@dataclass(frozen=True)
class LossShare:
    """The rows' share of the loss, and its gradients; summed over all rows they are the whole batch's."""

    loss: Tensor
    """(), the share of the value."""
    image_embeds: Tensor
    """(B, D), gradient for the rows' image embeddings; only this share contributes to them."""
    text_embeds: Tensor
    """(N, D), contribution to the gradients of *all* fresh text embeddings: sum it over the shares."""
    logit_scale: Tensor
    """(), contribution to the gradient of the multiplier (not of its logarithm)."""
    logit_bias: Tensor
    """(), contribution to the gradient of the bias."""
    negative_texts: Tensor | None = None
    """(P, D), contribution to the gradients of the negative texts."""


Loss = Callable[[Pairs, Pairs | None, Tensor, Tensor, slice], LossShare]
"""(fresh, remembered, logit_scale, logit_bias, rows) -> LossShare."""

LogitGradient = Callable[[slice, slice, Tensor], tuple[Tensor, Tensor]]
"""(rows, columns, tile of logits) -> (the tile's part of the loss, d loss / d logits); it may overwrite the logits."""


@torch.no_grad()
def sigmoid(
    fresh: Pairs,
    remembered: Pairs | None,
    logit_scale: Tensor,
    logit_bias: Tensor,
    rows: slice,
    *,
    pos_weight: PosWeight = 1.0,
    remembered_positives: RememberedPositives = "use",
) -> LossShare:
    """Pairwise sigmoid loss: softplus(-z S) summed over all pairs and divided by N, z = +1 inside a group, else -1.

    S = logit_scale * <image, text> + logit_bias. Every row's image meets all fresh, negative and remembered texts, its
    text meets all remembered images. A remembered copy of the same sample is left out; `pos_weight` multiplies the
    positives' terms ("balanced": fresh positives and fresh negatives weigh the same); with
    `remembered_positives="ignore"` remembered rows of the anchor's group are left out too.
    Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023.
    """
    block = _Block(fresh, remembered, logit_scale, logit_bias, rows, remembered_positives)
    if pos_weight == "balanced":
        pos_weight = balanced_weight(fresh.group)

    def gradient(positive: Tensor, kept: Tensor | None, logits: Tensor) -> tuple[Tensor, Tensor]:
        losses = F.softplus(logits) - logits * positive  # softplus(-S) = softplus(S) - S
        slope = torch.sigmoid(logits) - positive.to(logits.dtype)
        if pos_weight != 1.0:
            weight = positive.to(logits.dtype).mul_(pos_weight - 1).add_(1)
            losses, slope = losses * weight, slope * weight
        if kept is not None:
            losses, slope = losses * kept, slope * kept
        return losses.sum() / len(fresh), slope / len(fresh)

    block.add_fresh(lambda r, c, logits: gradient(block.fresh_positive(r, c), None, logits))
    if fresh.negative_texts is not None:
        block.add_negative_texts(
            lambda r, c, logits: gradient(torch.zeros_like(logits, dtype=torch.bool), None, logits)
        )
    if remembered is not None:
        masked = lambda r, c, logits: gradient(*block.remembered_masks(r, c), logits)  # noqa: E731
        block.add_remembered_texts(masked)
        block.add_remembered_images(masked)
    return block.share()


@torch.no_grad()
def infonce(
    fresh: Pairs,
    remembered: Pairs | None,
    logit_scale: Tensor,
    logit_bias: Tensor,
    rows: slice,
    *,
    label_smoothing: float = 0.0,
    remembered_positives: RememberedPositives = "use",
    merge_logsumexp: Callable[[Tensor], Tensor] = lambda partial: partial,
) -> LossShare:
    """Symmetric InfoNCE: the mean cross-entropy over image rows and over text rows, averaged.

    An anchor's candidates are all fresh and all remembered embeddings of the other tower, and an image's the negative
    texts too; its target mass is spread
    evenly over its group; label smoothing spreads that share over all its candidates, as torch's cross_entropy does.
    A remembered copy of the same sample is left out. The softmax does not feel `logit_bias`: its gradient is zero.
    `merge_logsumexp` turns the (N,) partial log-sum-exp of the text anchors over these rows into that over all rows
    (the identity where `rows` is the whole batch). Source: Radford et al., CLIP, 2021; van den Oord et al., 2018.
    """
    block = _Block(fresh, remembered, logit_scale, torch.zeros_like(logit_bias), rows, remembered_positives)
    row_lse, column_lse = block.logsumexp()
    column_lse = merge_logsumexp(column_lse)
    on, off = 1 - label_smoothing, label_smoothing
    row_positives, row_candidates = block.counts(rows)
    row_candidates = row_candidates + len(block.negative_texts)
    column_positives, column_candidates = block.counts(slice(0, len(fresh)))
    row_on, row_off = on / row_positives, off / row_candidates  # target of a positive, and of any candidate
    column_on, column_off = on / column_positives, off / column_candidates
    norm = 2 * len(fresh)

    def fresh_gradient(r: slice, c: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        target = block.fresh_positive(r, c) * (row_on[r, None] + column_on[c])
        if label_smoothing:
            target += row_off[r, None] + column_off[c]
        softmaxes = torch.exp(logits - row_lse[r, None]).add_(torch.exp(logits - column_lse[c]))
        return -(logits * target).sum() / norm, softmaxes.sub_(target).div_(norm)

    def negative_gradient(r: slice, c: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        target = row_off[r, None].expand_as(logits)
        softmax = torch.exp(logits - row_lse[r, None])
        return -(logits * target).sum() / norm, softmax.sub_(target).div_(norm)

    def remembered_gradient(lse: Tensor, on_: Tensor, off_: Tensor) -> LogitGradient:
        def gradient(r: slice, c: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
            positive, kept = block.remembered_masks(r, c)
            target = positive * on_[r, None]
            if label_smoothing:
                target += kept * off_[r, None]
            softmax = torch.exp(logits - lse[r, None]).mul_(kept)
            return -(logits * target).sum() / norm, softmax.sub_(target).div_(norm)

        return gradient

    block.loss += (row_lse.sum() + column_lse[rows].sum()) / norm
    block.add_fresh(fresh_gradient)
    if fresh.negative_texts is not None:
        block.add_negative_texts(negative_gradient)
    if remembered is not None:
        block.add_remembered_texts(remembered_gradient(row_lse, row_on, row_off))
        block.add_remembered_images(remembered_gradient(column_lse[rows], column_on[rows], column_off[rows]))
    return replace(block.share(), logit_bias=torch.zeros_like(logit_bias))


def diagonal(loss: Loss) -> Loss:
    """The same loss with each pair as its own group: only the diagonal is positive, as in the papers."""

    def only_diagonal(
        fresh: Pairs, remembered: Pairs | None, logit_scale: Tensor, logit_bias: Tensor, rows: slice
    ) -> LossShare:
        fresh = replace(fresh, group=torch.arange(len(fresh), device=fresh.group.device))
        if remembered is not None:
            remembered = replace(remembered, group=torch.full_like(remembered.group, -1))
        return loss(fresh, remembered, logit_scale, logit_bias, rows)

    return only_diagonal


class _Block:
    """The B x (N + Q) logits of some rows, visited tile by tile, and the sums that a loss gathers over them.

    Everything is float32 at least, whatever the towers' precision (float64 stays float64).
    """

    def __init__(
        self,
        fresh: Pairs,
        remembered: Pairs | None,
        logit_scale: Tensor,
        logit_bias: Tensor,
        rows: slice,
        remembered_positives: RememberedPositives,
    ) -> None:
        dtype = torch.promote_types(fresh.image_embeds.dtype, torch.float32)
        self.images, self.texts = fresh.image_embeds[rows].to(dtype), fresh.text_embeds.to(dtype)
        self.row_texts, self.group, self.sample_id, self.rows = (
            self.texts[rows],
            fresh.group,
            fresh.sample_id,
            rows,
        )
        self.scale, self.bias = logit_scale.to(dtype), logit_bias.to(dtype)
        self.remembered, self.ignore_positives = remembered, remembered_positives == "ignore"
        if remembered is not None:
            self.old_images, self.old_texts = (
                remembered.image_embeds.to(dtype),
                remembered.text_embeds.to(dtype),
            )
        negative_texts = self.texts[:0] if fresh.negative_texts is None else fresh.negative_texts.to(dtype)
        self.negative_texts, self.d_negative_texts = negative_texts, torch.zeros_like(negative_texts)
        self.loss = torch.zeros_like(self.scale)
        self.d_scale, self.d_bias = torch.zeros_like(self.scale), torch.zeros_like(self.scale)
        self.d_images, self.d_texts = torch.zeros_like(self.images), torch.zeros_like(self.texts)

    # Which pairs are positives, and which remembered ones count at all.

    def fresh_positive(self, r: slice, c: slice) -> Tensor:
        """(tile rows, tile columns) bool: the fresh text is of the row's group."""
        return self.group[self.rows][r, None] == self.group[c]

    def remembered_masks(self, r: slice, c: slice) -> tuple[Tensor, Tensor]:
        """(positive, kept), each (tile rows, tile columns) bool, for the rows against the remembered pairs."""
        same_group = self.group[self.rows][r, None] == self.remembered.group[c]
        kept = self.sample_id[self.rows][r, None] != self.remembered.sample_id[c]
        if self.ignore_positives:
            kept &= ~same_group
        return same_group & kept, kept

    def counts(self, anchors: slice) -> tuple[Tensor, Tensor]:
        """(positives, candidates) of each anchor over all fresh and remembered pairs, each (anchors,)."""
        group, sample_id, dtype = self.group[anchors], self.sample_id[anchors], self.texts.dtype
        positives = _count_equal(group, self.group)
        candidates = torch.full_like(positives, len(self.group))
        if self.remembered is not None:
            old = self.remembered
            same_group, same_sample = _count_equal(group, old.group), _count_equal(sample_id, old.sample_id)
            both = _count_equal(_mix(group, sample_id), _mix(old.group, old.sample_id))
            left_out = same_group + same_sample - both if self.ignore_positives else same_sample
            positives = positives + (0 if self.ignore_positives else same_group - both)
            candidates = candidates + len(old) - left_out
        return positives.to(dtype), candidates.to(dtype)

    # Passes over the tiles.

    def logsumexp(self) -> tuple[Tensor, Tensor]:
        """Log-sum-exp over candidates: of the rows' images (B,), and of all texts over these rows only (N,)."""
        over_texts = self.images.new_full((len(self.images),), -torch.inf)
        over_images = self.images.new_full((len(self.texts),), -torch.inf)
        for r, c, logits in self._tiles(self.images, self.texts):
            over_texts[r] = torch.logaddexp(over_texts[r], logits.logsumexp(1))
            over_images[c] = torch.logaddexp(over_images[c], logits.logsumexp(0))
        for r, _, logits in self._tiles(self.images, self.negative_texts):
            over_texts[r] = torch.logaddexp(over_texts[r], logits.logsumexp(1))
        if self.remembered is not None:
            own_texts = over_images[
                self.rows
            ]  # a view: each text anchor's remembered images are counted by its own row
            for lse, anchors, others in (
                (over_texts, self.images, self.old_texts),
                (own_texts, self.row_texts, self.old_images),
            ):
                for r, c, logits in self._tiles(anchors, others):
                    logits.masked_fill_(~self.remembered_masks(r, c)[1], -torch.inf)
                    lse[r] = torch.logaddexp(lse[r], logits.logsumexp(1))
        return over_texts, over_images

    def add_fresh(self, gradient: LogitGradient) -> None:
        """The rows' images against all fresh texts."""
        self._add(self.images, self.texts, self.d_images, self.d_texts, gradient)

    def add_negative_texts(self, gradient: LogitGradient) -> None:
        """The rows' images against the texts that fit none."""
        self._add(self.images, self.negative_texts, self.d_images, self.d_negative_texts, gradient)

    def add_remembered_texts(self, gradient: LogitGradient) -> None:
        """The rows' images against the remembered texts."""
        self._add(self.images, self.old_texts, self.d_images, None, gradient)

    def add_remembered_images(self, gradient: LogitGradient) -> None:
        """The rows' texts against the remembered images."""
        self._add(self.row_texts, self.old_images, self.d_texts[self.rows], None, gradient)

    def share(self) -> LossShare:
        of_negatives = self.d_negative_texts if len(self.negative_texts) else None
        return LossShare(self.loss, self.d_images, self.d_texts, self.d_scale, self.d_bias, of_negatives)

    def _add(self, anchors, others, d_anchors, d_others, gradient) -> None:
        of_dots = torch.zeros_like(anchors)  # sum over columns of (d loss / d logits) * other embedding
        for r, c, logits in self._tiles(anchors, others):
            loss, slope = gradient(r, c, logits)
            self.loss += loss
            self.d_bias += slope.sum()
            of_dots[r] += slope @ others[c]
            if d_others is not None:
                d_others[c].addmm_(slope.T, anchors[r] * self.scale)
        self.d_scale += (of_dots * anchors).sum()  # <slope, anchors others^T>, without the matrix
        d_anchors += of_dots * self.scale

    def _tiles(self, anchors: Tensor, others: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        for r in _slices(len(anchors)):
            scaled = anchors[r] * self.scale
            for c in _slices(len(others)):
                yield r, c, torch.addmm(self.bias, scaled, others[c].T)


def balanced_weight(group: Tensor) -> float:
    """Negatives for each positive among all pairs of N images and N texts with these groups (N,); 1 without any."""
    positives = int(_count_equal(group, group).sum())
    return (len(group) ** 2 - positives) / positives or 1.0


def _slices(length: int) -> Iterator[slice]:
    return (slice(start, min(start + TILE, length)) for start in range(0, length, TILE))


def _count_equal(values: Tensor, among: Tensor) -> Tensor:
    """For each value, how often it occurs in `among`: (n,), (m,) -> (n,) int64, in O((n + m) log m)."""
    ordered = among.sort().values
    return torch.searchsorted(ordered, values, right=True) - torch.searchsorted(ordered, values)


def _mix(group: Tensor, sample_id: Tensor) -> Tensor:
    """One int64 for a (group, sample) pair; wraps around on purpose."""
    return group * -7046029254386353131 + sample_id
