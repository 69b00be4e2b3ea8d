"""The study of prompts: each template alone, the best one, and the best one per class, chosen on held-out images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import f1_score
from torch import Tensor

from lib.evaluation.classification import ensemble, two_figures, zeroshot_scores
from lib.evaluation.report import Rows, decimals
from lib.evaluation.splits import Fold, Labelled


@dataclass(frozen=True)
class PromptStudy:
    """Figures on the test images, {"accuracy", "macro_f1"} each, and the templates chosen in each fold."""

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
        """Its entry in metrics.json; "chosen" lists one template per fold."""
        per_class = {
            name: [templates[fold[number]] for fold in self.chosen_per_class] for number, name in enumerate(classes)
        }
        return {
            "ensemble": self.ensemble,
            "templates": dict(zip(templates, self.alone, strict=True)),
            "best_template": self.best | {"chosen": [templates[number] for number in self.chosen]},
            "best_template_per_class": self.best_per_class | {"chosen": per_class},
        }

    def tables(self, classes: Sequence[str], templates: Sequence[str]) -> dict[str, Rows]:
        """Figures of each template and of the chosen ones, and the templates chosen for each class."""
        chosen = " / ".join(dict.fromkeys(templates[number] for number in self.chosen))
        figures = {
            "all templates together": self.ensemble,
            f"best template, chosen on other images: {chosen}": self.best,
            "best template per class, chosen on other images": self.best_per_class,
        } | dict(zip(templates, self.alone, strict=True))
        rows = [[name, decimals(each["accuracy"]), decimals(each["macro_f1"])] for name, each in figures.items()]
        per_class = [
            [name, " / ".join(dict.fromkeys(templates[fold[number]] for fold in self.chosen_per_class))]
            for number, name in enumerate(classes)
        ]
        return {
            "Prompts": [["template", "accuracy", "macro F1"], *rows],
            "Best template of each class": [["class", "template"], *per_class],
        }


def study_prompts(test: Labelled[Tensor], prompt_embeds: Tensor, folds: Sequence[Fold]) -> PromptStudy:
    """Figures of templates on the test images; each fold's chooser selects the best ones.

    prompt_embeds: (K, T, D), unit norm, as `prompt_embeddings` returns it.
    """
    alone = predictions_alone(test.rows, prompt_embeds)
    best, best_per_class = np.empty_like(test.labels), np.empty_like(test.labels)
    chosen, chosen_per_class = [], []
    for fold in folds:
        template, per_class = choose_templates(fold.chooser, prompt_embeds)
        best[fold.rows] = alone[template][fold.rows]
        # (K, D): each class is represented by its own best template.
        class_embeds = prompt_embeds[torch.arange(len(prompt_embeds)), torch.from_numpy(per_class)]
        best_per_class[fold.rows] = zeroshot_scores(test.take(fold.rows).rows, class_embeds).argmax(axis=1)
        chosen.append(template)
        chosen_per_class.append(per_class)
    together = zeroshot_scores(test.rows, ensemble(prompt_embeds)).argmax(axis=1)
    return PromptStudy(
        two_figures(test.labels, together),
        [two_figures(test.labels, predicted) for predicted in alone],
        two_figures(test.labels, best),
        two_figures(test.labels, best_per_class),
        chosen,
        chosen_per_class,
    )


def choose_templates(chooser: Labelled[Tensor], prompt_embeds: Tensor) -> tuple[int, np.ndarray]:
    """The template with the best accuracy, and for each class (K,) the one with the best F1 of this class.

    F1, because recall alone would choose prompts that attract every image to their class. Of templates that are
    equal for a class, the one with the better accuracy is taken, then the first.
    """
    count = len(prompt_embeds)
    if len(chooser.labels) == 0:
        return 0, np.zeros(count, dtype=np.int64)
    predictions = predictions_alone(chooser.rows, prompt_embeds)
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
