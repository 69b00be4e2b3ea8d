"""The objective of a script: its loss in tiles, and the dense twin that --verify-gradients compares it with.

The twins take each block as one tile, with its masks, and leave the gradients to autograd.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.losses.infonce import old_normalizers
from lib.losses.positives import Pairs, SameText, masks
from lib.losses.sigmoid import PosWeight, block_weights, positive_weight
from lib.losses.tiles import Block, Logits, Loss, lowest
from lib.towers import Family

DenseLoss = Callable[..., Tensor]
"""(fresh, remembered, logit_scale, logit_bias) -> (), differentiable.

The negative texts may be (W, P, D), where each of W ranks encodes them for its own share of the images.
"""


@dataclass(frozen=True)
class Objective:
    """A loss in both forms, which accept `same_text` too, and the family of models that it was published with."""

    family: Family
    loss: Loss
    dense: DenseLoss

    def of_run(self, positives: Literal["group", "pair"], same_text: SameText) -> "Objective":
        """The objective with --positives and --same-text of a run."""
        loss, dense = partial(self.loss, same_text=same_text), partial(self.dense, same_text=same_text)
        if positives == "pair":
            loss, dense = partial(_only_the_diagonal, loss), partial(_only_the_diagonal, dense)
        return replace(self, loss=loss, dense=dense)


def _only_the_diagonal(
    loss: Callable, fresh: Pairs, remembered: Pairs | None, *given: Any, tile: int | None = None
) -> Any:
    """The loss with each pair as a group of its own, as in the papers: only the diagonal is positive."""
    fresh = replace(fresh, group=fresh.ids.each_its_group().group)
    remembered = remembered and replace(remembered, group=torch.full_like(remembered.group, -1))
    return loss(fresh, remembered, *given, **({"tile": tile} if tile else {}))


def dense_sigmoid(
    fresh: Pairs,
    remembered: Pairs | None,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    pos_weight: PosWeight = 1.0,
    same_text: SameText = "negative",
) -> Tensor:
    """The pairwise sigmoid loss with each block of logits as one tile."""
    rows, weights = slice(0, len(fresh)), block_weights(fresh, remembered)
    logits = Logits(fresh, remembered, logit_scale, logit_bias, rows, same_text, None, *weights)
    weight = positive_weight(pos_weight, fresh.ids, same_text).to(logits.scale)
    total = torch.zeros_like(logit_scale)
    for block in logits.blocks:
        factors, anchors = block.weights, block.anchors
        slope = factors.embeddings / factors.value  # 2 where the value counts half
        anchors = slope * anchors - (slope - 1) * anchors.detach()
        S, positive, _ = _as_one_tile(logits, block._replace(anchors=anchors))
        total = total + factors.value * torch.where(positive, weight * _softplus(-S), _softplus(S)).sum()
    own = logits.scale * (logits.fresh.anchors * logits.fresh.others).sum(1) + logit_bias
    return (total + (1 - logits.fresh.weights.value) * weight * _softplus(-own).sum()) / len(fresh)


def dense_infonce(
    fresh: Pairs,
    remembered: Pairs | None,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    label_smoothing: float = 0.0,
    same_text: SameText = "negative",
) -> Tensor:
    """Symmetric InfoNCE with all logits at once."""
    logits = Logits(fresh, remembered, logit_scale, logit_bias, slice(0, len(fresh)), same_text)
    image, total = logits.fresh, torch.zeros_like(logit_scale)
    text = image._replace(tower="text", anchors=image.others, others=image.anchors)
    blocks = [image, text, *logits.blocks[1:]]
    for tower in ("image", "text"):
        of_tower = [_as_one_tile(logits, block) for block in blocks if block.tower == tower]
        S, positive, excluded = (torch.cat(column, 1) for column in zip(*of_tower, strict=True))
        candidate = (~excluded).to(S)
        target = (1 - label_smoothing) * positive.to(S) / positive.sum(1, keepdim=True)
        target = target + label_smoothing * candidate / candidate.sum(1, keepdim=True)
        total = total + F.cross_entropy(S, target) / 2
        if remembered is not None:  # slopes without a value: the remembered anchors' own softmax
            met = slice(S.shape[1] - len(remembered), None)  # the last block
            S, target = S[:, met] - logit_bias, target[:, met]
            old = old_normalizers(fresh, remembered, {tower: S.detach().logsumexp(0)})[tower]
            as_anchors = (((S.detach() - old).exp() - target) * S).sum() / (2 * len(fresh))
            total = total + as_anchors - as_anchors.detach()
    return total


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=80)  # above it the identity: exactly so, in float64 too


def _as_one_tile(logits: Logits, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """The whole block, differentiable: logits, and positives and excluded as bool, each (A, M)."""
    # Negative texts may be (W, P, D), where each of W ranks encodes them for its own images.
    others = block.others if block.others.ndim == 3 else block.others[None]
    S = ((block.anchors * logits.scale).unflatten(0, (len(others), -1)) @ others.mT).flatten(0, 1)
    found = masks(block.ids, block.other_ids, logits.same_text, logits.compared(block))
    positive, excluded = (torch.zeros_like(S, dtype=torch.bool) if mask is None else mask for mask in found)
    return (S if logits.bias is None else S + logits.bias).masked_fill(excluded, lowest(S)), positive, excluded
