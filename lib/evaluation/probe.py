"""The task probe: classifiers on frozen image embeddings, trained with all labels and with a few."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from lib.errors import InputError
from lib.evaluation.charts import plot_classifiers, plot_few_shot
from lib.evaluation.class_charts import plot_class_f1, plot_confusions
from lib.evaluation.classification import class_figures
from lib.evaluation.probe_classifiers import FAMILIES, Chosen, Family, FewShot, choose, few_shot
from lib.evaluation.report import Outcome, Picture, Rows, decimals, skipped_table
from lib.evaluation.splits import Splits, embed_splits
from lib.evaluation.subject import Subject
from lib.evaluation.tasks import Probe

LISTED = 5  # best classes, and worst ones


@dataclass(frozen=True)
class Result:
    """One kind of classifier on the embeddings."""

    family: Family
    chosen: Chosen
    figures: dict
    """as `class_figures` returns them, on the test images"""
    few: list[FewShot]

    @property
    def title(self) -> str:
        """Its name for people."""
        return self.family.title

    def metrics(self) -> dict:
        """Its entry in metrics.json."""
        few = {
            str(point.shots): {"accuracy": point.mean, "deviation": point.deviation, "draws": point.accuracies}
            for point in self.few
        }
        chosen = {self.family.setting: self.chosen.setting, "validation_accuracy": self.chosen.validation_accuracy}
        return self.figures | chosen | {"few_shot": few}


def probe(options: Probe, device: torch.device) -> Outcome | None:
    """Train every classifier on the training split, choose on validation, measure on the test split."""
    subject = Subject.open(options.model, options, device, needs="classes")
    splits = embed_splits(subject)
    if not subject.measures:
        return None
    few = _few_shots(options, splits)
    results = []
    for family in tqdm(FAMILIES, "classifiers"):
        chosen = choose(family, splits.train, splits.validation, options.run.seed)
        figures = class_figures(splits.test.labels, chosen.model.predict(splits.test.rows), splits.classes)
        results.append(Result(family, chosen, figures, few[family.name]))
    # By validation accuracy: the test images must not choose.
    best = max(results, key=lambda result: result.chosen.validation_accuracy)
    facts = subject.facts(splits.embedded) | splits.facts | {"best on validation": best.title}
    unfinished = [result.title for result in results if not result.chosen.converged]
    facts |= {"stopped before convergence": ", ".join(unfinished)} if unfinished else {}
    return Outcome(
        metrics={result.family.name: result.metrics() for result in results},
        facts=facts,
        tables=_tables(results, best) | skipped_table(subject.data, splits.embedded),
        pictures=_pictures(results, best, splits),
    )


def _few_shots(options: Probe, splits: Splits) -> dict[str, list[FewShot]]:
    """A curve for each family; shots above the size of the largest class are left out, since they change nothing."""
    largest = np.bincount(splits.train.labels).max()
    shots = [number for number in sorted(set(options.shots)) if number <= largest]
    if options.shots and not shots:
        asked = " ".join(map(str, options.shots))
        raise InputError(f"--shots {asked}: no class has more than {largest} training images; ask for fewer")
    seeds = range(options.run.seed, options.run.seed + options.draws)
    curves: dict[str, list[FewShot]] = {family.name: [] for family in FAMILIES}
    for number, family in tqdm(list(itertools.product(shots, FAMILIES)), "few-shot"):
        curves[family.name].append(few_shot(family, splits.train, splits.validation, splits.test, number, seeds))
    return curves


def _tables(results: Sequence[Result], best: Result) -> dict[str, Rows]:
    summary = [["classifier", "accuracy", "macro F1", "validation accuracy", "regularization"]]
    for result in results:
        numbers = (result.figures["accuracy"], result.figures["macro_f1"], result.chosen.validation_accuracy)
        summary.append([result.title, *map(decimals, numbers), f"{result.family.setting} {result.chosen.setting:g}"])
    tables: dict[str, Rows] = {"Probe of frozen image embeddings": summary}
    if best.few:
        tables["Accuracy with few labels, mean ± deviation over draws"] = [
            ["images per class", *(result.title for result in results)],
            *(
                [str(points[0].shots), *(f"{point.mean:.4f} ± {point.deviation:.4f}" for point in points)]
                for points in zip(*(result.few for result in results), strict=True)
            ),
            ["all", *(decimals(result.figures["accuracy"]) for result in results)],
        ]
    return tables | _class_tables(results, best)


def _class_tables(results: Sequence[Result], best: Result) -> dict[str, Rows]:
    """The best and worst classes of the best classifier, and F1 of every class by every classifier."""
    per_class = best.figures["per_class"]
    tested = [name for name in per_class if per_class[name]["support"]]
    ranked = sorted(tested, key=lambda name: (-per_class[name]["f1"], name))
    head = ["class", "precision", "recall", "F1", "images"]

    def lines(names: Sequence[str]) -> Rows:
        return [head, *([name, *map(decimals, per_class[name].values())] for name in names)]

    everything = [["class", *(result.title for result in results), "images"]]
    for name in per_class:
        f1 = (decimals(result.figures["per_class"][name]["f1"]) for result in results)
        everything.append([name, *f1, str(per_class[name]["support"])])
    return {
        f"Best classes, {best.title}": lines(ranked[:LISTED]),
        f"Worst classes, {best.title}": lines(ranked[::-1][:LISTED]),
        "F1 of every class": everything,
    }


def _pictures(results: Sequence[Result], best: Result, splits: Splits) -> list[Picture]:
    """Charts of all classifiers, and of the best one's classes."""
    figures = {result.title: result.figures for result in results}
    chance = np.bincount(splits.test.labels).max() / len(splits.test.labels)
    pictures = [Picture("Classifiers", "classifiers.png", partial(plot_classifiers, figures, chance))]
    if best.few:
        curves = {result.title: result.few for result in results}
        full = {title: each["accuracy"] for title, each in figures.items()}
        pictures.append(Picture("Few labels", "few_shot.png", partial(plot_few_shot, curves, full)))
    f1, matrix = partial(plot_class_f1, best.figures["per_class"]), {"": best.figures["confusion"]}
    pictures.append(Picture(f"F1 by class, {best.title}", "class_f1.png", f1))
    confusion = partial(plot_confusions, matrix, splits.classes)
    pictures.append(Picture(f"Confusion matrix, {best.title}", "confusion.png", confusion))
    return pictures
