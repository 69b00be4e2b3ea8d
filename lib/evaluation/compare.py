"""The task compare: several models on the same images, zero-shot if the data has classes, else retrieval."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePath

import numpy as np
import torch

from lib.data.evaluation_set import EvaluationSet, spread
from lib.data.prompt_banks import renamed
from lib.errors import InputError
from lib.evaluation.charts import plot_intervals, plot_training
from lib.evaluation.class_charts import plot_confusions, plot_f1_differences
from lib.evaluation.classification import class_embeddings, zeroshot_scores
from lib.evaluation.compare_statistics import (
    DIRECTIONS,
    RECALLS,
    RESAMPLED,
    classification_comparison,
    retrieval_comparison,
)
from lib.evaluation.image_sheets import plot_differing, plot_text_queries
from lib.evaluation.origin import Training, training_of
from lib.evaluation.report import OpenImage, Outcome, Picture, Rows, data_facts, decimals, skipped_table, words
from lib.evaluation.retrieval_answers import SHOWN, Gallery, Matched, match, text_query
from lib.evaluation.retrieval_ranks import keep_readable, retrieval_ranks
from lib.evaluation.subject import Model, Subject, check_there
from lib.evaluation.tasks import Compare

INNER_FOLDERS = ("export", "checkpoints")  # of a run: they name no model
DIFFERING_IMAGES = 20
DIFFERING_CAPTIONS = 10  # rows of the sheet: a caption takes one for each model


def compare(options: Compare, device: torch.device) -> Outcome | None:
    """Figures of each model with intervals, the differences of each two, and the training of each."""
    names = options.names or short_names(options.models)
    for model in options.models:
        check_there(model, "--models")  # before the first model works: the last one's fault must not come late
    first = Subject.open(options.models[0], options, device, needs="either", prompts=options.prompts)
    data = comparable(first.data, options.class_names)
    measure = _compare_classifiers if data.classes is not None else _compare_retrieval
    outcome = measure(names, data, _subjects(first, options.models), options.resamples, options.run.seed)
    of_models = dict(zip(names, options.models, strict=True))
    warnings = {f"warning {name}": first.warning_about(model) for name, model in of_models.items()}
    warned = {name: warning for name, warning in warnings.items() if warning}
    return outcome and _with_trainings(replace(outcome, facts=outcome.facts | warned), of_models)


def comparable(data: EvaluationSet, class_names: Path | None) -> EvaluationSet:
    """The data with the names of its classes from the file; InputError if there is nothing to compare models by."""
    if data.classes is None and class_names:
        raise InputError(f"--class-names {class_names}: {data.name} has captions and no classes")
    if data.classes is None and data.captions is None:
        raise InputError(f"{data.name} has neither classes nor captions to compare models by")
    if data.classes is not None and class_names:
        return replace(data, classes=renamed(data.classes, class_names))
    return data


def short_names(models: tuple[str, ...]) -> tuple[str, ...]:
    """Names that tell the models apart: as few of the last folders of their paths as are needed."""
    paths = [[name for name in PurePath(model).parts if name not in INNER_FOLDERS] or [model] for model in models]
    for length in range(1, max(map(len, paths)) + 1):
        names = tuple("/".join(path[-length:]) for path in paths)
        if len(set(names)) == len(names):
            return names
    return models


def _subjects(first: Subject, models: tuple[str, ...]) -> Iterator[Subject]:
    """Each model in turn on the same data, so that the others need not be in memory together."""
    yield first
    for model in models[1:]:
        yield replace(first, model=Model.load(model, first.model.precision))


# Classifiers


def _compare_classifiers(
    names: Sequence[str], data: EvaluationSet, subjects: Iterator[Subject], resamples: int, seed: int
) -> Outcome | None:
    """Compare zero-shot predictions on the images that every model could read."""
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
    predicted = {name: each.argmax(axis=1) for name, each in zip(names, scores, strict=True)}
    metrics = classification_comparison(names, labels, scores, classes, resamples, seed)
    facts = data_facts(data, answers[0][0]) | {"classes": str(len(classes))}
    facts |= {"intervals": f"95%, by {resamples} samples of the images", "test": "McNemar's, exact"}
    tables = classifier_tables(metrics) | skipped_table(data, answers[0][0])
    pictures = classifier_pictures(metrics, labels, predicted, classes, lambda row: data.open_image(int(images[row])))
    return Outcome(metrics, facts, tables, pictures)


def classifier_tables(metrics: dict) -> dict[str, Rows]:
    """Overall, pair by pair, and F1 class by class with the differences from the first model."""
    models = metrics["models"]
    columns = ("accuracy", "top5", "macro_precision", "macro_recall", "macro_f1")
    overall = [["model", *map(words, columns)]]
    for name, figures in models.items():
        bounds = figures["intervals"]
        overall.append([name, *(_bounded(decimals(figures[key]), bounds.get(key)) for key in columns)])
    pairs = [["models", *map(words, RESAMPLED), "only first right", "only second right", "p"]]
    for pair in metrics["pairs"]:
        changes = [_bounded(f"{pair[key]['difference']:+.4f}", pair[key]["interval"]) for key in RESAMPLED]
        only_first, only_second, p_value = pair["mcnemar"].values()
        pairs.append([" → ".join(pair["models"]), *changes, str(only_first), str(only_second), f"{p_value:.3g}"])
    first, *others = models
    per_class = [["class", "images", *(f"F1, {name}" for name in models), *(f"{name} − {first}" for name in others)]]
    for name, figures in models[first]["per_class"].items():
        f1 = [model["per_class"][name]["f1"] for model in models.values()]
        differences = [f"{value - f1[0]:+.4f}" for value in f1[1:]]
        per_class.append([name, str(figures["support"]), *map(decimals, f1), *differences])
    return {"Comparison of classifiers": overall, "Differences": pairs, "Classes": per_class}


def _bounded(value: str, bounds: tuple[float, float] | None) -> str:
    return f"{value} [{bounds[0]:.4f}, {bounds[1]:.4f}]" if bounds else value


def classifier_pictures(
    metrics: dict, labels: np.ndarray, predicted: dict[str, np.ndarray], classes: Sequence[str], open_image: OpenImage
) -> list[Picture]:
    """Charts, and images on which models differ; labels, predicted: (n,); open_image takes a row of them."""
    models = metrics["models"]
    figures = {
        words(key): {name: (each[key], each["intervals"][key]) for name, each in models.items()} for key in RESAMPLED
    }
    per_class = {name: each["per_class"] for name, each in models.items()}
    matrices = {name: each["confusion"] for name, each in models.items()}
    pictures = [
        Picture("Accuracy and macro F1", "overall.png", partial(plot_intervals, figures)),
        Picture("F1 by class", "f1_differences.png", partial(plot_f1_differences, per_class)),
        Picture("Confusion matrices", "confusions.png", partial(plot_confusions, matrices, classes)),
    ]
    rows = differing(labels, np.stack(list(predicted.values())))
    if rows:
        sheet = partial(plot_differing, rows, labels, predicted, classes, open_image)
        pictures.append(Picture("Images on which they differ", "differing.png", sheet))
    return pictures


def differing(labels: np.ndarray, predicted: np.ndarray) -> list[int]:
    """A fair sample of the images that some models have right and others wrong, sorted by which model is right.

    labels: (n,); predicted: (models, n). If there are none, of the images on which all are wrong but differ.
    """
    right, differ = predicted == labels, (predicted != predicted[0]).any(axis=0)
    return _by_right_model(right, DIFFERING_IMAGES) or spread(np.flatnonzero(differ), DIFFERING_IMAGES)


def _by_right_model(right: np.ndarray, count: int) -> list[int]:
    """At most `count` of the columns that some models have right and others wrong, evenly spaced.

    right: (models, n) bool. Sorted by which model is right, so that the even spacing covers every combination.
    """
    rows = np.flatnonzero(right.any(axis=0) & ~right.all(axis=0))
    return spread(rows[np.lexsort(~right[::-1, rows])], count)


# Retrieval


def _compare_retrieval(
    names: Sequence[str], data: EvaluationSet, subjects: Iterator[Subject], resamples: int, seed: int
) -> Outcome | None:
    """Compare retrieval on the images that every model could read, with their captions."""
    texts, image_of_text = data.captioning
    answers = []
    for subject in subjects:
        answers.append((subject.embed_images(), subject.embed_texts(texts)))
    if not subject.measures:
        return None
    valid = torch.stack([embedded.valid for embedded, _ in answers]).all(dim=0)
    _, captions, caption_image = keep_readable(valid, image_of_text)
    models = {
        name: match(data, embedded.embeds, valid, text_embeds[captions])[0]
        for name, (embedded, text_embeds) in zip(names, answers, strict=True)
    }
    ranks = [retrieval_ranks(each.image_embeds, each.text_embeds, caption_image) for each in models.values()]
    metrics = retrieval_comparison(names, ranks, caption_image.numpy(), resamples, seed)
    facts = data_facts(data, answers[0][0]) | {"captions": str(len(captions))}
    facts["intervals"] = f"95%, by {resamples} samples of the images with all their captions"
    pictures = _retrieval_pictures(metrics, models, np.stack([to_image.numpy() for _, to_image in ranks]))
    return Outcome(metrics, facts, _retrieval_tables(metrics) | skipped_table(data, answers[0][0]), pictures)


def _retrieval_tables(metrics: dict) -> dict[str, Rows]:
    """Each direction of each model, and the differences of each two."""
    overall = [["model", "direction", *RECALLS, "MRR", "median rank"]]
    for name, model in metrics["models"].items():
        for direction in DIRECTIONS:
            figures = model[direction]
            cells = [_bounded(decimals(figures[key]), figures["intervals"][key]) for key in RECALLS]
            overall.append([name, words(direction), *cells, decimals(figures["MRR"]), f"{figures['median_rank']:g}"])
    differences = [["models", "direction", *RECALLS]]
    for pair in metrics["pairs"]:
        for direction in DIRECTIONS:
            cells = [_bounded(f"{pair[direction][key]:+.4f}", pair[direction]["intervals"][key]) for key in RECALLS]
            differences.append([" → ".join(pair["models"]), words(direction), *cells])
    return {"Comparison of retrieval": overall, "Differences": differences}


def _retrieval_pictures(metrics: dict, models: Mapping[str, Matched], to_image: np.ndarray) -> list[Picture]:
    """The recalls with their intervals, and captions on which the models differ.

    to_image: (models, m) ranks of each caption's image.
    """
    panels = {
        f"{words(direction)} {key}": {
            name: (model[direction][key], model[direction]["intervals"][key])
            for name, model in metrics["models"].items()
        }
        for direction in DIRECTIONS
        for key in RECALLS
    }
    pictures = [Picture("Recall with 95% intervals", "recall.png", partial(plot_intervals, panels))]
    rows = differing_captions(to_image)
    if rows:
        title = "Captions whose image one model shows among the first five and another does not"
        draw = partial(plot_differing_captions, rows, models, to_image, title)
        pictures.append(Picture(title, "differing.png", draw))
    return pictures


def differing_captions(ranks: np.ndarray) -> list[int]:
    """A fair sample of the captions whose image some models show among the first five and others do not.

    ranks: (models, m) of each caption's image, from 1.
    """
    return _by_right_model(ranks <= SHOWN, max(2, DIFFERING_CAPTIONS // len(ranks)))


def plot_differing_captions(
    captions: list[int], models: Mapping[str, Matched], ranks: np.ndarray, title: str, path: Path
) -> None:
    """Draw a row per caption and model: the five most similar images, the right one framed.

    captions: rows of each model's captions; ranks: (models, m), in the models' order.
    """
    gallery = Gallery(next(iter(models.values())).open_image)
    queries = []
    for caption in captions:
        for number, (name, matched) in enumerate(models.items()):
            query = text_query(matched, gallery, caption, int(ranks[number, caption]))
            queries.append(query._replace(text=f"{name}: {query.text}"))
    plot_text_queries(queries, gallery.open, title, path)


# Training


def _with_trainings(outcome: Outcome, models: dict[str, str]) -> Outcome:
    """The outcome with length, time and losses of the models' training, as far as their runs are known."""
    found = {name: training_of(model) for name, model in models.items()}
    trainings = {name: training for name, training in found.items() if training}
    facts = {f"model {name}": model for name, model in models.items()} | outcome.facts
    if not trainings:
        return replace(outcome, facts=facts)
    metrics = outcome.metrics | {"training": {name: training.metrics() for name, training in trainings.items()}}
    chart = Picture("Training", "training.png", partial(plot_training, trainings))
    tables = outcome.tables | {"Training": _training_table(trainings)}
    return Outcome(metrics, facts, tables, [*outcome.pictures, chart])


def _training_table(trainings: dict[str, Training]) -> Rows:
    """Length, time and last loss of each training."""
    rows = [["model", "trained for", "seconds per epoch", "last loss"]]
    for name, training in trainings.items():
        length = f"{training.epochs[-1]:.4g} {'epochs' if training.in_epochs else 'steps'}"
        seconds = f"{training.seconds_per_epoch:.3g}" if training.in_epochs else "unknown"
        rows.append([name, length, seconds, f"{training.losses[-1]:.4g}{training.kind.removeprefix('loss')}"])
    return rows
