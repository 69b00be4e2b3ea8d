"""Charts with a place for every class, for three classes or for hundreds; each function draws one PNG file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from lib.evaluation.charts import DPI, PROMPT_WIDTH, RIGHT, WRONG, horizontal_bars, row_height, save, wrapped

ANNOTATED_CLASSES = 20  # up to here a cell of a confusion matrix has room for its number
LABELLED_CLASSES = 150  # up to here every class has room for its name
BARS_PER_COLUMN, MOST_BARS = 40, 120


def plot_confusions(confusions: Mapping[str, Sequence[Sequence[int]]], classes: Sequence[str], path: Path) -> None:
    """Confusion matrices (K, K) by model name, as shares of each true class, side by side on one scale.

    Every cell has its number up to 20 classes; of more than 150, every second or third has its name.
    """
    few = len(classes) <= ANNOTATED_CLASSES
    step, size = -(-len(classes) // LABELLED_CLASSES), 9 if few else 7
    names = [wrapped(name, 24 if few else 72) for name in classes[::step]]
    side = max(row_height(names, size, 0.5 if few else 0.14) * min(len(classes), LABELLED_CLASSES), 3)
    margin = 0.4 + size / 72 * 0.62 * max(len(line) for name in names for line in name.split("\n"))
    width = side * len(confusions) + margin + 0.4 * (len(confusions) - 1) + 1.2
    figure = Figure(figsize=(width, side + margin + 0.8), layout="constrained")
    panels = figure.subplots(1, len(confusions), squeeze=False, sharey=True)[0]
    for axes, (model, confusion) in zip(panels, confusions.items(), strict=True):
        image = _draw_confusion(axes, np.asarray(confusion, dtype=float), few)
        axes.set_xticks(range(0, len(classes), step), names, rotation=90, fontsize=size)
        axes.set_yticks(range(0, len(classes), step), names, fontsize=size)
        accuracy = np.trace(confusion) / max(np.sum(confusion), 1)
        axes.set_title(f"{wrapped(model, 40) or 'Confusion'}, accuracy {accuracy:.3f}", fontsize=12)
    panels[0].set_ylabel("true class")
    figure.colorbar(image, ax=panels, shrink=0.7, fraction=0.03, label="share of the true class")
    figure.savefig(path, dpi=DPI, bbox_inches="tight", pad_inches=0.15)


def _draw_confusion(axes: Axes, counts: np.ndarray, annotated: bool) -> AxesImage:
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # The square root lifts the small shares, which are the ones to look for.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    for row, column in zip(*np.nonzero(shares), strict=True) if annotated else ():
        share = shares[row, column]
        colour = "white" if share > 0.35 else "black"
        axes.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xlabel("predicted class")
    return image


def plot_class_f1(per_class: Mapping[str, dict], path: Path) -> None:
    """F1 of each class as bars, best first, with the number of its images; of many classes the 120 lowest."""
    ranked = sorted(per_class.items(), key=lambda entry: (-entry[1]["f1"], entry[0]))
    shown = ranked[-MOST_BARS:]
    columns, per_column = _columns(len(shown))
    names = [wrapped(f"{name} ({figures['support']})", 34) for name, figures in shown]
    size = 6.4 if columns == 1 else 4.8 * columns, 1.2 + row_height(names, 8, 0.22) * per_column
    figure = Figure(figsize=size, layout="constrained")
    for column, axes in enumerate(figure.subplots(1, columns, squeeze=False)[0]):
        rows = slice(column * per_column, (column + 1) * per_column)
        f1 = [figures["f1"] for _, figures in shown[rows]]
        horizontal_bars(axes, f1, names[rows], ".2f", places=per_column)
        axes.set_xlim(0, 1.14)
        axes.set_xticks([0, 0.5, 1])
    which = "each class" if len(shown) == len(ranked) else f"the {len(shown)} lowest of {len(ranked)} classes"
    save(figure, path, f"F1 of {which} (number of images)")


def plot_f1_differences(per_class: Mapping[str, dict[str, dict]], path: Path) -> None:
    """For each model but the first, its F1 of each class minus the first model's, the greatest gain on top.

    per_class: by model and class, with "f1" and "support". Of many classes the 120 largest differences are drawn.
    """
    first, *others = per_class
    differences = {name: _differences(per_class[first], per_class[name]) for name in others}
    longest = len(differences[others[0]])
    columns, per_column = _columns(longest)
    height = 0.9 + row_height([name for name, _ in differences[others[0]]], 8, 0.24) * per_column
    figure = Figure(figsize=(max(7, 4.8 * columns), height * len(others) + 0.2), layout="constrained")
    which = f", the {longest} largest of {len(per_class[first])}" if longest < len(per_class[first]) else ""
    panels = figure.subfigures(len(others), 1, squeeze=False)[:, 0]
    for panel, (model, rows) in zip(panels, differences.items(), strict=True):
        panel.suptitle(wrapped(f"F1 of {model} minus F1 of {first}{which} (number of images)", 90), fontsize=11)
        reach = max(0.02, max(abs(value) for _, value in rows)) * 1.5
        for column, axes in enumerate(panel.subplots(1, columns, squeeze=False)[0]):
            names, values = zip(*rows[column * per_column : (column + 1) * per_column], strict=True)
            colours = [RIGHT if value >= 0 else WRONG for value in values]
            horizontal_bars(axes, values, names, "+.3f", colours=colours, places=per_column)
            axes.set_xlim(-reach, reach)
            axes.axvline(0, color="black", linewidth=0.8)
    save(figure, path)


def _differences(first: dict[str, dict], other: dict[str, dict]) -> list[tuple[str, float]]:
    """(class with its number of images, difference), the largest ones, from gain to loss."""
    found = [(f"{name} ({row['support']})", other[name]["f1"] - row["f1"]) for name, row in first.items()]
    largest = sorted(found, key=lambda entry: -abs(entry[1]))[:MOST_BARS]
    return [(wrapped(name, 34), value) for name, value in sorted(largest, key=lambda entry: (-entry[1], entry[0]))]


def _columns(count: int) -> tuple[int, int]:
    """Columns for so many bars, and bars in each."""
    columns = -(-count // BARS_PER_COLUMN)
    return columns, -(-count // columns)


def plot_heat_map(means: np.ndarray, classes: Sequence[str], prompts: Sequence[str], path: Path) -> None:
    """Similarity of each class (c, K) to each prompt, above or below the mean of all classes."""
    above = means - means.mean(axis=0)
    most = max(float(np.abs(above).max()), 1e-6)
    names = [wrapped(prompt, PROMPT_WIDTH) for prompt in prompts]
    edges = np.cumsum([0.0, *(name.count("\n") + 1 for name in names)])  # a prompt is as wide as it has lines
    row, size = (0.24, 8) if len(classes) <= 40 else (0.15, 7)
    tall = row * min(len(classes), LABELLED_CLASSES)
    figure = Figure(figsize=(max(0.22 * edges[-1], 2) + 3.4, tall + 4.4), layout="constrained")
    axes = figure.add_subplot()
    image = axes.pcolormesh(edges, np.arange(len(classes) + 1), above, cmap="RdBu_r", vmin=-most, vmax=most)
    figure.colorbar(image, ax=axes, label="similarity above the mean of all classes", shrink=min(1, 4 / tall))
    axes.set_xticks((edges[1:] + edges[:-1]) / 2, names, rotation=90, fontsize=8)
    step = -(-len(classes) // LABELLED_CLASSES)
    labels = [wrapped(name, 72) for name in classes[::step]]
    axes.set_yticks(np.arange(0, len(classes), step) + 0.5, labels, fontsize=size)
    axes.invert_yaxis()
    axes.set_title("Mean cosine similarity of the classes to the prompts")
    save(figure, path)
