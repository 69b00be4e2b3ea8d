"""Parts of labelled data to train on, to choose on and to measure on, without a common image."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lib.errors import InputError
from lib.evaluation.classifiers import Part
from lib.evaluation.embed import Embedded
from lib.evaluation.subject import Subject

VALIDATION_SHARE, TEST_SHARE = 0.2, 0.25


@dataclass(frozen=True)
class Parts:
    """Embedded images with labels, and how the parts came about."""

    train: Part
    validation: Part
    test: Part
    classes: tuple[str, ...]
    embedded: Embedded
    """all images of the subject's data, the test part or what was divided"""
    facts: dict[str, str]
    """what each part is, for people"""

    def of_rows(self, change: Callable[[np.ndarray], np.ndarray]) -> "Parts":
        """The same parts with other rows, made of each part's own: (n, D) -> (n, F)."""
        train, validation, test = (
            Part(change(part.rows), part.labels) for part in (self.train, self.validation, self.test)
        )
        return replace(self, train=train, validation=validation, test=test)


def embed_parts(subject: Subject) -> Parts:
    """Embed the subject's part of the data to test on, and the data's train and val parts to learn from.

    Without a train part the subject's own is divided, without a val part the training images are; by class and by
    the seed. All ranks together. InputError if classes cannot be learnt from it.
    """
    seed = subject.options.run.seed
    train, validation = (_other(subject, part) for part in ("train", "val"))
    classes = _all_classes([each.data.labelling.classes for each in (subject, train, validation) if each is not None])
    embedded = subject.embed_images()
    test, name = _readable(subject, embedded, classes), subject.data.name
    if train is None:
        kept, held = divide(test.labels, TEST_SHARE, seed)
        learnt, test, train_name = test.take(kept), test.take(held), name
    else:
        learnt, train_name = _readable(train, train.embed_images(), classes), train.data.name
    _check_classes(learnt, classes, train_name)
    if validation is None:
        kept, held = divide(learnt.labels, VALIDATION_SHARE, seed)
        learnt, chosen_on, how = learnt.take(kept), learnt.take(held), f"held out of {train_name}"
    else:
        chosen_on, how = _readable(validation, validation.embed_images(), classes), f"of {validation.data.name}"
    for part, purpose in ((chosen_on, "to choose the regularization on"), (test, "to test on")):
        if len(part.labels) == 0:
            raise InputError(f"{name} leaves no images {purpose}; give it a split folder or more images a class")
    facts = {
        "learnt from": f"{len(learnt.labels):,} images of {train_name}",
        "chosen on": f"{len(chosen_on.labels):,} images {how}",
        "tested on": f"{len(test.labels):,} images {'of' if train is not None else 'held out of'} {name}",
    }
    facts |= _missing(classes, learnt.labels, "classes without training images")
    facts |= _missing(classes, test.labels, "classes without test images")
    return Parts(learnt, chosen_on, test, classes, embedded, facts)


def divide(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers kept and held out, each class by the same share; a class keeps at least one, and gives one of two."""
    order = np.random.default_rng(seed).permutation(len(labels))
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        held[rows[: min(max(1, round(len(rows) * share)), len(rows) - 1)]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def _other(subject: Subject, part: str) -> Subject | None:
    """Another part than the one to test on, if there is one with images."""
    other = subject.of(part)
    return None if other is subject or other is None or len(other.data) == 0 else other


def _all_classes(lists: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The classes of all parts: shards may know only those that occur in them."""
    for names in lists:
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise InputError(f"two classes are called {repeated[0]!r}; rename one")
    return tuple(dict.fromkeys(name for names in lists for name in names))


def _readable(subject: Subject, embedded: Embedded, classes: tuple[str, ...]) -> Part:
    """The embeddings of the images that could be read, with their labels among all classes."""
    labels, own_classes, _ = subject.data.labelling
    number = np.array([classes.index(name) for name in own_classes], dtype=np.int64)
    valid = embedded.valid.numpy()
    return Part(embedded.embeds.numpy()[valid], number[np.asarray(labels)[valid]])


def _check_classes(learnt: Part, classes: tuple[str, ...], name: str) -> None:
    found = np.unique(learnt.labels)
    if len(found) < 2:
        only = f"one class, {classes[found[0]]!r}" if len(found) else "no class"
        raise InputError(f"the training images of {name} have {only}: a classifier needs at least two to tell apart")


def _missing(classes: tuple[str, ...], labels: np.ndarray, title: str) -> dict[str, str]:
    missing = [classes[number] for number in range(len(classes)) if number not in set(labels.tolist())]
    return {title: ", ".join(missing)} if missing else {}
