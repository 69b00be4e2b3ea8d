"""Positives of each anchor, and pairs that do not count for it: by their ids, never as a mask of all pairs.

What is linear in the logits (their targets) needs only sums over equal ids: O(N D), where a mask would be N x N.
"""

from collections.abc import Iterator
from itertools import combinations
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

RememberedPositives = Literal["use", "ignore"]

SameText = Literal["exclude", "positive", "negative"]
"""How pairs of equal text and different group count for each other: not at all, as positives, or as negatives."""

NOBODY = torch.iinfo(torch.int64).min
"""A group, sample and text that no pair is of."""


Names = tuple[str, ...]
"""Names of ids."""


class Identified(Protocol):
    """Pairs with the three ids, each (N,)."""

    @property
    def group(self) -> Tensor: ...
    @property
    def sample_id(self) -> Tensor: ...
    @property
    def text_id(self) -> Tensor: ...


class Ids(NamedTuple):
    """Group, sample and text of some pairs, each (N,) int64; equal texts have one text_id."""

    group: Tensor
    sample_id: Tensor
    text_id: Tensor

    @classmethod
    def of(cls, pairs: Identified) -> "Ids":
        """The ids of a chunk or of embedded pairs."""
        return cls(pairs.group, pairs.sample_id, pairs.text_id)

    def rows(self, rows: slice) -> "Ids":
        return Ids(*(column[rows] for column in self))

    def each_its_group(self) -> "Ids":
        """The same pairs, each as a group of its own."""
        return self._replace(group=torch.arange(len(self.group), device=self.group.device))


class Relation:
    """A anchors to M others, by their ids.

    Others of an anchor's group are its positives, and with `same_text="positive"` those of its text too; with "exclude"
    others of its text alone are left out. The remaining others are its negatives. With `remembered` the others are of
    past steps: stale copies of the anchor's own sample are left out, and, with "ignore", all that would be positives.
    """

    def __init__(
        self,
        anchors: Ids,
        others: Ids,
        same_text: SameText = "negative",
        remembered: RememberedPositives | None = None,
        some_left_out: bool | None = None,
    ) -> None:
        """anchors, others: ids, each (A,) or (M,).

        some_left_out: whether to look for others that are left out; None: as there are any, for which this waits for
        the device.
        """
        self.anchors, self.others, self.same_text, self.remembered = anchors, others, same_text, remembered
        # An other that equals the anchor in one of the first is its positive; in one of the second, no negative.
        self._of_positives: Names = ("group", "text_id") if same_text == "positive" else ("group",)
        self._compared: Names = ("group",) if same_text == "negative" else ("group", "text_id")
        if remembered:
            self._compared += ("sample_id",)
        self._keys: dict[Names, _EqualKeys] = {}
        can_be = remembered is not None or same_text == "exclude"
        self.some_left_out = can_be and (self._any_left_out() if some_left_out is None else some_left_out)
        """Whether any of the others is left out for any anchor."""

    def sum_positives(self, values: Tensor) -> Tensor:
        """For each anchor the sum over its positives: (M, D) -> (A, D)."""
        if self.remembered == "ignore":
            return values.new_zeros(len(self.anchors.group), values.shape[1])
        stale = self.remembered is not None and self.some_left_out
        return self._sum(self._of_positives, values, but="sample_id" if stale else None)

    def sum_candidates(self, values: Tensor) -> Tensor:
        """For each anchor the sum over all others that count for it: (M, D) -> (A, D)."""
        candidates = values.sum(0).expand(len(self.anchors.group), -1)
        if not self.some_left_out:
            return candidates
        return candidates - self._sum(self._compared, values) + self.sum_positives(values)

    def counts(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(positives, candidates) of each anchor, each (A,)."""
        ones = torch.ones(len(self.others.group), 1, dtype=dtype, device=self.others.group.device)
        return self.sum_positives(ones)[:, 0], self.sum_candidates(ones)[:, 0]

    def positive(self, r: slice, c: slice) -> Tensor:
        """(tile rows, tile columns) bool: the other is the anchor's positive."""
        positive = self._equal(self._of_positives, r, c)
        if self.remembered == "ignore":
            return torch.zeros_like(positive)
        return positive & ~self._equal(("sample_id",), r, c) if self.remembered and self.some_left_out else positive

    def left_out(self, r: slice, c: slice) -> Tensor:
        """(tile rows, tile columns) bool: the other does not count for the anchor. Only where some are left out."""
        assert self.some_left_out
        if self.remembered == "ignore":
            return self._equal(self._compared, r, c)
        if self.same_text != "exclude":
            return self._equal(("sample_id",), r, c)
        text_alone = self._equal(("text_id",), r, c) & ~self._equal(("group",), r, c)
        return text_alone | self._equal(("sample_id",), r, c) if self.remembered else text_alone

    def _any_left_out(self) -> bool:
        self.some_left_out = True  # or nothing would be subtracted
        candidates = self.counts(torch.float32)[1]  # exact up to 16 million others
        return bool((candidates < len(self.others.group)).any())

    def _equal(self, any_of: Names, r: slice, c: slice) -> Tensor:
        """(tile rows, tile columns) bool: anchor and other are equal in one of these ids at least."""
        tiles = (getattr(self.anchors, name)[r, None] == getattr(self.others, name)[c] for name in any_of)
        equal = next(tiles)
        for tile in tiles:
            equal |= tile
        return equal

    def _sum(self, any_of: Names, values: Tensor, but: str | None = None) -> Tensor:
        """For each anchor the sum over the others that equal it in one of these ids at least, and not in `but`.

        By inclusion and exclusion: less those equal in two of them, and so on.
        """
        terms = list(_subsets(any_of))
        if but:
            terms += [((*names, but), -sign) for names, sign in terms]
        total = self._equal_keys(terms[0][0]).sums(values)
        for names, sign in terms[1:]:
            total.add_(self._equal_keys(names).sums(values), alpha=sign)
        return total

    def _equal_keys(self, names: Names) -> "_EqualKeys":
        if names not in self._keys:
            first, *more = names
            if more:
                keys = self._equal_keys((first,)).with_both(self._equal_keys(tuple(more)))
            else:
                keys = _EqualKeys(getattr(self.anchors, first), getattr(self.others, first))
            self._keys[names] = keys
        return self._keys[names]


class _EqualKeys:
    """Sums over the others whose key equals an anchor's: (A,) and (M,) int64 keys, joined by sorting.

    A key's place is where it first stands among the sorted keys. (`unique` would wait for the device to count them.)
    """

    def __init__(self, keys: Tensor, other_keys: Tensor) -> None:
        self.count = len(other_keys)
        ordered = other_keys.sort().values
        self.place_of_other = torch.searchsorted(ordered, other_keys)
        self.place = torch.searchsorted(ordered, keys)
        if self.count:
            self.place.clamp_(max=self.count - 1)
            self.found = ordered[self.place] == keys
        else:  # a rank's share may have no rows
            self.found = torch.zeros_like(keys, dtype=torch.bool)

    def with_both(self, further: "_EqualKeys") -> "_EqualKeys":
        """Sums over the others whose keys equal an anchor's here and there: both places make one number."""
        of_others = self.place_of_other * self.count + further.place_of_other
        of_anchors = self.place * self.count + further.place
        return _EqualKeys(of_anchors.masked_fill_(~(self.found & further.found), -1), of_others)

    def sums(self, values: Tensor) -> Tensor:
        """(M, D) -> (A, D)"""
        if not self.count:
            return values.new_zeros(len(self.place), values.shape[1])
        sums = torch.zeros_like(values).index_add_(0, self.place_of_other, values)
        return sums[self.place].mul_(self.found[:, None])


def _subsets(names: Names) -> Iterator[tuple[Names, int]]:
    """Every choice of one or more names, with its sign in inclusion and exclusion; single ones first."""
    for size in range(1, len(names) + 1):
        yield from ((chosen, 1 if size % 2 else -1) for chosen in combinations(names, size))
