"""Where the sigmoid loss's bias starts, so that the first steps are not spent on finding it.

At the start nearly all pairs are negatives; a bias of -ln(negatives per positive) makes the expected loss of both
kinds equal (Zhai et al., 2023, section 3.2, whose -10 belongs to a batch of about 22,000).
"""

import math

import torch
from torch import Tensor

from lib.losses import Pairs, PosWeight, balanced_weight, sigmoid

SOLVED_ON = 2048  # pairs that the solved bias is taken from: more would not move it


def bias_from_counts(group: Tensor, remembered: int, pos_weight: PosWeight = 1.0) -> float:
    """-ln(negatives per weighted positive) for N fresh pairs of these groups and Q remembered ones of the same kind.

    group: (N,) int64. Every row meets N fresh texts, Q remembered texts, and with its text Q remembered images.
    """
    counts = group.cpu().unique(return_counts=True)[1].double()
    size = len(group)
    others = max(size - 1, 1)
    share = ((counts * (counts - 1)).sum() / (size * others)).item()  # of other pairs that are positives
    met = size - 1 + 2 * remembered
    positives = 1 + met * share
    weight = float(balanced_weight(group)) if pos_weight == "balanced" else pos_weight
    return -math.log(max(met + 1 - positives, 1.0) / (positives * weight))


def solved_bias(pairs: Pairs, logit_scale: Tensor, pos_weight: PosWeight = 1.0) -> float:
    """The bias at which the sigmoid loss of these pairs is least, at this scale: a softmax-trained model's start."""
    rows = slice(0, min(len(pairs), SOLVED_ON))
    some = Pairs(pairs.image_embeds[rows], pairs.text_embeds[rows], pairs.group[rows], pairs.sample_id[rows])
    low, high = -2 * float(logit_scale) - 20, 2 * float(logit_scale) + 20
    for _ in range(40):  # the loss is convex in the bias: halve the bracket of its derivative's zero
        middle = (low + high) / 2
        bias = torch.tensor(middle, device=logit_scale.device)
        if sigmoid(some, None, logit_scale, bias, rows, pos_weight=pos_weight).logit_bias > 0:
            high = middle
        else:
            low = middle
    return (low + high) / 2
