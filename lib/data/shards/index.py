"""The index beside packed shards: their splits, counts and class names."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lib.data.fields import is_utf8, name_of
from lib.data.remote.fetch import Fetcher
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


def read_index(folder: str, fetcher: Fetcher) -> ShardIndex | None:
    """The index in a folder or at a URL, or None where there is none; InputError where it is damaged."""
    path = f"{folder.rstrip('/')}/{INDEX}"
    text = fetcher.read_text(path)
    if text is None:
        return None
    advice = "pack the shards again, or remove it"
    faults = (ValueError, KeyError, TypeError, RecursionError)
    with raised_as(lambda fault: InputError(f"{path} is damaged ({_told(fault)}); {advice}"), *faults):
        record = json.loads(text)
        if not isinstance(record, dict) or not {"version", "shards"} <= record.keys():
            return None  # another program's index
        version = _count(record, "version")
        if version != _VERSION:
            raise InputError(f"{path} is of version {version}, read here is {_VERSION}; pack the shards again")
        return ShardIndex(_entries(record["shards"]), _classes(record.get("classes")))


def write_index(folder: Path, index: ShardIndex) -> None:
    """Write the index into a folder, whole or not at all; the same index gives the same bytes."""
    shards = {name: entry._asdict() for name, entry in sorted(index.shards.items())}
    record = {"version": _VERSION, "classes": index.classes and list(index.classes), "shards": shards}
    write_text(folder / INDEX, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _told(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)[:200]


def _entries(shards: object) -> dict[str, ShardEntry]:
    if not isinstance(shards, dict) or not shards:
        raise ValueError("shards must be an object with an entry for each shard")
    return {_checked_name(name): _entry(entry) for name, entry in shards.items()}


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


def _checked_name(name: str) -> str:
    """The shard's name, which is that of a file in the index's own folder."""
    if not _FILE_NAME.fullmatch(name) or not is_utf8(name):
        raise ValueError(f"no name of a file beside the index: {name!r}")
    return name


def _classes(names: object) -> tuple[str, ...] | None:
    if names is None:
        return None
    if not isinstance(names, list) or not names:
        raise TypeError("classes must be a list of names")
    found = [name_of(name) for name in names]
    classes = tuple(name for name in found if name and is_utf8(name))
    if len(set(classes)) < len(names):
        raise ValueError("classes must be distinct names")
    return classes
