"""Which pictures an evaluation leaves: charts of its figures, and a fair sample of its answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib.evaluation.examples import (
    ImageQuery,
    OpenImage,
    TextQuery,
    plot_image_queries,
    plot_predictions,
    plot_text_queries,
    spread,
)
from lib.evaluation.plots import plot_class_f1, plot_confusion, plot_recall, plot_similarities
from lib.evaluation.retrieval import retrieval_ranks

QUERIES, ANSWERS = 6, 5  # examples of a direction, answers shown of each
PREDICTIONS = 12  # right ones and wrong ones each


class Picture(NamedTuple):
    """A PNG file of the report and what it shows."""

    title: str
    path: Path


def retrieval_pictures(
    folder: Path,
    metrics: dict[str, dict[str, float]],
    image_embeds: Tensor,
    text_embeds: Tensor,
    captions: Sequence[str],
    caption_image: Tensor,
    open_image: OpenImage,
) -> list[Picture]:
    """Draw recall, similarities and examples of both directions into the folder.

    image_embeds: (n, D); text_embeds: (m, D); captions: m; caption_image: (m,).
    open_image: by row of image_embeds.
    """
    recall = Picture("Recall", folder / "recall.png")
    plot_recall(metrics, recall.path)
    similarities = Picture("Similarity of pairs", folder / "similarities.png")
    matched, unmatched = _pair_similarities(image_embeds, text_embeds, caption_image)
    plot_similarities(matched, unmatched, similarities.path)

    to_text, to_image = retrieval_ranks(image_embeds, text_embeds, caption_image)
    from_text = Picture("Examples, text to image", folder / "examples_text_to_image.png")
    queries = []
    for row in spread(range(len(captions)), QUERIES):
        found = _most_similar(text_embeds[row], image_embeds)
        right = [image == caption_image[row].item() for image in found]
        queries.append(TextQuery(captions[row], to_image[row].item(), found, right))
    plot_text_queries(queries, open_image, from_text.path)

    from_image = Picture("Examples, image to text", folder / "examples_image_to_text.png")
    queries = []
    captioned = caption_image.unique().tolist()
    for place in spread(range(len(captioned)), QUERIES):
        image = captioned[place]
        found = _most_similar(image_embeds[image], text_embeds)
        right = [caption_image[row].item() == image for row in found]
        queries.append(ImageQuery(image, to_text[place].item(), [captions[row] for row in found], right))
    plot_image_queries(queries, open_image, from_image.path)
    return [recall, similarities, from_text, from_image]


def zeroshot_pictures(
    folder: Path,
    metrics: dict,
    labels: np.ndarray,
    predicted: np.ndarray,
    classes: Sequence[str],
    open_image: OpenImage,
) -> list[Picture]:
    """Draw the confusion matrix, F1 by class and examples into the folder.

    labels, predicted: (n,) class numbers; open_image takes a row of them.
    """
    confusion = Picture("Confusion matrix", folder / "confusion.png")
    plot_confusion(metrics["confusion"], classes, confusion.path)
    f1 = Picture("F1 by class", folder / "class_f1.png")
    plot_class_f1(metrics["per_class"], f1.path)
    examples = Picture("Examples", folder / "examples.png")
    right, wrong = ((labels == predicted).nonzero()[0], (labels != predicted).nonzero()[0])
    true_names, predicted_names = ([classes[number] for number in numbers] for numbers in (labels, predicted))
    plot_predictions(
        spread(right, PREDICTIONS),
        spread(wrong, PREDICTIONS),
        true_names,
        predicted_names,
        open_image,
        examples.path,
    )
    return [confusion, f1, examples]


def _pair_similarities(
    image_embeds: Tensor, text_embeds: Tensor, caption_image: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Similarity of each caption (m,) to its image and, where there is one, to a random other image."""
    matched = (image_embeds[caption_image] * text_embeds).sum(dim=1)
    if len(image_embeds) == 1:
        return matched.numpy(), np.zeros(0)
    generator = torch.Generator().manual_seed(0)
    shift = torch.randint(1, len(image_embeds), caption_image.shape, generator=generator)
    other = (caption_image + shift) % len(image_embeds)
    return matched.numpy(), (image_embeds[other] * text_embeds).sum(dim=1).numpy()


def _most_similar(query: Tensor, candidates: Tensor) -> list[int]:
    return (candidates @ query).topk(min(ANSWERS, len(candidates))).indices.tolist()
