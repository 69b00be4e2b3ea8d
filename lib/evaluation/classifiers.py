"""Classifiers that are trained on frozen embeddings: their kinds, regularization and choice."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

HIDDEN, MLP_BATCH, MLP_STEPS = 256, 200, 1000


class Part(NamedTuple):
    """Rows to learn from or to measure on."""

    rows: np.ndarray
    """(n, F) float32, embeddings or what is made of them"""
    labels: np.ndarray
    """(n,) int64"""

    def joined(self, other: "Part") -> "Part":
        """The rows of both."""
        return Part(np.concatenate([self.rows, other.rows]), np.concatenate([self.labels, other.labels]))

    def take(self, places: np.ndarray) -> "Part":
        """Some of the rows."""
        return Part(self.rows[places], self.labels[places])


@dataclass(frozen=True)
class Family:
    """A kind of classifier and the settings to choose from."""

    name: str
    title: str
    setting: str
    """what its regularization is called"""
    settings: tuple[float, ...]
    """the strongest regularization first, so that it wins a tie"""
    build: Callable[[float, int, int], ClassifierMixin]
    """(setting, training rows, seed) -> a classifier of scikit-learn"""


def _mlp(alpha: float, rows: int, seed: int) -> MLPClassifier:
    # Epochs for about the same number of steps, so that a few rows are learnt and many do not take hours.
    epochs = int(np.clip(MLP_STEPS // -(-rows // MLP_BATCH), 10, 500))
    return MLPClassifier((HIDDEN,), alpha=alpha, batch_size=min(MLP_BATCH, rows), max_iter=epochs, random_state=seed)


LINEAR_SVM = Family(
    "linear_svm",
    "linear SVM",
    "C",
    (1e-4, 1e-3, 1e-2, 0.1, 1.0),
    lambda C, rows, seed: LinearSVC(C=C, tol=1e-3, random_state=seed),
)
LOGISTIC_REGRESSION = Family(
    "logistic_regression",
    "logistic regression",
    "C",
    (1e-4, 1e-3, 1e-2, 0.1, 1.0),
    lambda C, rows, seed: LogisticRegression(C=C, random_state=seed, max_iter=1000),
)
MLP = Family("mlp", "MLP", "alpha", (10.0, 1.0, 0.01), _mlp)
KNN = Family(
    "knn",
    "k-NN",
    "neighbours",
    (50, 20, 10, 5, 1),
    lambda neighbours, rows, seed: KNeighborsClassifier(min(int(neighbours), rows)),
)
FAMILIES = (LINEAR_SVM, LOGISTIC_REGRESSION, MLP, KNN)


class Chosen(NamedTuple):
    """A classifier with the setting that was best on validation."""

    model: Pipeline | ClassifierMixin
    """trained on the training and the validation rows together"""
    setting: float
    validation_accuracy: float
    """of the same setting trained on the training rows alone"""
    converged: bool
    """whether the solver came to its end; an MLP stops after its epochs by design"""


def choose(
    family: Family, train: Part, validation: Part, seed: int, *, settings: Sequence[float] | None = None,
    standardize: bool = True,
) -> Chosen:  # fmt: skip
    """Fit every setting on the training rows, keep the most accurate on validation, and fit it on both."""
    scores = []
    for setting in settings or family.settings:
        model, _ = fit(family, setting, train, seed, standardize=standardize)
        scores.append((accuracy(model, validation), setting))
    best, setting = max(scores, key=lambda score: score[0])  # the first of equals
    model, converged = fit(family, setting, train.joined(validation), seed, standardize=standardize)
    return Chosen(model, setting, best, converged)


def fit(
    family: Family, setting: float, train: Part, seed: int, *, standardize: bool = True
) -> tuple[Pipeline | ClassifierMixin, bool]:
    """One classifier on the training rows, standardized by their own mean and deviation; and whether it converged."""
    classifier = family.build(setting, len(train.labels), seed)
    model = make_pipeline(StandardScaler(), classifier) if standardize else classifier
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(train.rows, train.labels)
    stopped = any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    return model, family is MLP or not stopped


def accuracy(model: ClassifierMixin | Pipeline, part: Part) -> float:
    """Share of the rows that are classified rightly."""
    return float(accuracy_score(part.labels, model.predict(part.rows)))
