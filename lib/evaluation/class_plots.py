"""Charts with a place for every class: confusion matrices and F1 bars, for three classes or a hundred."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from lib.evaluation.drawing import DPI, RIGHT, wrapped

ANNOTATED_CLASSES = 20  # up to here a confusion cell has room for its number
LABELLED_CLASSES = 150  # up to here every class has room for its name
BARS_PER_COLUMN, MOST_BARS = 40, 120


def plot_confusion(confusion: Sequence[Sequence[int]], classes: Sequence[str], path: Path) -> None:
    """Confusion matrix (K, K) as shares of each true class; every cell with its number up to 20 classes."""
    plot_confusions({"": confusion}, classes, path)


def plot_confusions(confusions: dict[str, Sequence[Sequence[int]]], classes: Sequence[str], path: Path) -> None:
    """Confusion matrices of several models by name, on one scale, side by side; as `plot_confusion` draws each."""
    names, size = _axis_names(classes), 9 if len(classes) <= ANNOTATED_CLASSES else 7
    cell = max(0.5 if len(classes) <= ANNOTATED_CLASSES else 0.14, line_height(size) * max_lines(names))
    side = max(cell * min(len(classes), LABELLED_CLASSES), 3)
    margin = 0.4 + size / 72 * 0.62 * max(len(line) for name in names for line in name.split("\n"))
    width = side * len(confusions) + margin + 0.4 * (len(confusions) - 1) + 1.2
    figure = Figure(figsize=(width, side + margin + 0.8), layout="constrained")
    panels = figure.subplots(1, len(confusions), squeeze=False, sharey=True)[0]
    for axes, (model, confusion) in zip(panels, confusions.items(), strict=True):
        image = _draw_confusion(axes, np.asarray(confusion, dtype=float), names, size, len(classes))
        accuracy = np.trace(confusion) / max(np.sum(confusion), 1)
        axes.set_title(f"{wrapped(model, 40) or 'Confusion'}, accuracy {accuracy:.3f}", fontsize=12)
    panels[0].set_ylabel("true class")
    figure.colorbar(image, ax=panels, shrink=0.7, fraction=0.03, label="share of the true class")
    figure.savefig(path, dpi=DPI, bbox_inches="tight", pad_inches=0.15)


def _draw_confusion(axes: Axes, counts: np.ndarray, names: Sequence[str], size: float, count: int) -> AxesImage:
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # The square root lifts the small shares, which are the ones to look for.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    if count <= ANNOTATED_CLASSES:
        for row, column in zip(*np.nonzero(shares), strict=True):
            share = shares[row, column]
            colour = "white" if share > 0.35 else "black"
            axes.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=8, color=colour)
    places = range(0, count, -(-count // LABELLED_CLASSES))
    axes.set_xticks(places, names, rotation=90, fontsize=size)
    axes.set_yticks(places, names, fontsize=size)
    axes.set_xlabel("predicted class")
    return image


def _axis_names(classes: Sequence[str]) -> list[str]:
    """Names for an axis: of more classes than have room, every second or third."""
    few = len(classes) <= ANNOTATED_CLASSES
    return [wrapped(name, 24 if few else 72) for name in classes[:: -(-len(classes) // LABELLED_CLASSES)]]


def plot_class_f1(per_class: dict[str, dict], path: Path) -> None:
    """F1 of each class as bars, best first, with the number of its images; of many classes the 120 lowest."""
    ranked = sorted(per_class.items(), key=lambda entry: (-entry[1]["f1"], entry[0]))
    shown = ranked[-MOST_BARS:]
    columns = -(-len(shown) // BARS_PER_COLUMN)
    per_column = -(-len(shown) // columns)
    names = [wrapped(f"{name} ({numbers['support']})", 34) for name, numbers in shown]
    bar = max(0.22, line_height(8) * max_lines(names))
    width = 6.4 if columns == 1 else 4.8 * columns
    figure = Figure(figsize=(width, 1.2 + bar * per_column), layout="constrained")
    for column in range(columns):
        axes = figure.add_subplot(1, columns, column + 1)
        part = slice(column * per_column, (column + 1) * per_column)
        heights = [numbers["f1"] for _, numbers in shown[part]]
        bars = axes.barh(range(len(heights)), heights, 0.75, color=RIGHT)
        axes.bar_label(bars, [f"{height:.2f}" for height in heights], padding=2, fontsize=8)
        axes.set_yticks(range(len(heights)), names[part], fontsize=8)
        axes.set_ylim(per_column - 0.5, -0.5)
        axes.set_xlim(0, 1.14)
        axes.set_xticks([0, 0.5, 1])
        axes.spines[["top", "right"]].set_visible(False)
    which = "each class" if len(shown) == len(ranked) else f"the {len(shown)} lowest of {len(ranked)} classes"
    figure.suptitle(f"F1 of {which} (number of images)", fontsize=12)
    figure.savefig(path, dpi=DPI)


def max_lines(names: Sequence[str]) -> int:
    """Lines of the name that has most of them."""
    return max(name.count("\n") + 1 for name in names)


def line_height(size: float) -> float:
    """Inches that a line of a label takes at a font size in points."""
    return size * 1.3 / 72
