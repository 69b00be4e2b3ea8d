"""Tables of images with captions or classes: CSV, TSV and JSON Lines, alone or in a folder of images (imagefolder)."""

import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from lib.data.caption_table import CaptionRow, CaptionTable
from lib.data.fields import (
    COLUMNS,
    FOUND_COLUMNS,
    SPLITS,
    Columns,
    NotText,
    image_name,
    is_utf8,
    name_of,
    shown,
    texts_of,
)
from lib.data.find_images import ImageFinder, is_image_name, walk_images
from lib.data.labelled_table import LabelledTable, labelled_by_captions
from lib.data.records import Delimited, json_objects
from lib.errors import InputError, raised_as, readable
from lib.files import open_text

SUFFIXES = (".csv", ".tsv", ".jsonl")
METADATA = ("metadata.csv", "metadata.jsonl")
METADATA_PARQUET = "metadata.parquet"
_LOOKED_AT = 100
"""Rows to read of a table that the user did not ask for, to find out what it holds."""


def read_table(
    path: Path, flag: str, image_root: str | None = None, columns: Columns = FOUND_COLUMNS
) -> CaptionTable | LabelledTable:
    """Read a table; InputError, naming `flag`, for columns that are not understood, or splits of which none is."""
    finder = ImageFinder(path.parent, ("images", "Images"), image_root)
    file = TableFile(path, flag, columns, finder)
    table = CaptionTable(path, "captions", flag, has_columns=True)
    table.fill(file.rows(), finder)
    table.kind = file.kind("captions")
    table.checked(finder)
    return labelled_by_captions(table) if file.labelled else table


def names_images_below(path: Path) -> bool:
    """True where the first rows of a table are captions of images that lie next to it."""
    with suppress(InputError):
        finder = ImageFinder(path.parent, ("images", "Images"), None)
        file = TableFile(path, "", FOUND_COLUMNS, finder)
        rows = list(islice(file.rows(), _LOOKED_AT))
        return not file.labelled and any(finder.find(row.image) for row in rows if row.reason is None)
    return False


def is_metadata(path: Path) -> bool:
    """True for a table with a column of file names, and one of captions or classes."""
    file = TableFile(path, "", FOUND_COLUMNS, ImageFinder(path.parent, (), None))
    with suppress(InputError):
        return any(file.is_understood for _ in islice(file.rows(), _LOOKED_AT))
    return False


def metadata_files(folder: Path, names: tuple[str, ...] = METADATA) -> list[Path]:
    """List the metadata files of the folder and of the split folders in it."""
    inner = sorted(name for name in os.listdir(folder) if name.lower() in SPLITS)
    places = [folder, *(folder / name for name in inner)]
    return [place / name for place in places for name in names if (place / name).is_file()]


def read_imagefolder(root: Path, flag: str, image_root: str | None, columns: Columns) -> CaptionTable | LabelledTable:
    """Read the metadata, and count images that no row names as no_row; InputError, naming `flag`, as for tables."""
    files = _checked_files(root, flag, image_root)
    finder = ImageFinder(root, (), None)
    tables = [TableFile(file, flag, columns, ImageFinder(file.parent, (), None)) for file in files]
    table = CaptionTable(root, "imagefolder", flag, has_columns=True)
    for file, rows in zip(files, tables, strict=True):
        table.fill(_placed(rows.rows(), "" if file.parent == root else f"{file.parent.name}/"), finder, file)
    of_classes = {rows.labelled for rows in tables if rows.is_understood}
    if len(of_classes) > 1:
        raise InputError(f"{flag} {root}: one file of metadata has captions and another classes; give them one column")
    table.kind = tables[0].kind("imagefolder")
    _skip_undivided(table)
    _count_unnamed(root, table)
    table.checked(finder)
    return labelled_by_captions(table) if True in of_classes else table


def _checked_files(root: Path, flag: str, image_root: str | None) -> list[Path]:
    """Return the metadata files, at most one in each folder."""
    if image_root is not None:
        raise InputError(
            f"--image-root {image_root}: the metadata of {flag} {root} name images next to them; leave it out"
        )
    files = metadata_files(root)
    if not files and (parquet := metadata_files(root, (METADATA_PARQUET,))):
        raise InputError(
            f"{flag} {root}: {parquet[0]} is not read as metadata of a folder; give "
            f"parquet:{parquet[0]} --image-root {parquet[0].parent}"
        )
    if not files:
        raise InputError(f"{flag} {root} holds neither {' nor '.join(METADATA)}, in it or in split folders")
    for file in files:
        if sum(file.parent == other.parent for other in files) > 1:
            raise InputError(f"{flag} {root}: {file.parent} holds {' and '.join(METADATA)}; remove one")
    return files


def _placed(rows: Iterable[CaptionRow], place: str) -> Iterator[CaptionRow]:
    """Make image names relative to the root; without a split of its own a row has that of its image's folder."""
    for row in rows:
        if row.reason is not None:
            yield row._replace(split=_split_of(f"{place}image"))
        else:
            key = row.image if row.image.startswith("/") else place + row.image
            yield row._replace(image=key, split=_split_of(key) or "all")


def _split_of(key: str) -> str | None:
    """Return the split that the top folder of an image names."""
    top, slash, _ = os.path.normpath(key).partition("/")
    return SPLITS.get(top.lower()) if slash else None


def _skip_undivided(table: CaptionTable) -> None:
    """Leave out images of split "all" where others have a split: they would be used nowhere, and not be counted."""
    if len(table.of_split) > 1:
        for key in table.of_split.pop("all", {}):
            table.unlisted.add(key)
            table.skip(key, "no_split")


def _count_unnamed(root: Path, table: CaptionTable) -> None:
    """Count images that no row names, and other things in the folder with the name of an image."""
    keys = table.unlisted.union(*table.of_split.values())
    named = {os.path.normpath(key) for key in keys}
    for found in walk_images(root):
        split = _split_of(f"{found.prefix}image")
        for name in found.names:
            if (key := found.prefix + name) not in named:
                table.skip(shown(key), "no_row" if is_utf8(key) else "not_utf8", split)
        for key, reason in found.skipped:
            if key not in named:
                table.skip(key, reason, split)


class TableFile:
    """Rows of a file by the meaning of its columns; a column of captions takes precedence over one of classes."""

    def __init__(self, path: Path, flag: str, columns: Columns, finder: ImageFinder):
        self._path, self._asked, self._finder = path, f"{flag} {path}", finder
        self._wanted = _wanted(columns)
        self.labelled = False
        """True where rows name a class and no caption; known after the first row"""
        self._chosen: list[str] = []  # the column of texts, then others that might be meant

    @property
    def is_understood(self) -> bool:
        """True once the columns of images and of texts were found: after the first row that has both."""
        return bool(self._chosen)

    def kind(self, word: str) -> str:
        """Return the word, with the chosen column if there were several: "captions (of text, not of title)"."""
        word = "labels" if self.labelled and word == "captions" else word
        if len(self._chosen) < 2:
            return word
        used, *others = map(shown, self._chosen)
        return f"{word} (of column {used}, not of {', '.join(others)})"

    def rows(self) -> Iterator[CaptionRow]:
        """Yield the rows, of split "train" where they have none of their own."""
        is_table = raised_as(lambda fault: InputError(f"{self._asked} is not readable as a table: {fault}"), csv.Error)
        with readable(self._asked), is_table, open_text(self._path) as file:
            suffix = self._path.suffix.lower()
            records = self._objects(json_objects(file)) if suffix == ".jsonl" else self._cells(Delimited(file, suffix))
            for line, fields in records:
                yield _row(line, fields)

    def _cells(self, table: Delimited) -> Iterator[tuple[int, Sequence[object] | str]]:
        """Yield (line number, image, texts, split and group), or the reason why a line is no row."""
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
            yield line, (cells[image], cells[text], cells[split], cells[group])

    def _objects(self, objects: Iterator[tuple[int, dict | str]]) -> Iterator[tuple[int, Sequence[object] | str]]:
        found: dict[tuple[str, ...], list[str | None]] = {}  # objects may differ in what they name
        first: tuple[str, ...] = ()
        for line, record in objects:
            if isinstance(record, str):
                yield line, record
                continue
            names = tuple(record)
            if names not in found:
                first = first or names
                found[names] = self._own(names)
                if not self._chosen and not self._missing(names):
                    found = {names: self._choose(names)}
            # A column that the object lacks is None, and no object has that for a key.
            yield line, [record.get(name) for name in found[names]]
        if first and not self._chosen:
            self._choose(first)

    def _choose(self, names: Sequence[str]) -> list[str | None]:
        """Choose the columns to read by name; InputError where there is none of images or of texts."""
        if meaning := self._missing(names):
            if not "".join(names).isprintable():
                raise InputError(f"{self._asked} is no table: its first line is not text; is it the right file?")
            wanted = self._wanted[meaning] or self._wanted["label"]
            raise InputError(
                f"{self._asked} has no column for the {meaning}: it has {', '.join(map(shown, names)) or 'none'}; "
                f"name one of them {' or '.join(wanted)}, or choose one by --{meaning}-column"
            )
        captions = _named(names, self._wanted["caption"])
        self.labelled = not captions
        own = self._own(names)
        for name in filter(None, own):
            if len(twice := [each for each in names if each.strip().lower() == name.strip().lower()]) > 1:
                raise InputError(
                    f"{self._asked} has {len(twice)} columns called {shown(name.strip())}; rename or remove all but one"
                )
        self._chosen = captions or _named(names, self._wanted["label"])
        return own

    def _missing(self, names: Sequence[str]) -> str | None:
        """Return the meaning, image or caption, without a column; classes take the place of captions."""
        if not _named(names, self._wanted["image"]):
            return "image"
        return None if any(_named(names, self._wanted[meaning]) for meaning in ("caption", "label")) else "caption"

    def _own(self, names: Sequence[str]) -> list[str | None]:
        """Return the table's own names for image, text, split and group, None for those that it lacks."""
        meanings = ("image", "label" if self.labelled else "caption", "split", "group")
        return [next(iter(_named(names, self._wanted[meaning])), None) for meaning in meanings]


def _row(line: int, fields: Sequence[object] | str) -> CaptionRow:
    """Return the row of (image, texts, split, group), or of the reason why the line is none."""
    if isinstance(fields, str):
        return CaptionRow("", line=line, reason=fields)
    image, texts, split, group = fields
    try:
        # A missing caption stays a caption, an empty one, and is counted as such.
        captions = texts_of(texts) or [""]
        return CaptionRow(image_name(image), captions, "train", name_of(split), name_of(group), line=line)
    except NotText:
        return CaptionRow("", line=line, reason="malformed_row")


def _wanted(columns: Columns) -> Mapping[str, Sequence[str]]:
    """Return the names that a column may have, in lower case, by meaning."""
    wanted: dict[str, Sequence[str]] = dict(COLUMNS)
    if columns.image is not None:
        wanted["image"] = (columns.image.lower(),)
    if columns.caption is not None:
        is_label = columns.caption.lower() in COLUMNS["label"]
        wanted |= {"caption": (), "label": ()} | {"label" if is_label else "caption": (columns.caption.lower(),)}
    return wanted


def _named(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Return the columns with one of the wanted names, in the order of these."""
    own_name = {name.strip().lower(): name for name in reversed(names)}
    return [own_name[name] for name in wanted if name in own_name]
