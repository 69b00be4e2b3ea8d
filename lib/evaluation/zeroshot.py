"""Zero-shot classification: an image's class is the one whose prompts it is most similar to."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch.nn.functional as F
from einops import reduce
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)
from torch import Tensor

from lib.data.pairs import fill
from lib.errors import InputError
from lib.evaluation.embed import require_finite


def class_embeddings(
    classes: Sequence[str], templates: Sequence[str], embed_text: Callable[[list[str]], Tensor]
) -> Tensor:
    """One direction per class: the normalized mean of its prompts' embeddings (Radford et al. 2021, 3.1.4).

    embed_text: texts (m) -> (m, D), as `embed_texts` does. Returns (K, D), unit norm.
    """
    repeated = [name for name, count in Counter(classes).items() if count > 1]
    if repeated:
        raise InputError(f"two classes are called {repeated[0]!r}: no prompt tells them apart; rename one")
    prompts = [fill(template, name) for name in classes for template in templates]
    means = reduce(embed_text(prompts), "(k t) d -> k d", "mean", k=len(classes))
    return F.normalize(means, dim=1)


def zeroshot_scores(image_embeds: Tensor, class_embeds: Tensor) -> np.ndarray:
    """Similarity of each image to each class, (n, K) float32; the prediction is the largest of a row."""
    require_finite(image_embeds, "image")
    require_finite(class_embeds, "class")
    # Rounded from float64: classes with the same prompts must tie wherever they stand in the product.
    return (image_embeds.double() @ class_embeds.double().T).float().numpy()


def zeroshot_metrics(
    image_embeds: Tensor, labels: np.ndarray | Tensor, class_embeds: Tensor, classes: Sequence[str]
) -> dict:
    """Accuracy, top-5, macro averages, figures per class and the confusion counts, by scikit-learn.

    image_embeds: (n, D); labels: (n,) in [0, K); class_embeds: (K, D). Macro averages run, as scikit-learn's
    do, over the classes that occur among labels or predictions. "per_class" has every class by name;
    "confusion" is K lists of K counts, a list for each true class.
    """
    if len(image_embeds) == 0:
        raise InputError("there are no images to classify; point --data or --split at some")
    labels = np.asarray(labels)
    scores = zeroshot_scores(image_embeds, class_embeds)
    predicted = scores.argmax(axis=1)
    every = np.arange(len(classes))
    macro = precision_recall_fscore_support(labels, predicted, average="macro", zero_division=0)
    per_class = precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0)
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        # Among five classes or fewer the right one is always within the first five.
        "top5": float(top_k_accuracy_score(labels, scores, k=5, labels=every)) if len(classes) > 5 else 1.0,
        "macro_precision": float(macro[0]),
        "macro_recall": float(macro[1]),
        "macro_f1": float(macro[2]),
        "per_class": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(support)}
            for name, p, r, f, support in zip(classes, *per_class, strict=True)
        },
        "confusion": confusion_matrix(labels, predicted, labels=every).tolist(),
    }
