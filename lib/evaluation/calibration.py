"""Calibration: accuracy against confidence, before and after a fitted temperature."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from torch import Tensor

from lib.evaluation.classification import zeroshot_scores
from lib.evaluation.report import Rows, decimals
from lib.evaluation.splits import Fold

BINS = 15  # as in Guo et al. 2017
SCALES = (1e-2, 1e4)  # cosines lie in [-1, 1]: beyond these scales all classes are equally likely, or one is certain


@dataclass(frozen=True)
class Reliability:
    """Accuracy against confidence, in bins of equal width of the confidence."""

    temperatures: list[float]
    """1 / the scale of the similarities, one per fold"""
    ece: float
    """expected calibration error: |accuracy - confidence| of the bins, weighted by their number of images"""
    nll: float
    """mean of -log p(true class)"""
    counts: np.ndarray
    """(BINS,) images"""
    accuracy: np.ndarray
    """(BINS,) zero where a bin is empty"""
    confidence: np.ndarray
    """(BINS,) mean, zero where a bin is empty"""

    def metrics(self) -> dict:
        """Its entry in metrics.json."""
        return {"temperatures": self.temperatures, "ece": self.ece, "nll": self.nll}


def calibrate(
    scores: np.ndarray, labels: np.ndarray, class_embeds: Tensor, folds: Sequence[Fold], scale: float
) -> tuple[Reliability, Reliability]:
    """Reliability on the test images at the model's own scale, and at that fitted on each fold's chooser.

    scores: (n, K) cosines of the test images; labels: (n,); class_embeds: (K, D); scale: exp(logit_scale).
    """
    after = np.empty(len(labels))
    for fold in folds:
        chooser = zeroshot_scores(fold.chooser.rows, class_embeds)
        after[fold.rows] = fit_scale(chooser, fold.chooser.labels) if len(chooser) else scale
    fitted = [after[fold.rows[0]].item() for fold in folds if len(fold.rows)]
    return (
        reliability(scores, labels, np.full(len(labels), scale), [scale]),
        reliability(scores, labels, after, fitted),
    )


def fit_scale(scores: np.ndarray, labels: np.ndarray) -> float:
    """The scale whose softmax gives the labels the greatest likelihood (Guo et al. 2017, arXiv:1706.04599, 4.2).

    scores: (n, K) cosines; labels: (n,). The log-likelihood is concave in the scale, so there is one maximum.
    """

    def nll(log_scale: float) -> float:
        return -float(_log_likelihood(scores * np.exp(log_scale), labels).mean())

    return float(np.exp(minimize_scalar(nll, bounds=np.log(SCALES), method="bounded").x))


def reliability(scores: np.ndarray, labels: np.ndarray, scale: np.ndarray, scales: list[float]) -> Reliability:
    """Bins of the confidence, the softmax of scale * score at the predicted class.

    scores: (n, K); labels: (n,); scale: (n,), each image's own; scales: the different ones among them. A SigLIP
    model's bias is the same for all classes and cancels.
    """
    scaled = scores.astype(np.float64) * scale[:, None]
    predicted = scores.argmax(axis=1)
    confidence = np.exp(_log_likelihood(scaled, predicted))
    # (0, 1/15], (1/15, 2/15], ...
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    counts = np.bincount(place, minlength=BINS)
    right = np.bincount(place, predicted == labels, BINS)
    sure = np.bincount(place, confidence, BINS)
    return Reliability(
        temperatures=[1 / each for each in scales],
        ece=float(np.abs(right - sure).sum() / len(labels)),
        nll=-float(_log_likelihood(scaled, labels).mean()),
        counts=counts,
        accuracy=right / np.maximum(counts, 1),
        confidence=sure / np.maximum(counts, 1),
    )


def _log_likelihood(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """log p of the labels: (n, K), (n,) -> (n,)."""
    return np.take_along_axis(log_softmax(logits, axis=1), labels[:, None], axis=1)[:, 0]


def calibration_table(before: Reliability, after: Reliability) -> Rows:
    """Temperature, calibration error and likelihood before and after fitting."""
    rows = [["temperature", "value", "ECE", "negative log-likelihood"]]
    for name, each in (("the model's own", before), ("fitted", after)):
        temperatures = " / ".join(f"{temperature:.4g}" for temperature in each.temperatures)
        rows.append([name, temperatures, decimals(each.ece), decimals(each.nll)])
    return rows
