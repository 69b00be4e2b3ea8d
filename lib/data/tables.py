"""Owns tables of captions: CSV, TSV and JSONL files whose rows name an image and say what it shows."""

import csv
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lib.errors import InputError

SUFFIXES = (".csv", ".tsv", ".jsonl")

_COLUMNS = {
    "image": ("filename", "image", "image_path", "file_name", "filepath", "path"),
    "caption": ("caption", "captions", "text", "title", "sentence"),
    "split": ("split",),
    "group": ("group",),
}
_SPLITS = {
    "train": "train",
    "restval": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}


class Caption(NamedTuple):
    """One caption and its number within its image."""

    number: int
    text: str


@dataclass
class Captioned:
    """An image of a table with what its rows say."""

    key: str
    """as the table names it"""
    path: str | None
    """None where the file is missing"""
    split: str
    group: str | None
    captions: list[Caption]


@dataclass(frozen=True)
class Table:
    """The images of a table, in the order in which they first appear."""

    path: Path
    images: list[Captioned]
    malformed: list[tuple[str, str]]
    """(line, reason) of rows without an image"""

    @property
    def splits(self) -> set[str]:
        return {image.split for image in self.images}


def read_table(path: Path, flag: str) -> Table:
    """Read a table; InputError, naming `flag`, for columns or splits that are not understood."""
    finder = _ImageFinder(path.parent)
    images: dict[tuple[str, str], Captioned] = {}
    malformed = []
    for line, row in _rows(path, flag):
        if row is None:
            malformed.append((f"{path.name}:{line}", "malformed_row"))
            continue
        split = _SPLITS.get(row.split.lower())
        if split is None:
            known = ", ".join(_SPLITS)
            raise InputError(f"{flag} {path}, line {line}: split {row.split!r} is none of {known}")
        image = images.get((row.image, split))
        if image is None:
            image = Captioned(row.image, finder.find(row.image), split, row.group, [])
            images[row.image, split] = image
        for text in row.captions:
            image.captions.append(Caption(len(image.captions), text.strip()))
    if not images:
        raise InputError(f"{flag} {path} has no rows that name an image")
    if not any(image.path for image in images.values()):
        first = next(iter(images))[0]
        raise InputError(
            f"{flag} {path}: of the {len(images)} images it names not one is there (the first: {first!r}); "
            f"they are looked for in {path.parent} and {path.parent / 'images'}"
        )
    return Table(path, list(images.values()), malformed)


class _Row(NamedTuple):
    image: str
    captions: list[str]
    split: str
    group: str | None


def _rows(path: Path, flag: str) -> Iterator[tuple[int, _Row | None]]:
    """(line number, row) of each row; None for a row that names no image or is not readable."""
    lines = _json_rows(path) if path.suffix.lower() == ".jsonl" else _csv_rows(path)
    columns: dict[tuple[str, ...], dict[str, str | None]] = {}  # JSON objects may differ in what they name
    try:
        for line, record in lines:
            if record is None:
                yield line, None
                continue
            names = tuple(record)
            if names not in columns:
                columns[names] = _find_columns(names)
                if len(columns) == 1:
                    _check_columns(columns[names], names, path, flag)
            yield line, _row(record, columns[names])
    except csv.Error as error:
        raise InputError(f"{flag} {path} is not readable as a table: {error}") from None
    except OSError as error:
        raise InputError(f"{flag} {path} cannot be read: {error.strerror}") from None


def _row(record: dict, columns: dict[str, str | None]) -> _Row | None:
    # A column that the table lacks is None, and no record has that for a key.
    image, captions = record.get(columns["image"]), record.get(columns["caption"])
    split, group = record.get(columns["split"]), record.get(columns["group"])
    if not image or not isinstance(image, str):
        return None
    # A missing caption stays a caption, an empty one: it is counted as that.
    if not isinstance(captions, list) or not captions:
        captions = [captions]
    texts = ["" if caption is None else str(caption) for caption in captions]
    return _Row(image, texts, "train" if split is None else str(split), None if group is None else str(group))


def _find_columns(found: tuple[str, ...]) -> dict[str, str | None]:
    """The table's own name for each column that is needed, None for one that it lacks."""
    own_name = {name.strip().lower(): name for name in reversed(found)}
    return {
        meaning: next((own_name[name] for name in names if name in own_name), None)
        for meaning, names in _COLUMNS.items()
    }


def _check_columns(columns: dict[str, str | None], found: tuple[str, ...], path: Path, flag: str) -> None:
    for meaning in ("image", "caption"):
        if columns[meaning] is None:
            raise InputError(
                f"{flag} {path} has no column for the {meaning}: it has {', '.join(found) or 'none'}; "
                f"name one of them {' or '.join(_COLUMNS[meaning])}"
            )


def _csv_rows(path: Path) -> Iterator[tuple[int, dict]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses captions above 128 KiB
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        for row in reader:
            row.pop(None, None)  # cells beyond the header's
            yield reader.line_num, row


def _json_rows(path: Path) -> Iterator[tuple[int, dict | None]]:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except ValueError:
                record = None
            yield line, record if isinstance(record, dict) else None


class _ImageFinder:
    """Finds the files a table names, listing each folder once: a look per file is slow on network disks."""

    def __init__(self, folder: Path):
        self._bases = (str(folder), str(folder / "images"))
        self._listings: dict[str, frozenset[str]] = {}

    def find(self, name: str) -> str | None:
        """The path of the image `name`, or None."""
        for base in self._bases:
            path = os.path.join(base, name)  # an absolute name stays as it is
            folder, file = os.path.split(path)
            if file in self._listing(folder):
                return path
        return None

    def _listing(self, folder: str) -> frozenset[str]:
        if folder not in self._listings:
            try:
                self._listings[folder] = frozenset(os.listdir(folder))
            except OSError:
                self._listings[folder] = frozenset()
        return self._listings[folder]
