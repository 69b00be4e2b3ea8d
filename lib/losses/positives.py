"""Embedded pairs and their ids, from which the positives and the excluded pairs of a tile follow."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

SameText = Literal["exclude", "positive", "negative"]
"""Treatment of pairs with equal text and different group: excluded, positives of each other, or negatives."""

NOBODY = torch.iinfo(torch.int64).min
"""An id of no pair."""


class Ids(NamedTuple):
    """Group, sample and text of some pairs, each (N,) int64; equal texts have one text_id."""

    # Hashes of names and texts: equal on all ranks and in every run, so that ranks need not exchange a table of them.
    group: Tensor
    sample_id: Tensor
    text_id: Tensor

    @classmethod
    def of(cls, pairs: Any) -> "Ids":
        """The ids of a chunk or of embedded pairs."""
        return cls(pairs.group, pairs.sample_id, pairs.text_id)

    def rows(self, rows: slice) -> "Ids":
        return Ids(*(column[rows] for column in self))

    def each_its_group(self) -> "Ids":
        """The same pairs, each as a group of its own."""
        return self._replace(group=torch.arange(len(self.group), device=self.group.device))


@dataclass(frozen=True)
class Pairs:
    """Embedded pairs: `image_embeds` and `text_embeds` (N, D), unit norm; `group`, `sample_id`, `text_id` (N,) int64.

    `negative_texts` (P, D) belong to no pair; they are negatives of every image. InfoNCE gives each pair its
    normalizers (N,): the log of the mean exponential of the logits over all candidates of the image, and of the text.
    """

    image_embeds: Tensor
    text_embeds: Tensor
    group: Tensor
    sample_id: Tensor
    text_id: Tensor
    negative_texts: Tensor | None = None
    image_normalizer: Tensor | None = None
    text_normalizer: Tensor | None = None

    def __len__(self) -> int:
        return len(self.group)

    @property
    def ids(self) -> Ids:
        return Ids.of(self)


def masks(anchors: Ids, others: Ids, same_text: SameText, which: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    """(positives, excluded) of a tile, each (A, M) bool, or None without any; all other pairs are negatives.

    which: whether to compare groups, samples, texts. Samples are compared with the memory only: a stale copy of the
    anchor's own sample is excluded, as a negative would push the pair away from itself, and a positive would hold it.
    """
    ids = zip(anchors, others, which, strict=True)
    group, stale, text = (own[:, None] == other if some else None for own, other, some in ids)
    positive, excluded = group, None
    if text is not None:
        none = torch.zeros_like(text) if group is None else group
        positive, excluded = (none | text, None) if same_text == "positive" else (group, text & ~none)
    if stale is not None:
        positive = None if positive is None else positive & ~stale
        excluded = stale if excluded is None else excluded | stale
    return positive, excluded


def ids_in_common(anchors: Ids, others: Ids, which: Sequence[bool], side: int) -> Tensor:
    """(3, R, C) bool: anchors of tile row r and others of tile column c have a group, a sample, a text in common.

    side: rows and columns of a tile; which: as in masks. All tiles at once, since a GPU would have to be waited for at
    each of them.
    """
    rows, columns = (-(-len(ids.group) // side) for ids in (anchors, others))
    tables = torch.zeros(3, rows, columns, dtype=torch.bool, device=anchors.group.device)
    for table, own, other, some in zip(tables, anchors, others, which, strict=True):
        if some:
            ordered = torch.cat([own, other]).sort().values  # not `unique`, which waits for the device to count them
            present = own.new_zeros(rows + columns, len(ordered), dtype=torch.float32)
            for ids, tiles in ((own, present[:rows]), (other, present[rows:])):
                tiles[torch.arange(len(ids), device=ids.device) // side, torch.searchsorted(ordered, ids)] = 1
            table.copy_(present[:rows] @ present[rows:].T > 0)
    return tables


def count_positives(ids: Ids, same_text: SameText) -> tuple[Tensor, Tensor]:
    """(positives, candidates) among all pairs of N images and N texts with these ids: () int64."""
    size, positives, candidates = len(ids.group), ids.group.new_zeros(()), ids.group.new_full((), len(ids.group) ** 2)
    for start in range(0, size, 256):
        positive, excluded = masks(
            ids.rows(slice(start, start + 256)), ids, same_text, (True, False, same_text != "negative")
        )
        positives += 0 if positive is None else positive.count_nonzero()
        candidates -= 0 if excluded is None else excluded.count_nonzero()
    return positives, candidates
