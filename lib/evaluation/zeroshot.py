"""The task zeroshot: classify by prompts, choose prompts and a temperature on held-out images."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from lib.data.evaluation_set import spread
from lib.data.prompt_banks import renamed
from lib.evaluation.calibration import Reliability, calibrate, calibration_table
from lib.evaluation.charts import plot_prompts, plot_reliability
from lib.evaluation.class_charts import plot_class_f1, plot_confusions
from lib.evaluation.classification import ensemble, prompt_embeddings, zeroshot_metrics, zeroshot_scores
from lib.evaluation.image_sheets import plot_predictions
from lib.evaluation.prompt_study import PromptStudy, study_prompts
from lib.evaluation.report import OpenImage, Outcome, Picture, Rows, decimals, skipped_table, words
from lib.evaluation.splits import Labelled, folds, readable
from lib.evaluation.subject import Subject
from lib.evaluation.tasks import Zeroshot

PREDICTIONS = 12  # correct ones and wrong ones each
CONFUSIONS = 10  # rows of the table


def zeroshot(options: Zeroshot, device: torch.device) -> Outcome | None:
    """Zero-shot figures by all templates together, the study of each template, and the calibration.

    Prompts and temperature are chosen on the data's val split, or else on one half of the images for the other.
    """
    subject = Subject.open(options.model, options, device, needs="classes", prompts=options.prompts)
    data = subject.data
    labels, own_classes, templates = data.labelling
    classes = renamed(own_classes, options.class_names) if options.class_names else own_classes
    validation = subject.of("val") if subject.split != "val" else None
    embedded = subject.embed_images()
    validated = None if validation is None else validation.embed_images()
    prompt_embeds = prompt_embeddings(classes, templates, subject.embed_texts)
    if not subject.measures:
        return None

    images = embedded.valid.nonzero().flatten().numpy()
    test = Labelled(embedded.embeds[images], np.asarray(labels)[images])
    chooser = None
    chosen_on = "one half of these images and measured on the other, and vice versa: there is no other validation split"
    if validation is not None and validated is not None:
        chooser = readable(validation.data, validated, own_classes)
        chosen_on = f"{validation.data.name}, {len(chooser.labels)} images"
    held_out = folds(test, chooser, options.run.seed)
    class_embeds = ensemble(prompt_embeds)
    metrics = zeroshot_metrics(test.rows, test.labels, class_embeds, classes)
    study = study_prompts(test, prompt_embeds, held_out)
    scale = subject.model.towers.logit_scale.exp().item()
    scores = zeroshot_scores(test.rows, class_embeds)
    before, after = calibrate(scores, test.labels, class_embeds, held_out, scale)

    facts = subject.facts(embedded)
    facts |= {"classes": str(len(classes)), "prompt templates": str(len(templates)), "chosen on": chosen_on}
    tables = class_tables(metrics, classes) | study.tables(classes, templates)
    tables |= {"Calibration": calibration_table(before, after)} | skipped_table(data, embedded)
    metrics |= {"prompts": study.metrics(classes, templates)}
    metrics |= {"calibration": {"before": before.metrics(), "after": after.metrics()}}
    drawn = report_charts(metrics, study, (before, after), classes, templates)
    examples = example_sheet(test.labels, scores.argmax(axis=1), classes, lambda row: data.open_image(int(images[row])))
    return Outcome(metrics, facts, tables, [*drawn, examples])


def class_tables(metrics: dict, classes: Sequence[str]) -> dict[str, Rows]:
    """The summary, the most frequent confusions, and the figures of each class."""
    plain = {key: value for key, value in metrics.items() if isinstance(value, float)}
    per_class = [[name, *map(decimals, figures.values())] for name, figures in metrics["per_class"].items()]
    return {
        "Zero-shot classification": [["", *map(words, plain)], ["zero-shot", *map(decimals, plain.values())]],
        "Most frequent confusions": confusions(metrics["confusion"], classes),
        "Classes": [["class", "precision", "recall", "F1", "images"], *per_class],
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


def report_charts(
    metrics: dict,
    study: PromptStudy,
    reliabilities: tuple[Reliability, Reliability],
    classes: Sequence[str],
    templates: Sequence[str],
) -> list[Picture]:
    """Confusion matrix, F1 by class, prompts and calibration."""
    return [
        Picture("Confusion matrix", "confusion.png", partial(plot_confusions, {"": metrics["confusion"]}, classes)),
        Picture("F1 by class", "class_f1.png", partial(plot_class_f1, metrics["per_class"])),
        Picture("Prompts", "prompts.png", partial(plot_prompts, study, templates)),
        Picture("Calibration", "calibration.png", partial(plot_reliability, *reliabilities)),
    ]


def example_sheet(labels: np.ndarray, predicted: np.ndarray, classes: Sequence[str], open_image: OpenImage) -> Picture:
    """A fair sample of correct and of wrong predictions; labels, predicted: (n,); open_image takes a row of them."""
    correct, wrong = (spread(np.flatnonzero(hit), PREDICTIONS) for hit in (labels == predicted, labels != predicted))
    true_names, predicted_names = ([classes[number] for number in numbers] for numbers in (labels, predicted))
    draw = partial(plot_predictions, correct, wrong, true_names, predicted_names, open_image)
    return Picture("Examples", "examples.png", draw)
