"""The objective of a script: its tiled loss, and the dense twin that --verify-gradients compares it with."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.losses import LossShare, PosWeight, balanced_weight, diagonal
from lib.relation import Ids, SameText
from lib.towers import Family

DenseLoss = Callable[[Tensor, Tensor, Ids, Tensor, Tensor], Tensor]
"""(image_embeds (N, D), text_embeds (N, D), ids (N,), logit_scale, logit_bias) -> (), differentiable."""


@dataclass(frozen=True)
class Objective:
    """A loss in both forms, and the family of models that it was published with."""

    family: Family
    loss: Callable[..., LossShare]
    """a `Loss` that takes `same_text` too"""
    dense: Callable[..., Tensor]
    """a `DenseLoss` that takes `same_text` too"""

    def of_run(self, positives: Literal["group", "pair"], same_text: SameText) -> "Objective":
        """The objective with --positives and --same-text as a run has them."""
        loss, dense = partial(self.loss, same_text=same_text), partial(self.dense, same_text=same_text)
        if positives == "group":
            return replace(self, loss=loss, dense=dense)

        def dense_diagonal(images: Tensor, texts: Tensor, ids: Ids, scale: Tensor, bias: Tensor) -> Tensor:
            return dense(images, texts, ids.each_its_group(), scale, bias)

        return replace(self, loss=diagonal(loss), dense=dense_diagonal)


def dense_sigmoid(
    image_embeds: Tensor,
    text_embeds: Tensor,
    ids: Ids,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    pos_weight: PosWeight = 1.0,
    same_text: SameText = "negative",
) -> Tensor:
    """The pairwise sigmoid loss with all N x N logits at once."""
    logits = logit_scale * image_embeds @ text_embeds.T + logit_bias
    positive, counted = _masks(ids, same_text)
    weight = balanced_weight(ids, same_text) if pos_weight == "balanced" else pos_weight
    losses = torch.where(positive, -weight * F.logsigmoid(logits), -F.logsigmoid(-logits))
    return (losses * counted).sum() / len(logits)


def dense_infonce(
    image_embeds: Tensor,
    text_embeds: Tensor,
    ids: Ids,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    label_smoothing: float = 0.0,
    same_text: SameText = "negative",
) -> Tensor:
    """Symmetric InfoNCE with all N x N logits at once."""
    logits = logit_scale * image_embeds @ text_embeds.T + logit_bias
    positive, counted = _masks(ids, same_text)  # symmetric: the same in both directions
    target = (1 - label_smoothing) * positive.to(logits.dtype) / positive.sum(1, keepdim=True)
    if label_smoothing:
        target += label_smoothing * counted.to(logits.dtype) / counted.sum(1, keepdim=True)
    if same_text == "exclude":
        logits = logits.masked_fill(~counted, torch.finfo(logits.dtype).min)  # not -inf, which times 0 is not 0
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _masks(ids: Ids, same_text: SameText) -> tuple[Tensor, Tensor]:
    """(positives, what counts) among N pairs, each (N, N) bool."""
    same_group, equal_text = ids.group[:, None] == ids.group, ids.text_id[:, None] == ids.text_id
    positive = same_group | equal_text if same_text == "positive" else same_group
    return positive, positive | ~equal_text if same_text == "exclude" else torch.ones_like(positive)
