"""Captions of Flickr8k and Flickr30k: Kaggle's tables, and the token files with lists of splits."""

import csv
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Literal

from lib.data.caption_table import CaptionRow, CaptionTable
from lib.data.fields import SPLITS
from lib.data.find_images import ImageFinder
from lib.errors import InputError
from lib.files import open_text

FOLDERS = (
    *("Images", "images", "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr8k_images"),
    *("flickr30k-images", "flickr30k_images", "flickr30k_images/flickr30k_images"),
)
"""Names of the folder of images in the copies in circulation."""

_CAPTIONS = ("captions.txt", "results.csv")
_TEXT_FOLDERS = (".", "Flickr8k_text", "Flickr_TextData", "flickr30k_images", "text", "annotations")
_TOKEN = re.compile(r"(.+?)#(\d+)\t(.*)")
_SPLIT_LIST = re.compile(r"(?:.*[._-])?(train|dev|val|test)(?:_?images)?\.txt", re.IGNORECASE)
# Flickr30k's table at Kaggle has a row whose second bar was forgotten.
_LOST_BAR = re.compile(r"\s*(\d+)\s+(.*)")

_Form = Literal["token", ",", "|", "\t"]


def flickr_fits(path: Path) -> int:
    """2 for a token file or a table with bars, 1 for other tables and for folders of either, 0 for the rest."""
    if path.is_dir():
        return 1 if _file_of(path) else 0
    form = _form_of(path)
    return 0 if form is None else 2 if form in ("token", "|") else 1


def read_flickr(path: Path, flag: str, image_root: str | None = None) -> CaptionTable:
    """Read a captions file of any form, or that of a folder, with the lists of splits next to it."""
    path = (_file_of(path) if path.is_dir() else None) or path
    form = _form_of(path)
    if form is None:
        raise InputError(
            f"{flag} {path} is none of Flickr's captions files: it must begin with a line of column names, as "
            "image,caption or image_name| comment_number| comment, or hold lines as 1.jpg#0<TAB>caption"
        )
    finder = ImageFinder(path.parent, FOLDERS, image_root, next_to=True)
    table = CaptionTable(path, "Flickr captions", flag)
    table.fill(flickr_rows(path, form, flag), finder)
    return table.checked(finder)


def flickr_rows(path: Path, form: _Form, flag: str) -> Iterator[CaptionRow]:
    """Yield a row for each caption; InputError where the lists of splits name none of the images."""
    lists, split_of = _split_lists(path.parent)
    on_no_list: dict[str, None] = {}
    any_listed = False
    for line, cells in _token_cells(path) if form == "token" else _table_cells(path, form):
        if cells is None or "\0" in cells[0]:
            yield CaptionRow("", line=line, reason="malformed_row")
            continue
        image, caption = cells
        # Flickr30k's lists leave the extension out.
        split = (split_of.get(image) or split_of.get(image.rpartition(".")[0])) if lists else "all"
        any_listed |= split is not None
        if split is None:
            on_no_list[image] = None
        else:
            yield CaptionRow(image, [caption], split)
    if on_no_list and not any_listed:
        raise InputError(f"{flag} {path}: the lists of splits next to it ({', '.join(lists)}) name none of its images")
    for image in on_no_list:
        yield CaptionRow(image, reason="no_split")


def _form_of(path: Path) -> _Form | None:
    """Return how a file writes its captions, judged by its first line; None for any other file."""
    first = ""
    with suppress(OSError), open_text(path) as file:
        first = file.readline(10_000)
    if _TOKEN.fullmatch(first.rstrip("\r\n")):
        return "token"
    for separator in ("|", "\t", ","):
        columns = _columns(first, separator)
        if len(columns) > 1 and columns[0] in ("image", "image_name") and columns[-1] in ("caption", "comment"):
            return separator
    return None


def _file_of(folder: Path) -> Path | None:
    """Return the captions file of a folder with Flickr8k or Flickr30k, or None."""
    for place in (folder / name for name in _TEXT_FOLDERS):
        token_files = sorted(place.glob("*.token.txt")) + sorted(place.glob("*.token"))
        # Flickr8k has its captions twice: as written, and lemmatized, which is not the text to train on.
        plain = [file for file in token_files if "lemma" not in file.name.lower()]
        for file in (*(place / name for name in _CAPTIONS), *plain):
            if file.is_file() and _form_of(file):
                return file
    return None


def _columns(header: str, separator: str) -> list[str]:
    return [name.strip().strip('"').lower() for name in header.split(separator)]


def _token_cells(path: Path) -> Iterator[tuple[int, tuple[str, str] | None]]:
    for line, text in _lines(path):
        match = _TOKEN.fullmatch(text)
        yield line, (match[1], match[3]) if match else None


def _table_cells(path: Path, separator: str) -> Iterator[tuple[int, tuple[str, str] | None]]:
    """Yield (line number, (image, caption)): the image from the first column, the caption from the last."""
    lines = _lines(path)
    count = len(_columns(next(lines)[1], separator))
    for line, text in lines:
        text = text.replace("\r", " ")
        cells = next(csv.reader([text], delimiter=separator)) if '"' in text else []
        if len(cells) != count:
            # Not quoted, or badly: the caption is all that follows, separators included.
            cells = text.split(separator, count - 1)
        if len(cells) == count - 1 == 2 and (match := _LOST_BAR.fullmatch(cells[1])):
            cells = [cells[0], *match.groups()]
        name = cells[0].strip()
        yield line, (name, cells[-1]) if len(cells) == count and name else None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, line) of the lines that are not blank, bad bytes as surrogates."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.rstrip("\r\n")


def _split_lists(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return the files next to the captions that list images by split, and the split of each image they name."""
    matches = [_SPLIT_LIST.fullmatch(file.name) for file in sorted(folder.glob("*.txt"))]
    lists = [match for match in matches if match and _lists_names(folder / match[0])]
    split_of: dict[str, str] = {}
    for match in lists:
        split_of.update((entry.strip(), SPLITS[match[1].lower()]) for _, entry in _lines(folder / match[0]))
    return [match[0] for match in lists], split_of


def _lists_names(file: Path) -> bool:
    """True where a file called train.txt lists one image a line: files of captions have that name too."""
    first = [entry.split() for _, entry in islice(_lines(file), 20)]
    return bool(first) and all(len(words) == 1 for words in first)
