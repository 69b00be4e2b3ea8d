"""Choosing on some images and judging on others: a validation part, or the two halves of a test part."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Labelled(NamedTuple):
    """Embedded images with their classes."""

    embeds: Tensor
    """(n, D) unit norm"""
    labels: np.ndarray
    """(n,) int64"""

    def part(self, rows: np.ndarray) -> "Labelled":
        """Some of them, by number."""
        return Labelled(self.embeds[torch.from_numpy(rows)], self.labels[rows])


class Fold(NamedTuple):
    """What is chosen on `chooser` is judged on the test images `rows`, which are none of it."""

    chooser: Labelled
    rows: np.ndarray


def folds(test: Labelled, validation: Labelled | None, seed: int) -> list[Fold]:
    """One fold with validation images; without, two: each half of the test images is judged by the other's choice.

    The halves have every class's images in equal numbers, drawn by the seed. Together the folds judge every test
    image once, and never by itself.
    """
    if validation is not None:
        return [Fold(validation, np.arange(len(test.labels)))]
    shuffled = np.random.default_rng(seed).permutation(len(test.labels))
    by_class = shuffled[np.argsort(test.labels[shuffled], kind="stable")]
    even, odd = np.sort(by_class[::2]), np.sort(by_class[1::2])
    return [Fold(test.part(even), odd), Fold(test.part(odd), even)]
