"""The tar shards that --data stands for, and the split of each."""

import os
from dataclasses import dataclass

from lib.data.remote.fetch import Fetcher
from lib.data.remote.transfer import PIPE, TARS, is_url
from lib.data.shards.annotations import beside, shown
from lib.data.shards.index import INDEX, SPLITS, ShardIndex, read_index
from lib.errors import InputError


@dataclass(frozen=True)
class ShardSet:
    """Tar shards by split."""

    where: str
    """as the user named them"""
    splits: dict[str, tuple[str, ...]]
    """local paths, URLs or commands of train, val, test or, without an index, all"""
    index: ShardIndex | None


def find_shards(data: str, flag: str, fetcher: Fetcher) -> ShardSet:
    """The shards of a folder with an index, or those that a path, glob, brace pattern, URL or command stands for.

    An index beside them says which split each is of, and must name them all. Raises InputError, naming `flag`.
    """
    # An address with "?" is that of one shard: nothing lies below it.
    if os.path.isdir(data) or (is_url(data) and "?" not in data and not data.rstrip("}").endswith(TARS)):
        index = read_index(data, fetcher)
        if index:
            if os.path.isdir(data):
                _check_all_named(data, flag, [name for name in os.listdir(data) if name.endswith(TARS)], index)
            shards = tuple(f"{data.rstrip('/')}/{name}" for name in index.shards)
            return _by_split(data, flag, shards, index)
        if os.path.isdir(data) or data.endswith("/"):
            raise InputError(f"{flag} {data} has no {INDEX}; for its tar shards give '{data.rstrip('/')}/*.tar'")
    shards = fetcher.find(data, flag)
    indexes = {beside(shard, "") for shard in shards}
    index = read_index(indexes.pop(), fetcher) if len(indexes) == 1 and not data.startswith(PIPE) else None
    if index is None:
        return ShardSet(data, {"all": shards}, None)
    _check_all_named(data, flag, [os.path.basename(shown(shard)) for shard in shards], index)
    return _by_split(data, flag, shards, index)


def _check_all_named(data: str, flag: str, names: list[str], index: ShardIndex) -> None:
    """Refuse tars that an index beside them does not name: they would be lost, or lose all others their splits."""
    unnamed = next((name for name in sorted(names) if name not in index.shards), None)
    if unnamed is not None:
        raise InputError(
            f"{flag} {data}: {INDEX} does not name {unnamed}; move it elsewhere, or remove {INDEX} to read all tars as "
            "one split"
        )


def _by_split(data: str, flag: str, shards: tuple[str, ...], index: ShardIndex) -> ShardSet:
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for shard in shards:
        if not is_url(shard) and not os.path.isfile(shard.removeprefix("file://")):
            raise InputError(f"{flag} {data}: {INDEX} names {shard}, which is not there; copy it, or pack again")
        splits[index.shards[os.path.basename(shown(shard))].split].append(shard)
    return ShardSet(data, {split: tuple(found) for split, found in splits.items() if found}, index)
