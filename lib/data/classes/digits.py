"""The embedded data: scikit-learn's 1,797 handwritten digits, which need no file and no network."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from lib.data.images import Extent
from lib.data.pairs import Images
from lib.data.skipped import Skips

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZE = 32
"""Pixels on a side; 8 in the original."""


@dataclass(frozen=True)
class DigitImages:
    """Images held in memory as RGB, as large as the tiny models want them: that saves half the time."""

    keys: list[str]
    images: list[Image.Image]

    def __len__(self) -> int:
        return len(self.keys)

    def open(self, index: int, extent: Extent | None = None) -> Image.Image:
        """Image `index`, RGB; not to be changed."""
        return self.images[index]

    def identity(self, rows: np.ndarray) -> str:
        """Changes when one of these images does, which the embedded ones never do."""
        return "digits"


@dataclass(frozen=True)
class Digits:
    """All digits, in two splits."""

    name = "digits"
    kind = "embedded"
    bank = "digits"
    splits = ("train", "test")
    left_out: ClassVar[Mapping[str, Skips]] = {}

    def where(self, split: str) -> str:
        """Their name: they lie in no folder."""
        return self.name

    def images(self, split: str) -> tuple[Images, np.ndarray, tuple[str, ...]]:
        """Images of a split, their labels (n,) int64, and the classes' names."""
        return *_load_split(split), CLASSES


def _load_split(split: str) -> tuple[DigitImages, np.ndarray]:
    """Images and labels of "train" (about 80%) or "test" (every fifth image of each class)."""
    from sklearn.datasets import load_digits  # here, because it takes a second that other data need not wait

    digits = load_digits()
    labels = digits.target.astype(np.int64)
    number_in_class = np.empty_like(labels)
    for label in range(len(CLASSES)):
        members = labels == label
        number_in_class[members] = np.arange(members.sum())
    chosen = np.flatnonzero((number_in_class % 5 == 4) == (split == "test"))
    pixels = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    enlarged = [Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for image in pixels]
    images = [image.convert("RGB") for image in enlarged]
    return DigitImages([f"digit_{index:04d}" for index in chosen], images), labels[chosen]
