"""Evaluation sets: images with class labels, or with captions; and evenly spaced samples of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from PIL import Image

from lib.data.images import Extent
from lib.data.pairs import Images


class Labelling(NamedTuple):
    """Labels, class names and prompt templates of images with classes."""

    labels: np.ndarray
    """(n,) int64, index into `classes`"""
    classes: tuple[str, ...]
    templates: tuple[str, ...]


class Captioning(NamedTuple):
    """Captions of images, and the image of each."""

    captions: list[str]
    image: np.ndarray
    """(m,) int64, the image each caption belongs to"""


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """Images (n of them) with class labels, or with captions (m of them); can be pickled for workers."""

    name: str
    images: Images
    group: np.ndarray
    """(n,) int64"""
    labels: np.ndarray | None = None
    """(n,) int64, index into `classes`"""
    classes: tuple[str, ...] | None = None
    templates: tuple[str, ...] | None = None
    captions: list[str] | None = None
    caption_image: np.ndarray | None = None
    """(m,) int64, the image each caption belongs to"""
    skipped: tuple[tuple[str, str], ...] = ()
    """(key, reason) of what was left out without opening an image"""
    chooses: bool = True
    """False for a test split that training shows figures of: they choose no checkpoint"""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labelling(self) -> Labelling:
        """The labels, classes and templates of a set that has classes."""
        assert self.labels is not None and self.classes is not None
        return Labelling(self.labels, self.classes, self.templates or ())

    @property
    def captioning(self) -> Captioning:
        """The captions of a set that has captions, and the image of each."""
        assert self.captions is not None and self.caption_image is not None
        return Captioning(self.captions, self.caption_image)

    @property
    def image_keys(self) -> list[str]:
        """The images' names, in order."""
        return self.images.keys

    def open_image(self, index: int, extent: Extent | None = None) -> Image.Image:
        """Return image `index`, RGB and upright, in full or at `extent` or larger; raises BadImage."""
        return self.images.open(index, extent)


def spread(rows: Sequence[int] | np.ndarray, count: int) -> list[int]:
    """At most `count` of the rows, evenly spaced: a fair sample rather than a choice of the best."""
    if len(rows) == 0:
        return []
    places = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
    return [int(rows[place]) for place in places]


def limited(evaluation_set: EvaluationSet, limit: int | None) -> EvaluationSet:
    """At most `limit` of the images with their captions, evenly spaced so that every class has its share."""
    count = len(evaluation_set)
    if limit is None or limit >= count:
        return evaluation_set
    name = f"{evaluation_set.name}, {limit} of {count} images"
    return subset(evaluation_set, np.array(spread(range(count), limit)), name)


def subset(evaluation_set: EvaluationSet, rows: np.ndarray, name: str) -> EvaluationSet:
    """Some of the images, by ascending number, with their captions."""
    chosen = replace(
        evaluation_set,
        name=name,
        images=_Chosen([evaluation_set.image_keys[row] for row in rows], evaluation_set.images, rows),
        group=evaluation_set.group[rows],
    )
    if evaluation_set.labels is not None:
        chosen = replace(chosen, labels=evaluation_set.labels[rows])
    if evaluation_set.captions is not None:
        captions, image = evaluation_set.captioning
        kept = np.flatnonzero(np.isin(image, rows))
        caption_image = np.searchsorted(rows, image[kept])
        chosen = replace(chosen, captions=[captions[row] for row in kept], caption_image=caption_image)
    return chosen


@dataclass(frozen=True)
class _Chosen:
    """Some of other images, by number."""

    keys: list[str]
    images: Images
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def open(self, index: int, extent: Extent | None = None) -> Image.Image:
        return self.images.open(int(self.rows[index]), extent)

    def identity(self, rows: np.ndarray) -> str:
        """Changes when one of these images does."""
        return self.images.identity(self.rows[rows])
