"""Reading of text, key, group and class fields, the same for shards and tables: null, NaN, numbers, lists and marks."""

from math import isfinite
from typing import NamedTuple

_BYTE_ORDER_MARK = "\ufeff"


class Columns(NamedTuple):
    """Names that the user gave of the columns to read; None: they are found by their names and types."""

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
"""Names of the columns, by what they hold; the first that is there is read, a label only without a caption."""


class NotText(ValueError):
    """A field that holds an object, a list or a boolean where a text belongs."""


def text_of(value: object) -> str | None:
    """The field as text, without white space and byte order marks around it; None where it is missing.

    null, NaN and infinite numbers (pandas writes NaN for a missing text) are missing. A number is its digits, 7.0 is
    "7". Raises NotText for anything else.
    """
    if isinstance(value, str):
        text = value.strip()
        return text.strip(_BYTE_ORDER_MARK).strip() if _BYTE_ORDER_MARK in text else text
    if value is None or (isinstance(value, float) and not isfinite(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise NotText(f"a {type(value).__name__} where a text belongs")
    return str(int(value)) if value == int(value) else str(value)


def name_of(value: object) -> str | None:
    """A key, group or class name; None where the field is missing or empty. Raises NotText."""
    return text_of(value) or None


def texts_of(value: object) -> list[str]:
    """Captions: of a list each of its texts, of anything else the one text; [] where the field is missing.

    A missing text in a list is "": the others keep their numbers. Raises NotText for lists and objects in a list.
    """
    if not isinstance(value, str) and isinstance(value, list | tuple):  # texts first: tables have millions of them
        return [text_of(each) or "" for each in value]
    text = text_of(value)
    return [] if text is None else [text]


def is_utf8(text: str) -> bool:
    """Whether the text can be written as UTF-8: one with half a surrogate pair cannot, and no tokenizer takes it."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(name: str) -> str:
    """The name as it may be printed: with escapes where it is not UTF-8."""
    return name if is_utf8(name) else ascii(name)


def readable_class(name: str) -> str:
    """A class's name in prompts: underscores and any white space of a folder's name read as one space."""
    return " ".join(name.replace("_", " ").split()) or name
