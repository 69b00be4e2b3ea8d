"""Embedded pairs, what a loss makes of them, and the block of logits between some of them and all."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lib.losses.positives import NOBODY, Ids, Relation, RememberedPositives, SameText
from lib.losses.tiles import LogitTiles, TileBuffers, TileSlope, tile_side, wide_sum, wide_type


@dataclass(frozen=True)
class Pairs:
    """Embedded pairs: `image_embeds` and `text_embeds` (N, D), unit norm; `group`, `sample_id`, `text_id` (N,) int64.

    `negative_texts` (P, D) belong to no pair: further candidates, and no positives, of every image.
    """

    image_embeds: Tensor
    text_embeds: Tensor
    group: Tensor
    sample_id: Tensor
    text_id: Tensor
    negative_texts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.group)

    @property
    def ids(self) -> Ids:
        return Ids.of(self)


@dataclass(frozen=True)
class LossShare:
    """The rows' share of the loss, and its gradients; summed over all rows they are the whole batch's."""

    loss: Tensor
    """(), the share of the value."""
    image_embeds: Tensor
    """(B, D), gradient for the rows' image embeddings; only this share contributes to them."""
    text_embeds: Tensor
    """(N, D), contribution to the gradients of *all* fresh text embeddings: sum it over the shares."""
    logit_scale: Tensor
    """(), contribution to the gradient of the multiplier (not of its logarithm)."""
    logit_bias: Tensor
    """(), contribution to the gradient of the bias."""
    negative_texts: Tensor | None = None
    """(P, D), contribution to the gradients of the negative texts."""


class Face(LogitTiles):
    """Logits of some anchors (A, D) against some others (M, D), who is whose positive, and where gradients go."""

    def __init__(
        self,
        sums: "_Sums",
        relation: Relation,
        anchors: Tensor,
        others: Tensor,
        d_anchors: Tensor,
        d_others: Tensor | None = None,
    ) -> None:
        left_out = relation.left_out if relation.some_left_out else None
        super().__init__(anchors, others, sums.scale, sums.bias, sums.tiles, left_out)
        self.sums, self.relation, self.d_anchors, self.d_others = sums, relation, d_anchors, d_others

    def add(self, slope: TileSlope) -> None:
        """Gradients of a part of the loss whose d loss / d logits is given tile by tile."""
        d_scale, d_bias = self.add_gradients(slope, self.d_anchors, self.d_others)
        self.sums.d_scale += d_scale
        self.sums.d_bias += d_bias

    def subtract_target(self, target: Tensor) -> None:
        """Take -sum(t_ij * logit_ij) into the loss, and its gradients but for the others'; there is no bias.

        target: (A, D), each anchor's sum of t_ij * other_j.
        """
        of_scale = wide_sum(target * self.anchors)
        self.sums.loss -= of_scale * self.scale
        self.sums.d_scale -= of_scale
        self.d_anchors.addcmul_(target, self.scale, value=-1)

    def subtract_target_of_others(self, target: Tensor) -> None:
        """The others' part in the gradient of such a target: (M, D) or (D,), each other's sum of t_ij * anchor_i."""
        assert self.d_others is not None
        self.d_others.addcmul_(target.expand_as(self.d_others), self.scale, value=-1)


@dataclass(frozen=True)
class SoftmaxPart:
    """A part of the candidates, visited once: its log-sum-exp (A,), and its mean by softmax (A, D), of each anchor."""

    face: Face
    lse: Tensor
    mean: Tensor

    @classmethod
    def of(cls, face: Face) -> "SoftmaxPart":
        """Of a face whose others take no gradients."""
        return cls(face, *face.softmax_mean())

    def add_gradient(self, lse: Tensor) -> None:
        """Gradients of the sum of `lse` (A,), the log-sum-exp over all candidates; uses `mean` up."""
        face, of_dots = self.face, self.mean.mul_((self.lse - lse).exp_()[:, None])
        face.sums.d_scale += wide_sum(of_dots * face.anchors)
        face.d_anchors.addcmul_(of_dots, face.scale)


class _Sums:
    """The loss and the gradients of scale and bias, as the faces of a block add to them, and the tiles they work in.

    tile: rows and columns of a tile; None: as suits the device.
    """

    def __init__(self, scale: Tensor, bias: Tensor | None, tile: int | None) -> None:
        self.scale, self.bias = scale, bias
        self.loss, self.d_scale, self.d_bias = (torch.zeros_like(scale, dtype=wide_type(scale.device)) for _ in "abc")
        self.tiles = TileBuffers(tile or tile_side(scale.device))


class LossBlock:
    """The B x (N + P + Q) logits of some rows, in up to four faces, and the sums that a loss gathers over them.

    `fresh`: the rows' images against all fresh texts. `negatives`: the rows' images against the texts that fit none.
    `memory`: the rows' images against the remembered texts, and the rows' texts against the remembered images.
    `texts_relation`: all fresh texts to the rows' images. Everything is float32 at least, whatever the towers'
    precision (float64 stays float64).
    """

    def __init__(
        self,
        fresh: Pairs,
        remembered: Pairs | None,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        rows: slice,
        remembered_positives: RememberedPositives,
        same_text: SameText,
        tile: int | None,
    ) -> None:
        dtype = torch.promote_types(fresh.image_embeds.dtype, torch.float32)
        images, texts = fresh.image_embeds[rows].to(dtype), fresh.text_embeds.to(dtype)
        self.sums = _Sums(logit_scale.to(dtype), None if logit_bias is None else logit_bias.to(dtype), tile)
        self.d_images, self.d_texts, self.rows = torch.zeros_like(images), torch.zeros_like(texts), rows
        everyone, own = fresh.ids, fresh.ids.rows(rows)
        # An accelerator would be waited for, which costs more than masks that may be empty.
        some_left_out = None if images.device.type == "cpu" else True
        relation = Relation(own, everyone, same_text, some_left_out=some_left_out)
        self.fresh = Face(self.sums, relation, images, texts, self.d_images, self.d_texts)
        self.texts_relation = Relation(everyone, own, same_text, some_left_out=relation.some_left_out)
        self.negatives: list[Face] = []
        if fresh.negative_texts is not None:
            negative_texts = fresh.negative_texts.to(dtype)
            nobody = torch.full((len(negative_texts),), NOBODY, device=own.group.device)
            relation = Relation(own, Ids(nobody, nobody, nobody))
            gradients = torch.zeros_like(negative_texts)
            self.negatives.append(Face(self.sums, relation, images, negative_texts, self.d_images, gradients))
        self.memory: list[Face] = []
        self._ids, self._old_ids = everyone, None if remembered is None else remembered.ids
        self._same_text, self._remembered_positives = same_text, remembered_positives
        if remembered is not None:
            to_memory = Relation(own, remembered.ids, same_text, remembered_positives)
            for anchors, others, d_anchors in (
                (images, remembered.text_embeds, self.d_images),
                (texts[rows], remembered.image_embeds, self.d_texts[rows]),
            ):
                self.memory.append(Face(self.sums, to_memory, anchors, others.to(dtype), d_anchors))

    def as_anchors(self) -> tuple[Face, Face]:
        """The rows' images against all fresh texts, and all fresh texts against these: gradients for anchors alone."""
        images, texts = self.fresh.anchors, self.fresh.others
        return (
            Face(self.sums, self.fresh.relation, images, texts, self.d_images),
            Face(self.sums, self.texts_relation, texts, images, self.d_texts),
        )

    def double_embeddings(self) -> None:
        """Twice the gradients of the fresh embeddings that were gathered so far."""
        self.d_images.mul_(2)
        self.d_texts.mul_(2)

    def faces(self) -> Iterator[Face]:
        yield self.fresh
        yield from self.negatives
        yield from self.memory

    def counts(self) -> tuple[Tensor, Tensor]:
        """(positives, candidates) of every fresh anchor over all fresh and remembered pairs, each (N,)."""
        dtype = self.d_texts.dtype
        # Sums of ones are cheap: to wait for the device to say whether they are needed would cost more.
        related = partial(Relation, self._ids, same_text=self._same_text, some_left_out=True)
        counts = related(self._ids).counts(dtype)
        if self._old_ids is None:
            return counts
        old = related(self._old_ids, remembered=self._remembered_positives).counts(dtype)
        return counts[0] + old[0], counts[1] + old[1]

    def logsumexp(self) -> tuple[Tensor, Tensor, list[SoftmaxPart]]:
        """Log-sum-exp over candidates: of the rows' images (B,), and of all texts over these rows only (N,).

        Beside them what is needed of each face of the memory, whose logits need no second visit.
        """
        over_texts = self.d_images.new_full((len(self.d_images),), -torch.inf)
        over_images = self.d_texts.new_full((len(self.d_texts),), -torch.inf)
        self.fresh.add_logsumexp(over_texts, over_images)
        for face in self.negatives:
            face.add_logsumexp(over_texts)
        of_memory = [SoftmaxPart.of(face) for face in self.memory]
        # A view: each text anchor's remembered images are counted by its own row.
        for part, lse in zip(of_memory, (over_texts, over_images[self.rows]), strict=False):
            torch.logaddexp(lse, part.lse, out=lse)
        return over_texts, over_images, of_memory

    def subtract_target_of_texts(self, target: Tensor) -> None:
        """The fresh texts' part in the gradient of the images' targets: (N, D), each text's sum of t_ij * image_i."""
        self.d_texts.addcmul_(target, self.sums.scale, value=-1)

    def share(self, norm: float) -> LossShare:
        """What was gathered, divided by `norm`."""
        sums, dtype = self.sums, self.d_images.dtype
        parts = (sums.loss, self.d_images, self.d_texts, sums.d_scale, sums.d_bias)
        of_negatives = (face.d_others for face in self.negatives if face.d_others is not None)
        return LossShare(*(part.div_(norm).to(dtype) for part in (*parts, *of_negatives)))
