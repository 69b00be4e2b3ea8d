"""Sheets of examples: a query to a row, with what was found for it, ranks and scores."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.evaluation.drawing import DPI, RIGHT, ROW, TEXT, OpenImage, shorten, show_image, wrapped, write_text
from lib.evaluation.retrieval.answers import SHOWN, Answer, ImageQuery, TextQuery

LINE = 0.165  # inches, of the text beside a picture
LINE_LENGTH = 112  # characters


def plot_text_queries(queries: Sequence[TextQuery], open_image: OpenImage, title: str, path: Path) -> None:
    """A row per text: the text, and the images found, its own one framed; in a first column where it was missed."""
    missed = any(query.own and not _found(query) for query in queries)
    widths = [TEXT, *[ROW] * (missed + SHOWN)]
    figure = Figure(figsize=(sum(widths), (ROW + 0.3) * len(queries) + 0.5), layout="constrained")
    grid = figure.subplots(len(queries), len(widths), squeeze=False, width_ratios=widths)
    for row, query in zip(grid, queries, strict=True):
        for axes in row:
            axes.axis("off")
        text = wrapped(shorten(query.text, 300), 36)
        write_text(row[0], text)
        if query.own:
            below = "\n" * (2 + text.count("\n"))
            write_text(row[0], f"{below}its own: rank {query.rank:,}, {query.own.score:.3f}", colour=RIGHT)
        if missed and query.own:
            show_image(row[1], open_image(query.own.content), RIGHT)
            row[1].set_title(f"its own\n{query.own.score:.3f}", fontsize=9, color=RIGHT)
        for place, (axes, answer) in enumerate(zip(row[1 + missed :], query.found, strict=False), 1):
            _show(axes, answer, place, open_image)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=DPI)


def _found(query: TextQuery | ImageQuery) -> bool:
    return any(answer.right for answer in query.found)


def _show(axes: Axes, answer: Answer[int], place: int, open_image: OpenImage) -> None:
    show_image(axes, open_image(answer.content), RIGHT if answer.right else None)
    mark, colour = (" ✓", RIGHT) if answer.right else ("", "black")
    axes.set_title(f"{place}{mark}\n{answer.score:.3f}", fontsize=9, color=colour)


def plot_image_queries(queries: Sequence[ImageQuery], open_image: OpenImage, title: str, path: Path) -> None:
    """A row per image: the image, and the captions found for it, its own ones marked."""
    texts = [_lines(query) for query in queries]
    heights = [max(ROW, LINE * sum(1 + line.count("\n") for line, _ in lines) + 0.3) for lines in texts]
    figure = Figure(figsize=(ROW + 3 * TEXT, sum(heights) + 0.6), layout="constrained")
    widths = [ROW, 3 * TEXT]
    grid = figure.subplots(len(queries), 2, squeeze=False, width_ratios=widths, height_ratios=heights)
    for (picture, text), query, lines, height in zip(grid, queries, texts, heights, strict=True):
        show_image(picture, open_image(query.image))
        text.axis("off")
        top = 0.98
        for line, colour in lines:
            write_text(text, line, top, colour)
            top -= LINE * (1 + line.count("\n")) / height
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=DPI)


def _lines(query: ImageQuery) -> list[tuple[str, str]]:
    """What stands beside the image, and in which colour."""
    lines = [(f"its own caption: rank {query.rank:,}, {query.own.score:.3f}", RIGHT)]
    if not _found(query):
        lines.append((_line("    ", query.own.content), RIGHT))
    for place, answer in enumerate(query.found, 1):
        start = f"{place} {'✓' if answer.right else '✗'}  {answer.score:.3f}  "
        lines.append((_line(start, answer.content), RIGHT if answer.right else "black"))
    return lines


def _line(start: str, caption: str) -> str:
    return start + wrapped(shorten(caption, 2 * LINE_LENGTH), LINE_LENGTH).replace("\n", "\n" + 12 * " ")
