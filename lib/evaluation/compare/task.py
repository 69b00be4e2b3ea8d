"""The task compare: embed with every model, and measure what the data allows, classes or captions."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePath

import torch

from lib.data.evaluation_set import EvaluationSet
from lib.data.prompt_banks import renamed
from lib.errors import InputError
from lib.evaluation.compare.classification import compare_classification
from lib.evaluation.compare.plots import plot_training
from lib.evaluation.compare.retrieval import compare_retrieval
from lib.evaluation.compare.training import Training, training_of
from lib.evaluation.origin import trained_on
from lib.evaluation.outcome import Outcome, Picture, Rows, figure
from lib.evaluation.subject import Model, Subject, check_there
from lib.evaluation.tasks import Compare

Draw = Callable[[Path], list[Picture]]

INNER_FOLDERS = ("export", "checkpoints")  # of a run: they name no model


def compare(options: Compare, device: torch.device) -> Outcome | None:
    """Figures of each model with intervals, differences from the first, and what their training took."""
    names = options.names or short_names(options.models)
    for model in options.models:
        check_there(model, "--models")  # a fault of the last one is told before the first one works
    first = Subject.open(options.models[0], options, device, needs="images", prompts=options.prompts)
    if first.data.classes is None and options.class_names:
        raise InputError(f"--class-names {options.class_names}: {first.data.name} has captions and no classes")
    subjects = _subjects(first, options.models)
    if first.data.classes is not None:
        data = _renamed(first.data, options.class_names)
        outcome = compare_classification(names, data, subjects, options.resamples, options.run.seed)
    elif first.data.captions is not None:
        outcome = compare_retrieval(names, first.data, subjects, options.resamples, options.run.seed)
    else:
        raise InputError(f"{first.data.name} has neither classes nor captions to compare models by")
    of_models = dict(zip(names, options.models, strict=True))
    warnings = {f"warning {name}": trained_on(model, options.data, first.part) for name, model in of_models.items()}
    warned = {name: warning for name, warning in warnings.items() if warning}
    return outcome and _with_trainings(replace(outcome, facts=outcome.facts | warned), of_models)


def short_names(models: tuple[str, ...]) -> tuple[str, ...]:
    """What tells the models apart: as few of the last parts of their paths as are needed."""
    parts = [[part for part in PurePath(model).parts if part not in INNER_FOLDERS] or [model] for model in models]
    for length in range(1, max(map(len, parts)) + 1):
        names = tuple("/".join(each[-length:]) for each in parts)
        if len(set(names)) == len(names):
            return names
    return models


def _subjects(first: Subject, models: tuple[str, ...]) -> Iterator[Subject]:
    """Each model in its turn over the same data: no two of the others are in memory together."""
    yield first
    for model in models[1:]:
        yield replace(first, model=Model.load(model, first.model.precision))


def _renamed(data: EvaluationSet, file: Path | None) -> EvaluationSet:
    return replace(data, classes=renamed(data.labelling.classes, file)) if file else data


def _with_trainings(outcome: Outcome, models: dict[str, str]) -> Outcome:
    """The outcome with what the models' runs tell of their training, where there is one."""
    found = {name: training_of(model) for name, model in models.items()}
    trainings = {name: training for name, training in found.items() if training}
    facts = {f"model {name}": model for name, model in models.items()} | outcome.facts
    if not trainings:
        return replace(outcome, facts=facts)
    metrics = outcome.metrics | {"training": {name: training.metrics() for name, training in trainings.items()}}
    draw = partial(_draw_with_training, draw=outcome.draw, trainings=trainings)
    return Outcome(metrics, facts, outcome.tables | {"Training": training_table(trainings)}, draw)


def training_table(trainings: dict[str, Training]) -> Rows:
    """Length, time and last loss of each training."""
    rows = [["model", "trained for", "seconds an epoch", "last loss"]]
    for name, training in trainings.items():
        length = f"{training.epochs[-1]:.4g} {'epochs' if training.in_epochs else 'steps'}"
        seconds = f"{training.seconds_per_epoch:.3g}" if training.in_epochs else "unknown"
        rows.append([name, length, seconds, figure(training.losses[-1])])
    return rows


def _draw_with_training(folder: Path, draw: Draw, trainings: dict[str, Training]) -> list[Picture]:
    picture = Picture("Training", folder / "training.png")
    plot_training(trainings, picture.path)
    return [*draw(folder), picture]
