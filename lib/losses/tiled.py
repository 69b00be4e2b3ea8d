"""InfoNCE and the pairwise sigmoid loss, computed in tiles: the value and the gradients, never the N x N logits.

Both take this rank's *rows* of the global batch and return those rows' share of the loss. Over any partition of the
batch into rows the shares add up to the loss and gradients of the whole batch, so nothing here knows about ranks.

Letters: N fresh pairs of the global batch, B rows of it, Q remembered pairs, P negative texts, D embedding dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lib.losses.blocks import Face, LossBlock, LossShare, Pairs
from lib.losses.positives import Ids, Relation, RememberedPositives, SameText
from lib.losses.tiles import TileSlope, wide_sum, wide_type

DIMENSIONS = 64  # of the embeddings, summed at a time

PosWeight = float | Literal["balanced"]
"""A number, or as many times as there are negatives for each positive among the fresh pairs."""


Through = Literal["both", "anchors"]
"""Where gradients flow while there is a memory: through anchors and candidates, or through the anchors alone, twice."""

Loss = Callable[..., LossShare]
"""(fresh, remembered, logit_scale, logit_bias, rows, *, tile=None) -> LossShare.

tile: rows and columns of the logits that are held at a time; None: as suits the device. It moves no figure.
"""


@torch.no_grad()
def sigmoid(
    fresh: Pairs,
    remembered: Pairs | None,
    logit_scale: Tensor,
    logit_bias: Tensor,
    rows: slice,
    *,
    pos_weight: PosWeight = 1.0,
    remembered_positives: RememberedPositives = "use",
    same_text: SameText = "negative",
    tile: int | None = None,
) -> LossShare:
    """Pairwise sigmoid loss: softplus(-z S) summed over all pairs and divided by N, z = +1 inside a group, else -1.

    S = logit_scale * <image, text> + logit_bias. Every row's image meets all fresh, negative and remembered texts, its
    text meets all remembered images. A remembered copy of the same sample is left out; `pos_weight` multiplies the
    positives' terms ("balanced": fresh positives and fresh negatives weigh the same); with
    `remembered_positives="ignore"` remembered rows of the anchor's group are left out too. `same_text`: as in Relation.
    Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023.
    """
    block = LossBlock(fresh, remembered, logit_scale, logit_bias, rows, remembered_positives, same_text, tile)
    scale = block.sums.scale
    if pos_weight == "balanced":
        weight = balanced_weight(fresh.ids, same_text).to(scale)
    else:
        weight = torch.full_like(scale, pos_weight)
    for face in block.faces():
        _add_softplus(face, weight, weighted=pos_weight != 1)
    return block.share(norm=len(fresh))


def _add_softplus(face: Face, weight: Tensor, weighted: bool) -> None:
    """Sum softplus(-z S) over the face, its positives `weight` () times, and the gradients.

    Each tile computes it as it stands: softplus(S) - S, summed apart, has no digits left where S is large.
    """
    zero, one = torch.zeros_like(weight), torch.ones_like(weight)

    def slope(r: slice, c: slice, logits: Tensor, spare: Tensor) -> Tensor:
        positive = face.relation.positive(r, c)
        # What is left out is -inf and no positive: its softplus and its slope are 0.
        against = logits.mul_(torch.where(positive, -one, one, out=spare))
        softplus = torch.logaddexp(against, zero, out=spare)
        face.sums.loss += wide_sum(softplus.mul_(torch.where(positive, weight, one)) if weighted else softplus)
        return against.sigmoid_().mul_(torch.where(positive, -weight, one, out=spare))

    face.add(slope)


@torch.no_grad()
def infonce(
    fresh: Pairs,
    remembered: Pairs | None,
    logit_scale: Tensor,
    logit_bias: Tensor,
    rows: slice,
    *,
    label_smoothing: float = 0.0,
    remembered_positives: RememberedPositives = "use",
    same_text: SameText = "negative",
    through: Through = "both",
    merge_logsumexp: Callable[[Tensor], Tensor] = lambda partial: partial,
    tile: int | None = None,
) -> LossShare:
    """Symmetric InfoNCE: the mean cross-entropy over image rows and over text rows, averaged.

    An anchor's candidates are all fresh and all remembered embeddings of the other tower, and an image's the negative
    texts too; its target mass is spread evenly over its group; label smoothing spreads that share over all its
    candidates, as torch's cross_entropy does. A remembered copy of the same sample is left out. The softmax does not
    feel `logit_bias`: its gradient is zero. `same_text`: as in Relation.
    `merge_logsumexp` turns the (N,) partial log-sum-exp of the text anchors over these rows into that over all rows
    (the identity where `rows` is the whole batch). Source: Radford et al., CLIP, 2021; van den Oord et al., 2018.

    `through="anchors"`, where there is a memory: the same value, but the fresh embeddings get its gradient as anchors
    alone, twice. As a candidate, an embedding is pulled by its own anchor and pushed by the fresh ones only, since the
    remembered are no anchors: the larger the memory, the less is pushed. As an anchor it meets all of them.
    """
    block = LossBlock(fresh, remembered, logit_scale, None, rows, remembered_positives, same_text, tile)
    row_lse, column_lse, of_memory = block.logsumexp()
    column_lse = merge_logsumexp(column_lse)
    block.sums.loss += torch.cat([row_lse, column_lse[rows]]).sum(dtype=wide_type(row_lse.device))

    for face in block.negatives:
        face.add(_softmax(row_lse))
    for part, lse in zip(of_memory, (row_lse, column_lse[rows]), strict=False):
        part.add_gradient(lse)

    # The cross-entropy is log-sum-exp less the logits' mean over the target, which is linear in them.
    positives, candidates = block.counts()
    wanted = partial(_Target.of_mass, label_smoothing)
    texts = wanted(positives, candidates)
    of_images = wanted(positives[rows], candidates[rows] + sum(len(face.others) for face in block.negatives))
    for face, target in zip(block.memory, (of_images, texts.of(rows)), strict=False):
        face.subtract_target(target.sum(face.relation, face.others, None))
    for face in block.negatives:
        face.subtract_target(of_images.sum(face.relation, face.others, None))
        if of_images.candidate is not None:
            face.subtract_target_of_others(of_images.candidate @ block.fresh.anchors)
    if through == "both" or not block.memory:
        _add_fresh(block, (row_lse, column_lse), (of_images, texts))
    else:
        for face, lse, target in zip(block.as_anchors(), (row_lse, column_lse), (of_images, texts), strict=True):
            face.add(_softmax(lse))
            face.subtract_target(target.sum(face.relation, face.others, None))
        block.double_embeddings()
    return block.share(norm=2 * len(fresh))


def _softmax(lse: Tensor) -> TileSlope:
    """The slope of each anchor's log-sum-exp (A,) over all its candidates."""
    return lambda r, c, logits, spare: logits.sub_(lse[r, None]).exp_()


def _add_fresh(block: LossBlock, lse: tuple[Tensor, Tensor], targets: "tuple[_Target, _Target]") -> None:
    """InfoNCE among the fresh pairs, both directions in one visit: through anchors and candidates.

    lse and targets: of the rows' images (B,), and of all texts (N,).
    """
    row_lse, column_lse = lse
    of_images, texts = targets

    def of_both_directions(r: slice, c: slice, logits: Tensor, spare: Tensor) -> Tensor:
        of_texts = torch.sub(logits, column_lse[c], out=spare).exp_()
        return logits.sub_(row_lse[r, None]).exp_().add_(of_texts)

    fresh = block.fresh
    fresh.add(of_both_directions)
    fresh.subtract_target(of_images.sum(fresh.relation, fresh.others, texts))
    block.subtract_target_of_texts(texts.sum(block.texts_relation, fresh.anchors, of_images))


@dataclass(frozen=True)
class _Target:
    """The probabilities that anchors want of a positive (A,) and, with label smoothing, of any candidate (A,)."""

    positive: Tensor
    candidate: Tensor | None

    @classmethod
    def of_mass(cls, smoothing: float, positives: Tensor, candidates: Tensor) -> "_Target":
        """A mass of 1 for each anchor: `smoothing` of it over its candidates (A,), the rest over its positives (A,)."""
        return cls((1 - smoothing) / positives, smoothing / candidates if smoothing else None)

    def of(self, rows: slice) -> "_Target":
        return _Target(self.positive[rows], None if self.candidate is None else self.candidate[rows])

    def sum(self, relation: Relation, others: Tensor, of_others: "_Target | None") -> Tensor:
        """Each anchor's sum of t_ij * other_j: (M, D) -> (A, D).

        of_others: the others are anchors too, of the same logits, and want their own of them. Some dimensions at a
        time: what is gathered on the way is then small beside the result.
        """
        total = others.new_empty(len(self.positive), others.shape[1])
        for start in range(0, others.shape[1], DIMENSIONS):
            d = slice(start, start + DIMENSIONS)
            total[:, d] = self._sum(relation, others[:, d], of_others)
        return total

    def _sum(self, relation: Relation, others: Tensor, of_others: "_Target | None") -> Tensor:
        total = relation.sum_positives(others).mul_(self.positive[:, None])
        if self.candidate is not None:
            total += self.candidate[:, None] * relation.sum_candidates(others)
        if of_others is not None:
            total += relation.sum_positives(others * of_others.positive[:, None])
            if of_others.candidate is not None:
                total += relation.sum_candidates(others * of_others.candidate[:, None])
        return total


def each_its_group(fresh: Pairs, remembered: Pairs | None) -> tuple[Pairs, Pairs | None]:
    """Make each pair a group of its own: only the diagonal is positive, as in the papers."""
    if remembered is not None:
        remembered = replace(remembered, group=torch.full_like(remembered.group, -1))
    return replace(fresh, group=fresh.ids.each_its_group().group), remembered


def diagonal(loss: Loss) -> Loss:
    """Make the same loss with each pair as a group of its own."""

    def only_diagonal(
        fresh: Pairs,
        remembered: Pairs | None,
        logit_scale: Tensor,
        logit_bias: Tensor,
        rows: slice,
        tile: int | None = None,
    ) -> LossShare:
        return loss(*each_its_group(fresh, remembered), logit_scale, logit_bias, rows, tile=tile)

    return only_diagonal


def balanced_weight(ids: Ids, same_text: SameText = "negative") -> Tensor:
    """Negatives for each positive among all pairs of N images and N texts with these ids: (), 1 without any."""
    counts = Relation(ids, ids, same_text, some_left_out=True).counts(torch.float64)
    positives, candidates = (count.sum() for count in counts)
    negatives = candidates - positives
    return torch.where(negatives > 0, negatives / positives, 1.0)
