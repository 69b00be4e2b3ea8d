"""The tables of a zero-shot report."""

from collections.abc import Sequence

import numpy as np

from lib.evaluation.outcome import Rows, figure
from lib.evaluation.zeroshot.calibration import Reliability
from lib.evaluation.zeroshot.prompt_study import PromptStudy

CONFUSIONS = 10


def class_tables(metrics: dict, classes: Sequence[str]) -> dict[str, Rows]:
    """The summary, the largest confusions, and the figures of each class."""
    plain = {key: value for key, value in metrics.items() if isinstance(value, float)}
    per_class = [[name, *map(figure, figures.values())] for name, figures in metrics["per_class"].items()]
    return {
        "Zero-shot classification": [
            ["", *(key.replace("_", " ") for key in plain)],
            ["zero-shot", *map(figure, plain.values())],
        ],
        "Most frequent confusions": confusions(metrics["confusion"], classes),
        "Classes": [["class", "precision", "recall", "f1", "support"], *per_class],
    }


def confusions(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> Rows:
    """The largest counts off the diagonal of a confusion matrix (K, K)."""
    counts = np.array(confusion)
    np.fill_diagonal(counts, 0)
    rows = [["true class", "predicted class", "images"]]
    for place in np.argsort(-counts, axis=None, kind="stable")[:CONFUSIONS]:
        true, predicted = np.unravel_index(place, counts.shape)
        if counts[true, predicted]:
            rows.append([classes[true], classes[predicted], str(counts[true, predicted])])
    return rows


def prompt_tables(study: PromptStudy, classes: Sequence[str], templates: Sequence[str]) -> dict[str, Rows]:
    """Each template and the choices on the test images, and what was chosen for each class."""
    chosen = " / ".join(dict.fromkeys(templates[number] for number in study.chosen))
    figures = {
        "all templates together": study.ensemble,
        f"best template, chosen on other images: {chosen}": study.best,
        "best template per class, chosen on other images": study.best_per_class,
    } | dict(zip(templates, study.alone, strict=True))
    rows = [[name, figure(each["accuracy"]), figure(each["macro_f1"])] for name, each in figures.items()]
    per_class = [
        [name, " / ".join(dict.fromkeys(templates[fold[number]] for fold in study.chosen_per_class))]
        for number, name in enumerate(classes)
    ]
    return {
        "Prompts": [["template", "accuracy", "macro f1"], *rows],
        "Best template of each class": [["class", "template"], *per_class],
    }


def calibration_table(before: Reliability, after: Reliability) -> dict[str, Rows]:
    """Temperature, calibration error and likelihood before and after fitting."""
    rows = [
        [
            name,
            " / ".join(f"{temperature:.4g}" for temperature in each.temperatures),
            figure(each.ece),
            figure(each.nll),
        ]
        for name, each in (("the model's own", before), ("fitted", after))
    ]
    return {"Calibration": [["temperature", "value", "ECE", "negative log-likelihood"], *rows]}
