"""Which pictures a retrieval report has: charts of its figures, and a fair sample of its answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from lib.evaluation.outcome import Picture
from lib.evaluation.retrieval.answers import (
    Gallery,
    candidates,
    examples,
    free_query,
    image_query,
    text_query,
)
from lib.evaluation.retrieval.plots import plot_candidates, plot_margins, plot_recall, plot_similarities
from lib.evaluation.retrieval.scores import Matched
from lib.evaluation.retrieval.sheets import plot_image_queries, plot_text_queries

EXAMPLES = 5  # of a direction that succeed, and as many that fail


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What there is to draw."""

    matched: Matched
    metrics: dict[str, dict[str, float]]
    to_text: Tensor
    """ranks (images with captions,)"""
    to_image: Tensor
    """ranks (m,)"""
    similarities: tuple[np.ndarray, np.ndarray]
    """of matched and of unmatched pairs"""
    margins: dict[str, np.ndarray]
    queries: Sequence[str]
    """free texts, q of them"""
    query_embeds: Tensor
    """(q, D)"""
    image: int
    """the one for the chart of candidates"""
    image_name: str
    seed: int

    def draw(self, folder: Path) -> list[Picture]:
        """Draw everything into the folder."""
        gallery = Gallery(self.matched.open_image)
        return [*self._charts(folder), *self._free_queries(folder, gallery), *self._examples(folder, gallery)]

    def _charts(self, folder: Path) -> list[Picture]:
        recall = Picture("Recall", folder / "recall.png")
        plot_recall(self.metrics, recall.path)
        similarities = Picture("Similarity of pairs", folder / "similarities.png")
        plot_similarities(*self.similarities, similarities.path)
        margins = Picture("Margins", folder / "margins.png")
        plot_margins(self.margins, margins.path)
        bars = Picture("One image and candidate captions", folder / "candidates.png")
        answers = candidates(self.matched, self.image, self.queries, self.query_embeds, self.seed)
        plot_candidates(self.matched.open_image(self.image), self.image_name, answers, bars.path)
        return [recall, similarities, margins, bars]

    def _free_queries(self, folder: Path, gallery: Gallery) -> list[Picture]:
        if not self.queries:
            return []
        picture = Picture("Pictures for your queries", folder / "queries.png")
        asked = zip(self.queries, self.query_embeds, strict=True)
        found = [free_query(self.matched, gallery, text, embed) for text, embed in asked]
        plot_text_queries(found, gallery.open, "The five most similar pictures, and their similarity", picture.path)
        return [picture]

    def _examples(self, folder: Path, gallery: Gallery) -> list[Picture]:
        """Sheets of what succeeds and of what fails, in both directions; none where there is nothing of a kind."""
        captioned = self.matched.caption_image.unique().tolist()

        def plot_texts(places: list[int], title: str, path: Path) -> None:
            queries = [text_query(self.matched, gallery, place, int(self.to_image[place])) for place in places]
            plot_text_queries(queries, gallery.open, title, path)

        def plot_images(places: list[int], title: str, path: Path) -> None:
            queries = [image_query(self.matched, captioned[place], int(self.to_text[place])) for place in places]
            plot_image_queries(queries, gallery.open, title, path)

        directions = (
            ("text to image", self.to_image, plot_texts),
            ("image to text", self.to_text, plot_images),
        )
        pictures = []
        for direction, ranks, plot in directions:
            for succeed, word in ((True, "succeed"), (False, "fail")):
                places = examples(ranks, succeed, EXAMPLES)
                if places:
                    path = folder / f"{direction.replace(' ', '_')}_{word}.png"
                    title = f"{direction.capitalize()}: examples that {word} (numbers: cosine similarity)"
                    plot(places, title, path)
                    pictures.append(Picture(f"{direction.capitalize()}, examples that {word}", path))
        return pictures
