"""The task retrieval: ranks of the right captions and images, similarities and margins, and examples."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib.data.evaluation_set import EvaluationSet, spread
from lib.errors import InputError
from lib.evaluation.charts import plot_candidates, plot_margins, plot_recall, plot_similarities
from lib.evaluation.image_sheets import plot_image_queries, plot_text_queries
from lib.evaluation.report import Outcome, Picture, Rows, decimals, skipped_table, words
from lib.evaluation.retrieval_answers import (
    Gallery,
    Matched,
    candidates,
    examples,
    free_query,
    image_query,
    match,
    text_query,
)
from lib.evaluation.retrieval_ranks import (
    keep_readable,
    retrieval_ranks,
    rounding_of_products,
    similarity_of_pairs,
    summarize_both,
)
from lib.evaluation.subject import Subject
from lib.evaluation.tasks import Retrieval

EXAMPLES = 5  # of a direction that succeed, and as many that fail
BLOCK_ENTRIES = 1 << 22  # similarities held at a time
MOST_MARGINS = 5000  # queries of a direction: more make the same histogram


def retrieval(options: Retrieval, device: torch.device) -> Outcome | None:
    """Recall@K, MRR and median rank in both directions."""
    subject = Subject.open(options.model, options, device, needs="captions")
    data, seed = subject.data, options.run.seed
    if options.image is not None and options.image not in data.image_keys:
        raise InputError(f"--image {options.image} is not in {data.name}; its first is {data.image_keys[0]}")
    embedded = subject.embed_images()
    captions, image_of_caption = data.captioning
    _, kept, _ = keep_readable(embedded.valid, image_of_caption)
    text_embeds = subject.embed_texts([captions[row] for row in kept])
    # Apart from the captions, so that their stored embeddings serve other queries too.
    query_embeds = subject.embed_texts(options.query) if options.query else text_embeds[:0]
    if not subject.measures:
        return None
    matched, images = match(data, embedded.embeds, embedded.valid, text_embeds, pairs=options.pairs)
    ranks = retrieval_ranks(matched.image_embeds, matched.text_embeds, matched.caption_image)
    metrics = summarize_both(*ranks)
    similarities = matched_similarities(matched), unmatched_similarities(matched, seed)
    by_direction = margins(matched)
    image = _chosen_image(options, data, images, matched.caption_image)
    pictures = [
        *report_charts(metrics, similarities, by_direction),
        candidates_chart(matched, image, data.image_keys[images[image]], options.query, query_embeds, seed),
        *sheets(matched, *ranks, options.query, query_embeds),
    ]
    facts = subject.facts(embedded) | {"captions": str(len(kept))}
    facts |= _pairs_fact(matched, images) if options.pairs else {}
    tables = {
        "Retrieval": _figures_table(metrics),
        "Similarities and margins": _scores_table(similarities, by_direction),
    }
    return Outcome(metrics, facts, tables | skipped_table(data, embedded), pictures)


def _chosen_image(options: Retrieval, data: EvaluationSet, images: np.ndarray, caption_image: Tensor) -> int:
    """Row of the image that --image names, else of a random one with captions."""
    if options.image is None:
        captioned = caption_image.unique()
        return int(captioned[np.random.default_rng(options.run.seed).integers(len(captioned))])
    places = np.flatnonzero(images == data.image_keys.index(options.image))
    if not len(places):
        raise InputError(f"--image {options.image} cannot be read; choose another")
    return int(places[0])


# Similarities behind the ranks


def matched_similarities(matched: Matched) -> np.ndarray:
    """Similarity of each caption to its image, (m,)."""
    return similarity_of_pairs(matched.image_embeds[matched.caption_image], matched.text_embeds).numpy()


def unmatched_similarities(matched: Matched, seed: int) -> np.ndarray:
    """Similarity of each caption to one other image, drawn at random, (m,); empty if there is no other."""
    images, caption_image = len(matched.image_embeds), matched.caption_image
    if images == 1:
        return np.zeros(0, np.float32)
    generator = torch.Generator().manual_seed(seed)
    other = (caption_image + torch.randint(1, images, caption_image.shape, generator=generator)) % images
    return similarity_of_pairs(matched.image_embeds[other], matched.text_embeds).numpy()


def margins(matched: Matched) -> dict[str, np.ndarray]:
    """By direction: similarity of the best right answer minus that of the best wrong one, of evenly spaced queries.

    At most 5,000 of a direction; above 0 is a success at rank 1. Empty if every candidate is right.
    """
    images, texts, caption_image = matched.image_embeds, matched.text_embeds, matched.caption_image
    own = torch.arange(len(images))
    captioned = torch.tensor(spread(caption_image.unique(), MOST_MARGINS))
    asked = torch.tensor(spread(range(len(texts)), MOST_MARGINS))
    return {
        "image_to_text": _margins(images[captioned], texts, captioned, caption_image),
        "text_to_image": _margins(texts[asked], images, caption_image[asked], own),
    }


def _margins(queries: Tensor, candidates: Tensor, query_key: Tensor, candidate_key: Tensor) -> np.ndarray:
    found = []
    for rows in torch.arange(len(queries)).split(max(1, BLOCK_ENTRIES // len(candidates))):
        similarity = queries[rows] @ candidates.T  # (block, candidates)
        right = query_key[rows, None] == candidate_key
        best_right = similarity.masked_fill(~right, -torch.inf).amax(dim=1)
        best_wrong = similarity.masked_fill_(right, -torch.inf).amax(dim=1)
        found.append((best_right - best_wrong).numpy())
    together = np.concatenate(found)
    # Within rounding the two tie, which is no success: a copy of the right image must not look like a margin.
    together[np.abs(together) <= rounding_of_products(queries, candidates)] = 0
    return together[np.isfinite(together)]


# The report


def report_charts(
    metrics: dict, similarities: tuple[np.ndarray, np.ndarray], by_direction: dict[str, np.ndarray]
) -> list[Picture]:
    """Recalls, similarities of matched and of unmatched pairs, margins by direction."""
    return [
        Picture("Recall", "recall.png", partial(plot_recall, metrics)),
        Picture("Similarity of pairs", "similarities.png", partial(plot_similarities, *similarities)),
        Picture("Margins", "margins.png", partial(plot_margins, by_direction)),
    ]


def candidates_chart(
    matched: Matched, image: int, name: str, queries: Sequence[str], query_embeds: Tensor, seed: int
) -> Picture:
    """Similarity of one image to its own captions, to others, and to the user's queries."""

    def draw(path: Path) -> None:
        answers = candidates(matched, image, queries, query_embeds, seed)
        plot_candidates(matched.open_image(image), name, answers, path)

    return Picture("One image and candidate captions", "candidates.png", draw)


def sheets(
    matched: Matched, to_text: Tensor, to_image: Tensor, queries: Sequence[str], query_embeds: Tensor
) -> list[Picture]:
    """Sheets of the user's queries (q) with embeddings (q, D), and of queries that succeed and fail both ways.

    to_text, to_image: ranks as `retrieval_ranks` returns them. A kind without examples has no sheet.
    """
    gallery = Gallery(matched.open_image)
    captioned = matched.caption_image.unique().tolist()

    def draw_queries(path: Path) -> None:
        found = [free_query(matched, gallery, *asked) for asked in zip(queries, query_embeds, strict=True)]
        plot_text_queries(found, gallery.open, "The five most similar images, and their similarity", path)

    def draw_texts(places: list[int], title: str, path: Path) -> None:
        found = [text_query(matched, gallery, place, int(to_image[place])) for place in places]
        plot_text_queries(found, gallery.open, title, path)

    def draw_images(places: list[int], title: str, path: Path) -> None:
        found = [image_query(matched, captioned[place], int(to_text[place])) for place in places]
        plot_image_queries(found, gallery.open, title, path)

    pictures = [Picture("Images for your queries", "queries.png", draw_queries)] if queries else []
    for name, ranks, draw in (("Text to image", to_image, draw_texts), ("Image to text", to_text, draw_images)):
        for succeed, word in ((True, "succeed"), (False, "fail")):
            places = examples(ranks, succeed, EXAMPLES)
            if places:
                title = f"{name}: examples that {word} (numbers: cosine similarity)"
                file = f"{name.lower().replace(' ', '_')}_{word}.png"
                pictures.append(Picture(f"{name}, examples that {word}", file, partial(draw, places, title)))
    return pictures


def _pairs_fact(matched: Matched, images: np.ndarray) -> dict[str, str]:
    """Number of pairs, and the effect of an image that is in several of them."""
    most = int(np.unique(images, return_counts=True)[1].max())
    fact = f"{len(matched.captions)}, each its own target"
    if most > 1:
        fact += f"; an image is in up to {most} of them, and its copies tie: a caption's rank is then {most} or more"
    return {"pairs": fact}


def _figures_table(metrics: dict[str, dict[str, float]]) -> Rows:
    table = [["", *map(words, metrics["image_to_text"])]]
    for direction, figures in metrics.items():
        *fractions, median = figures.values()
        table.append([words(direction), *map(decimals, fractions), f"{median:g}"])
    return table


def _scores_table(similarities: tuple[np.ndarray, np.ndarray], by_direction: dict[str, np.ndarray]) -> Rows:
    named = dict(zip(("similarity, matched pairs", "similarity, unmatched pairs"), similarities, strict=True))
    named |= {f"margin, {words(direction)}": values for direction, values in by_direction.items()}
    rows = [["", "mean", "5 %", "median", "95 %", "above 0"]]
    for name, values in named.items():
        if len(values):
            quantiles = np.quantile(values, (0.05, 0.5, 0.95)).tolist()
            rows.append([name, *map(decimals, [float(values.mean()), *quantiles, float(np.mean(values > 0))])])
    return rows
