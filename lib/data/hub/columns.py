"""Columns of a data set that the `datasets` library reads: which holds the image, which the captions or the class."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lib.data.fields import COLUMNS, Columns
from lib.errors import InputError

_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")
_LABELS = COLUMNS["label"]
_NUMBERED = re.compile(r"(?:caption|text|sentence)s?_?(\d+)", re.IGNORECASE)


class Found(NamedTuple):
    """The columns that are read."""

    image: str
    captions: tuple[str, ...]
    """text or lists of text; none where the data has classes"""
    label: str | None
    """class names, or numbers that have names"""
    names: tuple[str, ...]
    """of the numbers in `label`"""


class _Types:
    """The columns of a table by type."""

    def __init__(self, table: Any):
        import datasets
        import pyarrow.types as arrow

        self.features, self.arrow = table.features, {field.name: field.type for field in table.features.arrow_schema}
        strings = (arrow.is_string, arrow.is_large_string)
        lists = (arrow.is_list, arrow.is_large_list, arrow.is_fixed_size_list)

        def is_text(kind: Any) -> bool:
            return any(test(kind) for test in strings)

        def is_image(kind: Any) -> bool:
            return arrow.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}

        def is_texts(kind: Any) -> bool:
            return is_text(kind) or (any(test(kind) for test in lists) and is_text(kind.value_type))

        self.images = self._of(is_image)
        self.binary = self._of(lambda kind: arrow.is_binary(kind) or arrow.is_large_binary(kind))
        self.text = self._of(is_text)
        self.texts = self._of(is_texts)
        self.classes = [name for name in self.arrow if isinstance(self.features[name], datasets.ClassLabel)]
        self.integers = [name for name in self._of(arrow.is_integer) if name not in self.classes]

    def _of(self, test: Callable[[Any], bool]) -> list[str]:
        return [name for name, kind in self.arrow.items() if test(kind)]

    def __str__(self) -> str:
        return ", ".join(f"{name} ({self._kind(name)})" for name in self.arrow)

    def _kind(self, name: str) -> str:
        feature = type(self.features[name]).__name__
        return feature if feature in ("Image", "ClassLabel") or name in self.images else str(self.arrow[name])[:40]


def find_columns(table: Any, wanted: Columns, asked: str) -> Found:
    """Find the columns of a `datasets.Dataset` by type and name, or those that are wanted.

    Raises InputError, beginning with what was asked for, that names the columns and the flag to choose one.
    """
    types = _Types(table)
    image = _image(types, wanted.image, asked)
    captions, label = _texts(types, wanted.caption, image, asked)
    names = tuple(table.features[label].names) if label in types.classes else ()
    return Found(image, captions, label, names)


def _image(types: _Types, wanted: str | None, asked: str) -> str:
    possible = [*types.images, *types.binary, *types.text]
    if wanted is not None:
        if wanted not in possible:
            raise InputError(f"{asked}: --image-column {wanted} is no column of images or paths; it has {types}")
        return wanted
    binary = [name for name in types.binary if name.lower() in _IMAGES]
    paths = [name for name in types.text if name.lower() in COLUMNS["image"]]
    of_a_type = next(filter(None, (types.images, binary, paths)), [])
    found = _first_named(of_a_type, COLUMNS["image"] if of_a_type is paths else _IMAGES)
    if found is None:
        number = "several columns" if of_a_type else "no column"
        raise InputError(f"{asked} has {number} of images: it has {types}; choose one by --image-column NAME")
    return found


def _texts(types: _Types, wanted: str | None, image: str, asked: str) -> tuple[tuple[str, ...], str | None]:
    """(columns of captions, column of classes), one of them empty."""
    texts = [name for name in types.texts if name != image]
    if wanted is not None:
        if wanted in types.classes or (wanted in types.text and wanted.lower() in _LABELS):
            return (), wanted
        if wanted in texts:
            return (wanted,), None
        raise InputError(f"{asked}: --caption-column {wanted} holds neither text nor named classes; it has {types}")
    named = _first_named(texts, COLUMNS["caption"], alone=False)
    if named is not None:
        return (named,), None
    numbered = {int(match[1]): name for name in texts if (match := _NUMBERED.fullmatch(name))}
    if numbered:
        return tuple(numbered[number] for number in sorted(numbered)), None
    label = _first_named(types.classes, _LABELS) or _first_named(texts, _LABELS, alone=False)
    if label is not None:
        return (), label
    numbers = _first_named(types.integers, _LABELS, alone=False)
    if numbers is not None:
        raise InputError(
            f"{asked}: column {numbers} holds numbers without class names; store it as a ClassLabel or as text, or "
            f"choose another by --caption-column NAME; it has {types}"
        )
    several = "several columns of classes" if types.classes else "no column of captions or of classes"
    raise InputError(f"{asked} has {several}: it has {types}; choose one by --caption-column NAME")


def _first_named(columns: Sequence[str], names: Sequence[str], alone: bool = True) -> str | None:
    """The column with the first of these names; `alone`: or the only column, whatever its name."""
    if alone and len(columns) == 1:
        return columns[0]
    own_name = {column.lower(): column for column in reversed(columns)}
    return next((own_name[name] for name in names if name in own_name), None)
