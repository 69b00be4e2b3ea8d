"""Owns images with classes, whatever they come from: training pairs and evaluation sets made of them."""

from collections.abc import Collection
from typing import Protocol

import numpy as np

from lib.data.evaluation_set import EvaluationSet
from lib.data.pairs import Images, IndexedSource, class_groups, prompted_source
from lib.errors import InputError


class LabelledImages(Protocol):
    """Images with class labels, in splits."""

    kind: str
    """for descriptions: "class folders" """
    bank: str
    """the prompt templates that go with them, unless others are asked for"""

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
        raise InputError(f"--data {labelled.where('')} has no train folder, only {', '.join(labelled.splits)}")
    images, labels, classes = labelled.images(split)
    return prompted_source(images, labels, classes, templates, labelled.where(split), labelled.kind)


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
    )
