"""Where the sigmoid loss's bias starts, so that the first steps are not spent on finding it.

At the start nearly all pairs are negatives; a bias of -ln(negatives per positive) makes the expected loss of both
kinds equal (Zhai et al., 2023, section 3.2, whose -10 belongs to a batch of about 22,000).
"""

import math
from functools import partial

import torch
from torch import Tensor

from lib.losses.positives import Ids, Pairs, SameText, count_positives
from lib.losses.sigmoid import PosWeight, positive_weight, sigmoid

SOLVED_ON = 2048  # pairs that the solved bias is taken from: more would not move it


def bias_from_counts(ids: Ids, remembered: int, pos_weight: PosWeight = 1.0, same_text: SameText = "negative") -> float:
    """-ln(negatives per weighted positive) for N fresh pairs of these ids and Q remembered ones of the same kind.

    ids: (N,) each. Every row meets N fresh texts, Q remembered texts, and with its text Q remembered images.
    """
    positives, candidates = (count.item() for count in count_positives(ids, same_text))
    size = len(ids.group)
    # Of its N - 1 others, each pair has so many as positives and as negatives; the remembered are met alike.
    more = (size - 1 + 2 * remembered) / (size * max(size - 1, 1))
    negatives, positives = more * (candidates - positives), 1 + more * (positives - size)
    weight = float(positive_weight(pos_weight, ids, same_text))
    return -math.log(max(negatives, 1.0) / (positives * weight))


def solved_bias(
    pairs: Pairs, logit_scale: Tensor, pos_weight: PosWeight = 1.0, same_text: SameText = "negative"
) -> float:
    """The bias at which the sigmoid loss of these pairs is least, at this scale: a softmax-trained model's start."""
    rows = slice(0, min(len(pairs), SOLVED_ON))
    some = Pairs(pairs.image_embeds[rows], pairs.text_embeds[rows], *pairs.ids.rows(rows))
    slope = partial(sigmoid, some, None, logit_scale, rows=rows, pos_weight=pos_weight, same_text=same_text)
    low, high = -2 * float(logit_scale) - 20, 2 * float(logit_scale) + 20
    for _ in range(40):  # the loss is convex in the bias: halve the bracket of its derivative's zero
        middle = (low + high) / 2
        bias = torch.tensor(middle, device=logit_scale.device)
        if slope(logit_bias=bias).logit_bias > 0:
            high = middle
        else:
            low = middle
    return (low + high) / 2
