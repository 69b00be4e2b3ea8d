"""Samples of a data set that the `datasets` library reads: captioned images, or images with classes."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from lib.data.captions.listing import SPLITS, Caption, Captioned, CaptionedImages, ImageFinder
from lib.data.classes.labelled_rows import LabelledRows
from lib.data.fields import Columns, NotText, is_utf8, name_of, readable_class, texts_of
from lib.data.hub.columns import Found, find_columns
from lib.data.hub.library import Rows
from lib.data.hub.row_images import RowImages
from lib.data.skipped import by_split
from lib.errors import InputError

_AT_ONCE = 10_000
_NOT_UTF8 = "\udcff"


def read_rows(
    loaded: Rows, path: Path, kind: str, flag: str, image_root: str | None, columns: Columns
) -> CaptionedImages | LabelledRows:
    """Read all but the images, in the order of the rows; InputError, naming `flag`, for columns that cannot be used."""
    table = loaded.table
    found = find_columns(table, columns, f"{flag} {path}")
    keys = [f"{split.own_name}/{row}" for split in loaded.splits for row in range(split.rows)]
    splits = [split.split for split in loaded.splits for _ in range(split.rows)]
    if "split" in table.column_names and found.captions != ("split",):
        splits = _own_splits(table, splits, f"{flag} {path}")
    places = _places(table, found.image, path, flag, image_root)
    images = RowImages(keys, places, _encoded(table, found.image), f"{loaded.version} {found.image}")
    if loaded.unread:
        kind += f" (without the split {', '.join(loaded.unread)})"
    if found.label is not None:
        return _labelled(table, found, splits, images, path, kind, flag)
    return _captioned(table, found, splits, images, path, kind)


def _captioned(
    table: Any, found: Found, splits: list[str], images: RowImages, path: Path, kind: str
) -> CaptionedImages:
    listed: list[Captioned] = []
    left_out: dict[str | None, list[tuple[str, str]]] = {}
    for row, (group, *values) in enumerate(_values(table, ["group", *found.captions])):
        try:
            named = name_of(group)
            # In several columns a missing caption keeps its place: the others keep their numbers.
            texts = [text for value in values for text in (texts_of(value) or [""] * (len(values) > 1))]
        except NotText:
            left_out.setdefault(splits[row], []).append((images.keys[row], "malformed_row"))
            continue
        if not is_utf8(named or ""):
            left_out.setdefault(splits[row], []).append((images.keys[row], "not_utf8"))
            continue
        captions = [Caption(number, text) for number, text in enumerate(texts)]
        place = None if images.places[row] is None else row
        listed.append(Captioned(images.keys[row], None, splits[row], named, captions, place))
    skips = by_split(left_out, {image.split for image in listed})
    return CaptionedImages(path, kind, listed, skips, images, has_columns=True)


def _labelled(
    table: Any, found: Found, splits: list[str], images: RowImages, path: Path, kind: str, flag: str
) -> LabelledRows:
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
    labels = [number.get(name or "", -1) for name in named]
    rows: dict[str, list[int]] = {}
    left_out: dict[str | None, list[tuple[str, str]]] = {}
    for row, (split, place, label) in enumerate(zip(splits, images.places, labels, strict=True)):
        if place is None or label < 0:
            left_out.setdefault(split, []).append((images.keys[row], "missing" if place is None else "no_text"))
        else:
            rows.setdefault(split, []).append(row)
    if not rows:
        raise InputError(f"{flag} {path}: no row has an image and a class in column {found.label}")
    skips = by_split(left_out, rows)
    return LabelledRows(path, kind, images, np.array(labels, dtype=np.int64), classes, rows, skips)


def _own_splits(table: Any, given: list[str], asked: str) -> list[str]:
    """The splits that a column of that name says, else those given."""
    words = [word if isinstance(word, str) else None for (word,) in _values(table, ["split"])]
    unknown = next((word for word in words if word is not None and word.lower() not in SPLITS), None)
    if unknown is not None:
        raise InputError(
            f"{asked}: column split holds {unknown!r}, none of {', '.join(SPLITS)}; rename or remove the column"
        )
    return [own if word is None else SPLITS[word.lower()] for word, own in zip(words, given, strict=True)]


def _places(table: Any, image: str, path: Path, flag: str, image_root: str | None) -> list[int | str | None]:
    """Of each row its number where it stores an image, the path where it names a file, None where there is neither."""
    beside = path if path.is_dir() else path.parent
    finder = ImageFinder(beside if beside.is_dir() else Path(), ("data", "images", "data/images"), image_root)
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
    """Whether each row stores an image, and else the name of its file; image bytes are not read."""
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
    """The column of images alone, which the library does not decode."""
    import datasets

    column = table.select_columns([image])
    is_image = isinstance(column.features[image], datasets.Image)
    return column.cast_column(image, datasets.Image(decode=False)) if is_image else column


def _values(table: Any, columns: list[str]) -> Iterator[tuple]:
    """The values of these columns, row by row; None of a column that the table lacks."""
    there = [name for name in columns if name in table.column_names]
    for some in _batches(table, there):
        values = {name: _python(some[name]) for name in there}
        yield from zip(*(values.get(name, [None] * len(some)) for name in columns), strict=True)


def _batches(table: Any, columns: list[str]) -> Iterator[Any]:
    """The columns as pyarrow tables of some rows each, not copied."""
    chosen = table.select_columns(columns).with_format("arrow")
    return (chosen[start : start + _AT_ONCE] for start in range(0, len(chosen), _AT_ONCE))


def _python(array: Any) -> list:
    """The values; one that is not UTF-8, as in a damaged file, becomes a text that is counted as that."""
    with suppress(UnicodeDecodeError):
        return array.to_pylist()
    return [_python_value(value) for value in array]


def _python_value(value: Any) -> object:
    with suppress(UnicodeDecodeError):
        return value.as_py()
    return _NOT_UTF8
