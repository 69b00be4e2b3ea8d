"""The pairwise sigmoid loss. Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training (SigLIP), 2023."""

from typing import Literal

import torch
from torch import Tensor

from lib.losses.positives import Ids, Pairs, SameText, count_positives
from lib.losses.tiles import Logits, LossShare, Weights, wide_sum, wide_type

PosWeight = float | Literal["balanced"]
"""A number, or as many times as there are negatives for each positive among the fresh pairs."""


@torch.no_grad()
def sigmoid(
    fresh: Pairs,
    remembered: Pairs | None,
    logit_scale: Tensor,
    logit_bias: Tensor,
    rows: slice,
    *,
    pos_weight: PosWeight = 1.0,
    same_text: SameText = "negative",
    tile: int | None = None,
) -> LossShare:
    """Pairwise sigmoid loss: softplus(-z S) summed over all pairs and divided by N, z = +1 for positives, else -1.

    S = logit_scale * <image, text> + logit_bias, both (). Each row's image meets all fresh, negative and remembered
    texts, its text all remembered images. Positives share a group (`same_text`: see SameText); a remembered copy of the
    same sample is excluded. `pos_weight` multiplies the terms of positives; "balanced" gives fresh positives and fresh
    negatives the same weight.

    A memory makes the mean over the other pairs more exact and leaves its weight alone: value, bias and gradients do
    not jump when the memory is switched on or grows. The Q remembered pairs have the share Q / (N - 1 + Q) of the
    weight of the N - 1 fresh ones, and at most half: they are older. Each meets a row twice, by image and by text: in
    the value and for scale and bias it counts half.
    """
    weights = block_weights(fresh, remembered)
    logits = Logits(fresh, remembered, logit_scale, logit_bias, rows, same_text, tile, *weights)
    weight = positive_weight(pos_weight, fresh.ids, same_text).to(logits.scale)
    zero, one = torch.zeros_like(weight), torch.ones_like(weight)
    for t in logits.tiles():
        against = t.logits  # -z S
        if t.positive is not None:
            against *= torch.sub(one, t.positive, alpha=2, out=t.spare)
        # Not as softplus(S) - S, summed apart: no digits are left of that where S is large.
        softplus = torch.logaddexp(against, zero, out=t.spare)
        if t.positive is not None and pos_weight != 1:
            softplus *= torch.addcmul(one, t.positive, weight - 1)
        logits.loss += t.block.weights.value * wide_sum(softplus)
        slope = against.sigmoid_()
        if t.positive is not None:  # times -weight for positives, else 1
            slope *= torch.addcmul(one, t.positive, -1 - weight, out=t.spare)
        logits.add(t, slope)
    if remembered is not None:
        _add_own_pairs(logits, rows, (1 - weights[0].value) * weight)
    return logits.share(norm=len(fresh))


def block_weights(fresh: Pairs, remembered: Pairs | None) -> tuple[Weights, Weights]:
    """Weights of the fresh and of the remembered block: see `sigmoid`."""
    if remembered is None:
        return Weights(), Weights()
    others, old = max(len(fresh) - 1, 1), len(remembered)
    share_of_old = min(old / (others + old), 0.5)
    of_fresh, of_old = 1 - share_of_old, share_of_old * others / old
    return Weights(of_fresh, of_fresh), Weights(of_old, of_old / 2)


def _add_own_pairs(logits: Logits, rows: slice, weight: Tensor) -> None:
    """Add the terms of each row's own pair again, with this weight: together with the tiles' they count once."""
    images, texts = logits.fresh.anchors, logits.fresh.others[rows]
    assert logits.bias is not None
    cosine = (images * texts).sum(1)
    against = -(logits.scale * cosine + logits.bias)
    slope = -weight * against.sigmoid()
    logits.loss += (weight * torch.logaddexp(against, torch.zeros_like(against))).sum(dtype=logits.loss.dtype)
    logits.d_scale += (slope * cosine).sum()
    logits.d_bias += slope.sum()
    towards = (slope * logits.scale)[:, None]
    logits.d_images.addcmul_(towards, texts)
    logits.d_texts[rows] += towards * images


def positive_weight(pos_weight: PosWeight, ids: Ids, same_text: SameText) -> Tensor:
    """`pos_weight` as a number (); balanced: negatives for each positive among N images and N texts, 1 without any."""
    if pos_weight != "balanced":
        return torch.tensor(pos_weight)
    positives, candidates = count_positives(ids, same_text)
    negatives = (candidates - positives).to(wide_type(positives.device))
    return torch.where(negatives > 0, negatives / positives, 1.0)
