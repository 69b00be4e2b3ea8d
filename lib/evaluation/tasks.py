"""The tasks of evaluate.py from end to end: embed, measure, and say what to tell and to draw."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib.data.evaluation_set import EvaluationSet
from lib.data.pipeline import ImagePipeline
from lib.evaluation.embed import Embedded, counted, embed_images, embed_texts
from lib.evaluation.html import Rows
from lib.evaluation.pictures import Picture, retrieval_pictures, zeroshot_pictures
from lib.evaluation.retrieval import keep_readable, retrieval_metrics
from lib.evaluation.zeroshot import class_embeddings, zeroshot_metrics, zeroshot_scores
from lib.processing import Processing
from lib.towers import TwoTowers

MOST_LISTED = 50  # rows of a list in the report


@dataclass(frozen=True)
class Subject:
    """A model, the data it is measured on, and how to run it."""

    towers: TwoTowers
    processing: Processing
    data: EvaluationSet
    device: torch.device
    batch_size: int
    workers: int

    def embed_images(self) -> Embedded:
        """All images, with a progress bar on rank 0."""
        pipeline = ImagePipeline(self.processing.image_size, self.processing.resize, "none")
        return embed_images(
            self.towers,
            self.data,
            pipeline,
            device=self.device,
            batch_size=self.batch_size,
            workers=self.workers,
            progress=True,
        )

    def embed_texts(self, texts: list[str]) -> Tensor:
        """Texts (m) -> (m, D), with a progress bar on rank 0."""
        return embed_texts(
            self.towers,
            texts,
            self.processing.tokenize,
            device=self.device,
            batch_size=self.batch_size,
            progress=True,
        )


@dataclass(frozen=True)
class Outcome:
    """What a task found."""

    metrics: dict
    """the content of metrics.json"""
    facts: dict[str, str]
    """what was measured, for people"""
    tables: dict[str, Rows]
    """figures for people, the first table the shortest"""
    draw: Callable[[Path], list[Picture]]
    """writes the pictures into a folder"""


def retrieve(subject: Subject) -> Outcome:
    """Recall@K, MRR and median rank in both directions, of data with captions."""
    data = subject.data
    embedded = subject.embed_images()
    images, kept, caption_image = keep_readable(embedded.valid, data.caption_image)
    captions = [data.captions[row] for row in kept]
    image_embeds, text_embeds = embedded.embeds[images], subject.embed_texts(captions)
    metrics = retrieval_metrics(image_embeds, text_embeds, caption_image)
    table = [["", *(key.replace("_", " ") for key in metrics["image_to_text"])]]
    for direction, figures in metrics.items():
        *fractions, median = figures.values()
        table.append([direction.replace("_", " "), *map(_figure, fractions), f"{median:g}"])
    draw = partial(
        retrieval_pictures,
        metrics=metrics,
        image_embeds=image_embeds,
        text_embeds=text_embeds,
        captions=captions,
        caption_image=caption_image,
        open_image=lambda row: data.open_image(int(images[row])),
    )
    facts = _facts(data, embedded) | {"captions": str(len(captions))}
    return Outcome(metrics, facts, {"Retrieval": table} | _skipped_table(data, embedded), draw)


def classify(subject: Subject) -> Outcome:
    """Zero-shot accuracy, macro averages and figures per class, of data with classes."""
    data = subject.data
    embedded = subject.embed_images()
    images = embedded.valid.nonzero().flatten()
    image_embeds, labels = embedded.embeds[images], np.asarray(data.labels)[images]
    class_embeds = class_embeddings(data.classes, data.templates, subject.embed_texts)
    metrics = zeroshot_metrics(image_embeds, labels, class_embeds, data.classes)
    plain = {key: figure for key, figure in metrics.items() if isinstance(figure, float)}
    summary = [["", *(key.replace("_", " ") for key in plain)], ["zero-shot", *map(_figure, plain.values())]]
    per_class = [["class", "precision", "recall", "f1", "support"]]
    per_class += [[name, *map(_figure, figures.values())] for name, figures in metrics["per_class"].items()]
    tables = {
        "Zero-shot classification": summary,
        "Most frequent confusions": _confusions_table(metrics["confusion"], data.classes),
        "Classes": per_class,
    }
    draw = partial(
        zeroshot_pictures,
        metrics=metrics,
        labels=labels,
        predicted=zeroshot_scores(image_embeds, class_embeds).argmax(axis=1),
        classes=data.classes,
        open_image=lambda row: data.open_image(int(images[row])),
    )
    facts = _facts(data, embedded)
    facts |= {"classes": str(len(data.classes)), "prompt templates": str(len(data.templates))}
    return Outcome(metrics, facts, tables | _skipped_table(data, embedded), draw)


def _facts(data: EvaluationSet, embedded: Embedded) -> dict[str, str]:
    facts = {"data": data.name, "images": str(int(embedded.valid.sum()))}
    skipped = [*data.skipped, *embedded.skipped]
    if skipped:
        facts["skipped"] = f"{len(skipped)} ({counted(reason for _, reason in skipped)})"
    return facts


def _skipped_table(data: EvaluationSet, embedded: Embedded) -> dict[str, Rows]:
    skipped = [*data.skipped, *embedded.skipped]
    if not skipped:
        return {}
    more = [["…", f"{len(skipped) - MOST_LISTED} more"]] if len(skipped) > MOST_LISTED else []
    return {"Skipped": [["what", "why"], *map(list, skipped[:MOST_LISTED]), *more]}


def _confusions_table(confusion: list[list[int]], classes: tuple[str, ...]) -> Rows:
    """The largest counts off the diagonal."""
    counts = np.array(confusion)
    np.fill_diagonal(counts, 0)
    rows = [["true class", "predicted class", "images"]]
    for place in np.argsort(-counts, axis=None, kind="stable")[:10]:
        true, predicted = np.unravel_index(place, counts.shape)
        if counts[true, predicted]:
            rows.append([classes[true], classes[predicted], str(counts[true, predicted])])
    return rows


def _figure(value: float | int) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"
