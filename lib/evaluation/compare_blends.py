"""The task compare --blend: what a run learned and what it forgot, for blends of its initial and trained weights.

Source: Wortsman et al., Robust fine-tuning of zero-shot models, 2022, arXiv:2109.01903 (WiSE-FT).
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lib.data.evaluation_set import subset
from lib.errors import InputError
from lib.evaluation.charts import plot_blends
from lib.evaluation.classification import class_embeddings, two_figures, zeroshot_scores
from lib.evaluation.compare import comparable
from lib.evaluation.compare_statistics import DIRECTIONS, RECALLS
from lib.evaluation.report import Outcome, Picture, Rows, decimals, words
from lib.evaluation.retrieval_ranks import keep_readable, retrieval_metrics
from lib.evaluation.splits import halves
from lib.evaluation.subject import Model, Subject
from lib.evaluation.tasks import Compare, DataFlags
from lib.runs.blend import blended, load_initial

DATA, ALSO = "data", "also"


class Division(NamedTuple):
    """A data set in two: images to choose the blend on, and others to measure it on."""

    validation: Subject
    test: Subject


def compare_blends(options: Compare, device: torch.device) -> Outcome | None:
    """Figures of each blend on the user's data and on other data, and the best blend by their validation images."""
    run = Path(options.models[0])
    initial = load_initial(run)
    first = Subject.open(str(run), options, device, needs="either", prompts=options.prompts)
    other = _open_other(first.model, options, device)
    divisions = {DATA: _divide(first, options.class_names), ALSO: _divide(other, None)}
    towers = first.model.towers
    trained = {name: value.detach().cpu().clone() for name, value in towers.state_dict().items()}
    blends: list[dict] = []
    for share in sorted(options.blend):
        towers.load_state_dict(blended(initial.weights, trained, share, run))
        model = replace(first.model)  # an object keeps the hash of its weights
        blends.append({"blend": share} | {key: _measure(each, model) for key, each in divisions.items()})
    if not first.measures:
        return None
    means = [statistics.fmean(_main(blend[key]["validation"]) for key in divisions) for blend in blends]
    best = blends[int(np.argmax(means))]["blend"]  # of equal means that of the smallest share of trained weights
    facts = {"model": first.model.name, "initial weights": initial.source, "precision": first.model.precision.name}
    facts |= _data_facts(divisions)
    facts["best blend"] = f"{best:g}: it has the highest mean of both figures on the validation images"
    table = _table(blends, means)
    points = {f"{blend['blend']:g}": (_main(blend[ALSO]), _main(blend[DATA])) for blend in blends}
    axes = [f"{_name(blends[0][key])} on {divisions[key].test.data.name}" for key in (ALSO, DATA)]
    chart = Picture("Blends", "blends.png", partial(plot_blends, points, f"{best:g}", axes))
    title = "Blends of initial and trained weights"
    return Outcome({"blends": blends, "best_blend": best}, facts, {title: table}, [chart])


def _open_other(model: Model, options: Compare, device: torch.device) -> Subject:
    """The same model on the data of --also."""
    assert options.also is not None
    data = DataFlags(data=options.also, limit=options.data.limit, allow_pipe=options.data.allow_pipe)
    try:
        return Subject.open(model, replace(options, data=data), device, needs="either")
    except InputError as fault:
        raise InputError(str(fault).replace("--data", "--also")) from fault


def _divide(subject: Subject, class_names: Path | None) -> Division:
    """Choose on the val split and measure on the subject's own; without a val split, half of the images for each."""
    validation = subject.of("val") if subject.split != "val" else None
    data = comparable(subject.data, class_names)
    if validation is not None and len(validation.data):
        chooser = replace(validation, data=comparable(validation.data, class_names))
        return Division(chooser, replace(subject, data=data))
    if len(data) < 2:
        raise InputError(f"{data.name} has too few images to choose a blend on one half and measure it on the other")
    labels = np.zeros(len(data), dtype=np.int64) if data.labels is None else data.labels
    one, other = halves(labels, subject.options.run.seed)
    chooser = replace(subject, data=subset(data, one, f"one half of {data.name}"))
    return Division(chooser, replace(subject, data=subset(data, other, f"the other half of {data.name}")))


def _measure(division: Division, model: Model) -> dict:
    """Figures of the test images, and of the validation images below "validation"; all ranks call it together."""
    test, validation = (_figures(replace(subject, model=model)) for subject in (division.test, division.validation))
    return test | {"validation": validation}


def _figures(subject: Subject) -> dict[str, float]:
    """Accuracy and macro F1, or the recalls' means over both directions; the first one counts. Empty but on rank 0."""
    data, embedded = subject.data, subject.embed_images()
    if data.classes is not None:
        labels, classes, templates = data.labelling
        class_embeds = class_embeddings(classes, templates, subject.embed_texts)
        if not subject.measures:
            return {}
        images = embedded.valid.nonzero().flatten()
        scores = zeroshot_scores(embedded.embeds[images], class_embeds)
        return two_figures(np.asarray(labels)[images], scores.argmax(axis=1))
    texts, image_of_text = data.captioning
    text_embeds = subject.embed_texts(texts)
    if not subject.measures:
        return {}
    images, captions, caption_image = keep_readable(embedded.valid, image_of_text)
    found = retrieval_metrics(embedded.embeds[images], text_embeds[captions], caption_image)
    return {key: statistics.fmean(found[direction][key] for direction in DIRECTIONS) for key in RECALLS}


def _main(figures: Mapping[str, float]) -> float:
    return next(iter(figures.values()))


def _name(figures: Mapping[str, float]) -> str:
    name = words(next(iter(figures)))
    return f"mean {name} of both directions" if name in RECALLS else name


def _data_facts(divisions: Mapping[str, Division]) -> dict[str, str]:
    """The images that the blend was chosen and measured on, and warnings about images seen in training."""
    facts: dict[str, str] = {}
    for key, (validation, test) in divisions.items():
        facts |= {
            f"--{key}, chosen on": f"{validation.data.name}, {len(validation.data)} images",
            f"--{key}, measured on": f"{test.data.name}, {len(test.data)} images",
        }
        facts |= {f"--{key}, warning": warning} if (warning := test.warning) else {}
    return facts


def _table(blends: Sequence[Mapping], means: Sequence[float]) -> Rows:
    names = [f"{_name(blends[0][key])}, --{key}" for key in (DATA, ALSO)]
    rows = [["blend", *names, *(f"validation: {name}" for name in names), "mean on validation"]]
    for blend, mean in zip(blends, means, strict=True):
        measured = [blend[DATA], blend[ALSO], blend[DATA]["validation"], blend[ALSO]["validation"]]
        rows.append([f"{blend['blend']:g}", *(decimals(_main(each)) for each in measured), decimals(mean)])
    return rows
