"""Captions of Flickr8k and Flickr30k: Kaggle's tables, and the token files with lists of splits."""

import csv
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Literal

from lib.data.captions.listing import SPLITS, CaptionedImages, ImageFinder, Listing
from lib.data.fields import shown
from lib.errors import InputError
from lib.files import open_text

FOLDERS = (
    "Images",
    "images",
    "Flicker8k_Dataset",
    "Flickr8k_Dataset",
    "flickr8k_images",
    "flickr30k-images",
    "flickr30k_images",
    "flickr30k_images/flickr30k_images",
)
"""Names of the folder of images in the copies that are about."""

_CAPTIONS = ("captions.txt", "results.csv")
_TEXT_FOLDERS = (".", "Flickr8k_text", "Flickr_TextData", "flickr30k_images", "text", "annotations")
_TOKEN = re.compile(r"(.+?)#(\d+)\t(.*)")
_SPLIT_LIST = re.compile(r"(?:.*[._-])?(train|dev|val|test)(?:_?images)?\.txt", re.IGNORECASE)
# Flickr30k's table at Kaggle has a row whose second bar was forgotten.
_LOST_BAR = re.compile(r"\s*(\d+)\s+(.*)")

_Form = Literal["token", ",", "|", "\t"]


def read_flickr(path: Path, flag: str, image_root: str | None = None) -> CaptionedImages:
    """Read a captions file of any of the forms, with the lists of splits that lie beside it."""
    form = flickr_form(path)
    if form is None:
        raise InputError(
            f"{flag} {path} is none of Flickr's captions files: it must begin with a line of column names, as "
            "image,caption or image_name| comment_number| comment, or hold lines as 1.jpg#0<TAB>caption"
        )
    finder = ImageFinder(path.parent, FOLDERS, image_root, beside=True)
    listing = Listing(path, "Flickr captions", flag)
    split_of = _SplitLists(path.parent)
    on_no_list: dict[str, None] = {}
    for line, row in _token_rows(path) if form == "token" else _table_rows(path, form):
        if row is None or "\0" in row[0]:
            listing.skip(f"{path.name}:{line}", "malformed_row")
        elif (split := split_of(row[0])) is None:
            on_no_list[row[0]] = None
        else:
            listing.add(finder, row[0], split, [row[1]])
    if on_no_list and listing.empty:
        names = ", ".join(split_of.files)
        raise InputError(f"{flag} {path}: the lists of splits beside it ({names}) name none of its images")
    for name in on_no_list:
        listing.skip(shown(name), "no_split")
    return listing.finish(finder)


def flickr_form(path: Path) -> _Form | None:
    """How a file writes its captions, from its first line; None for any other file."""
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


def flickr_file(folder: Path) -> Path | None:
    """The captions file of a folder that holds Flickr8k or Flickr30k, or None."""
    for place in (folder / name for name in _TEXT_FOLDERS):
        token_files = sorted(place.glob("*.token.txt")) + sorted(place.glob("*.token"))
        # The lemmatized captions of Flickr8k lie beside the plain ones.
        plain = [file for file in token_files if "lemma" not in file.name.lower()]
        for file in (*(place / name for name in _CAPTIONS), *plain):
            if file.is_file() and flickr_form(file):
                return file
    return None


def _columns(header: str, separator: str) -> list[str]:
    return [name.strip().strip('"').lower() for name in header.split(separator)]


def _token_rows(path: Path) -> Iterator[tuple[int, tuple[str, str] | None]]:
    for line, text in _lines(path):
        match = _TOKEN.fullmatch(text)
        yield line, (match[1], match[3]) if match else None


def _table_rows(path: Path, separator: str) -> Iterator[tuple[int, tuple[str, str] | None]]:
    """(line number, (image, caption)): the image in the first column, the caption in the last."""
    lines = _lines(path)
    count = len(_columns(next(lines)[1], separator))
    for line, text in lines:
        text = text.replace("\r", " ")
        cells = next(csv.reader([text], delimiter=separator)) if '"' in text else []
        if len(cells) != count:
            # Not quoted, or not well: the caption is all that follows, separators included.
            cells = text.split(separator, count - 1)
        if len(cells) == count - 1 == 2 and (match := _LOST_BAR.fullmatch(cells[1])):
            cells = [cells[0], *match.groups()]
        name = cells[0].strip()
        yield line, (name, cells[-1]) if len(cells) == count and name else None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, line) of the lines that are not blank, bad bytes as surrogates."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.rstrip("\r\n")


class _SplitLists:
    """The lists of image names beside a captions file; called with a name, gives the image's split.

    "all" where there are no lists, None for an image that is on none of them.
    """

    def __init__(self, folder: Path):
        matches = [_SPLIT_LIST.fullmatch(file.name) for file in sorted(folder.glob("*.txt"))]
        lists = [match for match in matches if match and _lists_names(folder / match[0])]
        self.files = [match[0] for match in lists]
        self._split: dict[str, str] = {}
        for match in lists:
            split = SPLITS[match[1].lower()]
            self._split.update((entry.strip(), split) for _, entry in _lines(folder / match[0]))

    def __call__(self, image: str) -> str | None:
        if not self.files:
            return "all"
        # Flickr30k's lists leave the extension out.
        return self._split.get(image) or self._split.get(image.rpartition(".")[0])


def _lists_names(file: Path) -> bool:
    """Whether a file called train.txt is a list of images, one a line: others have that name too."""
    first = [entry.split() for _, entry in islice(_lines(file), 20)]
    return bool(first) and all(len(words) == 1 for words in first)
