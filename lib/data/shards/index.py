"""Owns the index that lies beside packed shards: their splits, counts and class names."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lib.data.remote.fetch import Fetcher
from lib.errors import InputError

INDEX = "index.json"
SPLITS = ("train", "val", "test", "all")

_VERSION = 1


class ShardEntry(NamedTuple):
    """What the index says of one shard."""

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
    try:
        record = json.loads(text)
        if not isinstance(record, dict) or not {"version", "shards"} <= record.keys():
            return None  # another program's index
        if record["version"] != _VERSION:
            raise InputError(
                f"{path} is of version {record['version']}, read here is {_VERSION}; pack the shards again"
            )
        shards = {name: _entry(entry) for name, entry in record["shards"].items()}
        classes = None if record.get("classes") is None else tuple(map(str, record["classes"]))
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error!r}); pack the shards again, or remove it") from None
    return ShardIndex(shards, classes)


def write_index(folder: Path, index: ShardIndex) -> None:
    """Write the index into a folder, whole or not at all; the same index gives the same bytes."""
    shards = {name: entry._asdict() for name, entry in sorted(index.shards.items())}
    record = {"version": _VERSION, "classes": index.classes and list(index.classes), "shards": shards}
    unfinished = folder / f".{INDEX}.unfinished"
    unfinished.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / INDEX)


def _entry(entry: dict) -> ShardEntry:
    split = str(entry["split"])
    if split not in SPLITS:
        raise ValueError(f"split {split!r}")
    return ShardEntry(split, int(entry["samples"]), int(entry["pairs"]), int(entry["bytes"]))
