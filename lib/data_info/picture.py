"""Picture of random pairs: thumbnails with their texts beneath."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from lib.data import BadImage

PICTURED, COLUMNS = 24, 6
_THUMBNAIL = 224  # pixels
# In inches: side of a thumbnail, gap between two, height of a line of text, height of the title.
_SIDE, _GAP, _LINE, _TITLE = 2.0, 0.12, 0.145, 0.4
_LETTERS, _LINES = 28, 5  # of a text
_DPI = 112


class RandomPair(NamedTuple):
    """A text, and what decodes its image or raises BadImage."""

    open: Callable[[], Image.Image]
    text: str


def plot_pairs(pairs: Sequence[RandomPair], title: str, path: Path) -> None:
    """Draw the pairs in rows of six; an image that cannot be decoded is a grey square with the reason."""
    texts = [_wrapped(pair.text) for pair in pairs]
    under = _LINE * max((len(lines) for lines in texts), default=0) + _GAP
    columns, rows = COLUMNS, -(-len(pairs) // COLUMNS)
    width, height = columns * (_SIDE + _GAP) + _GAP, rows * (_SIDE + under) + _TITLE
    figure = Figure(figsize=(width, height))
    figure.text(_GAP / width, 1 - 0.5 * _TITLE / height, title, fontsize=11, va="center", parse_math=False)
    for place, (pair, lines) in enumerate(zip(pairs, texts, strict=True)):
        row, column = divmod(place, columns)
        left, bottom = _GAP + column * (_SIDE + _GAP), height - _TITLE - row * (_SIDE + under) - _SIDE
        axes = figure.add_axes((left / width, bottom / height, _SIDE / width, _SIDE / height))
        _show(axes, pair)
        axes.text(0, -0.03, "\n".join(lines), transform=axes.transAxes, fontsize=8.5, va="top", parse_math=False)
    figure.savefig(path, dpi=_DPI)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), _LETTERS, max_lines=_LINES, placeholder=" …")


def _show(axes: Axes, pair: RandomPair) -> None:
    axes.axis("off")
    try:
        image = pair.open()
        # Small ones are shown pixel by pixel; each stands on its text, with white above it.
        enlarge = Image.Resampling.NEAREST if max(image.size) < _THUMBNAIL // 2 else Image.Resampling.BICUBIC
        axes.imshow(ImageOps.pad(image, (_THUMBNAIL, _THUMBNAIL), enlarge, color="white", centering=(0.5, 1)))
    except BadImage as bad:
        axes.imshow(Image.new("RGB", (_THUMBNAIL, _THUMBNAIL), "lightgrey"))
        axes.text(0.5, 0.5, bad.reason, transform=axes.transAxes, ha="center", va="center", fontsize=10)
