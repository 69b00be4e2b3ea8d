"""The objective of a script: its tiled loss, and the dense twin that --verify-gradients compares it with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.losses.positives import Ids, RememberedPositives, SameText
from lib.losses.tiled import Loss, Pairs, PosWeight, Through, balanced_weight, diagonal, each_its_group
from lib.towers import Family

DenseLoss = Callable[[Pairs, Pairs | None, Tensor, Tensor], Tensor]
"""(fresh, remembered, logit_scale, logit_bias) -> (), differentiable.

The negative texts may be (W, P, D), where each of W ranks encodes them for its own share of the images.
"""


@dataclass(frozen=True)
class Objective:
    """A loss in both forms, and the family of models that it was published with."""

    family: Family
    loss: Loss
    """takes `same_text` too"""
    dense: Callable[..., Tensor]
    """a `DenseLoss` that takes `same_text` too"""

    def of_run(self, positives: Literal["group", "pair"], same_text: SameText) -> "Objective":
        """The objective with --positives and --same-text as a run has them."""
        loss, dense = partial(self.loss, same_text=same_text), partial(self.dense, same_text=same_text)
        if positives == "group":
            return replace(self, loss=loss, dense=dense)

        def dense_diagonal(fresh: Pairs, remembered: Pairs | None, scale: Tensor, bias: Tensor) -> Tensor:
            return dense(*each_its_group(fresh, remembered), scale, bias)

        return replace(self, loss=diagonal(loss), dense=dense_diagonal)


def dense_sigmoid(
    fresh: Pairs,
    remembered: Pairs | None,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    pos_weight: PosWeight = 1.0,
    remembered_positives: RememberedPositives = "use",
    same_text: SameText = "negative",
) -> Tensor:
    """The pairwise sigmoid loss with all logits at once."""
    of_images, of_texts = _logits(fresh, remembered, logit_scale, same_text, remembered_positives, "both")
    weight = balanced_weight(fresh.ids, same_text) if pos_weight == "balanced" else pos_weight
    total = torch.zeros_like(logit_scale)
    for part in (*of_images, *of_texts[1:]):  # fresh pairs count once
        logits = part.scaled + logit_bias
        losses = torch.where(part.positive, -weight * F.logsigmoid(logits), -F.logsigmoid(-logits))
        total = total + (losses * part.counted).sum()
    return total / len(fresh)


def dense_infonce(
    fresh: Pairs,
    remembered: Pairs | None,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    label_smoothing: float = 0.0,
    remembered_positives: RememberedPositives = "use",
    same_text: SameText = "negative",
    through: Through = "both",
) -> Tensor:
    """Symmetric InfoNCE with all logits at once; `through="anchors"` as in the tiled loss."""
    total = torch.zeros_like(logit_scale)
    for parts in _logits(fresh, remembered, logit_scale, same_text, remembered_positives, through):
        scaled, positive, counted = _joined(parts)
        logits = scaled + logit_bias
        target = (1 - label_smoothing) * positive.to(logits.dtype) / positive.sum(1, keepdim=True)
        if label_smoothing:
            target += label_smoothing * counted.to(logits.dtype) / counted.sum(1, keepdim=True)
        if same_text == "exclude" or remembered is not None:
            logits = logits.masked_fill(~counted, torch.finfo(logits.dtype).min)  # not -inf, which times 0 is not 0
        total = total + F.cross_entropy(logits, target) / 2
    return total


class _Part(NamedTuple):
    """Some anchors against one kind of candidates: logits but for the bias, positives, and what counts, each (A, M)."""

    scaled: Tensor
    positive: Tensor
    counted: Tensor


def _joined(parts: Sequence[_Part]) -> _Part:
    return parts[0] if len(parts) == 1 else _Part(*(torch.cat(column, 1) for column in zip(*parts, strict=True)))


def _logits(
    fresh: Pairs,
    remembered: Pairs | None,
    scale: Tensor,
    same_text: SameText,
    remembered_positives: RememberedPositives,
    through: Through,
) -> tuple[list[_Part], list[_Part]]:
    """All logits of the images, and of the texts: first against the fresh pairs, then against what else there is."""
    images, texts = scale * fresh.image_embeds, scale * fresh.text_embeds
    masks = _masks(fresh.ids, fresh.ids, same_text)  # symmetric
    if through == "both" or remembered is None:
        scaled = images @ fresh.text_embeds.T
        of_images, of_texts = [_Part(scaled, *masks)], [_Part(scaled.T, *masks)]
    else:  # as anchors alone, but twice: the same value with another slope
        images, texts = (scale * (2 * embeds - embeds.detach()) for embeds in (fresh.image_embeds, fresh.text_embeds))
        of_images = [_Part(images @ fresh.text_embeds.detach().T, *masks)]
        of_texts = [_Part(texts @ fresh.image_embeds.detach().T, *masks)]
    if fresh.negative_texts is not None:
        of_ranks = fresh.negative_texts if fresh.negative_texts.ndim == 3 else fresh.negative_texts[None]
        scaled = (images.unflatten(0, (len(of_ranks), -1)) @ of_ranks.mT).flatten(0, 1)
        nobody = torch.zeros_like(scaled, dtype=torch.bool)
        of_images.append(_Part(scaled, nobody, ~nobody))
    if remembered is not None:
        masks = _masks(fresh.ids, remembered.ids, same_text, remembered_positives)
        of_images.append(_Part(images @ remembered.text_embeds.T, *masks))
        of_texts.append(_Part(texts @ remembered.image_embeds.T, *masks))
    return of_images, of_texts


def _masks(
    anchors: Ids, others: Ids, same_text: SameText, remembered: RememberedPositives | None = None
) -> tuple[Tensor, Tensor]:
    """(positives, what counts) of A anchors against M others, each (A, M) bool; remembered: the others are."""
    same_group, equal_text = anchors.group[:, None] == others.group, anchors.text_id[:, None] == others.text_id
    positive = same_group | equal_text if same_text == "positive" else same_group
    counted = positive | ~equal_text if same_text == "exclude" else torch.ones_like(positive)
    if remembered is None:
        return positive, counted
    counted = counted & (anchors.sample_id[:, None] != others.sample_id)
    if remembered == "ignore":
        return torch.zeros_like(positive), counted & ~positive
    return positive & counted, counted
