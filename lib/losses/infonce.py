"""Symmetric InfoNCE, the loss of CLIP. Source: van den Oord et al., 2018; Radford et al., 2021."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lib.losses.positives import Pairs, SameText
from lib.losses.tiles import Logits, LossShare, Tile, wide_type


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
    merge_logsumexp: Callable[[Tensor], Tensor] = lambda partial: partial,
    tile: int | None = None,
) -> LossShare:
    """Symmetric InfoNCE: the mean cross-entropy over image rows and over text rows, averaged.

    An anchor's candidates are all fresh and remembered embeddings of the other tower, and an image's the negative texts
    too; its target is spread evenly over its group (`same_text`: see SameText), and the share `label_smoothing` of it
    over all candidates, as torch's cross_entropy does. A remembered copy of the same sample is excluded. The softmax
    does not depend on `logit_bias`: its gradient is zero. `merge_logsumexp` turns log-sum-exps (K, N) of the text
    anchors over these rows into those over all rows (the identity where `rows` is the whole batch).

    Remembered pairs are anchors too, in the gradients and not in the value: each attracts and repels the fresh
    candidates as in its own softmax (`old_normalizers`). Without that, a fresh embedding is attracted by its own anchor
    and repelled by the fresh anchors alone: the less, the larger the memory (ContAccum, Kim et al., 2024).
    """
    logits = Logits(fresh, remembered, logit_scale, None, rows, same_text, tile)
    images, texts = Softmax(logits.d_images, label_smoothing), Softmax(logits.d_texts, label_smoothing)
    anchors = {"image": images, "text": texts}
    count = 0 if remembered is None else len(remembered)
    old = {tower: softmax.lse.new_full((count,), -torch.inf) for tower, softmax in anchors.items()}
    for t in logits.tiles():
        anchors[t.block.tower].add(t, t.r, 1)
        if t.block is logits.fresh:
            texts.add(t, t.c, 0)
        elif t.block.d_others is None:
            largest = t.logits.amax(0)
            _add_to(old[t.block.tower][t.c], _exp(torch.sub(t.logits, largest, out=t.spare)).sum(0).log_() + largest)
    logits.loss += images.finish(slice(None)) + texts.finish(rows, merge_logsumexp)
    if remembered is not None:
        met = dict(zip(old, merge_logsumexp(torch.stack(list(old.values()))), strict=True))
        old = old_normalizers(fresh, remembered, met)

    for t in logits.tiles():
        softmax = anchors[t.block.tower]
        if t.block is logits.fresh:
            others = texts.slope(t, t.c, 0, out=t.spare)
        elif t.block.d_others is None:
            others = softmax.slope_of_old(t, old[t.block.tower][t.c], out=t.spare)
        else:
            others = None
        slope = softmax.slope(t, t.r, 1, out=t.logits)
        logits.add(t, slope if others is None else slope.add_(others))
    dtype, share = logits.scale.dtype, logits.share(norm=2 * len(fresh))
    of_image, of_text = map(math.log, count_candidates(fresh, remembered))
    normalizers = (images.lse - of_image).to(dtype), (texts.lse - of_text).to(dtype)
    return replace(share, image_normalizer=normalizers[0], text_normalizer=normalizers[1])


def count_candidates(fresh: Pairs, remembered: Pairs | None) -> tuple[int, int]:
    """How many candidates an image and a text have; the excluded count too."""
    count = len(fresh) + (0 if remembered is None else len(remembered))
    negatives = 0 if fresh.negative_texts is None else fresh.negative_texts.shape[-2]
    return count + negatives, count


def old_normalizers(fresh: Pairs, remembered: Pairs, met: dict[str, Tensor]) -> dict[str, Tensor]:
    """Log-sum-exps (Q,) of the remembered anchors over all their candidates, by the tower that they meet.

    met: those over the fresh candidates. For each other candidate, the mean counts that the anchor had when it was
    fresh. So the probabilities of the fresh candidates sum to less than 1, however old the anchor is.
    """
    assert remembered.image_normalizer is not None and remembered.text_normalizer is not None
    of_image, of_text = (math.log(count - len(fresh)) for count in count_candidates(fresh, remembered))
    others = {"image": remembered.text_normalizer + of_text, "text": remembered.image_normalizer + of_image}
    return {tower: torch.logaddexp(lse, others[tower].to(lse)) for tower, lse in met.items()}


class Softmax:
    """The softmax of A anchors over their candidates: `add` every tile, `finish`, then `slope` of every tile.

    d_anchors: (A, D), their gradients. Sums are (A,), in float64 where the device has it.
    """

    def __init__(self, d_anchors: Tensor, smoothing: float) -> None:
        self.smoothing, self.dtype = smoothing, d_anchors.dtype
        sums = torch.zeros(5, len(d_anchors), dtype=wide_type(d_anchors.device), device=d_anchors.device)
        self.lse, self.positives, self.positive_logits, self.candidates, self.candidate_logits = sums
        self.lse.fill_(-torch.inf)

    def add(self, t: Tile, of: slice, axis: int) -> None:
        """Add a tile's candidates, which lie along `axis`, to the sums of the anchors `of`."""
        count: Tensor | int = 0
        if t.positive is not None:
            count = t.spare.copy_(t.positive).sum(axis)
            self.positives[of] += count
            self.positive_logits[of] += torch.mul(t.logits, t.positive, out=t.spare).sum(axis)
        if self.smoothing:
            kept = torch.ones_like(t.logits) if t.excluded is None else (~t.excluded).to(t.logits)
            self.candidates[of] += kept.sum(axis)
            self.candidate_logits[of] += kept.mul_(t.logits).sum(axis)
        largest = t.logits.amax(axis, keepdim=True)
        weights = _exp(torch.sub(t.logits, largest, out=t.spare))
        if t.positive is not None:
            # A learnt positive weighs 1, next to which float32 loses the little that all others add: sum them apart.
            weights -= t.positive
        total = count + weights.sum(axis).to(self.lse)
        _add_to(self.lse[of], total.log_() + largest.squeeze(axis))

    def finish(self, rows: slice, merge: Callable[[Tensor], Tensor] = lambda partial: partial) -> Tensor:
        """Sum of cross-entropies, (): log-sum-exps of `rows`, less all logits times targets; merge: see infonce."""
        near = torch.where(self.positives > 0, self.positive_logits / self.positives, self.lse)
        # The log-sum-exp of log-counts is the log of the sum of counts, so one exchange does.
        counts = [self.positives] + ([self.candidates] if self.smoothing else [])
        self.lse, *counts = merge(torch.stack([self.lse, *(count.log() for count in counts)]))
        positives, candidates = counts[0].exp().clamp_(min=1), counts[-1].exp().clamp_(min=1)
        target, of_all = (1 - self.smoothing) / positives, self.smoothing / candidates
        # p = exp(logit - lse) = p0 exp(logit - reference): the positives' mean logit is the reference, so that the
        # exponential of a learnt positive is about 1. None exceeds e^60.
        reference = torch.maximum(near, self.lse - 60).to(self.dtype)
        p0 = (reference - self.lse).exp()
        columns = (self.lse, reference, p0, p0 - target, of_all, target)
        self.columns = torch.stack([column.to(self.dtype) for column in columns])
        losses = -target * self.positive_logits - of_all * self.candidate_logits
        losses[rows] += self.lse[rows]
        return losses.sum()

    def slope(self, t: Tile, of: slice, axis: int, out: Tensor) -> Tensor:
        """d cross-entropy / d logits: p - target."""
        lse, reference, p0, p0_less_target, target_of_all, _ = self.columns[:, of].unsqueeze(1 + axis)
        slope = _exp(torch.sub(t.logits, lse if t.positive is None else reference, out=out))
        if t.positive is not None:
            # p - target of a learnt positive is too small for a difference in float32: p0 (exp - 1) + (p0 - target)
            slope.sub_(t.positive).mul_(p0).addcmul_(t.positive, p0_less_target)
        if self.smoothing:
            slope.sub_(target_of_all)
            if t.excluded is not None:
                slope.masked_fill_(t.excluded, 0)
        return slope

    def slope_of_old(self, t: Tile, old_lse: Tensor, out: Tensor) -> Tensor:
        """p - target of remembered anchors, which lie along the columns, for the fresh candidates in the rows.

        old_lse: (columns,). Pairs of one group have the same positives, so a target is that of the fresh anchor.
        """
        *_, target_of_all, target = self.columns[:, t.r].unsqueeze(2)
        slope = _exp(torch.sub(t.logits, old_lse.to(out.dtype), out=out))
        if t.positive is not None:
            slope.addcmul_(t.positive, target, value=-1)
        if self.smoothing:
            slope.sub_(target_of_all)
            if t.excluded is not None:
                slope.masked_fill_(t.excluded, 0)
        return slope


def _add_to(lse: Tensor, more: Tensor) -> None:
    """Add candidates with the log-sum-exps `more` to these, in place."""
    torch.logaddexp(lse, more.to(lse), out=lse)


def _exp(logits: Tensor) -> Tensor:
    """exp in place; on a CPU of at least the smallest normal number, as it takes ten times as long below."""
    if logits.device.type == "cpu":
        logits.clamp_(min=math.log(torch.finfo(logits.dtype).tiny) + 1)
    return logits.exp_()
