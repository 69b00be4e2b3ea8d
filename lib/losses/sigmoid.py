"""The pairwise sigmoid loss. Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training (SigLIP), 2023."""

from typing import Literal

import torch
from torch import Tensor

from lib.losses.positives import Ids, Pairs, SameText, count_positives
from lib.losses.tiles import Logits, LossShare, wide_sum, wide_type

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
    """
    logits = Logits(fresh, remembered, logit_scale, logit_bias, rows, same_text, tile)
    weight = positive_weight(pos_weight, fresh.ids, same_text).to(logits.scale)
    for t in logits.tiles():
        if t.positive is None:
            logits.loss += wide_sum(_softplus(t.logits, out=t.spare))
            logits.add(t, t.logits.sigmoid_())
        else:
            against = t.logits.mul_(torch.mul(t.positive, -2, out=t.spare).add_(1))  # -z S
            softplus = _softplus(against, out=t.spare)
            logits.loss += wide_sum(softplus) + (weight - 1) * wide_sum(softplus.mul_(t.positive))
            logits.add(t, against.sigmoid_().mul_(t.positive.mul_(-1 - weight).add_(1)))  # times -weight for positives
    return logits.share(norm=len(fresh))


def _softplus(logits: Tensor, out: Tensor) -> Tensor:
    # Not as softplus(S) - S for the positives, summed apart: no digits are left of that where S is large.
    return torch.logaddexp(logits, logits.new_zeros(()), out=out)


def positive_weight(pos_weight: PosWeight, ids: Ids, same_text: SameText) -> Tensor:
    """`pos_weight` as a number (); balanced: negatives for each positive among N images and N texts, 1 without any."""
    if pos_weight != "balanced":
        return torch.tensor(pos_weight)
    positives, candidates = count_positives(ids, same_text)
    negatives = (candidates - positives).to(wide_type(positives.device))
    return torch.where(negatives > 0, negatives / positives, 1.0)
