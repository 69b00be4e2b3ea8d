"""Zero-shot scores of images and classes, and the figures of any class predictions."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch.nn.functional as F
from einops import rearrange
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support
from torch import Tensor

from lib.data.pairs import fill
from lib.errors import InputError
from lib.evaluation.embed import require_finite

EmbedText = Callable[[list[str]], Tensor]
"""Texts (m) -> (m, D), unit norm"""


def prompt_embeddings(classes: Sequence[str], templates: Sequence[str], embed_text: EmbedText) -> Tensor:
    """Every class in every template: (K, T, D), unit norm."""
    repeated = [name for name, count in Counter(classes).items() if count > 1]
    if repeated:
        raise InputError(f"two classes are called {repeated[0]!r}: no prompt tells them apart; rename one")
    prompts = [fill(template, name) for name in classes for template in templates]
    return rearrange(embed_text(prompts), "(k t) d -> k t d", k=len(classes))


def ensemble(prompt_embeds: Tensor) -> Tensor:
    """The normalized mean of each class's prompts (Radford et al. 2021, 3.1.4): (K, T, D) -> (K, D), unit norm."""
    return F.normalize(prompt_embeds.mean(dim=1), dim=1)


def class_embeddings(classes: Sequence[str], templates: Sequence[str], embed_text: EmbedText) -> Tensor:
    """The ensemble of all templates for each class: (K, D), unit norm."""
    return ensemble(prompt_embeddings(classes, templates, embed_text))


def zeroshot_scores(image_embeds: Tensor, class_embeds: Tensor) -> np.ndarray:
    """Similarity of each image to each class, (n, K) float32; the prediction is the largest of a row.

    Of equal scores the first class is predicted, whatever the label: equal embeddings give chance.
    """
    require_finite(image_embeds, "image")
    require_finite(class_embeds, "class")
    # Rounded from float64: classes with the same prompts must tie wherever they stand in the product.
    return (image_embeds.double() @ class_embeds.double().T).float().numpy()


def zeroshot_metrics(
    image_embeds: Tensor, labels: np.ndarray | Tensor, class_embeds: Tensor, classes: Sequence[str]
) -> dict:
    """`class_figures`, with top-5, of images (n, D) with labels (n,) against classes (K, D)."""
    if len(image_embeds) == 0:
        raise InputError("there are no images to classify; point --data or --split at some")
    return score_figures(np.asarray(labels), zeroshot_scores(image_embeds, class_embeds), classes)


def score_figures(labels: np.ndarray, scores: np.ndarray, classes: Sequence[str]) -> dict:
    """`class_figures`, with top-5, of scores (n, K) and labels (n,)."""
    figures = class_figures(labels, scores.argmax(axis=1), classes)
    return {"accuracy": figures.pop("accuracy"), "top5": top5(labels, scores)} | figures


def top5(labels: np.ndarray, scores: np.ndarray) -> float:
    """The fraction of images (n,) whose class is among the first five by score (n, K), at least the accuracy.

    Equal scores are in the order of the classes, as argmax takes them for the prediction: scikit-learn's
    top_k_accuracy_score takes the last of them first, so that its top-5 can be below the accuracy.
    """
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    before = (scores > own) | ((scores == own) & (np.arange(scores.shape[1]) < labels[:, None]))
    return float((before.sum(axis=1) < 5).mean())


def class_figures(labels: np.ndarray, predicted: np.ndarray, classes: Sequence[str]) -> dict:
    """Accuracy, macro averages, figures of every class by name and the confusion counts, by scikit-learn.

    labels, predicted: (n,) in [0, K). Macro averages run, as scikit-learn's do, over the classes that occur among
    labels or predictions; "confusion" is K lists of K counts, one list for each true class.
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


def two_figures(labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """{"accuracy", "macro_f1"} of labels and predictions (n,)."""
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
    }


def confusion(labels: np.ndarray, predicted: np.ndarray, count: int) -> np.ndarray:
    """Counts (K, K) by true and by predicted class, of labels and predictions (n,)."""
    return np.bincount(labels * count + predicted, minlength=count**2).reshape(count, count)


def macro_f1(matrix: np.ndarray) -> float:
    """Macro F1 of a confusion matrix (K, K), over the classes that occur, as in scikit-learn."""
    occurring = matrix.sum(axis=0) + matrix.sum(axis=1)
    return float((2 * np.diag(matrix) / np.maximum(occurring, 1))[occurring > 0].mean())
