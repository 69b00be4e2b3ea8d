"""Owns tables of captions: CSV, TSV and JSONL files whose rows name an image and say what it shows."""

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lib.data.captions.listing import SPLITS, CaptionedImages, ImageFinder, Listing
from lib.data.fields import FOUND_COLUMNS, Columns
from lib.errors import InputError

SUFFIXES = (".csv", ".tsv", ".jsonl")

COLUMNS = {
    "image": ("filename", "image", "image_path", "file_name", "filepath", "path", "image_name"),
    "caption": (
        *("caption", "captions", "text", "texts", "txt", "title", "sentence", "sentences", "comment"),
        *("description", "alt_text", "raw", "prompt"),
    ),
    "split": ("split",),
    "group": ("group",),
}
"""Names of the columns, by what they hold; the first that is there is read."""


def read_table(
    path: Path, flag: str, image_root: str | None = None, columns: Columns = FOUND_COLUMNS
) -> CaptionedImages:
    """Read a table; InputError, naming `flag`, for columns or splits that are not understood."""
    wanted = COLUMNS | {meaning: (name.lower(),) for meaning, name in columns._asdict().items() if name is not None}
    finder = ImageFinder(path.parent, ("images", "Images"), image_root)
    listing = Listing(path, "captions", flag)
    for line, row in _rows(path, flag, wanted):
        if row is None:
            listing.malformed.append((f"{path.name}:{line}", "malformed_row"))
            continue
        split = SPLITS.get(row.split.lower())
        if split is None:
            raise InputError(f"{flag} {path}, line {line}: split {row.split!r} is none of {', '.join(SPLITS)}")
        listing.add(finder, row.image, split, row.captions, row.group)
    return replace(listing.finish(finder), has_columns=True)


class _Row(NamedTuple):
    image: str
    captions: list[str]
    split: str
    group: str | None


def _rows(path: Path, flag: str, wanted: dict[str, tuple[str, ...]]) -> Iterator[tuple[int, _Row | None]]:
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
                columns[names] = _find_columns(names, wanted)
                if len(columns) == 1:
                    _check_columns(columns[names], names, wanted, path, flag)
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


def _find_columns(found: tuple[str, ...], wanted: dict[str, tuple[str, ...]]) -> dict[str, str | None]:
    """The table's own name for each column that is needed, None for one that it lacks."""
    own_name = {name.strip().lower(): name for name in reversed(found)}
    return {
        meaning: next((own_name[name] for name in names if name in own_name), None) for meaning, names in wanted.items()
    }


def _check_columns(
    columns: dict[str, str | None], found: tuple[str, ...], wanted: dict[str, tuple[str, ...]], path: Path, flag: str
) -> None:
    for meaning in ("image", "caption"):
        if columns[meaning] is None:
            if not "".join(found).isprintable():
                raise InputError(f"{flag} {path} is no table: its first line is not text; is it the right file?")
            raise InputError(
                f"{flag} {path} has no column for the {meaning}: it has {', '.join(found) or 'none'}; "
                f"name one of them {' or '.join(wanted[meaning])}, or choose one by --{meaning}-column"
            )


def _csv_rows(path: Path) -> Iterator[tuple[int, dict]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses captions above 128 KiB
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        for row in reader:
            row.pop(None, None)  # cells beyond the header's
            yield reader.line_num, row


def _json_rows(path: Path) -> Iterator[tuple[int, dict | None]]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except ValueError:
                record = None
            yield line, record if isinstance(record, dict) else None
