"""The charts of a probe: what each classifier reaches, and how that grows with the number of labels."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lib.evaluation.drawing import DPI, RIGHT, WRONG
from lib.evaluation.probe.few_shot import FewShot

# Apart for colour-blind eyes; the marker says the same in grey.
STYLES = (("#2166ac", "o"), ("#d6604d", "s"), ("#1b7837", "^"), ("#762a83", "D"))


def plot_classifiers(figures: Mapping[str, Mapping[str, float]], chance: float, path: Path) -> None:
    """Bars of accuracy and macro F1 for each classifier, by its title; dotted: always the most frequent class."""
    figure = Figure(figsize=(2.2 + 1.5 * len(figures), 4.2), layout="constrained")
    axes = figure.add_subplot()
    for offset, colour, key in ((-0.2, RIGHT, "accuracy"), (0.2, WRONG, "macro_f1")):
        heights = [of_one[key] for of_one in figures.values()]
        bars = axes.bar(np.arange(len(figures)) + offset, heights, 0.38, color=colour, label=key.replace("_f1", " F1"))
        axes.bar_label(bars, fmt="%.3f", padding=2, fontsize=9)
    axes.axhline(chance, color="grey", linestyle=":", label=f"the most frequent class ({chance:.3f})")
    axes.set_xticks(range(len(figures)), [title.replace(" ", "\n") for title in figures])
    axes.set_ylim(0, 1.08)
    axes.set_title("Classifiers on frozen image embeddings")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=DPI)


def plot_few_shot(curves: Mapping[str, Sequence[FewShot]], full: Mapping[str, float], path: Path) -> None:
    """Accuracy against images a class with the deviation over draws; dashed: the accuracy with all images, `full`."""
    figure = Figure(figsize=(7.4, 4.8), layout="constrained")
    axes = figure.add_subplot()
    # Side by side, so that the whiskers of two classifiers do not lie on each other.
    shifts = 2.0 ** np.linspace(-0.06, 0.06, len(curves))
    for (title, curve), shift, (colour, marker) in zip(curves.items(), shifts, STYLES, strict=False):
        shots = np.array([point.shots for point in curve]) * shift
        means, deviations = [point.mean for point in curve], [point.deviation for point in curve]
        label = f"{title} (all: {full[title]:.3f})"
        axes.errorbar(shots, means, deviations, color=colour, marker=marker, capsize=3, markersize=5, label=label)
        axes.axhline(full[title], color=colour, linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    ticks = sorted({point.shots for curve in curves.values() for point in curve})
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()  # their labels would be formulas
    axes.set_xlabel("images a class to learn from (whiskers: standard deviation over draws; dashed: all images)")
    axes.set_ylabel("accuracy")
    axes.set_ylim(0, 1.04)
    axes.grid(alpha=0.3)
    axes.set_title("Accuracy with few labels")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=DPI)
