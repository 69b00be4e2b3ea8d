"""Few labels: the accuracy of a classifier that saw 1, 2, 4, ... images of each class, over several draws."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lib.evaluation.classifiers import Family, Part, accuracy, fit


class FewShot(NamedTuple):
    """What a number of images a class gives."""

    shots: int
    setting: float
    """the regularization that was best on validation, on average over the draws"""
    accuracies: tuple[float, ...]
    """on the test rows, one a draw"""

    @property
    def mean(self) -> float:
        """Over the draws."""
        return float(np.mean(self.accuracies))

    @property
    def deviation(self) -> float:
        """Standard deviation of a draw; 0 where there is only one."""
        return float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else 0.0


def few_shot(family: Family, train: Part, validation: Part, test: Part, shots: int, seeds: Sequence[int]) -> FewShot:
    """Accuracy after `shots` images of each class, drawn anew for every seed.

    The draws depend on the seed and the labels alone: every classifier sees the same images, and more shots
    see those of fewer shots too. A class with fewer images gives all it has.
    """
    draws = [(train.take(draw_shots(train.labels, shots, seed)), seed) for seed in seeds]
    best, setting, models = -1.0, 0.0, []
    for candidate in family.settings:
        fitted = [fit(family, candidate, few, seed)[0] for few, seed in draws]
        score = float(np.mean([accuracy(model, validation) for model in fitted]))
        if score > best:  # the first of equals: the strongest regularization
            best, setting, models = score, candidate, fitted
    return FewShot(shots, setting, tuple(accuracy(model, test) for model in models))


def draw_shots(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Row numbers of at most `shots` random images of each class that occurs, sorted."""
    order = np.random.default_rng(seed).permutation(len(labels))
    drawn = [order[labels[order] == label][:shots] for label in np.unique(labels)]
    return np.sort(np.concatenate(drawn))
