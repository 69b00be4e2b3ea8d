"""Sheets of example images: answers to queries, predictions, and images on which models differ."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.evaluation.charts import RIGHT, WRONG, save, shorten, show_image, wrapped
from lib.evaluation.report import OpenImage
from lib.evaluation.retrieval_answers import SHOWN, Answer, ImageQuery, TextQuery

ROW, TEXT = 1.75, 3.2  # inches: side of an image, width of the text next to it
LINE = 0.165  # inches, of a line of text
LINE_LENGTH = 112  # characters of a caption on a line
PREDICTIONS_IN_ROW, NAME_LENGTH = 6, 27  # images in a row, characters of a line above them
DIFFERING_IN_ROW, DIFFERING_SIDE, ANSWER_LENGTH = 5, 2.1, 33  # images, inches, characters of a line below them
GREEN, RED = "#1a7a32", "#c0182b"

Lines = list[tuple[str, str]]
"""(text, colour), each of which may be wrapped"""


def plot_text_queries(queries: Sequence[TextQuery], open_image: OpenImage, title: str, path: Path) -> None:
    """A row per text: the text, and the images found, its own one framed; in a first column if it was missed."""
    missed = any(query.own and not _found(query) for query in queries)
    widths = [TEXT, *[ROW] * (missed + SHOWN)]
    figure = Figure(figsize=(sum(widths), (ROW + 0.3) * len(queries) + 0.5), layout="constrained")
    grid = figure.subplots(len(queries), len(widths), squeeze=False, width_ratios=widths)
    for row, query in zip(grid, queries, strict=True):
        for axes in row:
            axes.axis("off")
        text = wrapped(shorten(query.text, 300), 36)
        _write(row[0], text, 0.95)
        if query.own:
            below = "\n" * (2 + text.count("\n"))
            _write(row[0], f"{below}its own: rank {query.rank:,}, {query.own.score:.3f}", 0.95, colour=RIGHT)
        if missed and query.own:
            show_image(row[1], open_image(query.own.content), RIGHT)
            row[1].set_title(f"its own\n{query.own.score:.3f}", fontsize=9, color=RIGHT)
        for place, (axes, answer) in enumerate(zip(row[1 + missed :], query.found, strict=False), 1):
            _show_answer(axes, answer, place, open_image)
    save(figure, path, title)


def _found(query: TextQuery | ImageQuery) -> bool:
    return any(answer.right for answer in query.found)


def _show_answer(axes: Axes, answer: Answer[int], place: int, open_image: OpenImage) -> None:
    show_image(axes, open_image(answer.content), RIGHT if answer.right else None)
    mark, colour = (" ✓", RIGHT) if answer.right else ("", "black")
    axes.set_title(f"{place}{mark}\n{answer.score:.3f}", fontsize=9, color=colour)


def plot_image_queries(queries: Sequence[ImageQuery], open_image: OpenImage, title: str, path: Path) -> None:
    """A row per image: the image, and the captions found for it, its own ones marked."""
    texts = [_captions(query) for query in queries]
    heights = [max(ROW, LINE * _count(lines) + 0.3) for lines in texts]
    figure = Figure(figsize=(ROW + 3 * TEXT, sum(heights) + 0.6), layout="constrained")
    widths = [ROW, 3 * TEXT]
    grid = figure.subplots(len(queries), 2, squeeze=False, width_ratios=widths, height_ratios=heights)
    for (picture, text), query, lines, height in zip(grid, queries, texts, heights, strict=True):
        show_image(picture, open_image(query.image))
        text.axis("off")
        _write_lines(text, lines, 0.98, LINE / height, 9.5)
    save(figure, path, title)


def _captions(query: ImageQuery) -> Lines:
    """Rank and wording of an image's own caption, and the captions found."""
    lines = [(f"its own caption: rank {query.rank:,}, {query.own.score:.3f}", RIGHT)]
    if not _found(query):
        lines.append((_caption("    ", query.own.content), RIGHT))
    for place, answer in enumerate(query.found, 1):
        start = f"{place} {'✓' if answer.right else '✗'}  {answer.score:.3f}  "
        lines.append((_caption(start, answer.content), RIGHT if answer.right else "black"))
    return lines


def _caption(start: str, caption: str) -> str:
    return start + wrapped(shorten(caption, 2 * LINE_LENGTH), LINE_LENGTH).replace("\n", "\n" + 12 * " ")


def plot_predictions(
    correct: Sequence[int],
    wrong: Sequence[int],
    true: Sequence[str],
    predicted: Sequence[str],
    open_image: OpenImage,
    path: Path,
) -> None:
    """A block of images with correct predictions above one with wrong predictions, each with its class names.

    correct, wrong: row numbers into true (n,), predicted (n,) and open_image.
    """
    titles = {row: wrapped(true[row], NAME_LENGTH) for row in correct}
    for row in wrong:
        names = f"true: {true[row]}", f"predicted: {predicted[row]}"
        titles[row] = "\n".join(wrapped(name, NAME_LENGTH) for name in names)
    blocks = [block for block in (("Correct", correct, RIGHT), ("Wrong", wrong, WRONG)) if len(block[1])]
    lines = [-(-len(rows) // PREDICTIONS_IN_ROW) for _, rows, _ in blocks]
    inches = [
        0.5 + count * (ROW + 0.15 * (1 + max(titles[row].count("\n") for row in rows)))
        for count, (_, rows, _) in zip(lines, blocks, strict=True)
    ]
    figure = Figure(figsize=(ROW * PREDICTIONS_IN_ROW + 0.4, sum(inches)), layout="constrained")
    panels = figure.subfigures(len(blocks), 1, squeeze=False, height_ratios=inches)[:, 0]
    for panel, (heading, rows, colour), count in zip(panels, blocks, lines, strict=True):
        panel.suptitle(heading, fontsize=12, color=colour)
        for axes in panel.subplots(count, PREDICTIONS_IN_ROW, squeeze=False).flat:
            axes.axis("off")
        for axes, row in zip(panel.axes, rows, strict=False):
            show_image(axes, open_image(row), RIGHT if colour == RIGHT else None)
            axes.set_title(titles[row], fontsize=8.5)
    save(figure, path)


def plot_differing(
    rows: Sequence[int],
    labels: np.ndarray,
    predicted: dict[str, np.ndarray],
    classes: Sequence[str],
    open_image: OpenImage,
    path: Path,
) -> None:
    """Images with the true class in black, and each model's prediction in green if right and in red if wrong.

    rows: numbers into labels (n,), predicted (n,) by model, and open_image.
    """
    texts = [_predictions(row, labels, predicted, classes) for row in rows]
    places = range(0, len(rows), DIFFERING_IN_ROW)
    # Below each row of images room for its longest text.
    heights = [LINE * (0.5 + max(map(_count, texts[place : place + DIFFERING_IN_ROW]))) for place in places]
    inches = [inch for height in heights for inch in (DIFFERING_SIDE, height)]
    figure = Figure(figsize=(DIFFERING_SIDE * DIFFERING_IN_ROW, sum(inches) + 0.4), layout="constrained")
    grid = figure.subplots(len(inches), DIFFERING_IN_ROW, squeeze=False, height_ratios=inches)
    for axes in grid.flat:
        axes.axis("off")
    for place, (row, lines) in enumerate(zip(rows, texts, strict=True)):
        line, column = divmod(place, DIFFERING_IN_ROW)
        show_image(grid[2 * line, column], open_image(row))
        _write_lines(grid[2 * line + 1, column], lines, 1.0, LINE / heights[line], 8.5)
    save(figure, path, "Images on which the models differ")


def _predictions(row: int, labels: np.ndarray, predicted: dict[str, np.ndarray], classes: Sequence[str]) -> Lines:
    """True class and predictions of an image; a mark next to the colour serves colour-blind eyes."""
    lines = [(wrapped(f"true: {classes[labels[row]]}", ANSWER_LENGTH), "black")]
    for name, answers in predicted.items():
        mark, colour = ("✓", GREEN) if answers[row] == labels[row] else ("✗", RED)
        lines.append((wrapped(f"{mark} {name}: {classes[answers[row]]}", ANSWER_LENGTH), colour))
    return lines


def _count(lines: Lines) -> int:
    """Number of lines once they are wrapped."""
    return sum(text.count("\n") + 1 for text, _ in lines)


def _write_lines(axes: Axes, lines: Lines, top: float, step: float, size: float) -> None:
    """Write the lines one below the other; top and step are fractions of the height of the axes."""
    for text, colour in lines:
        _write(axes, text, top, colour, size)
        top -= step * (1 + text.count("\n"))


def _write(axes: Axes, text: str, top: float, colour: str = "black", size: float = 9.5) -> None:
    """Write text from the left edge of the axes downwards."""
    axes.text(0.0, top, text, transform=axes.transAxes, ha="left", va="top", fontsize=size, color=colour)
