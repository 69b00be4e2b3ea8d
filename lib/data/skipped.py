"""Samples that are left out without opening an image: by split, so that each is counted once over all splits."""

from collections.abc import Collection, Mapping, Sequence

Skips = tuple[tuple[str, str], ...]
"""(key, reason) of each"""

_ORDER = ("train", "all", "val", "test")


def of_all_splits(left_out: Mapping[str, Skips]) -> Skips:
    """The skips of every split, in one list."""
    return tuple(skip for skips in left_out.values() for skip in skips)


def by_split(left_out: Mapping[str | None, Sequence[tuple[str, str]]], splits: Collection[str]) -> dict[str, Skips]:
    """Deal skips out to the splits that there are.

    Those of no known split (None), or of one without a usable sample, go to the split for training, or else to the
    first there is.
    """
    first = next((split for split in _ORDER if split in splits), "all")
    dealt: dict[str, list[tuple[str, str]]] = {}
    for split, skips in left_out.items():
        dealt.setdefault(split if split is not None and split in splits else first, []).extend(skips)
    return {split: tuple(skips) for split, skips in dealt.items()}
