"""A fair sample of the answers, with their pictures."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from lib.evaluation.drawing import DPI, RIGHT, ROW, WRONG, OpenImage, show_image, wrapped

COLUMNS = 6
NAME = 27  # characters of a line above a picture


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
    titles = {row: wrapped(true[row], NAME) for row in right}
    titles |= {
        row: f"{wrapped(f'true: {true[row]}', NAME)}\n{wrapped(f'said: {predicted[row]}', NAME)}" for row in wrong
    }
    blocks = [(rows, colour) for rows, colour in ((right, RIGHT), (wrong, WRONG)) if len(rows)]
    grids = [-(-len(rows) // COLUMNS) for rows, _ in blocks]
    inches = [
        0.5 + lines * (ROW + 0.15 * (1 + max(titles[row].count("\n") for row in rows)))
        for lines, (rows, _) in zip(grids, blocks, strict=True)
    ]
    figure = Figure(figsize=(ROW * COLUMNS + 0.4, sum(inches)), layout="constrained")
    parts = figure.subfigures(len(blocks), 1, squeeze=False, height_ratios=inches)[:, 0]
    for part, (rows, colour), lines in zip(parts, blocks, grids, strict=True):
        heading = "Classified rightly" if colour == RIGHT else "Classified wrongly"
        part.suptitle(heading, fontsize=12, color=colour)
        grid = part.subplots(lines, COLUMNS, squeeze=False).flat
        for axes in grid:
            axes.axis("off")
        for axes, row in zip(part.axes, rows, strict=False):
            show_image(axes, open_image(row), colour if colour == RIGHT else None)
            axes.set_title(titles[row], fontsize=8.5)
    figure.savefig(path, dpi=DPI)
