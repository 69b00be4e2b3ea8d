"""The task zeroshot: embed, measure, choose prompts and a temperature on validation data, and say what to tell."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from lib.data.prompt_banks import renamed
from lib.evaluation.class_plots import plot_class_f1, plot_confusion
from lib.evaluation.drawing import OpenImage, spread
from lib.evaluation.embed import Embedded
from lib.evaluation.outcome import Outcome, Picture, skipped_table
from lib.evaluation.subject import Subject
from lib.evaluation.tasks import Zeroshot
from lib.evaluation.zeroshot.calibration import Reliability, calibrate
from lib.evaluation.zeroshot.examples import plot_predictions
from lib.evaluation.zeroshot.held_out import Labelled, folds
from lib.evaluation.zeroshot.metrics import ensemble, prompt_embeddings, zeroshot_metrics, zeroshot_scores
from lib.evaluation.zeroshot.plots import plot_prompts, plot_reliability
from lib.evaluation.zeroshot.prompt_study import PromptStudy, study_prompts
from lib.evaluation.zeroshot.tables import calibration_table, class_tables, prompt_tables

PREDICTIONS = 12  # right ones and wrong ones each


def classify(options: Zeroshot, subject: Subject) -> Outcome | None:
    """Zero-shot figures by all templates together, the study of each, and the calibration.

    What has to be chosen, is chosen on the data's validation part, or else on one half of the images for the other.
    """
    data = subject.data
    labels, own_classes, templates = data.labelling
    classes = renamed(own_classes, options.class_names) if options.class_names else own_classes
    validation = subject.of("val") if subject.part != "val" else None
    embedded = subject.embed_images()
    validated = None if validation is None else validation.embed_images()
    prompt_embeds = prompt_embeddings(classes, templates, subject.embed_texts)
    if not subject.measures:
        return None

    test, images = labelled(embedded, labels)
    chooser = None
    chosen_on = "each half of these images what is judged on the other: there is no validation part besides them"
    if validation is not None and validated is not None:
        chooser = _as_in(own_classes, validation, validated)
        chosen_on = f"{validation.data.name}, {len(chooser.labels)} images"
    parts = folds(test, chooser, options.run.seed)
    class_embeds = ensemble(prompt_embeds)
    metrics = zeroshot_metrics(test.embeds, test.labels, class_embeds, classes)
    study = study_prompts(test, prompt_embeds, parts)
    scale = subject.model.towers.logit_scale.exp().item()
    scores = zeroshot_scores(test.embeds, class_embeds)
    before, after = calibrate(scores, test.labels, class_embeds, parts, scale)

    facts = subject.facts(embedded)
    facts |= {"classes": str(len(classes)), "prompt templates": str(len(templates)), "chosen on": chosen_on}
    tables = class_tables(metrics, classes) | prompt_tables(study, classes, templates)
    tables |= calibration_table(before, after) | skipped_table(data, embedded)
    metrics |= {"prompts": study.metrics(classes, templates)}
    metrics |= {"calibration": {"before": before.metrics(), "after": after.metrics()}}
    draw = partial(
        draw_pictures,
        metrics=metrics,
        study=study,
        reliabilities=(before, after),
        labels=test.labels,
        predicted=scores.argmax(axis=1),
        classes=classes,
        templates=templates,
        open_image=lambda row: data.open_image(int(images[row])),
    )
    return Outcome(metrics, facts, tables, draw)


def labelled(embedded: Embedded, labels: np.ndarray) -> tuple[Labelled, np.ndarray]:
    """The images that could be read, with labels (n,), and the rows (n,) where they stand in the data."""
    images = embedded.valid.nonzero().flatten()
    return Labelled(embedded.embeds[images], np.asarray(labels)[images]), images.numpy()


def _as_in(classes: Sequence[str], validation: Subject, embedded: Embedded) -> Labelled:
    """Validation images with the test part's class numbers; those of classes that it does not have are left out."""
    labels, own_classes, _ = validation.data.labelling
    found, _ = labelled(embedded, labels)
    number = {name: row for row, name in enumerate(classes)}
    numbers = np.array([number.get(name, -1) for name in own_classes])[found.labels]
    return Labelled(found.embeds, numbers).part((numbers >= 0).nonzero()[0])


def draw_pictures(
    folder: Path,
    metrics: dict,
    study: PromptStudy,
    reliabilities: tuple[Reliability, Reliability],
    labels: np.ndarray,
    predicted: np.ndarray,
    classes: Sequence[str],
    templates: Sequence[str],
    open_image: OpenImage,
) -> list[Picture]:
    """Draw everything into the folder; labels, predicted: (n,) class numbers; open_image takes a row of them."""
    confusion = Picture("Confusion matrix", folder / "confusion.png")
    plot_confusion(metrics["confusion"], classes, confusion.path)
    f1 = Picture("F1 by class", folder / "class_f1.png")
    plot_class_f1(metrics["per_class"], f1.path)
    prompts = Picture("Prompts", folder / "prompts.png")
    plot_prompts(study, templates, prompts.path)
    calibration = Picture("Calibration", folder / "calibration.png")
    plot_reliability(*reliabilities, calibration.path)
    examples = Picture("Examples", folder / "examples.png")
    right, wrong = ((labels == predicted).nonzero()[0], (labels != predicted).nonzero()[0])
    true_names, predicted_names = ([classes[number] for number in numbers] for numbers in (labels, predicted))
    sample = spread(right, PREDICTIONS), spread(wrong, PREDICTIONS)
    plot_predictions(*sample, true_names, predicted_names, open_image, examples.path)
    return [confusion, f1, prompts, calibration, examples]
