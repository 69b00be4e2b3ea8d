"""The tar shards that --data stands for, the split of each, and the index beside packed ones."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lib.data.fetcher import Fetcher
from lib.data.fields import is_utf8, name_of
from lib.data.remote import PIPE, TARS, is_away, is_url
from lib.errors import InputError, raised_as
from lib.files import write_text

INDEX = "index.json"
SPLITS = ("train", "val", "test", "all")

_VERSION = 1
_LARGEST = 2**40  # samples, pairs or bytes of one shard
# "?" would end the name in an address.
_FILE_NAME = re.compile(r"(?!\.{1,2}$)[^/\\?\0]{1,255}")


class ShardEntry(NamedTuple):
    """The index's entry of one shard."""

    split: str
    """train, val, test or all"""
    samples: int
    """samples with an image"""
    pairs: int
    """captions with text over those samples, or the samples again where they have a class"""
    bytes: int


@dataclass(frozen=True)
class ShardIndex:
    """Shards by file name, and the class names, if the samples have classes."""

    shards: dict[str, ShardEntry]
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ShardSet:
    """Tar shards by split."""

    where: str
    """as the user named them"""
    splits: dict[str, tuple[str, ...]]
    """local paths, URLs or commands of train, val, test or, without an index, all"""
    index: ShardIndex | None


def find_shards(data: str, flag: str, fetcher: Fetcher) -> ShardSet:
    """The shards of a folder with an index, or of a path, glob, brace pattern, URL or command.

    An index beside them gives the split of each, and must name them all. Raises InputError, naming `flag`.
    """
    # An address with "?" is that of one shard: nothing lies below it.
    if os.path.isdir(data) or (is_url(data) and "?" not in data and not data.rstrip("}").endswith(TARS)):
        index = read_index(data, fetcher)
        if index:
            if os.path.isdir(data):
                _check_all_named(data, flag, [name for name in os.listdir(data) if name.endswith(TARS)], index)
            return _by_split(data, flag, [f"{data.rstrip('/')}/{name}" for name in index.shards], index)
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


def _by_split(data: str, flag: str, shards: list[str] | tuple[str, ...], index: ShardIndex) -> ShardSet:
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for shard in shards:
        if not is_url(shard) and not os.path.isfile(shard.removeprefix("file://")):
            raise InputError(f"{flag} {data}: {INDEX} names {shard}, which is not there; copy it, or pack again")
        splits[index.shards[os.path.basename(shown(shard))].split].append(shard)
    return ShardSet(data, {split: tuple(found) for split, found in splits.items() if found}, index)


def shown(shard: str) -> str:
    """The shard as it may be printed: an address without its query, which may hold access keys."""
    return shard.partition("?")[0] if is_url(shard) else shard


def beside(shard: str, name: str) -> str:
    """The path or URL of another file in the shard's folder; a command has none and is returned as it is."""
    return shard if shard.startswith(PIPE) else os.path.join(os.path.dirname(shown(shard)), name)


def shard_names(shards: tuple[str, ...]) -> tuple[str, ...]:
    """Distinct names of the shards: paths below their common folder, without queries.

    The names are part of the samples' keys, so they must not change when the data moves to another folder or address.
    """
    places = [shown(shard) if is_away(shard) else os.path.abspath(shard.removeprefix("file://")) for shard in shards]
    if len(set(places)) < len(shards):  # addresses that differ only in their queries
        places = list(shards)
    split = [place.split("/") for place in places]
    common = os.path.commonprefix([parts[:-1] for parts in split])
    return tuple("/".join(parts[len(common) :]) for parts in split)


def read_index(folder: str, fetcher: Fetcher) -> ShardIndex | None:
    """The index in a folder or at a URL, or None where there is none; InputError where it is damaged."""
    path = f"{folder.rstrip('/')}/{INDEX}"
    text = fetcher.read_text(path)
    if text is None:
        return None
    advice = "pack the shards again, or remove it"
    faults = (ValueError, KeyError, TypeError, RecursionError)
    with raised_as(lambda fault: InputError(f"{path} is damaged ({_worded(fault)}); {advice}"), *faults):
        record = json.loads(text)
        if not isinstance(record, dict) or not {"version", "shards"} <= record.keys():
            return None  # another program's index
        version = _count(record, "version")
        if version != _VERSION:
            raise InputError(f"{path} is of version {version}, read here is {_VERSION}; pack the shards again")
        shards = record["shards"]
        if not isinstance(shards, dict) or not shards:
            raise ValueError("shards must be an object with an entry for each shard")
        return ShardIndex({_file_name(name): _entry(entry) for name, entry in shards.items()}, _classes(record))


def write_index(folder: Path, index: ShardIndex) -> None:
    """Write the index into a folder, whole or not at all; the same index gives the same bytes."""
    shards = {name: entry._asdict() for name, entry in sorted(index.shards.items())}
    record = {"version": _VERSION, "classes": index.classes and list(index.classes), "shards": shards}
    write_text(folder / INDEX, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _worded(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)[:200]


def _entry(entry: object) -> ShardEntry:
    if not isinstance(entry, dict):
        raise TypeError(f"{entry!r} in place of a shard's entry")
    if entry["split"] not in SPLITS:
        raise ValueError(f"split {entry['split']!r}")
    return ShardEntry(entry["split"], *(_count(entry, name) for name in ("samples", "pairs", "bytes")))


def _count(record: dict, name: str) -> int:
    count = record[name]
    if type(count) is not int or not 0 <= count <= _LARGEST:
        raise ValueError(f"{name} {count!r}")
    return count


def _file_name(name: str) -> str:
    """The shard's name, checked to be that of a file in the index's own folder."""
    if not _FILE_NAME.fullmatch(name) or not is_utf8(name):
        raise ValueError(f"no name of a file beside the index: {name!r}")
    return name


def _classes(record: dict) -> tuple[str, ...] | None:
    names = record.get("classes")
    if names is None:
        return None
    if not isinstance(names, list) or not names:
        raise TypeError("classes must be a list of names")
    found = [name_of(name) for name in names]
    classes = tuple(name for name in found if name and is_utf8(name))
    if len(set(classes)) < len(names):
        raise ValueError("classes must be distinct names")
    return classes
