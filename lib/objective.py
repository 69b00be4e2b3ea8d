"""What a script trains for: its tiled loss, and the dense twin that --verify-gradients compares it with."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.losses import Loss, PosWeight, balanced_weight
from lib.towers import Family

DenseLoss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(image_embeds (N, D), text_embeds (N, D), group (N,), logit_scale, logit_bias) -> (), differentiable."""


@dataclass(frozen=True)
class Objective:
    """A loss in both forms, and the family of models that it was published with."""

    family: Family
    loss: Loss
    dense: DenseLoss


def dense_sigmoid(
    image_embeds: Tensor,
    text_embeds: Tensor,
    group: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    pos_weight: PosWeight = 1.0,
) -> Tensor:
    """The pairwise sigmoid loss with all N x N logits at once."""
    logits = logit_scale * image_embeds @ text_embeds.T + logit_bias
    positive = group[:, None] == group
    weight = balanced_weight(group) if pos_weight == "balanced" else pos_weight
    losses = torch.where(positive, -weight * F.logsigmoid(logits), -F.logsigmoid(-logits))
    return losses.sum() / len(group)


def dense_infonce(
    image_embeds: Tensor,
    text_embeds: Tensor,
    group: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Symmetric InfoNCE with all N x N logits at once."""
    logits = logit_scale * image_embeds @ text_embeds.T + logit_bias
    positive = (group[:, None] == group).to(logits.dtype)
    target = positive / positive.sum(1, keepdim=True)  # groups are symmetric: the same in both directions
    of_images = F.cross_entropy(logits, target, label_smoothing=label_smoothing)
    of_texts = F.cross_entropy(logits.T, target, label_smoothing=label_smoothing)
    return (of_images + of_texts) / 2
