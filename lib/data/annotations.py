"""Owns what the text members of a shard's samples say: captions, class, group and key."""

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from lib.data.tars import TEXT_SUFFIXES, Sample, index_samples, read_member
from lib.errors import InputError


class Annotation(NamedTuple):
    """What the text members of a sample say."""

    key: str
    captions: tuple[str, ...]
    """as written, empty ones included"""
    class_name: str | None
    group: str | None


def shard_names(paths: tuple[str, ...]) -> tuple[str, ...]:
    """What tells the shards apart: their paths below the folder that holds them all."""
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    return tuple(os.path.relpath(path, folder) for path in paths)


def annotate(key: str, members: dict, shard: str, classes: tuple[str, ...] | None) -> Annotation:
    """Read what the text members (bytes by suffix) of the sample `key` of the shard so named say.

    `classes` names the class numbers of .cls members or of "class" in .json members.
    """
    record = _record(members.get("json", b"{}"))
    if "txt" in members:
        captions = [_text(members["txt"])]
    else:
        captions = record.get("captions", record.get("caption", []))
        captions = [captions] if isinstance(captions, str) else captions
    label = _text(members["cls"]) if "cls" in members else record.get("class")
    # Keys begin again in every shard, so the shard belongs to them.
    own_key = str(record["key"]) if "key" in record else f"{shard}/{key}"
    group = str(record["group"]) if "group" in record else None
    captions = captions if isinstance(captions, list) else []
    texts = tuple("" if caption is None else str(caption).strip() for caption in captions)
    return Annotation(own_key, texts, _class_name(label, classes), group)


def notes(paths: tuple[str, ...], classes: tuple[str, ...] | None) -> Iterator[Annotation]:
    """The annotations of all samples that have an image, without reading the images."""
    for path in paths:
        for sample in index_samples(path):
            if isinstance(sample, Sample) and sample.image is not None:
                yield annotate_indexed(sample, path, path, classes)


def annotate_indexed(sample: Sample, path: str, shard: str, classes: tuple[str, ...] | None) -> Annotation:
    """The annotation of a sample of which only the places of its members are known."""
    places = sample.members.items()
    texts = {suffix: read_member(path, place) for suffix, place in places if suffix in TEXT_SUFFIXES}
    return annotate(sample.key, texts, shard, classes)


def first_annotation(paths: tuple[str, ...], classes: tuple[str, ...] | None, flag: str) -> Annotation:
    """The first sample that has an image and text; InputError where none of the first thousand has."""
    for note in islice(notes(paths, classes), 1000):
        if note.captions:
            return note
        if note.class_name is not None:
            if classes is None and note.class_name.isdecimal():
                raise InputError(
                    f"{flag} {paths[0]}: classes are numbers and have no names; put classes.txt, one name a "
                    "line, beside the shards"
                )
            return note
    raise InputError(
        f"{flag} {paths[0]}: no sample with an image (.jpg, .png, .webp) and a text (.txt, .json or .cls) of "
        "the same name was found"
    )


def listed_classes(paths: tuple[str, ...]) -> tuple[str, ...] | None:
    """Class names by number from classes.txt beside the first shard, if it is there."""
    listing = Path(paths[0]).parent / "classes.txt"
    if not listing.is_file():
        return None
    names = listing.read_text(encoding="utf-8").split("\n")
    return tuple(name.strip().replace("_", " ") for name in names if name.strip())


def _class_name(label: object, classes: tuple[str, ...] | None) -> str | None:
    name = str(label).strip() if label is not None else ""
    if classes is not None and name.isdecimal():
        return classes[int(name)] if int(name) < len(classes) else None
    return name.replace("_", " ") or None


def _record(content: bytes) -> dict:
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _text(content: bytes) -> str:
    return content.decode("utf-8", errors="replace").strip()
