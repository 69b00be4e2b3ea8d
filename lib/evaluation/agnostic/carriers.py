"""Which prompts carry the classes: how much of a prompt's similarity tells the classes apart."""

from typing import NamedTuple

import numpy as np
from sklearn.inspection import permutation_importance

from lib.evaluation.classifiers import Chosen, Part

SHUFFLES = 5


class Carrier(NamedTuple):
    """A prompt and what it tells about the classes."""

    prompt: str
    between: float
    """share of the similarity's variance that lies between the classes (eta squared), 0 to 1"""
    lost: float
    """accuracy that the linear SVM on all similarities loses when this one is shuffled"""
    highest: int
    """the class whose images are most similar to it, on average"""
    lowest: int


def rank_carriers(prompts: list[str], test: Part, svm: Chosen, seed: int) -> list[Carrier]:
    """The prompts, the one that carries most first.

    test: similarities (n, K) and labels of the test images; svm: trained on such similarities.
    """
    classes, means = class_means(test)
    between = variance_between(test)
    lost = permutation_importance(svm.model, *test, scoring="accuracy", n_repeats=SHUFFLES, random_state=seed)
    highest, lowest = classes[means.argmax(axis=0)], classes[means.argmin(axis=0)]
    carriers = [
        Carrier(prompt, float(share), float(loss), int(high), int(low))
        for prompt, share, loss, high, low in zip(prompts, between, lost.importances_mean, highest, lowest, strict=True)
    ]
    return sorted(carriers, key=lambda carrier: -carrier.between)


def variance_between(part: Part) -> np.ndarray:
    """Eta squared of each column: (n, K) -> (K,), the variance of the class means over the whole variance."""
    rows = part.rows.astype(np.float64)
    classes, place = np.unique(part.labels, return_inverse=True)
    means = np.stack([rows[part.labels == label].mean(axis=0) for label in classes])
    whole = rows.var(axis=0)
    explained = means[place].var(axis=0)
    return np.divide(explained, whole, out=np.zeros_like(whole), where=whole > 0)


def class_means(part: Part) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the classes that occur (c,), and the mean of their rows (c, K)."""
    classes = np.unique(part.labels)
    return classes, np.stack([part.rows[part.labels == label].mean(axis=0) for label in classes])
