"""Owns what a model is evaluated on: images by number, with labels or with captions."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from lib.data.images import Extent
from lib.data.pairs import Images


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
    def image_keys(self) -> list[str]:
        """The images' names, in order."""
        return self.images.keys

    def open_image(self, index: int, extent: Extent | None = None) -> Image.Image:
        """Image `index`, RGB and upright, in full or at `extent` or larger; raises BadImage."""
        return self.images.open(index, extent)
