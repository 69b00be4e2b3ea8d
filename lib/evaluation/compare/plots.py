"""Charts of a comparison: figures with intervals, differences by class, training."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lib.evaluation.class_plots import BARS_PER_COLUMN, MOST_BARS, line_height, max_lines
from lib.evaluation.compare.training import Training
from lib.evaluation.drawing import DPI, RIGHT, WRONG, wrapped

COLOURS = (RIGHT, WRONG, "#1b7837", "#762a83", "#b8860b", "#35978f", "#8c510a", "#636363")
LIKE_LOSSES = 5  # up to this ratio losses share a panel: those of different kinds differ by more

Interval = tuple[float, tuple[float, float]]
"""A value, and the bounds around it."""


def plot_intervals(figures: dict[str, dict[str, Interval]], path: Path) -> None:
    """A panel for each figure, in it a point with its 95% interval for each model, the first on top."""
    columns = min(3, len(figures))
    rows = -(-len(figures) // columns)
    names = [wrapped(name, 30) for name in next(iter(figures.values()))]
    height = 0.9 + max(0.4, line_height(9) * max_lines(names)) * len(names)
    figure = Figure(figsize=(3.4 * columns + 1.6, height * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, (title, values) in zip(grid.flat, figures.items(), strict=False):
        for place, (value, (low, high)) in enumerate(values.values()):
            colour = COLOURS[place % len(COLOURS)]
            axes.plot([low, high], [place, place], color=colour, linewidth=2.5, solid_capstyle="butt")
            axes.plot(value, place, "o", color=colour, markersize=7)
            axes.annotate(f"{value:.3f}", (value, place), (0, 7), textcoords="offset points", ha="center", fontsize=9)
        axes.set_title(title, fontsize=11)
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.set_ylim(len(names) - 0.5, -0.7)
        axes.margins(x=0.15)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="x", alpha=0.3)
    for axes in grid.flat[len(figures) :]:
        axes.axis("off")
    figure.suptitle("95% intervals", fontsize=12)
    figure.savefig(path, dpi=DPI)


def plot_f1_differences(per_class: dict[str, dict[str, dict]], path: Path) -> None:
    """For each model but the first, F1 of each class less the first's, the greatest gain on top.

    per_class: by model and class, with "f1" and "support". Of many classes the 120 largest differences are drawn.
    """
    first, *others = per_class
    figures = {name: _differences(per_class[first], per_class[name]) for name in others}
    longest = max(map(len, figures.values()))
    columns = -(-longest // BARS_PER_COLUMN)
    per_column = -(-longest // columns)
    names = [wrapped(label, 34) for label, _ in next(iter(figures.values()))]
    bar = max(0.24, line_height(8) * max_lines(names))
    figure = Figure(figsize=(max(7, 4.8 * columns), (0.9 + bar * per_column) * len(others) + 0.2), layout="constrained")
    parts = figure.subfigures(len(others), 1, squeeze=False)[:, 0]
    for part, (name, differences) in zip(parts, figures.items(), strict=True):
        left_out = len(per_class[first]) - len(differences)
        which = f", the {len(differences)} largest of {len(per_class[first])}" if left_out else ""
        part.suptitle(wrapped(f"F1 of {name} less that of {first}{which} (number of images)", 90), fontsize=11)
        reach = max(0.02, max(abs(value) for _, value in differences)) * 1.5
        for column in range(columns):
            rows = differences[column * per_column : (column + 1) * per_column]
            _draw_differences(part.add_subplot(1, columns, column + 1), rows, reach, per_column)
    figure.savefig(path, dpi=DPI)


def _differences(first: dict[str, dict], other: dict[str, dict]) -> list[tuple[str, float]]:
    """(class with its support, difference), the largest ones, from gain to loss."""
    found = [(f"{name} ({row['support']})", other[name]["f1"] - row["f1"]) for name, row in first.items()]
    largest = sorted(found, key=lambda entry: -abs(entry[1]))[:MOST_BARS]
    return sorted(largest, key=lambda entry: (-entry[1], entry[0]))


def _draw_differences(axes: Axes, rows: Sequence[tuple[str, float]], reach: float, places: int) -> None:
    values = [value for _, value in rows]
    bars = axes.barh(range(len(rows)), values, 0.75, color=[RIGHT if value >= 0 else WRONG for value in values])
    axes.bar_label(bars, [f"{value:+.3f}" for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), [wrapped(name, 34) for name, _ in rows], fontsize=8)
    axes.set_ylim(places - 0.5, -0.5)
    axes.set_xlim(-reach, reach)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def plot_training(trainings: dict[str, Training], path: Path) -> None:
    """Training loss against epoch, losses of different kinds in panels of their own, and the time of an epoch."""
    highest = [max(training.losses) for training in trainings.values()]
    together = max(highest) <= LIKE_LOSSES * min(highest)
    panels = [list(trainings)] if together else [[name] for name in trainings]
    timed = {name: each.seconds_per_epoch for name, each in trainings.items() if each.in_epochs}
    columns = len(panels) + bool(timed)
    figure = Figure(figsize=(4.4 * columns, 4), layout="constrained")
    grid = figure.subplots(1, columns, squeeze=False)[0]
    colour = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(trainings)}
    for axes, names in zip(grid, panels, strict=False):
        for name in names:
            training = trainings[name]
            axes.plot(training.epochs, training.losses, color=colour[name], label=wrapped(name, 30))
            if training.remembered_from is not None:  # more candidates: the loss jumps, nothing broke
                axes.axvline(training.remembered_from, color=colour[name], linestyle=":", linewidth=1)
        dotted = " (dotted: memory used from here on)" if any(trainings[name].remembered_from for name in names) else ""
        axes.set_xlabel(("epoch" if all(trainings[name].in_epochs for name in names) else "step") + dotted)
        axes.set_ylabel("loss")
        axes.set_title("Training loss" if together else "Training loss, on a scale of its own", fontsize=11)
        axes.legend(frameon=False, fontsize=9)
    if timed:
        axes, names = grid[-1], [wrapped(name, 16) for name in timed]
        bars = axes.bar(range(len(timed)), timed.values(), 0.6, color=[colour[name] for name in timed])
        axes.bar_label(bars, [f"{seconds:.3g}" for seconds in timed.values()], padding=2)
        axes.set_xticks(range(len(timed)), names, fontsize=9)
        axes.margins(y=0.12)
        axes.set_ylabel("seconds")
        axes.set_title("Mean time of an epoch", fontsize=11)
    figure.savefig(path, dpi=DPI)
