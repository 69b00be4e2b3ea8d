"""Symmetric InfoNCE, the loss of CLIP. Source: van den Oord et al., 2018; Radford et al., 2021."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lib.losses.positives import Pairs, SameText
from lib.losses.tiles import Logits, LossShare, Tile

Through = Literal["both", "anchors"]
"""both: gradients of anchors and candidates; anchors: with a memory, stop those of candidates and double the others."""


@torch.no_grad()
def infonce(
    fresh: Pairs,
    remembered: Pairs | None,
    logit_scale: Tensor,
    logit_bias: Tensor,
    rows: slice,
    *,
    label_smoothing: float = 0.0,
    same_text: SameText = "negative",
    through: Through = "both",
    merge_logsumexp: Callable[[Tensor], Tensor] = lambda partial: partial,
    tile: int | None = None,
) -> LossShare:
    """Symmetric InfoNCE: the mean cross-entropy over image rows and over text rows, averaged.

    An anchor's candidates are all fresh and remembered embeddings of the other tower, and an image's the negative texts
    too; its target is spread evenly over its group (`same_text`: see SameText), and the share `label_smoothing` of it
    over all candidates, as torch's cross_entropy does. A remembered copy of the same sample is excluded. The softmax
    does not depend on `logit_bias`: its gradient is zero. `merge_logsumexp` turns log-sum-exps (K, N) of the text
    anchors over these rows into those over all rows (the identity where `rows` is the whole batch).

    `through="anchors"` changes gradients, not the value: remembered embeddings only serve as candidates, so with "both"
    a fresh candidate is attracted by its own anchor but repelled by the fresh anchors alone.
    """
    logits = Logits(fresh, remembered, logit_scale, None, rows, same_text, tile)
    images, texts = (Softmax(len(d), logits.loss, label_smoothing) for d in (logits.d_images, logits.d_texts))
    anchors = {"image": images, "text": texts}
    for t in logits.tiles():
        anchors[t.block.tower].add(t, t.r, 1)
        if t.block is logits.fresh:
            texts.add(t, t.c, 0)
    images.finish(logits.scale.dtype)
    texts.finish(logits.scale.dtype, merge_logsumexp)
    logits.loss += images.loss_of(slice(0, len(logits.d_images))) + texts.loss_of(rows)

    apart = through == "anchors" and remembered is not None
    for t in logits.tiles():
        slope_of_texts = texts.slope(t, t.c, 0, out=t.spare) if t.block is logits.fresh else None
        slope = anchors[t.block.tower].slope(t, t.r, 1, out=t.logits)
        if slope_of_texts is None or apart:
            logits.add(t, slope, slope_of_texts)
        else:
            logits.add(t, slope.add_(slope_of_texts))
    if apart:
        logits.d_images.mul_(2)
        logits.d_texts.mul_(2)
    return logits.share(norm=2 * len(fresh))


class Softmax:
    """The softmax of A anchors over their candidates: `add` every tile, `finish`, then `slope` of every tile.

    Sums are (A,), in float64 where the device has it.
    """

    def __init__(self, anchors: int, like: Tensor, smoothing: float) -> None:
        self.smoothing, self.lse = smoothing, like.new_full((anchors,), -torch.inf)
        self.positives, self.positive_logits, self.candidates, self.candidate_logits = like.new_zeros(4, anchors)

    def add(self, t: Tile, of: slice, axis: int) -> None:
        """Add a tile's candidates, which lie along `axis`, to the sums of the anchors `of`."""
        largest = t.logits.amax(axis, keepdim=True)
        weights = _exp(torch.sub(t.logits, largest, out=t.spare))
        total = torch.zeros_like(self.lse[of])
        if t.positive is not None:
            # A learnt positive weighs 1, next to which float32 loses the little that all others add: sum them apart.
            total, weights = total + t.positive.sum(axis), weights.sub_(t.positive)
            self.positives[of] += total
        total = total + weights.sum(axis)
        self.lse[of] = torch.logaddexp(self.lse[of], total.log_() + largest.squeeze(axis))
        if t.positive is not None:
            self.positive_logits[of] += torch.mul(t.logits, t.positive, out=t.spare).sum(axis)
        if self.smoothing:
            kept = torch.ones_like(t.logits) if t.excluded is None else (~t.excluded).to(t.logits.dtype)
            self.candidates[of] += kept.sum(axis)
            self.candidate_logits[of] += (t.logits * kept).sum(axis)

    def finish(self, dtype: torch.dtype, merge: Callable[[Tensor], Tensor] = lambda partial: partial) -> None:
        """From the sums over all candidates, what `slope` needs, in `dtype`; `merge` as in infonce."""
        near = torch.where(self.positives > 0, self.positive_logits / self.positives, self.lse)
        # The log-sum-exp of log-counts is the log of the sum of counts, so one exchange does.
        counts = [self.positives] + ([self.candidates] if self.smoothing else [])
        self.lse, *counts = merge(torch.stack([self.lse, *(count.log() for count in counts)]))
        positives, candidates = counts[0].exp().clamp_(min=1), counts[-1].exp().clamp_(min=1)
        self.target, self.target_of_all = (1 - self.smoothing) / positives, self.smoothing / candidates
        # p = exp(logit - lse) = p0 exp(logit - reference): the positives' mean logit is the reference, so that the
        # exponential of a learnt positive is about 1. None exceeds e^60.
        self.reference = torch.maximum(near, self.lse - 60).to(dtype)
        p0 = (self.reference - self.lse).exp()
        self.p0, self.p0_less_target = p0.to(dtype), (p0 - self.target).to(dtype)

    def loss_of(self, rows: slice) -> Tensor:
        """Sum of cross-entropies: of the rows' log-sum-exps, less all logits times their targets."""
        losses = -self.target * self.positive_logits - self.target_of_all * self.candidate_logits
        losses[rows] += self.lse[rows]
        return losses.sum()

    def slope(self, t: Tile, of: slice, axis: int, out: Tensor) -> Tensor:
        """d cross-entropy / d logits: p - target."""
        columns = (self.reference, self.p0, self.p0_less_target, self.target_of_all)
        reference, p0, p0_less_target, target_of_all = (column[of].unsqueeze(axis) for column in columns)
        slope = _exp(torch.sub(t.logits, reference, out=out))
        if t.positive is None:
            slope.mul_(p0)
        else:  # p - target of a learnt positive is too small for a difference in float32: p0 (exp - 1) + (p0 - target)
            slope.sub_(t.positive).mul_(p0).addcmul_(t.positive, p0_less_target)
        if self.smoothing:
            slope.sub_(target_of_all)
            if t.excluded is not None:
                slope.masked_fill_(t.excluded, 0)
        return slope


def _exp(logits: Tensor) -> Tensor:
    """exp in place."""
    if logits.device.type == "cpu":  # which takes twenty times as long for numbers below the smallest normal one
        logits.clamp_(min=math.log(torch.finfo(logits.dtype).tiny) + 1)
    return logits.exp_()
