"""Pictures on which classifiers differ, with what is true and what each of them said."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lib.evaluation.drawing import DPI, OpenImage, show_image, spread, wrapped, write_text

TRUE, RIGHT, WRONG = "black", "#1a7a32", "#c0182b"
COLUMNS, SHOWN = 5, 20
WIDTH, LINE = 2.1, 0.155  # inches: of a picture, and of a line of text below it
LETTERS = 33  # of a line


def differing(labels: np.ndarray, predicted: np.ndarray) -> list[int]:
    """A fair sample of the images that some models have right and others wrong, by who is right.

    labels: (n,); predicted: (models, n). Where there are none, of the images on which all err differently.
    """
    right = predicted == labels
    return by_who_is_right(right, SHOWN) or spread(np.flatnonzero((predicted != predicted[0]).any(axis=0)), SHOWN)


def by_who_is_right(right: np.ndarray, count: int) -> list[int]:
    """At most `count` of what some models have right and others do not, evenly spaced, by who is right.

    right: (models, n) bool.
    """
    rows = np.flatnonzero(right.any(axis=0) & ~right.all(axis=0))
    return spread(rows[np.lexsort(~right[::-1, rows])], count)


def plot_differing(
    rows: Sequence[int],
    labels: np.ndarray,
    predicted: dict[str, np.ndarray],
    classes: Sequence[str],
    open_image: OpenImage,
    path: Path,
) -> None:
    """The pictures with the true class in black, and each model's in green where right and in red where wrong.

    rows: which of labels (n,), of predicted (n,) by model, and of open_image.
    """
    texts = [_lines(row, labels, predicted, classes) for row in rows]
    places = range(0, len(rows), COLUMNS)
    # Below each line of pictures room for its longest text.
    heights = [LINE * (0.5 + max(_count(text) for text in texts[place : place + COLUMNS])) for place in places]
    inches = [inch for height in heights for inch in (WIDTH, height)]
    figure = Figure(figsize=(WIDTH * COLUMNS, sum(inches) + 0.4), layout="constrained")
    grid = figure.subplots(len(inches), COLUMNS, squeeze=False, height_ratios=inches)
    for axes in grid.flat:
        axes.axis("off")
    for place, (row, text) in enumerate(zip(rows, texts, strict=True)):
        line, column = divmod(place, COLUMNS)
        show_image(grid[2 * line, column], open_image(row))
        top = 1.0
        for words, colour in text:
            write_text(grid[2 * line + 1, column], words, top=top, colour=colour, size=8.5)
            top -= LINE / heights[line] * _count([(words, colour)])
    figure.suptitle("Images on which the models differ", fontsize=12)
    figure.savefig(path, dpi=DPI)


def _lines(
    row: int, labels: np.ndarray, predicted: dict[str, np.ndarray], classes: Sequence[str]
) -> list[tuple[str, str]]:
    """What stands below a picture: (text, colour), a mark beside the colour for those who see none."""
    lines = [(wrapped(f"true: {classes[labels[row]]}", LETTERS), TRUE)]
    for name, answers in predicted.items():
        right = answers[row] == labels[row]
        lines.append(
            (wrapped(f"{'✓' if right else '✗'} {name}: {classes[answers[row]]}", LETTERS), RIGHT if right else WRONG)
        )
    return lines


def _count(text: Sequence[tuple[str, str]]) -> int:
    return sum(words.count("\n") + 1 for words, _ in text)
