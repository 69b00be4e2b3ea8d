"""The charts of the agnostic study: temperatures, entropies, and prompts against classes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lib.evaluation.agnostic.carriers import Carrier
from lib.evaluation.class_plots import LABELLED_CLASSES
from lib.evaluation.drawing import DPI, RIGHT, WRONG, wrapped

MOST_PROMPTS = 40  # prompts with room for their names; of more, those that carry most
WRAPPED = 44  # characters of a prompt on a line


def plot_temperatures(
    sweep: Mapping[float, Mapping[str, float]], prompts: int, references: Mapping[str, float], path: Path
) -> None:
    """Mean entropy, and accuracy of both classifiers, against temperature; references: accuracies to compare with."""
    figure = Figure(figsize=(7.4, 8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    temperatures = sorted(sweep)
    most = math.log(prompts)
    above.plot(temperatures, [sweep[t]["mean_entropy"] for t in temperatures], "o-", color=RIGHT)
    above.axhline(most, color="grey", linestyle="--")
    above.set_ylim(0, most * 1.16)
    told = f"maximum, log {prompts} = {most:.3f}"
    above.text(0.02, most * 1.03, told, color="dimgrey", transform=above.get_yaxis_transform())
    above.set_ylabel("mean entropy (nats)")
    above.set_title("How undecided images are between the prompts")
    for key, style, colour, name in (("accuracy", "o-", RIGHT, "linear SVM"), ("mlp_accuracy", "s-", WRONG, "MLP")):
        below.plot(temperatures, [sweep[t][key] for t in temperatures], style, color=colour, label=name)
    for (name, value), line in zip(references.items(), ("-.", "--", ":"), strict=True):
        below.axhline(value, color="dimgrey", linestyle=line, linewidth=1.2, label=f"{name} ({value:.3f})")
    below.set_ylim(0, 1.04)
    below.set_xscale("log")
    below.set_xticks(temperatures, [f"{t:g}" for t in temperatures], rotation=45)
    below.minorticks_off()
    below.set_xlabel("temperature")
    below.set_ylabel("accuracy")
    below.set_title("What the shares of the prompts tell about the classes")
    figure.legend(loc="outside lower center", frameon=False)
    figure.savefig(path, dpi=DPI)


def plot_entropies(entropies: Mapping[float, np.ndarray], prompts: int, path: Path) -> None:
    """A histogram of the images' entropies for each temperature, all on the same scale."""
    columns = min(4, len(entropies))
    rows = -(-len(entropies) // columns)
    most = math.log(prompts)
    figure = Figure(figsize=(2.6 * columns + 0.6, 2.0 * rows + 1.1), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(entropies) :]:
        axes.set_visible(False)
    for axes, (temperature, values) in zip(grid.flat, sorted(entropies.items()), strict=False):
        axes.hist(values, np.linspace(0, most, 41), weights=np.full(len(values), 1 / len(values)), color=RIGHT)
        axes.axvline(most, color="grey", linestyle="--")
        axes.set_title(f"temperature {temperature:g}, mean {values.mean():.2f}", fontsize=9)
        axes.set_xlim(0, most * 1.05)
    figure.supxlabel(f"entropy of an image over the prompts (dashed: log {prompts} = {most:.2f})", fontsize=10)
    figure.supylabel("share of images", fontsize=10)
    figure.savefig(path, dpi=DPI)


def plot_heat_map(means: np.ndarray, classes: Sequence[str], prompts: Sequence[str], path: Path) -> None:
    """Similarity of each class (c, K) to each prompt, above or below the mean of all classes."""
    above = means - means.mean(axis=0)
    most = max(float(np.abs(above).max()), 1e-6)
    names, widths = _wrapped(prompts)
    edges = np.concatenate([[0.0], np.cumsum(widths)])
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
    figure.savefig(path, dpi=DPI)


def plot_carriers(carriers: Sequence[Carrier], path: Path) -> None:
    """Bars of what each prompt tells about the classes, the prompt that carries most on top."""
    shown = carriers[:MOST_PROMPTS]
    names, heights = _wrapped([carrier.prompt for carrier in shown])
    places = np.cumsum(heights) - heights / 2
    figure = Figure(figsize=(10, 1.5 + 0.23 * heights.sum()), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _bars(left, places, [carrier.between for carrier in shown], "share of its variance between classes")
    _bars(right, places, [carrier.lost for carrier in shown], "accuracy the SVM loses when it is shuffled")
    left.set_yticks(places, names, fontsize=8)
    left.set_ylim(heights.sum(), 0)
    which = "" if len(shown) == len(carriers) else f", {len(shown)} of {len(carriers)}"
    figure.suptitle(f"Which prompts carry the classes{which}", fontsize=12)
    figure.savefig(path, dpi=DPI)


def _wrapped(prompts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The prompts in lines, and how many lines each has: so much room it needs."""
    names = [wrapped(prompt, WRAPPED) for prompt in prompts]
    return names, np.array([name.count("\n") + 1.0 for name in names])


def _bars(axes: Axes, places: np.ndarray, lengths: Sequence[float], label: str) -> None:
    """Horizontal bars with their numbers, and room for these on both sides of zero."""
    bars = axes.barh(places, lengths, 0.75, color=RIGHT)
    axes.bar_label(bars, [f"{length:.3f}" for length in lengths], padding=2, fontsize=8)
    axes.axvline(0, color="black", linewidth=0.8)
    least, most = min(0.0, *lengths), max(0.0, *lengths)
    room = 0.18 * max(most - least, 1e-3)
    axes.set_xlim(least - (room if least < 0 else 0), most + room)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
