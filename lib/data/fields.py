"""Fields of rows, read the same way for tables, shards and the hub: texts, names, classes, splits, unusable rows."""

from collections.abc import Collection, Mapping, Sequence
from math import isfinite
from typing import NamedTuple

_BYTE_ORDER_MARK = "\ufeff"


class Columns(NamedTuple):
    """Names of the columns to read; None: found by name and type."""

    image: str | None = None
    """--image-column"""
    caption: str | None = None
    """--caption-column"""


FOUND_COLUMNS = Columns()

COLUMNS = {
    "image": ("filename", "image", "image_path", "file_name", "filepath", "path", "image_name"),
    "caption": (
        *("caption", "captions", "text", "texts", "txt", "title", "sentence", "sentences", "comment"),
        *("description", "alt_text", "raw", "prompt"),
    ),
    "label": ("label", "labels", "fine_label", "class", "class_name", "class_label", "category", "target"),
    "split": ("split",),
    "group": ("group",),
}
"""Column names by meaning; the first one present is read, a label only where there is no caption."""

# Data sets agree on three splits but not on their names; "restval" is Karpathy's word for further training images.
SPLITS = {
    "train": "train",
    "restval": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
"""The split of each word that files use; data without splits has the single split "all"."""

Skips = tuple[tuple[str, str], ...]
"""(key, reason) of samples left out without opening an image"""


def of_all_splits(left_out: Mapping[str, Skips]) -> Skips:
    """Concatenate the skips of every split."""
    return tuple(skip for skips in left_out.values() for skip in skips)


def by_split(left_out: Mapping[str | None, Sequence[tuple[str, str]]], splits: Collection[str]) -> dict[str, Skips]:
    """Assign skips to the existing splits.

    Each skip must be counted exactly once over all splits. Those of no known split (None), or of a split without a
    usable sample, therefore go to the training split, or else to the first that exists.
    """
    first = next((split for split in ("train", "all", "val", "test") if split in splits), "all")
    assigned: dict[str, list[tuple[str, str]]] = {}
    for split, skips in left_out.items():
        assigned.setdefault(split if split is not None and split in splits else first, []).extend(skips)
    return {split: tuple(skips) for split, skips in assigned.items()}


class NotText(ValueError):
    """A field with an object, a list or a boolean instead of a text."""


def text_of(value: object) -> str | None:
    """Return the field as text, without surrounding white space and byte order marks; None where it is missing.

    null, NaN and infinite numbers (pandas writes NaN for a missing text) are missing. A number is its digits, 7.0 is
    "7". Raises NotText for anything else.
    """
    if isinstance(value, str):
        text = value.strip()
        return text.strip(_BYTE_ORDER_MARK).strip() if _BYTE_ORDER_MARK in text else text
    if value is None or (isinstance(value, float) and not isfinite(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise NotText(f"a {type(value).__name__} instead of a text")
    return str(int(value)) if value == int(value) else str(value)


def name_of(value: object) -> str | None:
    """Return a key, group or class name; None where the field is missing or empty. Raises NotText."""
    return text_of(value) or None


def image_name(value: object) -> str:
    """Return the name of an image file as written; raises NotText for anything that cannot be one."""
    if not isinstance(value, str) or not (name := value.strip()) or "\0" in name:
        raise NotText(f"{value!r} is no file name")
    return name


def texts_of(value: object) -> list[str]:
    """Return the captions of a field: every text of a list, or the single text; [] where the field is missing.

    A missing text in a list becomes "", because a caption's number is part of its sample id: the others keep theirs.
    Raises NotText for lists and objects in a list.
    """
    if not isinstance(value, str) and isinstance(value, list | tuple):  # texts first: tables have millions of them
        return [text_of(each) or "" for each in value]
    text = text_of(value)
    return [] if text is None else [text]


def is_utf8(text: str) -> bool:
    """True where the text can be written as UTF-8; tokenizers refuse one with half a surrogate pair."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(name: str) -> str:
    """Return the name in printable form: with escapes where it is not UTF-8."""
    return name if is_utf8(name) else ascii(name)


def readable_class(name: str) -> str:
    """Return a class name for prompts: underscores and white space become single spaces."""
    return " ".join(name.replace("_", " ").split()) or name
