"""Evaluation sets: images with class labels, or with captions."""

from dataclasses import dataclass
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
