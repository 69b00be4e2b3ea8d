"""Training pairs and evaluation sets, made of images with classes from anywhere."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from lib.data.classes.class_names import renamed
from lib.data.classes.labelled_rows import LabelledRows
from lib.data.evaluation_set import EvaluationSet
from lib.data.pairs import Images, IndexedSource, class_groups, prompted_source
from lib.data.skipped import Skips
from lib.errors import InputError


class LabelledImages(Protocol):
    """Images with class labels, in splits."""

    bank: str
    """the prompt templates that go with them, unless others are asked for"""

    @property
    def kind(self) -> str:
        """For descriptions: "class folders"."""

    @property
    def name(self) -> str:
        """Their name in reports."""

    @property
    def splits(self) -> Collection[str]:
        """Those of train, val and test that there are, or "all" alone."""

    @property
    def left_out(self) -> Mapping[str, Skips]:
        """(key, reason) of the samples of each split that cannot be used, as far as is known without opening them."""

    def where(self, split: str) -> str:
        """The folder of a split, or the name."""

    def images(self, split: str) -> tuple[Images, np.ndarray, tuple[str, ...]]:
        """Images of a split, their labels (n,) int64, and the names of the classes, the same for all splits."""


def labelled_source(
    labelled: LabelledImages, templates: tuple[str, ...], class_names: Path | None = None
) -> IndexedSource:
    """The training images with class prompts.

    class_names: a file of names to use instead of the data's, see `renamed`.
    """
    split = "train" if "train" in labelled.splits else "all"
    if split not in labelled.splits:
        raise InputError(f"--data {labelled.where('')} has no split for training, only {', '.join(labelled.splits)}")
    images, labels, classes = labelled.images(split)
    if class_names is None and isinstance(labelled, LabelledRows) and labelled.numbers_only:
        raise InputError(
            f"--data {labelled.where(split)} has numbers for classes ({', '.join(classes[:3])}, ...), which say "
            "nothing to a text tower; give --class-names FILE, a YAML list of their names in the order of the numbers"
        )
    classes = renamed(classes, class_names) if class_names else classes
    left_out = labelled.left_out.get(split, ())
    return prompted_source(images, labels, classes, templates, labelled.where(split), labelled.kind, left_out)


def labelled_evaluation(
    labelled: LabelledImages, split: str, templates: tuple[str, ...], class_names: Path | None = None
) -> EvaluationSet:
    """The images of one split with labels; class_names as in `labelled_source`."""
    images, labels, classes = labelled.images(split)
    classes = renamed(classes, class_names) if class_names else classes
    return EvaluationSet(
        name=f"{labelled.name} ({split})",
        images=images,
        group=class_groups(classes)[labels],
        labels=labels,
        classes=classes,
        templates=templates,
        skipped=labelled.left_out.get(split, ()),
    )
