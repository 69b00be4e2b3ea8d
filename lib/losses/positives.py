"""Embedded pairs and their ids, from which the positives and the excluded pairs of a tile follow."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
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

    `negative_texts` (P, D) belong to no pair; they are negatives of every image.
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


def masks(
    anchors: Ids, others: Ids, same_text: SameText, remembered: bool, occur: Sequence[bool] = (True, True, True)
) -> tuple[Tensor | None, Tensor | None]:
    """(positives, excluded) of a tile, each (A, M) bool, or None without any; all other pairs are negatives.

    remembered: the others come from the memory. A stale copy of the anchor's own sample is then excluded: as a negative
    it would push the pair away from itself, as a positive it would hold it where it was.
    occur: some group, sample and text occurs on both sides; others are not compared.
    """

    def equal(kind: int) -> Tensor | None:
        return anchors[kind][:, None] == others[kind] if occur[kind] else None

    positive, excluded = equal(0), None
    if same_text != "negative" and (equal_text := equal(2)) is not None:
        none = torch.zeros_like(equal_text) if positive is None else positive
        positive, excluded = (none | equal_text, None) if same_text == "positive" else (positive, equal_text & ~none)
    if remembered and (stale := equal(1)) is not None:
        positive = None if positive is None else positive & ~stale
        excluded = stale if excluded is None else excluded | stale
    return positive, excluded


def numbered(parts: Sequence[Ids]) -> list[Ids]:
    """The ids of all parts as numbers from 0, int32, equal where the ids are: they compare in a quarter of the time."""
    columns = []
    for column in zip(*parts, strict=True):
        sorted_ids, order = torch.cat(column).sort()
        numbers = F.pad((sorted_ids.diff() != 0).cumsum(0), (1, 0)).int()
        columns.append(torch.empty_like(numbers).scatter_(0, order, numbers).split(list(map(len, column))))
    return [Ids(*part) for part in zip(*columns, strict=True)]


def occurrences(anchors: Ids, others: Ids, rows: Sequence[slice], side: int, count: int) -> Tensor:
    """(R, C, 3) bool: a group, sample or text of that slice of the anchors occurs among those `side` others.

    Ids as `numbered`, below `count`. Most tiles have none in common and hold negatives alone. It is found for all tiles
    at once: a GPU would have to wait for each answer.
    """
    found = others.group.new_zeros(len(rows), 3, -(-len(others.group) // side) * side, dtype=torch.bool)
    for in_row, r in zip(found, rows, strict=True):
        for row, own, other in zip(in_row, anchors.rows(r), others, strict=True):
            row[: len(other)] = row.new_zeros(count).index_fill_(0, own.long(), True)[other.long()]
    return found.unflatten(2, (-1, side)).any(3).mT


def count_positives(ids: Ids, same_text: SameText) -> tuple[Tensor, Tensor]:
    """(positives, candidates) among all pairs of N images and N texts with these ids: () int64."""
    size, positives, candidates = len(ids.group), ids.group.new_zeros(()), ids.group.new_full((), len(ids.group) ** 2)
    for start in range(0, size, 256):
        positive, excluded = masks(ids.rows(slice(start, start + 256)), ids, same_text, False)
        positives += 0 if positive is None else positive.count_nonzero()
        candidates -= 0 if excluded is None else excluded.count_nonzero()
    return positives, candidates
