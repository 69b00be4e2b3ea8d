"""The study of prompts: each template alone, the best one, and the best one per class, chosen on held-out images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor

from lib.evaluation.zeroshot.held_out import Fold, Labelled
from lib.evaluation.zeroshot.metrics import ensemble, zeroshot_scores


@dataclass(frozen=True)
class PromptStudy:
    """Figures on the test images, {"accuracy", "macro_f1"} each, and what was chosen in each fold."""

    ensemble: dict[str, float]
    """all templates together"""
    alone: list[dict[str, float]]
    """each of the T templates by itself"""
    best: dict[str, float]
    """the one template with the best accuracy on the chooser"""
    best_per_class: dict[str, float]
    """for each class the template with the best F1 of this class on the chooser"""
    chosen: list[int]
    """the best template in each fold"""
    chosen_per_class: list[np.ndarray]
    """(K,) the best template of each class in each fold"""

    def metrics(self, classes: Sequence[str], templates: Sequence[str]) -> dict:
        """As metrics.json has it; what was chosen is a list, with one template a fold."""
        per_class = {
            name: [templates[fold[number]] for fold in self.chosen_per_class] for number, name in enumerate(classes)
        }
        return {
            "ensemble": self.ensemble,
            "templates": dict(zip(templates, self.alone, strict=True)),
            "best_template": self.best | {"chosen": [templates[number] for number in self.chosen]},
            "best_template_per_class": self.best_per_class | {"chosen": per_class},
        }


def study_prompts(test: Labelled, prompt_embeds: Tensor, folds: Sequence[Fold]) -> PromptStudy:
    """Judge templates on the test images, what has to be chosen first on each fold's chooser.

    prompt_embeds: (K, T, D), unit norm, as `prompt_embeddings` returns it.
    """
    alone = predictions_alone(test.embeds, prompt_embeds)
    best, best_per_class = np.empty_like(test.labels), np.empty_like(test.labels)
    chosen, chosen_per_class = [], []
    for fold in folds:
        template, per_class = choose_templates(fold.chooser, prompt_embeds)
        best[fold.rows] = alone[template][fold.rows]
        # Each class is its own best template's direction.
        class_embeds = prompt_embeds[torch.arange(len(prompt_embeds)), torch.from_numpy(per_class)]
        best_per_class[fold.rows] = zeroshot_scores(test.part(fold.rows).embeds, class_embeds).argmax(axis=1)
        chosen.append(template)
        chosen_per_class.append(per_class)
    together = zeroshot_scores(test.embeds, ensemble(prompt_embeds)).argmax(axis=1)
    return PromptStudy(
        _figures(test.labels, together),
        [_figures(test.labels, predicted) for predicted in alone],
        _figures(test.labels, best),
        _figures(test.labels, best_per_class),
        chosen,
        chosen_per_class,
    )


def choose_templates(chooser: Labelled, prompt_embeds: Tensor) -> tuple[int, np.ndarray]:
    """The template with the best accuracy, and for each class (K,) the one with this class's best F1.

    F1, because recall alone would choose prompts that draw every image to their class. Of templates that are
    equal for a class, the one with the better accuracy is taken, then the first.
    """
    count = len(prompt_embeds)
    if len(chooser.labels) == 0:
        return 0, np.zeros(count, dtype=np.int64)
    predictions = predictions_alone(chooser.embeds, prompt_embeds)
    accuracy = np.array([np.mean(chooser.labels == predicted) for predicted in predictions])
    every = np.arange(count)
    f1 = [f1_score(chooser.labels, each, labels=every, average=None, zero_division=0) for each in predictions]
    by_accuracy = np.argsort(-accuracy, kind="stable")
    per_class = by_accuracy[np.argmax(np.array(f1)[by_accuracy], axis=0)]
    return int(by_accuracy[0]), per_class


def predictions_alone(image_embeds: Tensor, prompt_embeds: Tensor) -> list[np.ndarray]:
    """The predictions (n,) of each template by itself; images (n, D), prompts (K, T, D)."""
    return [
        zeroshot_scores(image_embeds, prompt_embeds[:, number]).argmax(axis=1)
        for number in range(prompt_embeds.shape[1])
    ]


def _figures(labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
    }
