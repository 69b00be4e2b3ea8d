"""Which pairs are positives of which anchors, and which count at all: by their ids, never as a mask of all pairs.

What is linear in the logits (their targets) needs only sums over groups: O(N D), where a mask would be N x N.
"""

from typing import Literal

import torch
from torch import Tensor

RememberedPositives = Literal["use", "ignore"]


class Relation:
    """A anchors to M others, by `group` and `sample_id`.

    Others of an anchor's group are its positives, and all others are its candidates. With `remembered` the others are
    of past steps: stale copies of the anchor's own sample are left out, and, with "ignore", its whole group.
    """

    def __init__(
        self,
        anchors: tuple[Tensor, Tensor],
        others: tuple[Tensor, Tensor],
        remembered: RememberedPositives | None = None,
        some_left_out: bool | None = None,
    ) -> None:
        """anchors, others: (group, sample_id), each (A,) or (M,) int64.

        some_left_out: whether to look for others that are left out; None: as there are any, for which this waits for
        the device.
        """
        (self.group, self.sample_id), (self.other_group, self.other_sample_id) = anchors, others
        self.remembered = remembered
        self._of_group = _EqualKeys(self.group, self.other_group)
        self.some_left_out = False
        """Whether any of the others is left out for any anchor."""
        if remembered:
            self._of_sample = _EqualKeys(self.sample_id, self.other_sample_id)
            self._of_both = _EqualKeys(_mix(*anchors), _mix(*others))
            if some_left_out is None:
                found = self._of_sample.found.any()
                if remembered == "ignore":
                    found = found | self._of_group.found.any()
                some_left_out = bool(found)
            self.some_left_out = some_left_out

    def sum_positives(self, values: Tensor) -> Tensor:
        """For each anchor the sum over its positives: (M, D) -> (A, D)."""
        if self.remembered == "ignore":
            return values.new_zeros(len(self.group), values.shape[1])
        positives = self._of_group.sums(values)
        return positives - self._of_both.sums(values) if self.some_left_out else positives

    def sum_candidates(self, values: Tensor) -> Tensor:
        """For each anchor the sum over all others that count for it: (M, D) -> (A, D)."""
        candidates = values.sum(0).expand(len(self.group), -1)
        if not self.some_left_out:
            return candidates
        candidates = candidates - self._of_sample.sums(values)
        if self.remembered == "ignore":
            candidates += self._of_both.sums(values) - self._of_group.sums(values)
        return candidates

    def counts(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(positives, candidates) of each anchor, each (A,)."""
        ones = torch.ones(len(self.other_group), 1, dtype=dtype, device=self.group.device)
        return self.sum_positives(ones)[:, 0], self.sum_candidates(ones)[:, 0]

    def positive(self, r: slice, c: slice) -> Tensor:
        """(tile rows, tile columns) bool: the other is of the anchor's group, and counts."""
        same_group = self.group[r, None] == self.other_group[c]
        return same_group & ~self.left_out(r, c) if self.some_left_out else same_group

    def left_out(self, r: slice, c: slice) -> Tensor:
        """(tile rows, tile columns) bool: the other does not count for the anchor."""
        left_out = self.sample_id[r, None] == self.other_sample_id[c]
        if self.remembered == "ignore":
            left_out |= self.group[r, None] == self.other_group[c]
        return left_out


class _EqualKeys:
    """Sums over the others whose key equals an anchor's: (A,) and (M,) int64 keys, joined by sorting.

    A key's place is where it first stands among the sorted keys. (`unique` would wait for the device to count them.)
    """

    def __init__(self, keys: Tensor, other_keys: Tensor) -> None:
        ordered = other_keys.sort().values
        self.place_of_other = torch.searchsorted(ordered, other_keys)
        self.place = torch.searchsorted(ordered, keys).clamp_(max=len(ordered) - 1)
        self.found = ordered[self.place] == keys

    def sums(self, values: Tensor) -> Tensor:
        """(M, D) -> (A, D)"""
        sums = torch.zeros_like(values).index_add_(0, self.place_of_other, values)
        return sums[self.place].mul_(self.found[:, None])


def _mix(group: Tensor, sample_id: Tensor) -> Tensor:
    """One int64 for a (group, sample) pair; wraps around on purpose."""
    return group * -7046029254386353131 + sample_id
