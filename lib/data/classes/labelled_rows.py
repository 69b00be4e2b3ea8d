"""Rows of a table that name an image and its class, whether the images are files or lie in the rows."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.data.captions.listing import CaptionedImages
from lib.data.fields import readable_class
from lib.data.hub.row_images import RowImages
from lib.data.images import ImageFiles
from lib.data.skipped import Skips, by_split
from lib.errors import InputError


@dataclass(frozen=True)
class LabelledRows:
    """Rows with an image and a class, in splits."""

    path: Path
    """as the user named the data"""
    kind: str
    every_image: RowImages | ImageFiles
    labels: np.ndarray
    """(all rows,) int64, index into `classes`; -1 where there is none"""
    classes: tuple[str, ...]
    rows: dict[str, list[int]]
    """split -> rows that can be used; no split without any"""
    left_out: dict[str, Skips]
    """split -> (key, reason) of the others"""
    has_columns: bool = True
    """whether --image-column and --caption-column choose what is read"""
    bank = "simple"

    @property
    def name(self) -> str:
        return self.path.resolve().name if self.path.exists() else str(self.path)

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.rows)

    def where(self, split: str) -> str:
        """The data's name, whatever the split."""
        return str(self.path)

    def images(self, split: str) -> tuple[RowImages | ImageFiles, np.ndarray, tuple[str, ...]]:
        """Images of a split, their labels (n,) int64, and the class names with underscores read as spaces."""
        rows = self.rows[split]
        return self.every_image.chosen(rows), self.labels[rows], self.classes

    @property
    def numbers_only(self) -> bool:
        """Whether the classes are numbers, which say nothing to a text tower."""
        return all(name.isdecimal() for name in self.classes)


def labelled_by_captions(captioned: CaptionedImages, flag: str) -> LabelledRows:
    """Image files whose one caption is the name of their class, in the order in which they were named.

    The classes are sorted by name, or by number where all are numbers. An image that is named again in its split is
    counted as repeated_name. Raises InputError, naming `flag`, where no image has a class.
    """
    names = [readable_class(image.captions[0].text) if image.captions else "" for image in captioned.images]
    faults = [image.captions[0].fault if image.captions else "empty_caption" for image in captioned.images]
    found = {name for name, fault in zip(names, faults, strict=True) if not fault}
    classes = sorted(found, key=int) if all(map(str.isdecimal, found)) else sorted(found)
    number = {name: index for index, name in enumerate(classes)}
    rows: dict[str, list[int]] = {}
    left_out: dict[str | None, list[tuple[str, str]]] = {split: [*skips] for split, skips in captioned.left_out.items()}
    for row, (image, fault) in enumerate(zip(captioned.images, faults, strict=True)):
        skips = left_out.setdefault(image.split, [])
        if image.path is None:
            skips.append((image.key, "missing"))
            continue
        if fault:
            skips.append((image.key, "no_text" if fault == "empty_caption" else fault))
        else:
            rows.setdefault(image.split, []).append(row)
        skips += [(image.key, "repeated_name")] * (len(image.captions) - 1)
    if not rows:
        raise InputError(f"{flag} {captioned.path}: no row has an image and a class")
    images = ImageFiles([image.key for image in captioned.images], [image.path or "" for image in captioned.images])
    labels = np.array([number.get(name, -1) for name in names], dtype=np.int64)
    return LabelledRows(
        captioned.path, captioned.kind, images, labels, tuple(classes), rows, by_split(left_out, rows),
        captioned.has_columns,
    )  # fmt: skip
