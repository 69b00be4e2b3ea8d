"""Labelled images, and their splits: to train on, to choose on and to measure on, without a common image."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from lib.data.evaluation_set import EvaluationSet
from lib.errors import InputError
from lib.evaluation.embed import Embedded
from lib.evaluation.origin import has_trained_on
from lib.evaluation.subject import Subject

VALIDATION_SHARE, TEST_SHARE = 0.2, 0.25

Array = TypeVar("Array", np.ndarray, Tensor)


@dataclass(frozen=True)
class Labelled(Generic[Array]):
    """Embedded images with their classes."""

    rows: Array
    """(n, F) float32: embeddings, or features computed from them"""
    labels: np.ndarray
    """(n,) int64"""

    def take(self, places: np.ndarray) -> "Labelled[Array]":
        """Some of the images, by number."""
        return Labelled(self.rows[places], self.labels[places])


Split = Labelled[np.ndarray]
"""In scikit-learn's form"""


class Fold(NamedTuple):
    """The choice made on `chooser` is measured on the test images `rows`, of which it contains none."""

    chooser: Labelled[Tensor]
    rows: np.ndarray


def folds(test: Labelled[Tensor], validation: Labelled[Tensor] | None, seed: int) -> list[Fold]:
    """One fold with validation images; without, two, in which each half of the test images chooses for the other.

    Together the folds measure every test image once, and never with a choice made on it.
    """
    if validation is not None:
        return [Fold(validation, np.arange(len(test.labels)))]
    even, odd = halves(test.labels, seed)
    return [Fold(test.take(even), odd), Fold(test.take(odd), even)]


def halves(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of two halves of labels (n,), drawn by the seed, with equally many of every class; ascending."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    return np.sort(by_class[::2]), np.sort(by_class[1::2])


@dataclass(frozen=True)
class Splits:
    """Embedded images with labels, and how they were divided."""

    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    embedded: Embedded
    """all images of the subject's split, which was kept to test on or was divided"""
    facts: dict[str, str]
    """origin and size of each split, for people"""

    def with_rows(self, change: Callable[[np.ndarray], np.ndarray]) -> "Splits":
        """The same splits with other features, computed from each split's own: (n, D) -> (n, F)."""
        train, validation, test = (
            Labelled(change(each.rows), each.labels) for each in (self.train, self.validation, self.test)
        )
        return replace(self, train=train, validation=validation, test=test)


def embed_splits(subject: Subject) -> Splits:
    """Embed the subject's split to test on, and the data's train and val splits to train and to choose on.

    Without a train split the subject's own is divided, and without a val split the training images are, by class and
    by the seed. If the model comes from a run on these training images, the test images are divided in their place:
    nothing is chosen on images that the run learnt. All ranks together. InputError if no classifier can be trained.
    """
    train, validation = (_other(subject, split) for split in ("train", "val"))
    classes = _all_classes([each.data.labelling.classes for each in (subject, train, validation) if each is not None])
    embedded = subject.embed_images()
    test, name = _as_arrays(subject, embedded, classes), subject.data.name
    tested_on = f"of {name}"
    if train is None:
        kept, held_out = divide(test.labels, TEST_SHARE, subject.options.run.seed)
        training, test, train_name, tested_on = test.take(kept), test.take(held_out), name, f"held out of {name}"
    else:
        training, train_name = _as_arrays(train, train.embed_images(), classes), train.data.name
    _check_classes(training, classes, train_name)
    if validation is not None:
        chooser = _as_arrays(validation, validation.embed_images(), classes)
        source = f"of {validation.data.name}"
    elif train is not None and has_trained_on(subject.model.name, subject.options.data):
        # Embeddings that a model learnt separate the classes better than new ones: their best setting is another.
        kept, held_out = divide(test.labels, 0.5, subject.options.run.seed)
        chooser, test, tested_on = test.take(held_out), test.take(kept), f"of {name}, the other half"
        source = f"of {name}, one half of it, because the model was trained on images of {train_name}"
    else:
        kept, held_out = divide(training.labels, VALIDATION_SHARE, subject.options.run.seed)
        training, chooser, source = training.take(kept), training.take(held_out), f"held out of {train_name}"
    for each, purpose in ((chooser, "to choose the regularization on"), (test, "to test on")):
        if len(each.labels) == 0:
            raise InputError(f"{name} leaves no images {purpose}; give it a split folder or more images per class")
    facts = {
        "trained on": f"{len(training.labels):,} images of {train_name}",
        "chosen on": f"{len(chooser.labels):,} images {source}",
        "tested on": f"{len(test.labels):,} images {tested_on}",
    }
    facts |= _missing(classes, training.labels, "classes without training images")
    facts |= _missing(classes, test.labels, "classes without test images")
    return Splits(training, chooser, test, classes, embedded, facts)


def readable(data: EvaluationSet, embedded: Embedded, classes: Sequence[str]) -> Labelled[Tensor]:
    """Images that could be read, with labels that number `classes`; images of other classes are left out."""
    labels, own_classes, _ = data.labelling
    number = {name: row for row, name in enumerate(classes)}
    labels = np.array([number.get(name, -1) for name in own_classes], dtype=np.int64)[labels]
    kept = np.flatnonzero(embedded.valid.numpy() & (labels >= 0))
    return Labelled(embedded.embeds[kept], labels[kept])


def divide(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers kept and held out, the same share of each class; a class keeps at least one, and gives one of two."""
    order = np.random.default_rng(seed).permutation(len(labels))
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        held_out[rows[: min(max(1, round(len(rows) * share)), len(rows) - 1)]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _other(subject: Subject, split: str) -> Subject | None:
    """Another split than the subject's, if the data has it and it has images."""
    other = subject.of(split)
    return None if other is subject or other is None or len(other.data) == 0 else other


def _all_classes(lists: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The classes of all splits: shards may know only those that occur in them."""
    for names in lists:
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise InputError(f"two classes are called {repeated[0]!r}; rename one")
    return tuple(dict.fromkeys(name for names in lists for name in names))


def _as_arrays(subject: Subject, embedded: Embedded, classes: tuple[str, ...]) -> Split:
    """The subject's readable images."""
    found = readable(subject.data, embedded, classes)
    return Labelled(found.rows.numpy(), found.labels)


def _check_classes(training: Labelled, classes: tuple[str, ...], name: str) -> None:
    found = np.unique(training.labels)
    if len(found) < 2:
        only = f"one class, {classes[found[0]]!r}" if len(found) else "no class"
        raise InputError(f"the training images of {name} have {only}: a classifier needs at least two to tell apart")


def _missing(classes: tuple[str, ...], labels: np.ndarray, title: str) -> dict[str, str]:
    present = set(labels.tolist())
    missing = [name for number, name in enumerate(classes) if number not in present]
    return {title: ", ".join(missing)} if missing else {}
