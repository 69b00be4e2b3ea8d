"""Captions for which models find different pictures, with what each of them found."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lib.evaluation.compare.differing import by_who_is_right
from lib.evaluation.retrieval.answers import SHOWN, Gallery, TextQuery, text_query
from lib.evaluation.retrieval.scores import Matched
from lib.evaluation.retrieval.sheets import plot_text_queries

ROWS = 10  # of the sheet: a caption takes one for each model


def differing_captions(ranks: np.ndarray) -> list[int]:
    """A fair sample of the captions whose image some models show among the first five and others do not.

    ranks: (models, m) of each caption's image, from 1.
    """
    return by_who_is_right(ranks <= SHOWN, max(2, ROWS // len(ranks)))


def plot_differing_captions(
    captions: list[int], models: Mapping[str, Matched], ranks: np.ndarray, title: str, path: Path
) -> None:
    """A row per caption and model: the five most similar pictures, the right one framed.

    captions: rows of each model's captions; ranks: (models, m), in the models' order.
    """
    gallery = Gallery(next(iter(models.values())).open_image)
    queries = [
        _of_model(name, text_query(matched, gallery, caption, int(ranks[number, caption])))
        for caption in captions
        for number, (name, matched) in enumerate(models.items())
    ]
    plot_text_queries(queries, gallery.open, title, path)


def _of_model(name: str, query: TextQuery) -> TextQuery:
    return query._replace(text=f"{name}: {query.text}")
