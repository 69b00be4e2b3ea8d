"""Examples with their pictures: what was retrieved or predicted, and what would have been right."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from lib.evaluation.plots import DPI, RIGHT, WRONG, shorten, shorten_name

OpenImage = Callable[[int], Image.Image]
THUMBNAIL = 224  # pixels
ROW, TEXT = 1.75, 3.2  # inches: height of a row and width of a picture, width of a text beside it


class TextQuery(NamedTuple):
    """A caption, the rank of its image, and the images found for it, most similar first."""

    caption: str
    rank: int
    images: Sequence[int]
    right: Sequence[bool]


class ImageQuery(NamedTuple):
    """An image, the rank of its first own caption, and the captions found for it, most similar first."""

    image: int
    rank: int
    captions: Sequence[str]
    right: Sequence[bool]


def plot_text_queries(queries: Sequence[TextQuery], open_image: OpenImage, path: Path) -> None:
    """A row per caption: the caption with its image's rank, and the images found, the right one framed."""
    width = max(len(query.images) for query in queries)
    figure = Figure(figsize=(TEXT + ROW * width, ROW * len(queries) + 0.6), layout="constrained")
    grid = figure.subplots(len(queries), width + 1, squeeze=False, width_ratios=[TEXT, *[ROW] * width])
    for row, query in zip(grid, queries, strict=True):
        for axes in row:
            axes.axis("off")
        text = textwrap.fill(shorten(query.caption, 130), 38) + f"\n\nits image: rank {query.rank}"
        _write(row[0], text)
        answers = zip(row[1:], query.images, query.right, strict=False)
        for place, (axes, image, right) in enumerate(answers, start=1):
            _show(axes, open_image(image), right)
            axes.set_title(f"{place}{' ✓' if right else ''}", fontsize=9, color=RIGHT if right else "black")
    figure.suptitle("Text to image: captions and the images found (✓ the caption's own)", fontsize=12)
    figure.savefig(path, dpi=DPI)


def plot_image_queries(queries: Sequence[ImageQuery], open_image: OpenImage, path: Path) -> None:
    """A row per image: the image, and the captions found for it, its own ones marked."""
    figure = Figure(figsize=(ROW + 3 * TEXT, ROW * len(queries) + 0.6), layout="constrained")
    grid = figure.subplots(len(queries), 2, squeeze=False, width_ratios=[ROW, 3 * TEXT])
    for (picture, text), query in zip(grid, queries, strict=True):
        _show(picture, open_image(query.image), None)
        text.axis("off")
        _write(text, f"first own caption: rank {query.rank}", top=0.98)
        for place, (caption, right) in enumerate(zip(query.captions, query.right, strict=True), 1):
            line = f"{place} {'✓' if right else '✗'}  {shorten(caption, 100)}"
            _write(text, line, top=0.98 - 0.16 * place, colour=RIGHT if right else "black")
    figure.suptitle("Image to text: images and the captions found (✓ the image's own)", fontsize=12)
    figure.savefig(path, dpi=DPI)


def plot_predictions(
    right: Sequence[int],
    wrong: Sequence[int],
    true: Sequence[str],
    predicted: Sequence[str],
    open_image: OpenImage,
    path: Path,
) -> None:
    """A block of images classified rightly above one of images classified wrongly, each with its class names.

    right, wrong: row numbers into true (n,), predicted (n,) and open_image.
    """
    columns = 6
    blocks = [(rows, colour) for rows, colour in ((right, RIGHT), (wrong, WRONG)) if len(rows)]
    lines = [-(-len(rows) // columns) for rows, _ in blocks]
    figure = Figure(figsize=(ROW * columns + 0.4, 2.3 * sum(lines) + 0.4 * len(lines)), layout="constrained")
    parts = figure.subfigures(len(blocks), 1, squeeze=False, height_ratios=lines)[:, 0]
    for part, (rows, colour), line_count in zip(parts, blocks, lines, strict=True):
        title = "Classified rightly" if colour == RIGHT else "Classified wrongly"
        part.suptitle(title, fontsize=12, color=colour)
        grid = part.subplots(line_count, columns, squeeze=False).flat
        for axes in grid:
            axes.axis("off")
        for axes, row in zip(part.axes, rows, strict=False):
            _show(axes, open_image(row), colour == RIGHT)
            title = shorten_name(true[row])
            if colour == WRONG:
                title = f"true: {title}\nsaid: {shorten_name(predicted[row])}"
            axes.set_title(title, fontsize=8.5, parse_math=False)
    figure.savefig(path, dpi=DPI)


def spread(rows: Sequence[int] | np.ndarray, count: int) -> list[int]:
    """At most `count` of the rows, evenly spaced: a fair sample, not a choice of the best."""
    if len(rows) == 0:
        return []
    places = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
    return [int(rows[place]) for place in places]


def _show(axes: Axes, image: Image.Image, right: bool | None) -> None:
    """Draw the image; framed in blue where right, in a thin grey where not."""
    # A white square around every picture keeps rows and titles in line.
    enlarge = Image.Resampling.NEAREST if max(image.size) < THUMBNAIL // 2 else Image.Resampling.BICUBIC
    thumbnail = ImageOps.pad(image, (THUMBNAIL, THUMBNAIL), enlarge, color="white")
    axes.axis("on")
    axes.imshow(thumbnail)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=RIGHT if right else "lightgrey", linewidth=3 if right else 1)


def _write(axes: Axes, text: str, top: float = 0.95, colour: str = "black") -> None:
    place = {"transform": axes.transAxes, "ha": "left", "va": "top"}
    axes.text(0.0, top, text, fontsize=9.5, color=colour, parse_math=False, **place)
