"""The task agnostic: an image told by its similarities to generic prompts, at several temperatures."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score
from tqdm import tqdm

from lib.evaluation.agnostic.carriers import Carrier, class_means, rank_carriers
from lib.evaluation.agnostic.entropy import entropies, prompt_shares
from lib.evaluation.agnostic.plots import (
    MOST_PROMPTS,
    plot_carriers,
    plot_entropies,
    plot_heat_map,
    plot_temperatures,
)
from lib.evaluation.agnostic.prompts import generic_prompts
from lib.evaluation.classifiers import LINEAR_SVM, MLP, accuracy, choose
from lib.evaluation.outcome import Outcome, Picture, Rows, figure, skipped_table
from lib.evaluation.parts import Parts, embed_parts
from lib.evaluation.subject import Subject
from lib.evaluation.tasks import Agnostic


@dataclass(frozen=True)
class Findings:
    """All that is told and drawn."""

    prompts: list[str]
    sweep: dict[float, dict[str, float | bool]]
    """by temperature, as in metrics.json"""
    entropies: dict[float, np.ndarray]
    """by temperature, of the test images"""
    references: dict[str, float]
    """accuracies of the linear SVM on other inputs, and of no classifier"""
    carriers: list[Carrier]
    similarities: Parts
    """the parts with similarities (n, K) in place of embeddings"""


def agnostic(options: Agnostic, subject: Subject) -> Outcome | None:
    """Sweep the temperatures: entropy of the shares of the prompts, and accuracy of classifiers that see only these."""
    prompts = generic_prompts(options.prompts)
    parts = embed_parts(subject)
    prompt_embeds = subject.embed_texts(prompts).numpy()
    if not subject.measures:
        return None
    found = _find(options, prompts, parts, parts.of_rows(lambda rows: rows @ prompt_embeds.T))
    most = math.log(len(prompts))
    facts = subject.facts(parts.embedded) | parts.facts
    facts |= {"prompts": str(len(prompts)), "largest entropy": f"log {len(prompts)} = {most:.4f}"}
    facts |= {"classifiers see": "shares of the prompts" + (", standardized" if options.standardize else "")}
    unfinished = [f"{temperature:g}" for temperature, entry in found.sweep.items() if not entry["converged"]]
    facts |= {"SVM stopped before convergence": f"at temperature {', '.join(unfinished)}"} if unfinished else {}
    return Outcome(
        metrics={f"{temperature:g}": entry for temperature, entry in found.sweep.items()},
        facts=facts,
        tables=_tables(found) | skipped_table(subject.data, parts.embedded),
        draw=partial(_draw, found=found),
    )


def _shares(temperature: float, rows: np.ndarray) -> np.ndarray:
    return prompt_shares(torch.from_numpy(rows), temperature).numpy()


def _find(options: Agnostic, prompts: list[str], parts: Parts, similarities: Parts) -> Findings:
    sweep, of_images = {}, {}
    for temperature in tqdm(sorted(set(options.temperatures), reverse=True), "temperatures"):
        shares = similarities.of_rows(partial(_shares, temperature))
        of_images[temperature] = entropies(torch.from_numpy(shares.test.rows)).numpy()
        entropy = {"mean_entropy": float(of_images[temperature].mean()), "max_entropy": math.log(len(prompts))}
        sweep[temperature] = entropy | _accuracies(options, shares)
    svm = choose(LINEAR_SVM, similarities.train, similarities.validation, options.run.seed)
    of_embeds = choose(LINEAR_SVM, parts.train, parts.validation, options.run.seed)
    references = {
        "SVM on the image embeddings themselves": accuracy(of_embeds.model, parts.test),
        "SVM on the similarities, without softmax": accuracy(svm.model, similarities.test),
        "the most frequent class": float(np.bincount(parts.test.labels).max() / len(parts.test.labels)),
    }
    carriers = rank_carriers(prompts, similarities.test, svm, options.run.seed)
    return Findings(prompts, sweep, of_images, references, carriers, similarities)


def _accuracies(options: Agnostic, shares: Parts) -> dict[str, float | bool]:
    """Of the linear SVM and of the MLP, their regularization chosen on validation; and whether the SVM converged."""
    train, validation, (rows, labels) = shares.train, shares.validation, shares.test
    chosen = partial(choose, train=train, validation=validation, seed=options.run.seed, standardize=options.standardize)
    svm, mlp = chosen(LINEAR_SVM), chosen(MLP)
    by_svm, by_mlp = svm.model.predict(rows), mlp.model.predict(rows)
    return {
        "accuracy": float(accuracy_score(labels, by_svm)),
        "macro_f1": float(f1_score(labels, by_svm, average="macro")),
        "mlp_accuracy": float(accuracy_score(labels, by_mlp)),
        "mlp_macro_f1": float(f1_score(labels, by_mlp, average="macro")),
        "converged": svm.converged,
    }


def _tables(found: Findings) -> dict[str, Rows]:
    head = [
        "temperature",
        "mean entropy",
        "of the maximum",
        "SVM accuracy",
        "SVM macro F1",
        "MLP accuracy",
        "MLP macro F1",
    ]
    sweep = [head]
    for temperature, entry in found.sweep.items():
        entropy, most, *accuracies, _ = entry.values()
        sweep.append([f"{temperature:g}", figure(entropy), figure(entropy / most), *map(figure, accuracies)])
    carriers = [["prompt", "variance between classes", "accuracy lost", "nearest class", "farthest class"]]
    classes = found.similarities.classes
    for each in found.carriers:
        carriers.append(
            [each.prompt, figure(each.between), figure(each.lost), classes[each.highest], classes[each.lowest]]
        )
    references = [["for comparison", "accuracy"], *([name, figure(value)] for name, value in found.references.items())]
    return {"Generic prompts": sweep, "For comparison": references, "Which prompts carry the classes": carriers}


def _draw(folder: Path, found: Findings) -> list[Picture]:
    """The sweep, the entropies, and the prompts against the classes."""
    count = len(found.prompts)
    names = ("temperatures", "entropies", "similarities", "prompts")
    sweep, histograms, heat_map, carriers = (folder / f"{name}.png" for name in names)
    plot_temperatures(found.sweep, count, found.references, sweep)
    plot_entropies(found.entropies, count, histograms)
    shown = [carrier.prompt for carrier in found.carriers[:MOST_PROMPTS]]
    columns = [number for number, prompt in enumerate(found.prompts) if prompt in set(shown)]
    classes, means = class_means(found.similarities.test)
    class_names = [found.similarities.classes[number] for number in classes]
    plot_heat_map(means[:, columns], class_names, [found.prompts[number] for number in columns], heat_map)
    plot_carriers(found.carriers, carriers)
    return [
        Picture("Temperature", sweep),
        Picture("Entropy of the images", histograms),
        Picture("Similarity of classes and prompts", heat_map),
        Picture("Which prompts carry the classes", carriers),
    ]
