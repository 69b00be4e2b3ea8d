"""The table of images with classes: every reader of classes fills it, and training and evaluation use it."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from lib.data.caption_table import CaptionTable, divided_names
from lib.data.evaluation_set import EvaluationSet
from lib.data.fields import Skips, by_split, of_all_splits, readable_class
from lib.data.images import ImageFiles
from lib.data.load_datasets import RowImages
from lib.data.pairs import Images, IndexedSource, class_groups, prompted_source
from lib.data.prompt_banks import renamed
from lib.errors import InputError


class Labelled(NamedTuple):
    """The images of one split with their classes."""

    images: Images
    labels: np.ndarray
    """(n,) int64, index into `classes`"""
    classes: tuple[str, ...]
    """the same in all splits, so that a class has one number"""


@dataclass(frozen=True, kw_only=True)
class LabelledTable:
    """Images with class labels by split, and the samples that cannot be used."""

    name: str
    """for reports"""
    kind: str
    """for descriptions: "class folders" """
    where: str
    """the folder, or the name that the user gave"""
    where_train: str | None = None
    """the folder of the training split, if it has one of its own"""
    splits: tuple[str, ...]
    """some of train, val and test, or "all" alone"""
    images: Callable[[str], Labelled]
    """returns those of a split; some sets are downloaded only then"""
    left_out: Mapping[str, Skips] = field(default_factory=dict)
    """split -> (key, reason) of the samples that are known to be unusable without opening them"""
    bank: str = "simple"
    """the prompt templates for these classes, unless the user chooses others"""
    has_columns: bool = False
    """True where --image-column and --caption-column choose the columns to read"""
    divisible: Literal["by_class", "by_folder"] | None = None
    """the sets of which --hold-out takes a fraction each; None: the data has splits of its own, always"""

    def source(self, templates: tuple[str, ...], class_names: Path | None = None) -> IndexedSource:
        """Return the training images with class prompts; class_names: a file, see `renamed`."""
        split = "train" if "train" in self.splits else "all"
        if split not in self.splits:
            raise InputError(f"--data {self.where} has no split for training, only {', '.join(self.splits)}")
        where = self.where_train if self.where_train and split == "train" else self.where
        images, labels, classes = self.images(split)
        if class_names is None and self.has_columns and all(name.isdecimal() for name in classes):
            raise InputError(
                f"--data {where} has numbers for classes ({', '.join(classes[:3])}, ...), which say nothing to a text "
                "tower; give --class-names FILE, a YAML list of their names in the order of the numbers"
            )
        classes = renamed(classes, class_names) if class_names else classes
        return prompted_source(images, labels, classes, templates, where, self.kind, self.left_out.get(split, ()))

    def evaluation(self, split: str, templates: tuple[str, ...], class_names: Path | None = None) -> EvaluationSet:
        """Return the images of one split with labels; class_names as in `source`."""
        images, labels, classes = self.images(split)
        classes = renamed(classes, class_names) if class_names else classes
        return EvaluationSet(
            name=f"{self.name} ({split})",
            images=images,
            group=class_groups(classes)[labels],
            labels=labels,
            classes=classes,
            templates=templates,
            skipped=self.left_out.get(split, ()),
        )

    def held_out(self, fraction: float) -> "LabelledTable":
        """Divide the single split into train, val and test; a fraction of each class, so that each half has all."""
        images, labels, classes = self.images(*self.splits)
        assert isinstance(images, ImageFiles | RowImages)
        # Folders: "cat/1.jpg" is chosen alike in a root of class folders and in the train folder of a split one.
        by_folder = self.divisible == "by_folder"
        names = ["/".join(key.split("/")[-2:]) if by_folder else key for key in images.keys]
        sets = [os.path.dirname(key) for key in images.keys] if by_folder else labels.tolist()
        of_set: dict[str | int, list[str]] = {}
        for each, name in zip(sets, names, strict=True):
            of_set.setdefault(each, []).append(name)
        divided = {each: divided_names(members, fraction) for each, members in of_set.items()}
        split_of = [divided[each][name] for each, name in zip(sets, names, strict=True)]
        parts, _ = divide(images, labels, classes, split_of, [None] * len(names), {})
        left_out = {"train": of_all_splits(self.left_out)}
        splits = tuple(split for split in ("train", "val", "test") if split in parts)
        return replace(self, splits=splits, images=parts.__getitem__, left_out=left_out)


def divide(
    images: RowImages | ImageFiles,
    labels: np.ndarray,
    classes: tuple[str, ...],
    split_of: Sequence[str],
    faults: Sequence[str | None],
    skips: dict[str | None, list[tuple[str, str]]],
) -> tuple[dict[str, Labelled], dict[str, Skips]]:
    """Divide rows into splits: (usable images by split, skips by split).

    labels, split_of, faults: (rows,); a row with a fault is unusable. skips: what is known to be unusable besides.
    """
    rows: dict[str, list[int]] = {}
    for row, (split, fault) in enumerate(zip(split_of, faults, strict=True)):
        if fault is None:
            rows.setdefault(split, []).append(row)
        else:
            skips.setdefault(split, []).append((images.keys[row], fault))
    parts = {split: Labelled(images.chosen(chosen), labels[chosen], classes) for split, chosen in rows.items()}
    return parts, by_split(skips, parts)


def labelled_rows(
    path: Path, kind: str, splits: Mapping[str, Labelled], left_out: Mapping[str, Skips]
) -> LabelledTable:
    """Return the table of rows with columns of images and classes."""
    return LabelledTable(
        name=path.resolve().name if path.exists() else str(path),
        kind=kind,
        where=str(path),
        splits=tuple(splits),
        images=splits.__getitem__,
        left_out=left_out,
        has_columns=True,
        divisible="by_class",
    )


def labelled_by_captions(table: CaptionTable) -> LabelledTable:
    """Take the one caption of each image file as the name of its class.

    The classes are sorted by name, or by number where all are numbers. An image that is named again in its split is
    counted as repeated_name. InputError where no image has a class.
    """
    rows, skips = table.images, {split: [*skips] for split, skips in table.skips.items()}
    names, faults = [], []
    for image in rows:
        name, fault = (image.captions[0].text, image.captions[0].fault) if image.captions else ("", "empty_caption")
        names.append(readable_class(name))
        faults.append("missing" if image.path is None else "no_text" if fault == "empty_caption" else fault)
        if image.path is not None:
            skips.setdefault(image.split, []).extend([(image.key, "repeated_name")] * (len(image.captions) - 1))
    found = {name for name, image in zip(names, rows, strict=True) if image.captions and not image.captions[0].fault}
    classes = sorted(found, key=int) if all(map(str.isdecimal, found)) else sorted(found)
    number = {name: index for index, name in enumerate(classes)}
    images = ImageFiles([image.key for image in rows], [image.path or "" for image in rows])
    labels = np.array([number.get(name, -1) for name in names], dtype=np.int64)
    parts, left_out = divide(images, labels, tuple(classes), [image.split for image in rows], faults, skips)
    if not parts:
        raise InputError(f"{table.flag} {table.path}: no row has an image and a class")
    return labelled_rows(table.path, table.kind, parts, left_out)
