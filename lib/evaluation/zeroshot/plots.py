"""Charts of the prompt study and of the calibration."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.evaluation.class_plots import line_height, max_lines
from lib.evaluation.drawing import DPI, RIGHT, WRONG, wrapped
from lib.evaluation.zeroshot.calibration import BINS, Reliability
from lib.evaluation.zeroshot.prompt_study import PromptStudy

PALE = "#92c5de"
MOST_TEMPLATES = 40  # of more, the best and the worst halves are drawn


def plot_prompts(study: PromptStudy, templates: Sequence[str], path: Path) -> None:
    """Accuracy of each template alone, best first, below the ensemble and what validation chose."""
    together = {
        "all templates together": study.ensemble["accuracy"],
        "best template, chosen on other images": study.best["accuracy"],
        "best template per class, chosen on other images": study.best_per_class["accuracy"],
    }
    alone = sorted(((figures["accuracy"], name) for figures, name in zip(study.alone, templates, strict=True)))[::-1]
    half = MOST_TEMPLATES // 2
    left_out = len(alone) - MOST_TEMPLATES
    alone = [*alone[:half], *alone[-half:]] if left_out > 0 else alone
    accuracy = [*together.values(), *(value for value, _ in alone)]
    names = [wrapped(name, 48) for name in [*together, *(name for _, name in alone)]]
    figure = Figure(
        figsize=(8.5, 1.1 + max(0.26, line_height(9) * max_lines(names)) * len(names)), layout="constrained"
    )
    axes = figure.add_subplot()
    colours = [RIGHT] * len(together) + [PALE] * len(alone)
    bars = axes.barh(range(len(names)), accuracy, 0.75, color=colours)
    axes.bar_label(
        bars, [f"{value:.3f}" for value in accuracy], padding=3, fontsize=9, bbox={"color": "white", "pad": 0.5}
    )
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, max(accuracy) * 1.12 or 1)
    axes.axvline(study.ensemble["accuracy"], color=RIGHT, linestyle=":", linewidth=1.2, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("accuracy on the test images (dotted: all templates together)")
    without = f", {left_out} in the middle left out" if left_out > 0 else ""
    axes.set_title(f"Prompts: each template alone{without}", fontsize=12)
    figure.savefig(path, dpi=DPI)


def plot_reliability(before: Reliability, after: Reliability, path: Path) -> None:
    """Accuracy against confidence before and after the fitted temperature, with the images of each bin below."""
    figure = Figure(figsize=(9.5, 5.2), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=[3, 1])
    for column, (found, title) in enumerate(((before, "The model's own temperature"), (after, "Fitted temperature"))):
        _draw_bins(grid[0, column], found)
        temperatures = " and ".join(f"{temperature:.3g}" for temperature in found.temperatures)
        grid[0, column].set_title(f"{title}, {temperatures}\nECE {found.ece:.3f}", fontsize=11)
        counts = grid[1, column]
        counts.bar(_centres(), found.counts / found.counts.sum(), 0.9 / BINS, color="grey")
        counts.set_xlabel("confidence")
        counts.set_xlim(0, 1)
    grid[0, 0].set_ylabel("accuracy")
    grid[1, 0].set_ylabel("share of\nthe images")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=DPI)


def _draw_bins(axes: Axes, found: Reliability) -> None:
    filled = found.counts > 0
    centres = _centres()[filled]
    accuracy, confidence = found.accuracy[filled], found.confidence[filled]
    axes.bar(centres, accuracy, 0.9 / BINS, color=PALE, label="accuracy")
    lower, gap = np.minimum(accuracy, confidence), np.abs(accuracy - confidence)
    label = "gap to the confidence"
    axes.bar(centres, gap, 0.9 / BINS, lower, label=label, facecolor="none", edgecolor=WRONG, hatch="///")
    axes.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="as sure as right")
    axes.set_ylim(0, 1)


def _centres() -> np.ndarray:
    return (np.arange(BINS) + 0.5) / BINS
