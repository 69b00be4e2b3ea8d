"""Classifiers on frozen embeddings: their kinds, and the choice of their regularization."""

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

from lib.evaluation.splits import Labelled, Split

HIDDEN, MLP_BATCH, MLP_STEPS = 256, 200, 1000


@dataclass(frozen=True)
class Family:
    """A kind of classifier and the settings to choose from."""

    name: str
    title: str
    setting: str
    """name of its regularization"""
    settings: tuple[float, ...]
    """the strongest regularization first, so that it wins a tie"""
    build: Callable[[float, int, int], ClassifierMixin]
    """(setting, training rows, seed) -> a classifier of scikit-learn"""


def _mlp(alpha: float, rows: int, seed: int) -> MLPClassifier:
    # About the same number of steps for any number of rows: enough for a few, and not hours for many.
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
    """false if the solver stopped early; an MLP stops after its epochs by design, so it is always true"""


def choose(family: Family, train: Split, validation: Split, seed: int, *, standardize: bool = True) -> Chosen:
    """Fit every setting on the training rows, keep the most accurate on validation, and fit that one on both."""
    scores = []
    for setting in family.settings:
        model, _ = fit(family, setting, train, seed, standardize=standardize)
        scores.append((accuracy(model, validation), setting))
    best, setting = max(scores, key=lambda score: score[0])  # the first of equals
    rows = np.concatenate([train.rows, validation.rows])
    both = Labelled(rows, np.concatenate([train.labels, validation.labels]))
    model, converged = fit(family, setting, both, seed, standardize=standardize)
    return Chosen(model, setting, best, converged)


def fit(
    family: Family, setting: float, train: Split, seed: int, *, standardize: bool = True
) -> tuple[Pipeline | ClassifierMixin, bool]:
    """One classifier on the training rows, standardized by their own mean and deviation; and if it converged."""
    classifier = family.build(setting, len(train.labels), seed)
    model = make_pipeline(StandardScaler(), classifier) if standardize else classifier
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(train.rows, train.labels)
    stopped = any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    return model, family is MLP or not stopped


def accuracy(model: ClassifierMixin | Pipeline, data: Split) -> float:
    """Share of the rows whose predicted class is the true one."""
    return float(accuracy_score(data.labels, model.predict(data.rows)))


class FewShot(NamedTuple):
    """Accuracy of a classifier trained on a few images per class."""

    shots: int
    """images per class"""
    setting: float
    """the regularization that was best on validation, on average over the draws"""
    accuracies: tuple[float, ...]
    """on the test rows, one per draw"""

    @property
    def mean(self) -> float:
        """Mean over the draws."""
        return float(np.mean(self.accuracies))

    @property
    def deviation(self) -> float:
        """Standard deviation over the draws; 0 if there is only one."""
        return float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else 0.0


def few_shot(
    family: Family,
    train: Split,
    validation: Split,
    test: Split,
    shots: int,
    seeds: Sequence[int],
) -> FewShot:
    """Accuracy after training on `shots` images of each class, drawn anew for every seed.

    The draws depend only on the seed and the labels: every classifier sees the same images, and more shots include
    those of fewer shots. A class with fewer images gives all it has.
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
