"""Owns images with classes, whatever they come from: training pairs and evaluation sets made of them."""

from collections.abc import Collection
from typing import Protocol

import numpy as np

from lib.data.evaluation_set import EvaluationSet
from lib.data.hub.samples import LabelledRows
from lib.data.pairs import Images, IndexedSource, class_groups, prompted_source
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
        """What a report calls them."""

    @property
    def splits(self) -> Collection[str]:
        """Which of train, val and test there are, or "all" alone."""

    def where(self, split: str) -> str:
        """The folder of a split, or the name."""

    def images(self, split: str) -> tuple[Images, np.ndarray, tuple[str, ...]]:
        """Images of a split, their labels (n,) int64, and the names of the classes, the same for all splits."""


def labelled_source(labelled: LabelledImages, templates: tuple[str, ...]) -> IndexedSource:
    """The training images with class prompts."""
    split = "train" if "train" in labelled.splits else "all"
    if split not in labelled.splits:
        raise InputError(f"--data {labelled.where('')} has no split for training, only {', '.join(labelled.splits)}")
    images, labels, classes = labelled.images(split)
    left_out = _left_out(labelled, split)
    return prompted_source(images, labels, classes, templates, labelled.where(split), labelled.kind, left_out)


def labelled_evaluation(labelled: LabelledImages, split: str, templates: tuple[str, ...]) -> EvaluationSet:
    """The images of one split with labels."""
    images, labels, classes = labelled.images(split)
    return EvaluationSet(
        name=f"{labelled.name} ({split})",
        images=images,
        group=class_groups(classes)[labels],
        labels=labels,
        classes=classes,
        templates=templates,
        skipped=_left_out(labelled, split),
    )


def _left_out(labelled: LabelledImages, split: str) -> tuple[tuple[str, str], ...]:
    """(key, reason) of what is not used; only rows may lack an image or a class."""
    return labelled.left_out.get(split, ()) if isinstance(labelled, LabelledRows) else ()
