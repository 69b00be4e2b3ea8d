"""The figures of class predictions, whatever made them: accuracy, macro averages, per class, confusion."""

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import accuracy_score, precision_recall_fscore_support


def class_figures(labels: np.ndarray, predicted: np.ndarray, classes: Sequence[str]) -> dict:
    """Accuracy, macro averages, figures of every class by name and the confusion counts, by scikit-learn.

    labels, predicted: (n,) in [0, K). Macro averages run, as scikit-learn's do, over the classes that occur among
    labels or predictions; "confusion" is K lists of K counts, a list for each true class.
    """
    every = np.arange(len(classes))
    macro = precision_recall_fscore_support(labels, predicted, average="macro", zero_division=0)
    per_class = precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0)
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_precision": float(macro[0]),
        "macro_recall": float(macro[1]),
        "macro_f1": float(macro[2]),
        "per_class": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(support)}
            for name, p, r, f, support in zip(classes, *per_class, strict=True)
        },
        "confusion": confusion(labels, predicted, len(classes)).tolist(),
    }


def confusion(labels: np.ndarray, predicted: np.ndarray, count: int) -> np.ndarray:
    """Counts (K, K) by true and by predicted class, of labels and predictions (n,)."""
    return np.bincount(labels * count + predicted, minlength=count**2).reshape(count, count)
