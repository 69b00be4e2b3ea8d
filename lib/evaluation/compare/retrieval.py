"""Retrieval models side by side: recall with intervals, and the differences."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from lib.data.evaluation_set import EvaluationSet
from lib.evaluation.compare.differing_captions import differing_captions, plot_differing_captions
from lib.evaluation.compare.plots import plot_intervals
from lib.evaluation.compare.statistics import bootstrap, interval
from lib.evaluation.outcome import Outcome, Picture, Rows, data_facts, figure, skipped_table
from lib.evaluation.retrieval.metrics import RECALL_AT, keep_readable, retrieval_ranks, summarize_ranks
from lib.evaluation.retrieval.scores import Matched
from lib.evaluation.subject import Subject

DIRECTIONS = ("image_to_text", "text_to_image")
RECALLS = [f"R@{k}" for k in RECALL_AT]


def compare_retrieval(
    names: Sequence[str], data: EvaluationSet, subjects: Iterable[Subject], resamples: int, seed: int
) -> Outcome | None:
    """Compare on the images that every model could read, with their captions."""
    answers = []
    texts, image_of_text = data.captioning
    for subject in subjects:
        answers.append((subject.embed_images(), subject.embed_texts(texts)))
    if not subject.measures:
        return None
    valid = torch.stack([embedded.valid for embedded, _ in answers]).all(dim=0)
    images, captions, caption_image = keep_readable(valid, image_of_text)
    kept, rows = [texts[row] for row in captions], images.numpy()
    models = {
        name: Matched(
            embedded.embeds[images],
            text_embeds[captions],
            kept,
            caption_image,
            lambda row: data.open_image(int(rows[row])),
        )
        for name, (embedded, text_embeds) in zip(names, answers, strict=True)
    }
    ranks = [retrieval_ranks(each.image_embeds, each.text_embeds, caption_image) for each in models.values()]
    metrics = retrieval_comparison(names, ranks, caption_image.numpy(), resamples, seed)
    facts = data_facts(data, answers[0][0]) | {"captions": str(len(captions))}
    facts["intervals"] = f"95%, by {resamples} samples of the images with all their captions"
    to_image = np.stack([of_captions.numpy() for _, of_captions in ranks])
    draw = partial(draw_pictures, metrics=metrics, models=models, to_image=to_image)
    return Outcome(metrics, facts, tables(metrics) | skipped_table(data, answers[0][0]), draw)


def retrieval_comparison(
    names: Sequence[str],
    ranks: Sequence[tuple[torch.Tensor, torch.Tensor]],
    caption_image: np.ndarray,
    resamples: int,
    seed: int,
) -> dict:
    """Figures of each model with 95% intervals of its recalls, and the differences of each two.

    ranks: of each model, as `retrieval_ranks` returns them; caption_image: (m,). Images are resampled, each with all
    its captions, since captions of one image are not independent; the same ones for all models.
    """
    _, place = np.unique(caption_image, return_inverse=True)  # (m,) among the images with captions
    counts = np.bincount(place)
    found = np.stack([_found(*each, place) for each in ranks])  # (models, images, 2 directions, 3)

    def resampled_recalls(rows: np.ndarray) -> np.ndarray:
        sizes = np.array([len(rows), counts[rows].sum()])
        return found[:, rows].sum(axis=1) / sizes[:, None]

    samples = bootstrap(resampled_recalls, len(counts), resamples, seed)  # (resamples, models, 2, 3)
    models: dict[str, dict[str, dict]] = {
        name: {
            direction: summarize_ranks(ranks[number][way]) | {"intervals": _intervals(samples[:, number, way])}
            for way, direction in enumerate(DIRECTIONS)
        }
        for number, name in enumerate(names)
    }
    pairs = []
    for one, other in combinations(range(len(names)), 2):
        differences = samples[:, other] - samples[:, one]
        pair: dict = {"models": [names[one], names[other]]}
        for way, direction in enumerate(DIRECTIONS):
            first, second = models[names[one]][direction], models[names[other]][direction]
            pair[direction] = {key: second[key] - first[key] for key in RECALLS}
            pair[direction]["intervals"] = _intervals(differences[:, way])
        pairs.append(pair)
    return {"models": models, "pairs": pairs}


def _found(to_text: torch.Tensor, to_image: torch.Tensor, place: np.ndarray) -> np.ndarray:
    """Queries of each image that succeed within K: (images, 2, 3), itself and its captions."""
    within = np.array(RECALL_AT)
    by_image = (to_text.numpy()[:, None] <= within).astype(np.int64)
    by_caption = np.zeros_like(by_image)
    np.add.at(by_caption, place, to_image.numpy()[:, None] <= within)
    return np.stack([by_image, by_caption], axis=1)


def _intervals(samples: np.ndarray) -> dict[str, tuple[float, float]]:
    """Of recalls (resamples, 3), by name."""
    return {key: interval(samples[:, number]) for number, key in enumerate(RECALLS)}


def tables(metrics: dict) -> dict[str, Rows]:
    """Each direction of each model, and the differences of each two."""
    overall = [["model", "direction", *RECALLS, "MRR", "median rank"]]
    for name, model in metrics["models"].items():
        for direction in DIRECTIONS:
            figures = model[direction]
            cells = [f"{figure(figures[key])} {_bounds(figures, key)}" for key in RECALLS]
            words = direction.replace("_", " ")
            overall.append([name, words, *cells, figure(figures["MRR"]), f"{figures['median_rank']:g}"])
    differences = [["models", "direction", *RECALLS]]
    for pair in metrics["pairs"]:
        for direction in DIRECTIONS:
            cells = [f"{pair[direction][key]:+.4f} {_bounds(pair[direction], key)}" for key in RECALLS]
            differences.append([" → ".join(pair["models"]), direction.replace("_", " "), *cells])
    return {"Comparison of retrieval": overall, "Differences": differences}


def _bounds(figures: dict, key: str) -> str:
    low, high = figures["intervals"][key]
    return f"[{low:.4f}, {high:.4f}]"


def draw_pictures(folder: Path, metrics: dict, models: Mapping[str, Matched], to_image: np.ndarray) -> list[Picture]:
    """Draw the recalls with their intervals, and captions on which the models differ, into the folder.

    to_image: (models, m) ranks of each caption's image.
    """
    recall = Picture("Recall with 95% intervals", folder / "recall.png")
    panels = {}
    for direction in DIRECTIONS:
        for key in RECALLS:
            values = {name: model[direction] for name, model in metrics["models"].items()}
            title = f"{direction.replace('_', ' ')} {key}"
            panels[title] = {name: (figures[key], figures["intervals"][key]) for name, figures in values.items()}
    plot_intervals(panels, recall.path)
    differing = differing_captions(to_image)
    if not differing:
        return [recall]
    title = "Captions whose picture one model shows among the first five and another does not"
    sheet = Picture(title, folder / "differing.png")
    plot_differing_captions(differing, models, to_image, title, sheet.path)
    return [recall, sheet]
