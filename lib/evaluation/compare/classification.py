"""Zero-shot classifiers side by side: overall, class by class, and the images on which they differ."""

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from lib.data.evaluation_set import EvaluationSet
from lib.evaluation.class_figures import class_figures, confusion
from lib.evaluation.class_plots import plot_confusions
from lib.evaluation.compare.differing import differing, plot_differing
from lib.evaluation.compare.plots import plot_f1_differences, plot_intervals
from lib.evaluation.compare.statistics import bootstrap, interval, mcnemar
from lib.evaluation.drawing import OpenImage
from lib.evaluation.outcome import Outcome, Picture, Rows, data_facts, figure, skipped_table
from lib.evaluation.subject import Subject
from lib.evaluation.zeroshot.metrics import class_embeddings, top5, zeroshot_scores

RESAMPLED = ("accuracy", "macro_f1")


def compare_classification(
    names: Sequence[str], data: EvaluationSet, subjects: Iterable[Subject], resamples: int, seed: int
) -> Outcome | None:
    """Compare on the images that every model could read; data has the class names to use."""
    labels_of_all, classes, templates = data.labelling
    answers = []
    for subject in subjects:
        embedded = subject.embed_images()
        answers.append((embedded, class_embeddings(classes, templates, subject.embed_texts)))
    if not subject.measures:
        return None
    images = torch.stack([embedded.valid for embedded, _ in answers]).all(dim=0).nonzero().flatten()
    labels = np.asarray(labels_of_all)[images]
    scores = [zeroshot_scores(embedded.embeds[images], class_embeds) for embedded, class_embeds in answers]
    predicted = np.stack([each.argmax(axis=1) for each in scores])  # (models, n)
    metrics = classification_comparison(names, labels, scores, classes, resamples, seed)
    draw = partial(
        draw_pictures,
        metrics=metrics,
        labels=labels,
        predicted=dict(zip(names, predicted, strict=True)),
        classes=classes,
        open_image=lambda row: data.open_image(int(images[row])),
    )
    facts = data_facts(data, answers[0][0]) | {"classes": str(len(classes))}
    facts |= {"intervals": f"95%, by {resamples} samples of the images", "test": "McNemar's, exact"}
    return Outcome(metrics, facts, tables(metrics) | skipped_table(data, answers[0][0]), draw)


def classification_comparison(
    names: Sequence[str],
    labels: np.ndarray,
    scores: Sequence[np.ndarray],
    classes: Sequence[str],
    resamples: int,
    seed: int,
) -> dict:
    """Figures of each model with 95% intervals, and McNemar's test and the differences of each two.

    labels: (n,); scores: (n, K) of each model. The images are resampled, the same for all models.
    """
    predicted = np.stack([each.argmax(axis=1) for each in scores])
    count = len(classes)

    def resampled_figures(rows: np.ndarray) -> np.ndarray:
        matrices = (confusion(labels[rows], each[rows], count) for each in predicted)
        return np.array([[np.trace(matrix) / len(rows), macro_f1(matrix)] for matrix in matrices])

    samples = bootstrap(resampled_figures, len(labels), resamples, seed)  # (resamples, models, 2)
    models = {}
    for number, name in enumerate(names):
        figures = class_figures(labels, predicted[number], classes)
        intervals = {key: interval(samples[:, number, place]) for place, key in enumerate(RESAMPLED)}
        figures = {"accuracy": figures.pop("accuracy"), "top5": top5(labels, scores[number])} | figures
        models[name] = figures | {"intervals": intervals}
    pairs = []
    for one, other in combinations(range(len(names)), 2):
        difference = {
            key: {
                "difference": models[names[other]][key] - models[names[one]][key],
                "interval": interval(samples[:, other, place] - samples[:, one, place]),
            }
            for place, key in enumerate(RESAMPLED)
        }
        test = mcnemar(predicted[one] == labels, predicted[other] == labels)
        pairs.append({"models": [names[one], names[other]]} | difference | {"mcnemar": test._asdict()})
    return {"models": models, "pairs": pairs}


def macro_f1(matrix: np.ndarray) -> float:
    """Macro F1 of a confusion matrix (K, K), over the classes that occur, as scikit-learn has it."""
    occurring = matrix.sum(axis=0) + matrix.sum(axis=1)
    return float((2 * np.diag(matrix) / np.maximum(occurring, 1))[occurring > 0].mean())


def tables(metrics: dict) -> dict[str, Rows]:
    """Overall, pair by pair, and F1 class by class with the differences from the first model."""
    models = metrics["models"]
    columns = ("accuracy", "top5", "macro_precision", "macro_recall", "macro_f1")
    overall = [["model", *(key.replace("_", " ") for key in columns)]]
    for name, figures in models.items():
        cells = [figure(figures[key]) for key in columns]
        overall.append([name, *map(_with_interval, cells, (figures["intervals"].get(key) for key in columns))])
    pairs = [["models", "accuracy", "macro f1", "only first right", "only second right", "p"]]
    for pair in metrics["pairs"]:
        changes = [_with_interval(f"{pair[key]['difference']:+.4f}", pair[key]["interval"]) for key in RESAMPLED]
        only_first, only_second, p_value = pair["mcnemar"].values()
        pairs.append([" → ".join(pair["models"]), *changes, str(only_first), str(only_second), f"{p_value:.3g}"])
    first, *others = models
    per_class = [["class", "support", *(f"f1, {name}" for name in models), *(f"{name} − {first}" for name in others)]]
    for name, figures in models[first]["per_class"].items():
        f1 = [model["per_class"][name]["f1"] for model in models.values()]
        differences = [f"{value - f1[0]:+.4f}" for value in f1[1:]]
        per_class.append([name, str(figures["support"]), *map(figure, f1), *differences])
    return {"Comparison of classifiers": overall, "Differences": pairs, "Classes": per_class}


def _with_interval(value: str, bounds: tuple[float, float] | None) -> str:
    return f"{value} [{bounds[0]:.4f}, {bounds[1]:.4f}]" if bounds else value


def draw_pictures(
    folder: Path,
    metrics: dict,
    labels: np.ndarray,
    predicted: dict[str, np.ndarray],
    classes: Sequence[str],
    open_image: OpenImage,
) -> list[Picture]:
    """Draw everything into the folder; labels: (n,), predicted: (n,) by model; open_image takes a row of them."""
    models = metrics["models"]
    overall = Picture("Accuracy and macro F1", folder / "overall.png")
    figures = {key: {name: (each[key], each["intervals"][key]) for name, each in models.items()} for key in RESAMPLED}
    plot_intervals({key.replace("_", " "): values for key, values in figures.items()}, overall.path)
    f1 = Picture("F1 by class", folder / "f1_differences.png")
    plot_f1_differences({name: each["per_class"] for name, each in models.items()}, f1.path)
    matrices = Picture("Confusion matrices", folder / "confusions.png")
    plot_confusions({name: each["confusion"] for name, each in models.items()}, classes, matrices.path)
    pictures = [overall, f1, matrices]
    rows = differing(labels, np.stack(list(predicted.values())))
    if rows:
        pictures.append(Picture("Images on which they differ", folder / "differing.png"))
        plot_differing(rows, labels, predicted, classes, open_image, pictures[-1].path)
    return pictures
