"""The task retrieval: embed, measure, and say what to tell and to draw."""

from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lib.data.evaluation_set import EvaluationSet
from lib.errors import InputError
from lib.evaluation.embed import Embedded
from lib.evaluation.outcome import Outcome, Rows, figure, skipped_table
from lib.evaluation.retrieval.metrics import keep_readable, retrieval_ranks, summarize_ranks
from lib.evaluation.retrieval.pictures import Findings
from lib.evaluation.retrieval.scores import Matched, margins, matched_similarities, unmatched_similarities
from lib.evaluation.subject import Subject
from lib.evaluation.tasks import Retrieval


def retrieve(options: Retrieval, subject: Subject) -> Outcome | None:
    """Recall@K, MRR and median rank in both directions, of data with captions."""
    data = subject.data
    if options.image is not None and options.image not in data.image_keys:
        raise InputError(f"--image {options.image} is not in {data.name}; its first is {data.image_keys[0]}")
    embedded = subject.embed_images()
    captions, image_of_caption = data.captioning
    _, kept, _ = keep_readable(embedded.valid, image_of_caption)
    text_embeds = subject.embed_texts([captions[row] for row in kept])
    # Apart from the captions, which then need no other file for another query.
    query_embeds = subject.embed_texts(options.query) if options.query else text_embeds[:0]
    if not subject.measures:
        return None
    matched, images = _matched(data, embedded, text_embeds, options.pairs)
    to_text, to_image = retrieval_ranks(matched.image_embeds, matched.text_embeds, matched.caption_image)
    metrics = {"image_to_text": summarize_ranks(to_text), "text_to_image": summarize_ranks(to_image)}
    similarities = matched_similarities(matched), unmatched_similarities(matched, options.run.seed)
    by_direction = margins(matched)
    image = _chosen_image(options, data, images, matched.caption_image)
    findings = Findings(
        matched=matched,
        metrics=metrics,
        to_text=to_text,
        to_image=to_image,
        similarities=similarities,
        margins=by_direction,
        queries=options.query,
        query_embeds=query_embeds,
        image=image,
        image_name=data.image_keys[images[image]],
        seed=options.run.seed,
    )
    facts = subject.facts(embedded) | {"captions": str(len(kept))}
    facts |= _pairs_fact(matched, images) if options.pairs else {}
    tables = {
        "Retrieval": _figures_table(metrics),
        "Similarities and margins": _scores_table(similarities, by_direction),
    }
    return Outcome(metrics, facts, tables | skipped_table(data, embedded), findings.draw)


def _matched(data: EvaluationSet, embedded: Embedded, text_embeds: Tensor, pairs: bool) -> tuple[Matched, np.ndarray]:
    """What to rank, without unread images, and the row in `data` of each image of it."""
    texts, image_of_text = data.captioning
    images, kept, caption_image = keep_readable(embedded.valid, image_of_text)
    if pairs:
        images, caption_image = images[caption_image], torch.arange(len(kept))
    rows = images.numpy()
    captions = [texts[row] for row in kept]
    open_image = partial(_open, data, rows)
    return Matched(embedded.embeds[images], text_embeds, captions, caption_image, open_image), rows


def _open(data: EvaluationSet, rows: np.ndarray, row: int) -> Image.Image:
    return data.open_image(int(rows[row]))


def _chosen_image(options: Retrieval, data: EvaluationSet, images: np.ndarray, caption_image: Tensor) -> int:
    """The row of the image that was asked for, else of one with captions."""
    if options.image is None:
        captioned = caption_image.unique()
        return int(captioned[np.random.default_rng(options.run.seed).integers(len(captioned))])
    places = np.flatnonzero(images == data.image_keys.index(options.image))
    if not len(places):
        raise InputError(f"--image {options.image} cannot be read; choose another")
    return int(places[0])


def _pairs_fact(matched: Matched, images: np.ndarray) -> dict[str, str]:
    """How many pairs, and what an image in several of them means."""
    most = int(np.unique(images, return_counts=True)[1].max())
    told = f"{len(matched.captions)}, each its own target"
    if most > 1:
        told += f"; an image is in up to {most} of them, and its copies tie: a caption's rank is then {most} or more"
    return {"pairs": told}


def _figures_table(metrics: dict[str, dict[str, float]]) -> Rows:
    table = [["", *(key.replace("_", " ") for key in metrics["image_to_text"])]]
    for direction, figures in metrics.items():
        *fractions, median = figures.values()
        table.append([direction.replace("_", " "), *map(figure, fractions), f"{median:g}"])
    return table


def _scores_table(similarities: tuple[np.ndarray, np.ndarray], by_direction: dict[str, np.ndarray]) -> Rows:
    named = dict(zip(("similarity, matched pairs", "similarity, unmatched pairs"), similarities, strict=True))
    named |= {f"margin, {direction.replace('_', ' ')}": values for direction, values in by_direction.items()}
    rows = [["", "mean", "5 %", "median", "95 %", "above 0"]]
    for name, values in named.items():
        if len(values):
            quantiles = np.quantile(values, (0.05, 0.5, 0.95)).tolist()
            rows.append([name, *map(figure, [float(values.mean()), *quantiles, float(np.mean(values > 0))])])
    return rows
