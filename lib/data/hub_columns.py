"""Columns of a data set that the `datasets` library reads: images with captions, or with classes."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lib.data.caption_table import CaptionRow, CaptionTable
from lib.data.fields import COLUMNS, SPLITS, Columns, NotText, is_utf8, name_of, readable_class, texts_of
from lib.data.find_images import ImageFinder
from lib.data.labelled_table import LabelledTable, divide, labelled_rows
from lib.data.load_datasets import RowImages, Rows
from lib.errors import InputError

_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")
_LABELS = COLUMNS["label"]
_NUMBERED = re.compile(r"(?:caption|text|sentence)s?_?(\d+)", re.IGNORECASE)
_AT_ONCE = 10_000
_NOT_UTF8 = "\udcff"


class Found(NamedTuple):
    """The columns to read."""

    image: str
    captions: tuple[str, ...]
    """text or lists of text; none where the data has classes"""
    label: str | None
    """class names, or numbers that have names"""
    names: tuple[str, ...]
    """of the numbers in `label`"""


def read_rows(
    loaded: Rows, path: Path, kind: str, flag: str, image_root: str | None, columns: Columns
) -> CaptionTable | LabelledTable:
    """Read all columns but the images; InputError, naming `flag`, for columns that cannot be used."""
    table, keys, splits = loaded.table, loaded.keys, loaded.splits
    found = _find_columns(table, columns, f"{flag} {path}")
    if "split" in table.column_names and found.captions != ("split",):
        splits = _own_splits(table, splits, f"{flag} {path}")
    places = _places(table, found.image, path, flag, image_root)
    images = RowImages(keys, places, _encoded(table, found.image), f"{loaded.version} {found.image}")
    if loaded.unread:
        kind += f" (without the split {', '.join(loaded.unread)})"
    if found.label is not None:
        return _labelled(table, found, splits, images, path, kind, flag)
    captions = CaptionTable(path, kind, flag, images, has_columns=True)
    captions.fill(_caption_rows(table, found, splits, images), None)
    return captions


def _caption_rows(table: Any, found: Found, splits: list[str], images: RowImages) -> Iterator[CaptionRow]:
    for row, (group, *values) in enumerate(_values(table, ["group", *found.captions])):
        key, stored = images.keys[row], None if images.places[row] is None else row
        try:
            # In several columns a missing caption keeps its place: the others keep their numbers.
            texts = [text for value in values for text in (texts_of(value) or [""] * (len(values) > 1))]
            yield CaptionRow(key, texts, splits[row], group=name_of(group), stored=stored)
        except NotText:
            yield CaptionRow(key, split=splits[row], reason="malformed_row")


def _labelled(
    table: Any, found: Found, splits: list[str], images: RowImages, path: Path, kind: str, flag: str
) -> LabelledTable:
    assert found.label is not None
    values = [value for (value,) in _values(table, [found.label])]
    if found.names:
        # Names that read alike, a_b and "a b", are one class.
        names = [readable_class(name) for name in found.names]
        classes = tuple(dict.fromkeys(names))
        named = [None if value is None or not 0 <= value < len(names) else names[value] for value in values]
    else:
        named = [readable_class(name_of(value) or "") for value in values]
        classes = tuple(sorted(name for name in {*named} if name and is_utf8(name)))
    number = {name: index for index, name in enumerate(classes)}
    labels = np.array([number.get(name or "", -1) for name in named], dtype=np.int64)
    faults = [
        "missing" if place is None else "no_text" if label < 0 else None
        for place, label in zip(images.places, labels, strict=True)
    ]
    parts, left_out = divide(images, labels, classes, splits, faults, {})
    if not parts:
        raise InputError(f"{flag} {path}: no row has an image and a class in column {found.label}")
    return labelled_rows(path, kind, parts, left_out)


def _own_splits(table: Any, given: list[str], asked: str) -> list[str]:
    """Return the splits in a column of that name, or the given ones where it is empty."""
    words = [word if isinstance(word, str) else None for (word,) in _values(table, ["split"])]
    unknown = next((word for word in words if word is not None and word.lower() not in SPLITS), None)
    if unknown is not None:
        raise InputError(
            f"{asked}: column split holds {unknown!r}, none of {', '.join(SPLITS)}; rename or remove the column"
        )
    return [own if word is None else SPLITS[word.lower()] for word, own in zip(words, given, strict=True)]


def _places(table: Any, image: str, path: Path, flag: str, image_root: str | None) -> list[int | str | None]:
    """Return each row's number where it stores an image, the path where it names a file, None where it has neither."""
    folder = path if path.is_dir() else path.parent
    finder = ImageFinder(folder if folder.is_dir() else Path(), ("data", "images", "data/images"), image_root)
    places: list[int | str | None] = []
    first_name = None
    for stored, name in _stored_or_named(table, image):
        first_name = first_name or name
        places.append(len(places) if stored else finder.find(name) if name else None)
    if image_root is not None and first_name is None:
        raise InputError(f"--image-root {image_root}: {flag} {path} holds its own images; leave it out")
    if first_name is not None and not any(place is not None for place in places):
        raise InputError(
            f"{flag} {path}: of the images that its column {image} names not one is there (the first: {first_name!r}); "
            f"they are looked for in {finder.where}; --image-root says where they are"
        )
    return places


def _stored_or_named(table: Any, image: str) -> Iterator[tuple[bool, str | None]]:
    """Yield True for each row that stores an image, and else the name of its file; image bytes are not read."""
    import pyarrow.compute as pc
    import pyarrow.types as arrow

    for some in _batches(table, [image]):
        stored = named = column = some[image]
        if arrow.is_struct(column.type):
            stored, named = pc.struct_field(column, "bytes"), pc.struct_field(column, "path")
        elif arrow.is_string(column.type) or arrow.is_large_string(column.type):
            stored = None
        else:
            named = None
        is_stored = [False] * len(column) if stored is None else stored.is_valid().to_pylist()
        names = [None] * len(column) if named is None or all(is_stored) else _python(named)
        yield from ((held, None if held else name) for held, name in zip(is_stored, names, strict=True))


def _encoded(table: Any, image: str) -> Any:
    """Return the column of images alone, which the library then does not decode."""
    import datasets

    column = table.select_columns([image])
    is_image = isinstance(column.features[image], datasets.Image)
    return column.cast_column(image, datasets.Image(decode=False)) if is_image else column


def _values(table: Any, columns: list[str]) -> Iterator[tuple]:
    """Yield the values of these columns, row by row; None of a column that the table lacks."""
    there = [name for name in columns if name in table.column_names]
    for some in _batches(table, there):
        values = {name: _python(some[name]) for name in there}
        yield from zip(*(values.get(name, [None] * len(some)) for name in columns), strict=True)


def _batches(table: Any, columns: list[str]) -> Iterator[Any]:
    """Yield the columns as pyarrow tables of some rows each, not copied."""
    chosen = table.select_columns(columns).with_format("arrow")
    return (chosen[start : start + _AT_ONCE] for start in range(0, len(chosen), _AT_ONCE))


def _python(array: Any) -> list:
    """Return the values; one that is not UTF-8, as in a damaged file, becomes a text that is counted as such."""
    with suppress(UnicodeDecodeError):
        return array.to_pylist()
    return [_python_value(value) for value in array]


def _python_value(value: Any) -> object:
    with suppress(UnicodeDecodeError):
        return value.as_py()
    return _NOT_UTF8


class _Types:
    """The columns of a table by type."""

    def __init__(self, table: Any):
        import pyarrow.types as arrow

        self._types = {field.name: field.type for field in table.features.arrow_schema}
        self._features = {name: type(feature).__name__ for name, feature in table.features.items()}

        def is_text(kind: Any) -> bool:
            return arrow.is_string(kind) or arrow.is_large_string(kind)

        def is_list(kind: Any) -> bool:
            return arrow.is_list(kind) or arrow.is_large_list(kind) or arrow.is_fixed_size_list(kind)

        self.images = self._of(lambda kind: arrow.is_struct(kind) and {"bytes", "path"} <= {each.name for each in kind})
        self.binary = self._of(lambda kind: arrow.is_binary(kind) or arrow.is_large_binary(kind))
        self.text = self._of(is_text)
        self.texts = self._of(lambda kind: is_text(kind) or (is_list(kind) and is_text(kind.value_type)))
        self.classes = [name for name, feature in self._features.items() if feature == "ClassLabel"]
        self.integers = [name for name in self._of(arrow.is_integer) if name not in self.classes]

    def _of(self, test: Callable[[Any], bool]) -> list[str]:
        return [name for name, kind in self._types.items() if test(kind)]

    def __str__(self) -> str:
        named = {*self.images, *(name for name, feature in self._features.items() if feature == "Image"), *self.classes}
        words = {name: self._features[name] if name in named else str(kind)[:40] for name, kind in self._types.items()}
        return ", ".join(f"{name} ({word})" for name, word in words.items())


def _find_columns(table: Any, wanted: Columns, asked: str) -> Found:
    """Find the columns of a `datasets.Dataset` by type and name, or those that are wanted.

    Raises InputError, beginning with `asked`, that names the columns and the flag to choose one.
    """
    types = _Types(table)
    image = _image(types, wanted.image, asked)
    captions, label = _texts(types, wanted.caption, image, asked)
    names = tuple(table.features[label].names) if label in types.classes else ()
    return Found(image, captions, label, names)


def _image(types: _Types, wanted: str | None, asked: str) -> str:
    if wanted is not None:
        if wanted not in [*types.images, *types.binary, *types.text]:
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
    """Return (columns of captions, column of classes), one of them empty."""
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
    """Return the column with the first of these names; `alone`: or the only column, whatever its name."""
    if alone and len(columns) == 1:
        return columns[0]
    own_name = {column.lower(): column for column in reversed(columns)}
    return next((own_name[name] for name in names if name in own_name), None)
