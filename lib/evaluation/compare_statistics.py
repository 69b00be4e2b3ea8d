"""Statistics of a comparison: McNemar's test, bootstrap intervals, and the figures of models with both."""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest
from torch import Tensor

from lib.evaluation.classification import confusion, macro_f1, score_figures
from lib.evaluation.retrieval_ranks import RECALL_AT, summarize_both

LEVEL = 0.95
RESAMPLED = ("accuracy", "macro_f1")
DIRECTIONS = ("image_to_text", "text_to_image")
RECALLS = tuple(f"R@{k}" for k in RECALL_AT)


class McNemar(NamedTuple):
    """Images that only one of two models has right, and the probability of such a difference between equal models."""

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: np.ndarray, second: np.ndarray) -> McNemar:
    """The exact test (McNemar 1947; binomial, two-sided) of two models' answers, right or not, (n,) bool each."""
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    discordant = only_first + only_second
    p_value = float(binomtest(only_first, discordant).pvalue) if discordant else 1.0
    return McNemar(only_first, only_second, p_value)


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray], count: int, resamples: int, seed: int) -> np.ndarray:
    """The statistic of random samples, with replacement, of the rows 0 to count - 1 (Efron 1979).

    statistic: rows (count,) -> array; of several models at once, so that differences are of the same samples.
    Returns (resamples, *shape of the statistic).
    """
    generator = np.random.default_rng(seed)
    return np.stack([statistic(generator.integers(count, size=count)) for _ in range(resamples)])


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The percentiles that hold 95% of the samples (R,) between them."""
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def intervals(samples: np.ndarray, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Interval of each column of samples (R, figures), by name."""
    return {name: interval(samples[:, column]) for column, name in enumerate(names)}


def classification_comparison(
    names: Sequence[str],
    labels: np.ndarray,
    scores: Sequence[np.ndarray],
    classes: Sequence[str],
    resamples: int,
    seed: int,
) -> dict:
    """Figures of each model with 95% intervals, and McNemar's test and the differences of each two.

    labels: (n,); scores: (n, K) of each model. The images are resampled, the same ones for all models.
    """
    predicted = np.stack([each.argmax(axis=1) for each in scores])

    def resampled_figures(rows: np.ndarray) -> np.ndarray:
        matrices = (confusion(labels[rows], each[rows], len(classes)) for each in predicted)
        return np.array([[np.trace(matrix) / len(rows), macro_f1(matrix)] for matrix in matrices])

    samples = bootstrap(resampled_figures, len(labels), resamples, seed)  # (resamples, models, 2)
    models = {
        name: score_figures(labels, scores[number], classes) | {"intervals": intervals(samples[:, number], RESAMPLED)}
        for number, name in enumerate(names)
    }
    pairs = []
    for one, other in combinations(range(len(names)), 2):
        bounds = intervals(samples[:, other] - samples[:, one], RESAMPLED)
        difference = {
            key: {"difference": models[names[other]][key] - models[names[one]][key], "interval": bounds[key]}
            for key in RESAMPLED
        }
        test = mcnemar(predicted[one] == labels, predicted[other] == labels)
        pairs.append({"models": [names[one], names[other]]} | difference | {"mcnemar": test._asdict()})
    return {"models": models, "pairs": pairs}


def retrieval_comparison(
    names: Sequence[str], ranks: Sequence[tuple[Tensor, Tensor]], caption_image: np.ndarray, resamples: int, seed: int
) -> dict:
    """Figures of each model with 95% intervals of its recalls, and the differences of each two.

    ranks: of each model, as `retrieval_ranks` returns them; caption_image: (m,). Images are resampled, each with all
    its captions, since captions of one image are not independent; the same ones for all models.
    """
    _, place = np.unique(caption_image, return_inverse=True)  # (m,) among the images with captions
    counts = np.bincount(place)
    found = np.stack([_found(*each, place) for each in ranks])  # (models, images, 2 directions, 3)

    def resampled_recalls(rows: np.ndarray) -> np.ndarray:
        sizes = np.array([len(rows), counts[rows].sum()])
        return found[:, rows].sum(axis=1) / sizes[:, None]

    samples = bootstrap(resampled_recalls, len(counts), resamples, seed)  # (resamples, models, 2, 3)
    models: dict[str, dict[str, dict]] = {
        name: {
            direction: figures | {"intervals": intervals(samples[:, number, way], RECALLS)}
            for way, (direction, figures) in enumerate(summarize_both(*ranks[number]).items())
        }
        for number, name in enumerate(names)
    }
    pairs = []
    for one, other in combinations(range(len(names)), 2):
        differences = samples[:, other] - samples[:, one]
        pair: dict = {"models": [names[one], names[other]]}
        for way, direction in enumerate(DIRECTIONS):
            first, second = models[names[one]][direction], models[names[other]][direction]
            pair[direction] = {key: second[key] - first[key] for key in RECALLS}
            pair[direction]["intervals"] = intervals(differences[:, way], RECALLS)
        pairs.append(pair)
    return {"models": models, "pairs": pairs}


def _found(to_text: Tensor, to_image: Tensor, place: np.ndarray) -> np.ndarray:
    """Successful queries of each image within K: (images, 2, 3), by the image itself and by its captions."""
    within = np.array(RECALL_AT)
    by_image = (to_text.numpy()[:, None] <= within).astype(np.int64)
    by_caption = np.zeros_like(by_image)
    np.add.at(by_caption, place, to_image.numpy()[:, None] <= within)
    return np.stack([by_image, by_caption], axis=1)
