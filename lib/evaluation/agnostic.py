"""The task agnostic: classifiers that see only an image's similarities to generic prompts, at several temperatures."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.inspection import permutation_importance
from torch import Tensor
from tqdm import tqdm

from lib.config.safe_yaml import read_yaml
from lib.errors import InputError
from lib.evaluation.charts import MOST_PROMPTS, plot_carriers, plot_entropies, plot_temperatures
from lib.evaluation.class_charts import plot_heat_map
from lib.evaluation.classification import two_figures
from lib.evaluation.probe_classifiers import LINEAR_SVM, MLP, Chosen, accuracy, choose
from lib.evaluation.report import Outcome, Picture, Rows, decimals, skipped_table
from lib.evaluation.splits import Split, Splits, embed_splits
from lib.evaluation.subject import Subject
from lib.evaluation.tasks import Agnostic

SHUFFLES = 5
SHIPPED_PROMPTS = Path(__file__).with_name("generic_prompts.yaml")


class Carrier(NamedTuple):
    """A prompt, and how well it separates the classes."""

    prompt: str
    between: float
    """share of the similarity's variance that lies between the classes (eta squared), 0 to 1"""
    lost: float
    """accuracy that the linear SVM on all similarities loses when this one is shuffled"""
    highest: int
    """the class whose images are most similar to it, on average"""
    lowest: int


@dataclass(frozen=True)
class Findings:
    """Everything in the report."""

    prompts: list[str]
    sweep: dict[float, dict[str, float | bool]]
    """by temperature, as in metrics.json"""
    entropies: dict[float, np.ndarray]
    """by temperature, of the test images"""
    references: dict[str, float]
    """accuracies of the linear SVM on other inputs, and of the most frequent class"""
    carriers: list[Carrier]
    similarities: Splits
    """the splits with similarities (n, K) in place of embeddings"""


def agnostic(options: Agnostic, device: torch.device) -> Outcome | None:
    """Sweep the temperatures: entropy of the prompt probabilities, and accuracy of classifiers on them."""
    subject = Subject.open(options.model, options, device, needs="classes")
    prompts = generic_prompts(options.prompts)
    splits = embed_splits(subject)
    prompt_embeds = subject.embed_texts(prompts).numpy()
    if not subject.measures:
        return None
    found = _find(options, prompts, splits, splits.with_rows(lambda rows: rows @ prompt_embeds.T))
    most = math.log(len(prompts))
    facts = subject.facts(splits.embedded) | splits.facts
    facts |= {"prompts": str(len(prompts)), "largest entropy": f"log {len(prompts)} = {most:.4f}"}
    facts |= {"classifier input": "softmax over the prompts" + (", standardized" if options.standardize else "")}
    unfinished = [f"{temperature:g}" for temperature, entry in found.sweep.items() if not entry["converged"]]
    facts |= {"SVM stopped before convergence": f"at temperature {', '.join(unfinished)}"} if unfinished else {}
    return Outcome(
        metrics={f"{temperature:g}": entry for temperature, entry in found.sweep.items()},
        facts=facts,
        tables=_tables(found) | skipped_table(subject.data, splits.embedded),
        pictures=_pictures(found),
    )


def generic_prompts(prompts: Path | None) -> list[str]:
    """The distinct texts that a YAML file lists; without a file the shipped ones."""
    path = prompts or SHIPPED_PROMPTS
    texts = read_yaml(path, f"--prompts {path}", "; leave it out for the shipped ones")
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f'--prompts {path} must hold a list of texts, as in: - "a photo taken outdoors"')
    for text in texts:
        if "{}" in text:
            raise InputError(f"--prompts {path}: {text!r} has a place for a class name; generic prompts name no class")
    distinct = list(dict.fromkeys(texts))
    if len(distinct) < 2:
        raise InputError(f"--prompts {path} holds {len(distinct)} texts; a softmax over prompts needs at least 2")
    return distinct


def _find(options: Agnostic, prompts: list[str], splits: Splits, similarities: Splits) -> Findings:
    sweep, of_images = {}, {}
    for temperature in tqdm(sorted(set(options.temperatures), reverse=True), "temperatures"):
        probabilities = similarities.with_rows(partial(_probabilities, temperature))
        of_images[temperature] = entropies(torch.from_numpy(probabilities.test.rows)).numpy()
        entropy = {"mean_entropy": float(of_images[temperature].mean()), "max_entropy": math.log(len(prompts))}
        sweep[temperature] = entropy | _accuracies(options, probabilities)
    seed = options.run.seed
    svm = choose(LINEAR_SVM, similarities.train, similarities.validation, seed)
    of_embeds = choose(LINEAR_SVM, splits.train, splits.validation, seed)
    references = {
        "SVM on the image embeddings": accuracy(of_embeds.model, splits.test),
        "SVM on the similarities, without softmax": accuracy(svm.model, similarities.test),
        "the most frequent class": float(np.bincount(splits.test.labels).max() / len(splits.test.labels)),
    }
    carriers = rank_carriers(prompts, similarities.test, svm, seed)
    return Findings(prompts, sweep, of_images, references, carriers, similarities)


def _probabilities(temperature: float, rows: np.ndarray) -> np.ndarray:
    return prompt_probabilities(torch.from_numpy(rows), temperature).numpy()


def prompt_probabilities(similarities: Tensor, temperature: float) -> Tensor:
    """Softmax over the prompts of similarity / temperature: (n, K) -> (n, K) float64, rows sum to 1."""
    return (similarities.double() / temperature).softmax(dim=1)


def entropies(probabilities: Tensor) -> Tensor:
    """Entropy in nats of each row: (n, K) -> (n,), from 0 (one prompt has all) to log K (all are equal)."""
    # entr(0) is 0; a sum may exceed log K by its rounding.
    return torch.special.entr(probabilities).sum(dim=1).clamp(0.0, math.log(probabilities.shape[1]))


def _accuracies(options: Agnostic, inputs: Splits) -> dict[str, float | bool]:
    """Figures of the linear SVM and the MLP, regularization chosen on validation; and if the SVM converged."""
    svm, mlp = (
        choose(family, inputs.train, inputs.validation, options.run.seed, standardize=options.standardize)
        for family in (LINEAR_SVM, MLP)
    )
    by_svm, by_mlp = (two_figures(inputs.test.labels, each.model.predict(inputs.test.rows)) for each in (svm, mlp))
    return {**by_svm, **{f"mlp_{key}": value for key, value in by_mlp.items()}, "converged": svm.converged}


def rank_carriers(prompts: list[str], test: Split, svm: Chosen, seed: int) -> list[Carrier]:
    """The prompts, the one that separates the classes best first.

    test: similarities (n, K) and labels of the test images; svm: trained on such similarities.
    """
    classes, means = class_means(test)
    between = variance_between(test)
    shuffled = {"scoring": "accuracy", "n_repeats": SHUFFLES, "random_state": seed}
    lost = permutation_importance(svm.model, test.rows, test.labels, **shuffled)
    highest, lowest = classes[means.argmax(axis=0)], classes[means.argmin(axis=0)]
    carriers = [
        Carrier(prompt, float(share), float(loss), int(high), int(low))
        for prompt, share, loss, high, low in zip(prompts, between, lost.importances_mean, highest, lowest, strict=True)
    ]
    return sorted(carriers, key=lambda carrier: -carrier.between)


def variance_between(data: Split) -> np.ndarray:
    """Eta squared of each column: (n, K) -> (K,), the variance of the class means over the whole variance."""
    rows = data.rows.astype(np.float64)
    classes, place = np.unique(data.labels, return_inverse=True)
    means = np.stack([rows[data.labels == label].mean(axis=0) for label in classes])
    whole = rows.var(axis=0)
    explained = means[place].var(axis=0)
    return np.divide(explained, whole, out=np.zeros_like(whole), where=whole > 0)


def class_means(data: Split) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the classes that occur (c,), and the mean of their rows (c, K)."""
    classes = np.unique(data.labels)
    return classes, np.stack([data.rows[data.labels == label].mean(axis=0) for label in classes])


def _tables(found: Findings) -> dict[str, Rows]:
    of_classifiers = [f"{name} {figure}" for name in ("SVM", "MLP") for figure in ("accuracy", "macro F1")]
    sweep = [["temperature", "mean entropy", "of the maximum", *of_classifiers]]
    for temperature, entry in found.sweep.items():
        entropy, most, *accuracies, _ = entry.values()
        sweep.append([f"{temperature:g}", decimals(entropy), decimals(entropy / most), *map(decimals, accuracies)])
    carriers = [["prompt", "variance between classes", "accuracy lost", "nearest class", "farthest class"]]
    classes = found.similarities.classes
    for each in found.carriers:
        numbers = decimals(each.between), decimals(each.lost)
        carriers.append([each.prompt, *numbers, classes[each.highest], classes[each.lowest]])
    references = [["input", "accuracy"], *([name, decimals(value)] for name, value in found.references.items())]
    return {"Generic prompts": sweep, "For comparison": references, "Prompts that separate the classes": carriers}


def _pictures(found: Findings) -> list[Picture]:
    """The sweep, the entropies, and the prompts against the classes."""
    count = len(found.prompts)
    shown = {carrier.prompt for carrier in found.carriers[:MOST_PROMPTS]}
    columns = [number for number, prompt in enumerate(found.prompts) if prompt in shown]
    classes, means = class_means(found.similarities.test)
    class_names = [found.similarities.classes[number] for number in classes]
    heat_map = partial(plot_heat_map, means[:, columns], class_names, [found.prompts[number] for number in columns])
    sweep = partial(plot_temperatures, found.sweep, count, found.references)
    prompts, between, lost, *_ = zip(*found.carriers, strict=True)
    carriers = partial(plot_carriers, prompts, between, lost)
    return [
        Picture("Temperature", "temperatures.png", sweep),
        Picture("Entropy of the images", "entropies.png", partial(plot_entropies, found.entropies, count)),
        Picture("Similarity of classes and prompts", "similarities.png", heat_map),
        Picture("Prompts that separate the classes", "prompts.png", carriers),
    ]
