"""The task probe: classifiers on frozen image embeddings, with all labels and with a few."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lib.errors import InputError
from lib.evaluation.class_figures import class_figures
from lib.evaluation.class_plots import plot_class_f1, plot_confusion
from lib.evaluation.classifiers import FAMILIES, Chosen, Family, choose
from lib.evaluation.outcome import Outcome, Picture, Rows, figure, skipped_table
from lib.evaluation.parts import Parts, embed_parts
from lib.evaluation.probe.few_shot import FewShot, few_shot
from lib.evaluation.probe.plots import plot_classifiers, plot_few_shot
from lib.evaluation.subject import Subject
from lib.evaluation.tasks import Probe

LISTED = 5  # best classes, and worst ones

Curves = dict[str, list[FewShot]]


@dataclass(frozen=True)
class Reading:
    """What one kind of classifier makes of the embeddings."""

    family: Family
    chosen: Chosen
    figures: dict
    """as `class_figures` gives them, on the test part"""
    few: list[FewShot]


def probe(options: Probe, subject: Subject) -> Outcome | None:
    """Train every classifier on the training part, choose on validation, measure on the test part."""
    parts = embed_parts(subject)
    if not subject.measures:
        return None
    few = _few_shots(options, parts)
    readings = []
    for family in tqdm(FAMILIES, "classifiers"):
        chosen = choose(family, parts.train, parts.validation, options.run.seed)
        figures = class_figures(parts.test.labels, chosen.model.predict(parts.test.rows), parts.classes)
        readings.append(Reading(family, chosen, figures, few[family.name]))
    # By validation: the test images decide nothing.
    best = max(readings, key=lambda reading: reading.chosen.validation_accuracy)
    facts = subject.facts(parts.embedded) | parts.facts
    facts["best on validation"] = best.family.title
    unfinished = [reading.family.title for reading in readings if not reading.chosen.converged]
    facts |= {"stopped before convergence": ", ".join(unfinished)} if unfinished else {}
    return Outcome(
        metrics={reading.family.name: _entry(reading) for reading in readings},
        facts=facts,
        tables=_tables(readings, best) | skipped_table(subject.data, parts.embedded),
        draw=partial(_draw, readings=readings, best=best, parts=parts),
    )


def _few_shots(options: Probe, parts: Parts) -> Curves:
    """A curve for each family; numbers above the largest class are left out, as they would draw the same images."""
    largest = np.bincount(parts.train.labels).max()
    shots = [number for number in sorted(set(options.shots)) if number <= largest]
    if options.shots and not shots:
        asked = " ".join(map(str, options.shots))
        raise InputError(f"--shots {asked}: no class has more than {largest} training images; ask for fewer")
    seeds = range(options.run.seed, options.run.seed + options.draws)
    curves: Curves = {family.name: [] for family in FAMILIES}
    for number, family in tqdm(list(itertools.product(shots, FAMILIES)), "few-shot"):
        curves[family.name].append(few_shot(family, parts.train, parts.validation, parts.test, number, seeds))
    return curves


def _entry(reading: Reading) -> dict:
    """The classifier's part of metrics.json."""
    few = {
        str(point.shots): {"accuracy": point.mean, "deviation": point.deviation, "draws": point.accuracies}
        for point in reading.few
    }
    chosen = {
        reading.family.setting: reading.chosen.setting, "validation_accuracy": reading.chosen.validation_accuracy,
    }  # fmt: skip
    return reading.figures | chosen | {"few_shot": few}


def _tables(readings: Sequence[Reading], best: Reading) -> dict[str, Rows]:
    summary = [["classifier", "accuracy", "macro F1", "accuracy on validation", "chosen there"]]
    for reading in readings:
        numbers = (reading.figures["accuracy"], reading.figures["macro_f1"], reading.chosen.validation_accuracy)
        setting = f"{reading.family.setting} {reading.chosen.setting:g}"
        summary.append([reading.family.title, *map(figure, numbers), setting])
    tables = {"Probe of frozen image embeddings": summary}
    if best.few:
        tables["Accuracy with few labels, mean ± deviation over draws"] = [
            ["images a class", *(reading.family.title for reading in readings)],
            *(
                [str(points[0].shots), *(f"{point.mean:.4f} ± {point.deviation:.4f}" for point in points)]
                for points in zip(*(reading.few for reading in readings), strict=True)
            ),
            ["all", *(figure(reading.figures["accuracy"]) for reading in readings)],
        ]
    return tables | _class_tables(readings, best)


def _class_tables(readings: Sequence[Reading], best: Reading) -> dict[str, Rows]:
    """The best and worst classes of the best classifier, and F1 of every class by every classifier."""
    per_class = best.figures["per_class"]
    tested = [name for name in per_class if per_class[name]["support"]]
    ranked = sorted(tested, key=lambda name: (-per_class[name]["f1"], name))
    head = ["class", "precision", "recall", "F1", "images"]

    def lines(names: Sequence[str]) -> Rows:
        return [head, *([name, *map(figure, per_class[name].values())] for name in names)]

    everything = [["class", *(reading.family.title for reading in readings), "images"]]
    for name in per_class:
        f1 = (figure(reading.figures["per_class"][name]["f1"]) for reading in readings)
        everything.append([name, *f1, str(per_class[name]["support"])])
    return {
        f"Best classes, {best.family.title}": lines(ranked[:LISTED]),
        f"Worst classes, {best.family.title}": lines(ranked[::-1][:LISTED]),
        "F1 of every class": everything,
    }


def _draw(folder: Path, readings: Sequence[Reading], best: Reading, parts: Parts) -> list[Picture]:
    """Charts of all classifiers, and of the best one's classes."""
    figures = {reading.family.title: reading.figures for reading in readings}
    pictures = [Picture("Classifiers", folder / "classifiers.png")]
    chance = np.bincount(parts.test.labels).max() / len(parts.test.labels)
    plot_classifiers(figures, chance, pictures[-1].path)
    if best.few:
        pictures.append(Picture("Few labels", folder / "few_shot.png"))
        curves = {reading.family.title: reading.few for reading in readings}
        full = {title: of_one["accuracy"] for title, of_one in figures.items()}
        plot_few_shot(curves, full, pictures[-1].path)
    pictures.append(Picture(f"F1 by class, {best.family.title}", folder / "class_f1.png"))
    plot_class_f1(best.figures["per_class"], pictures[-1].path)
    pictures.append(Picture(f"Confusion matrix, {best.family.title}", folder / "confusion.png"))
    plot_confusion(best.figures["confusion"], parts.classes, pictures[-1].path)
    return pictures
