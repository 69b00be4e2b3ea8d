"""Tables: CSV, TSV and JSONL files whose rows name an image and its captions, or its class."""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from lib.data.captions.listing import SPLITS, CaptionedImages, ImageFinder, Listing, image_name
from lib.data.captions.records import Delimited, json_objects
from lib.data.classes.labelled_rows import LabelledRows, labelled_by_captions
from lib.data.fields import COLUMNS, FOUND_COLUMNS, Columns, NotText, name_of, shown, texts_of
from lib.data.image_names import is_image_name
from lib.errors import InputError, raised_as, readable
from lib.files import open_text

SUFFIXES = (".csv", ".tsv", ".jsonl")
_LOOKED_AT = 100
"""Rows of a table that nobody asked for, to find out what it is about."""


def read_table(
    path: Path, flag: str, image_root: str | None = None, columns: Columns = FOUND_COLUMNS
) -> CaptionedImages | LabelledRows:
    """Read a table; InputError, naming `flag`, for columns that are not understood, or splits of which none is."""
    finder = ImageFinder(path.parent, ("images", "Images"), image_root)
    table = Table(path, flag, columns, finder)
    listing = Listing(path, "captions", flag)
    add_rows(listing, table, finder)
    listed = replace(listing.finish(finder), has_columns=True, kind=table.kind("captions"))
    return labelled_by_captions(listed, flag) if table.labelled else listed


def add_rows(
    listing: Listing,
    table: "Table",
    finder: ImageFinder,
    place: str = "",
    split_of: Callable[[str], str | None] | None = None,
) -> None:
    """List the rows of a table; InputError where rows have splits and none is known.

    place: what image names are relative to, "train/". split_of: the split of an image whose row names none, or None.
    """
    unknown: tuple[int, str] | None = None
    of_place = split_of(f"{place}image") if split_of else None
    for line, row in table.rows():
        if isinstance(row, str):
            listing.skip(f"{place}{table.path.name}:{line}", row, of_place)
            continue
        key = row.image if not place or row.image.startswith("/") else place + row.image
        split = SPLITS.get(row.split.lower()) if row.split else (split_of(key) or "all") if split_of else "train"
        if split is None:
            unknown = unknown or (line, str(row.split))
            listing.named.add(key)
            listing.skip(f"{place}{table.path.name}:{line}", "unknown_split")
        else:
            listing.add(finder, key, split, row.texts, row.group)
    if unknown and listing.empty:
        line, word = unknown
        raise InputError(f"{table.flag} {table.path}, line {line}: split {word!r} is none of {', '.join(SPLITS)}")


def names_images_below(path: Path) -> bool:
    """Whether a table has captions of images that lie beside it, judged by its first rows."""
    with suppress(InputError):
        finder = ImageFinder(path.parent, ("images", "Images"), None)
        table = Table(path, "", FOUND_COLUMNS, finder)
        rows = [row for _, row in islice(table.rows(), _LOOKED_AT)]
        return not table.labelled and any(finder.find(row.image) for row in rows if not isinstance(row, str))
    return False


def is_metadata(path: Path) -> bool:
    """Whether a table has a column of file names, and one of captions or classes."""
    table = Table(path, "", FOUND_COLUMNS, ImageFinder(path.parent, (), None))
    with suppress(InputError):
        return any(table.is_understood for _ in islice(table.rows(), _LOOKED_AT))
    return False


class Row(NamedTuple):
    """An image of a table, and its captions or the name of its class."""

    image: str
    texts: list[str]
    split: str | None
    """as written"""
    group: str | None


class _Own(NamedTuple):
    """The table's own names of its columns, None for those that it lacks."""

    image: str | None
    text: str | None
    """of captions, or of classes"""
    split: str | None
    group: str | None


class Table:
    """Rows of a file by the meaning of its columns; those of captions go before those of classes."""

    def __init__(self, path: Path, flag: str, columns: Columns, finder: ImageFinder):
        self.path, self.flag, self._finder = path, flag, finder
        self._wanted = _wanted(columns)
        self.labelled = False
        """whether rows name a class and no caption; known after the first row"""
        self._chosen: tuple[str, list[str]] | None = None  # the column of texts, and others that might be meant

    @property
    def is_understood(self) -> bool:
        """Whether the columns of images and of texts were found; known after the first row that has both."""
        return self._chosen is not None

    def kind(self, word: str) -> str:
        """The word, with the column that was chosen where there were several: "captions (of text, not of title)"."""
        word = "labels" if self.labelled and word == "captions" else word
        if self._chosen is None or not self._chosen[1]:
            return word
        used, others = self._chosen
        return f"{word} (of column {shown(used)}, not of {', '.join(map(shown, others))})"

    def rows(self) -> Iterator[tuple[int, Row | str]]:
        """(line number, row, or the reason why it is none)."""
        is_table = raised_as(lambda fault: InputError(f"{self._asked} is not readable as a table: {fault}"), csv.Error)
        with readable(self._asked), is_table, open_text(self.path) as file:
            if self.path.suffix.lower() == ".jsonl":
                yield from self._objects(json_objects(file))
            else:
                yield from self._cells(Delimited(file, self.path.suffix.lower()))

    def _cells(self, table: Delimited) -> Iterator[tuple[int, Row | str]]:
        if not table.header:
            return
        own = self._choose(table.header)
        # A column that the table lacks is the last one, which every row is given.
        image, text, split, group = (-1 if name is None else table.header.index(name) for name in own)

        def is_row(cells: list[str]) -> bool:
            if len(cells) != len(table.header):
                return False
            name = cells[image].strip()
            return is_image_name(name) or self._finder.find(name) is not None

        for line, cells in table.rows(is_row):
            if isinstance(cells, str):
                yield line, cells
                continue
            cells.append("")
            yield line, _row(cells[image], cells[text], cells[split], cells[group])

    def _objects(self, objects: Iterator[tuple[int, dict | str]]) -> Iterator[tuple[int, Row | str]]:
        found: dict[tuple[str, ...], _Own] = {}  # objects may differ in what they name
        first: list[str] | None = None
        for line, record in objects:
            if isinstance(record, str):
                yield line, record
                continue
            names = tuple(record)
            if names not in found:
                first = first or [*names]
                found[names] = self._own(names)
                if self._chosen is None and not self._missing(names):
                    found = {names: self._choose(names)}
            # A column that the object lacks is None, and no object has that for a key.
            image, text, split, group = map(record.get, found[names])
            yield line, _row(image, text, split, group)
        if first and self._chosen is None:
            self._choose(first)

    def _choose(self, names: Sequence[str]) -> _Own:
        """Decide what is read by the names of the columns; InputError where an image or a text is not among them."""
        if meaning := self._missing(names):
            if not "".join(names).isprintable():
                raise InputError(f"{self._asked} is no table: its first line is not text; is it the right file?")
            wanted = self._wanted[meaning] or self._wanted["label"]
            raise InputError(
                f"{self._asked} has no column for the {meaning}: it has {', '.join(map(shown, names)) or 'none'}; "
                f"name one of them {' or '.join(wanted)}, or choose one by --{meaning}-column"
            )
        self.labelled = not _named(names, self._wanted["caption"])
        own = self._own(names)
        for name in filter(None, own):
            if len(twice := [each for each in names if _same(each, name)]) > 1:
                raise InputError(
                    f"{self._asked} has {len(twice)} columns called {shown(name.strip())}; rename or remove all but one"
                )
        texts = _named(names, self._wanted["label" if self.labelled else "caption"])
        self._chosen = texts[0], texts[1:]
        return own

    @property
    def _asked(self) -> str:
        return f"{self.flag} {self.path}"

    def _missing(self, names: Sequence[str]) -> str | None:
        """The meaning, image or caption, for which there is no column; of captions classes take the place."""
        if not _named(names, self._wanted["image"]):
            return "image"
        return None if any(_named(names, self._wanted[meaning]) for meaning in ("caption", "label")) else "caption"

    def _own(self, names: Sequence[str]) -> _Own:
        meanings = ("image", "label" if self.labelled else "caption", "split", "group")
        found = (_named(names, self._wanted[meaning]) for meaning in meanings)
        return _Own(*(each[0] if each else None for each in found))


def _wanted(columns: Columns) -> Mapping[str, Sequence[str]]:
    """The names that a column may have, in lower case, by what it holds."""
    wanted: dict[str, Sequence[str]] = dict(COLUMNS)
    if columns.image is not None:
        wanted["image"] = (columns.image.lower(),)
    if columns.caption is not None:
        is_label = columns.caption.lower() in COLUMNS["label"]
        wanted |= {"caption": (), "label": ()} | {"label" if is_label else "caption": (columns.caption.lower(),)}
    return wanted


def _named(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The columns that have one of the names wanted, in their order."""
    own_name = {name.strip().lower(): name for name in reversed(names)}
    return [own_name[name] for name in wanted if name in own_name]


def _same(name: str, other: str) -> bool:
    return name.strip().lower() == other.strip().lower()


def _row(image: object, texts: object, split: object, group: object) -> Row | str:
    try:
        # A missing caption stays a caption, an empty one: it is counted as that.
        return Row(image_name(image), texts_of(texts) or [""], name_of(split), name_of(group))
    except NotText:
        return "malformed_row"
