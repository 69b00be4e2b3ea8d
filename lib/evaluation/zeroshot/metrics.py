"""Zero-shot classification: an image's class is the one whose prompts it is most similar to."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from lib.data.pairs import fill
from lib.errors import InputError
from lib.evaluation.class_figures import class_figures
from lib.evaluation.embed import require_finite


def prompt_embeddings(
    classes: Sequence[str], templates: Sequence[str], embed_text: Callable[[list[str]], Tensor]
) -> Tensor:
    """Every class in every template: (K, T, D), unit norm; embed_text: texts (m) -> (m, D), as `embed_texts` does."""
    repeated = [name for name, count in Counter(classes).items() if count > 1]
    if repeated:
        raise InputError(f"two classes are called {repeated[0]!r}: no prompt tells them apart; rename one")
    prompts = [fill(template, name) for name in classes for template in templates]
    return rearrange(embed_text(prompts), "(k t) d -> k t d", k=len(classes))


def ensemble(prompt_embeds: Tensor) -> Tensor:
    """One direction per class, the normalized mean of its prompts' (Radford et al. 2021, 3.1.4).

    (K, T, D) -> (K, D), unit norm.
    """
    return F.normalize(prompt_embeds.mean(dim=1), dim=1)


def class_embeddings(
    classes: Sequence[str], templates: Sequence[str], embed_text: Callable[[list[str]], Tensor]
) -> Tensor:
    """The ensemble of all templates for each class: (K, D), unit norm."""
    return ensemble(prompt_embeddings(classes, templates, embed_text))


def zeroshot_scores(image_embeds: Tensor, class_embeds: Tensor) -> np.ndarray:
    """Similarity of each image to each class, (n, K) float32; the prediction is the largest of a row.

    Of equal ones it is the first, whatever the label: equal embeddings give chance. Top-5 has the same order.
    """
    require_finite(image_embeds, "image")
    require_finite(class_embeds, "class")
    # Rounded from float64: classes with the same prompts must tie wherever they stand in the product.
    return (image_embeds.double() @ class_embeds.double().T).float().numpy()


def zeroshot_metrics(
    image_embeds: Tensor, labels: np.ndarray | Tensor, class_embeds: Tensor, classes: Sequence[str]
) -> dict:
    """`class_figures`, with top-5, of the similarities of images (n, D) with labels (n,) to classes (K, D)."""
    if len(image_embeds) == 0:
        raise InputError("there are no images to classify; point --data or --split at some")
    labels, scores = np.asarray(labels), zeroshot_scores(image_embeds, class_embeds)
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
