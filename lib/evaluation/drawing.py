"""What the charts and picture sheets of every task share: colours, names in lines, thumbnails."""

import textwrap
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from PIL import Image, ImageOps

# Names of models and classes, and captions, are shown as they are: two $ in them are no formula.
matplotlib.rcParams["text.parse_math"] = False

# This blue and this red stay apart for colour-blind eyes and in grey.
RIGHT, WRONG = "#2166ac", "#d6604d"
DPI = 110
THUMBNAIL = 224  # pixels
ROW, TEXT = 1.75, 3.2  # inches: height of a row and width of a picture, width of a text beside it

OpenImage = Callable[[int], Image.Image]
"""A picture by row number."""


def shorten(text: str, length: int) -> str:
    """The text on one line in at most `length` characters, an ellipsis where it was longer."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def wrapped(text: str, width: int) -> str:
    """All of the text in lines of at most `width` characters; only a longer word is broken."""
    return textwrap.fill(" ".join(text.split()), width)


def spread(rows: Sequence[int] | np.ndarray, count: int) -> list[int]:
    """At most `count` of the rows, evenly spaced: a fair sample, not a choice of the best."""
    if len(rows) == 0:
        return []
    places = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
    return [int(rows[place]) for place in places]


def show_image(axes: Axes, image: Image.Image, colour: str | None = None) -> None:
    """Draw the image on a white square, framed in the colour, or in a thin grey without one."""
    # The square around every picture keeps rows and titles in line.
    enlarge = Image.Resampling.NEAREST if max(image.size) < THUMBNAIL // 2 else Image.Resampling.BICUBIC
    axes.axis("on")
    axes.imshow(ImageOps.pad(image, (THUMBNAIL, THUMBNAIL), enlarge, color="white"))
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=colour or "lightgrey", linewidth=3 if colour else 1)


def write_text(axes: Axes, text: str, top: float = 0.95, colour: str = "black", size: float = 9.5) -> None:
    """Write text from the left edge of the axes downwards; `top` in parts of their height."""
    place = axes.transAxes
    axes.text(0.0, top, text, transform=place, ha="left", va="top", fontsize=size, color=colour)
