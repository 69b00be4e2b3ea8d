"""Validation during training: figures and loss on held-out data, and the figure that picks the best checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf

import numpy as np
import torch
from torch import Tensor, nn

from lib.data.evaluation_set import EvaluationSet
from lib.data.pipeline import ImagePipeline
from lib.data.prepare import text_key
from lib.errors import InputError
from lib.evaluation.classification import EmbedText, class_embeddings, zeroshot_metrics
from lib.evaluation.embed import Embedded, embed_images, embed_texts
from lib.evaluation.retrieval_ranks import keep_readable, retrieval_metrics
from lib.towers.processing import Processing

LOSS_PAIRS = 8192  # more pairs cost time and hardly change the loss
_CLASSES = ("accuracy", "macro_f1")
_RETRIEVAL = tuple(
    f"{direction}.{figure}"
    for direction in ("text_to_image", "image_to_text")
    for figure in ("R@1", "R@5", "R@10", "MRR", "median_rank")
)

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], dict[str, float]]
Pairs = tuple[Tensor, Tensor, Tensor, Tensor]  # image_embeds, text_embeds, group, text_id, row by row


def validate(
    towers: nn.Module,
    evaluation_set: EvaluationSet,
    processing: Processing,
    loss: Loss,
    *,
    device: torch.device | str,
    batch_size: int = 256,
    workers: int = 0,
    progress: bool = False,
) -> dict:
    """Measure the towers in evaluation mode, without changing their modes or the global random state.

    loss(image_embeds (P, D), text_embeds (P, D), group (P,), text_id (P,)) -> figures is called once, on at most 8192
    evenly spaced pairs of an image and its first caption, or its class in the first template. Returns its figures, with
    classes "accuracy" and "macro_f1", with captions "image_to_text" and "text_to_image"; equal on all ranks.
    """
    if evaluation_set.classes is None and evaluation_set.captions is None:
        raise InputError(f"{evaluation_set.name} has neither classes nor captions to validate with")
    embed_text = partial(
        embed_texts, towers, tokenize=processing.tokenize, device=device, batch_size=batch_size, progress=progress
    )
    # Without augmentation, so that figures of different steps compare.
    pipeline = ImagePipeline(processing.image_size, processing.resize, "none")
    embedded = embed_images(
        towers, evaluation_set, pipeline, device=device, batch_size=batch_size, workers=workers, progress=progress
    )
    metrics: dict = {}
    if evaluation_set.classes is not None:
        of_classes, pairs = _classify(embedded, evaluation_set, embed_text)
        metrics |= of_classes
    if evaluation_set.captions is not None:
        of_captions, pairs = _retrieve(embedded, evaluation_set, embed_text)
        metrics |= of_captions
    spread = torch.linspace(0, len(pairs[0]) - 1, min(len(pairs[0]), LOSS_PAIRS)).round().long()
    return metrics | loss(*(rows[spread].to(device) for rows in pairs))


def _classify(
    embedded: Embedded, evaluation_set: EvaluationSet, embed_text: EmbedText
) -> tuple[dict[str, float], Pairs]:
    """Zero-shot figures, and pairs of each image with its class in the first template."""
    all_labels, classes, templates = evaluation_set.labelling
    image_embeds = embedded.embeds[embedded.valid]
    labels = torch.as_tensor(all_labels)[embedded.valid]
    full = zeroshot_metrics(image_embeds, labels, class_embeddings(classes, templates, embed_text), classes)
    first_prompts = class_embeddings(classes, templates[:1], embed_text)
    group = torch.as_tensor(evaluation_set.group)[embedded.valid]
    pairs = image_embeds, first_prompts[labels], group, labels  # one text for each class
    return {key: full[key] for key in ("accuracy", "macro_f1")}, pairs


def _retrieve(
    embedded: Embedded, evaluation_set: EvaluationSet, embed_text: EmbedText
) -> tuple[dict[str, dict[str, float]], Pairs]:
    """Retrieval figures, and pairs of each captioned image with its first caption."""
    texts, image_of_text = evaluation_set.captioning
    readable, captions, caption_image = keep_readable(embedded.valid, image_of_text)
    image_embeds = embedded.embeds[readable]
    text_embeds = embed_text([texts[row] for row in captions])
    images, first = (torch.from_numpy(rows) for rows in np.unique(caption_image, return_index=True))
    group = torch.as_tensor(evaluation_set.group)[readable][images]
    metrics = retrieval_metrics(image_embeds, text_embeds, caption_image)
    text_id = torch.tensor([text_key(texts[captions[row]]) for row in first.tolist()])
    return metrics, (image_embeds[images], text_embeds[first], group, text_id)


@dataclass(frozen=True)
class BestMetric:
    """The figure that picks the best checkpoint, by its dotted name."""

    name: str
    less_is_better: bool

    @classmethod
    def resolve(cls, name: str, validation: EvaluationSet | None) -> "BestMetric":
        """`auto` is accuracy if there are classes, else text-to-image R@1; InputError if the data lacks the figure."""
        if validation is None:
            if name not in ("auto", "loss"):
                raise InputError(f"--best-metric {name} needs validation data and --eval-every above 0")
            return cls("loss", True)
        known = ["loss"]
        known += _CLASSES if validation.classes is not None else ()
        known += _RETRIEVAL if validation.captions is not None else ()
        if name == "auto":
            name = "accuracy" if validation.classes is not None else "text_to_image.R@1"
        if name not in known:
            raise InputError(f"--best-metric {name} is not measured on this data; choose from {', '.join(known)}")
        return cls(name, name == "loss" or name.endswith("median_rank"))

    def value(self, metrics: dict) -> float:
        """The figure in nested metrics."""
        group, _, name = self.name.partition(".")
        return float(metrics[group][name] if name else metrics[group])

    def better(self, metrics: dict, best: dict) -> bool:
        """True if an evaluation beats the best one so far ({} without any); on a tie, if its loss is not higher."""
        if not best:
            return True
        value, so_far = self.value(metrics), float(best["value"])
        if value == so_far:
            return float(metrics["loss"]) <= best.get("loss", inf)
        return value < so_far if self.less_is_better else value > so_far
