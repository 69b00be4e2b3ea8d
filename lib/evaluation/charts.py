"""Charts of all tasks but those by class; each function draws one PNG file."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageOps

from lib.evaluation.calibration import BINS, Reliability
from lib.evaluation.origin import Training
from lib.evaluation.probe_classifiers import FewShot
from lib.evaluation.prompt_study import PromptStudy
from lib.evaluation.report import words
from lib.evaluation.retrieval_answers import Answer

# Names of models and classes, and captions, are shown as they are: two $ in them are no formula.
matplotlib.rcParams["text.parse_math"] = False

# These differ for colour-blind eyes and in grey; the markers do too.
RIGHT, WRONG, PALE = "#2166ac", "#d6604d", "#92c5de"
COLOURS = (RIGHT, WRONG, "#1b7837", "#762a83", "#b8860b", "#35978f", "#8c510a", "#636363")
MARKERS = "os^D"
DPI = 110
THUMBNAIL = 224  # pixels
HISTOGRAM_BINS = 60
MOST_TEMPLATES = 40  # of more, the best and the worst ones are drawn
MOST_PROMPTS = 40  # of more, those that separate the classes best are drawn
PROMPT_WIDTH = 44  # characters of a prompt on a line

Interval = tuple[float, tuple[float, float]]
"""A value, and the bounds around it."""


# Shared with the charts by class and the sheets of images


def shorten(text: str, length: int) -> str:
    """The text on one line in at most `length` characters, with an ellipsis if it was longer."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def wrapped(text: str, width: int) -> str:
    """All of the text in lines of at most `width` characters; only a longer word is broken."""
    return textwrap.fill(" ".join(text.split()), width)


def show_image(axes: Axes, image: Image.Image, colour: str | None = None) -> None:
    """Draw the image on a white square, framed in the colour, or in a thin grey without one."""
    # The square around every image keeps rows and titles in line.
    enlarge = Image.Resampling.NEAREST if max(image.size) < THUMBNAIL // 2 else Image.Resampling.BICUBIC
    axes.axis("on")
    axes.imshow(ImageOps.pad(image, (THUMBNAIL, THUMBNAIL), enlarge, color="white"))
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=colour or "lightgrey", linewidth=3 if colour else 1)


def save(figure: Figure, path: Path, title: str = "", *, legend_columns: int = 0) -> None:
    """Write the figure with a title above and, with columns, a legend below all of its charts."""
    if title:
        figure.suptitle(title, fontsize=12)
    if legend_columns:
        figure.legend(loc="outside lower center", ncols=legend_columns, frameon=False)
    figure.savefig(path, dpi=DPI)


def _lines(names: Sequence[str]) -> int:
    """Lines of the name with the most lines."""
    return max(name.count("\n") + 1 for name in names)


def row_height(names: Sequence[str], size: float, least: float) -> float:
    """Inches for each of the names at a font size in points, at least `least`."""
    return max(least, size * 1.3 / 72 * _lines(names))


def _pair_of_bars(axes: Axes, series: Mapping[str, Sequence[float]], ticks: Sequence[str]) -> None:
    """Fractions of two series side by side, with their values above them."""
    for offset, colour, (label, values) in zip((-0.2, 0.2), COLOURS, series.items(), strict=False):
        bars = axes.bar(np.arange(len(values)) + offset, values, 0.38, color=colour, label=label)
        axes.bar_label(bars, fmt="%.3f", padding=2, fontsize=9)
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_ylim(0, 1.08)


def horizontal_bars(
    axes: Axes,
    lengths: Sequence[float],
    names: Sequence[str],
    form: str,
    *,
    colours: str | Sequence[str] = RIGHT,
    heights: np.ndarray | None = None,
    size: float = 8,
    places: int | None = None,
) -> None:
    """Horizontal bars from the top down, with their names and values.

    heights: room of each bar, 1 for all by default; places: bars that there is room for, by default as many.
    """
    heights = np.ones(len(lengths)) if heights is None else heights
    middles = np.cumsum(heights) - heights / 2
    bars = axes.barh(middles, lengths, 0.75 * heights, color=colours)
    axes.bar_label(bars, [format(length, form) for length in lengths], padding=3, fontsize=size)
    axes.set_yticks(middles, names, fontsize=size)
    axes.set_ylim(places or heights.sum(), 0)
    axes.spines[["top", "right"]].set_visible(False)


# Retrieval


def plot_recall(metrics: dict[str, dict[str, float]], path: Path) -> None:
    """Bars of Recall@1/5/10 for both directions; metrics as `retrieval_metrics` returns them."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    recalls = [key for key in metrics["image_to_text"] if key.startswith("R@")]
    series = {
        f"{words(direction)} (MRR {each['MRR']:.3f}, median rank {each['median_rank']:g})": [each[k] for k in recalls]
        for direction, each in metrics.items()
    }
    _pair_of_bars(axes, series, recalls)
    axes.set(ylabel="fraction of queries", title="Queries with the right answer among the first K")
    save(figure, path, legend_columns=1)


def plot_similarities(matched: np.ndarray, unmatched: np.ndarray, path: Path) -> None:
    """Distributions of the cosine similarity of matched (P,) and of unmatched (Q,) image-text pairs."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    values = {f"unmatched ({len(unmatched):,} pairs)": unmatched, f"matched ({len(matched):,} pairs)": matched}
    _histograms(axes, values, (WRONG, RIGHT))
    axes.set(
        xlabel="cosine similarity of image and text (dashed: mean)",
        ylabel="share of pairs",
        title="Similarity of matched and of unmatched pairs",
    )
    save(figure, path, legend_columns=2)


def plot_margins(margins: dict[str, np.ndarray], path: Path) -> None:
    """Distributions of the right answer's similarity minus the best wrong one's, one chart per direction."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, (direction, values) in zip(figure.subplots(1, 2, sharey=True), margins.items(), strict=True):
        _histograms(axes, {direction: values}, (RIGHT,))
        axes.axvline(0, color="black", linewidth=1)
        above = f"{np.mean(values > 0):.1%} above 0" if len(values) else "there is no wrong answer"
        axes.set_title(f"{words(direction)}: {above} ({len(values):,} queries)", fontsize=11)
        axes.set_xlabel("similarity of best right minus best wrong answer (dashed: mean)")
    figure.axes[0].set_ylabel("share of queries")
    save(figure, path, "Margin between the right answer and the best wrong one")


def _histograms(axes: Axes, values: dict[str, np.ndarray], colours: Sequence[str]) -> None:
    """Shares of each kind of values over common bins, and their means."""
    together = np.concatenate(list(values.values()))
    if not len(together):
        return
    # Some width even if all values are equal.
    edges = np.linspace(together.min(), max(together.max(), together.min() + 0.02), HISTOGRAM_BINS + 1)
    for (name, numbers), colour in zip(values.items(), colours, strict=True):
        if len(numbers):
            share = np.full(len(numbers), 1 / len(numbers))
            axes.hist(numbers, edges.tolist(), weights=share, color=colour, alpha=0.6, label=name)
            axes.axvline(numbers.mean(), color=colour, linestyle="--", linewidth=1.2)


def plot_candidates(image: Image.Image, name: str, answers: Sequence[Answer[str]], path: Path) -> None:
    """Bars of one image's similarity to candidate captions, the most similar first, its own ones marked."""
    labels = [wrapped(shorten(answer.content, 180), 62) for answer in answers]
    heights = np.array([0.17 * max(1.6, 1 + label.count("\n")) for label in labels])
    figure = Figure(figsize=(12, max(3.4, heights.sum() * 1.15 + 1.3)), layout="constrained")
    picture, axes = figure.subplots(1, 2, width_ratios=[1, 3])
    show_image(picture, image)
    picture.set_title(wrapped(name, 28), fontsize=8)
    colours = [RIGHT if answer.right else WRONG for answer in answers]
    horizontal_bars(axes, [answer.score for answer in answers], labels, ".3f", colours=colours, heights=heights, size=9)
    for label, answer in zip(axes.get_yticklabels(), answers, strict=True):
        label.set_color(RIGHT if answer.right else "black")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.margins(x=0.12)
    axes.set_xlabel("cosine similarity")
    save(figure, path, "One image and candidate captions (blue: its own; red: others)")


# Zero-shot


def plot_prompts(study: PromptStudy, templates: Sequence[str], path: Path) -> None:
    """Accuracy of each template alone, best first, below the ensemble and the templates chosen on other images."""
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
    figure = Figure(figsize=(8.5, 1.1 + row_height(names, 9, 0.26) * len(names)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(study.ensemble["accuracy"], color=RIGHT, linestyle=":", linewidth=1.2, zorder=0)
    horizontal_bars(axes, accuracy, names, ".3f", colours=[RIGHT] * len(together) + [PALE] * len(alone), size=9)
    for text in axes.texts:
        text.set_bbox({"color": "white", "pad": 0.5})  # the dotted line must not cross a number
    axes.set(xlim=(0, max(accuracy) * 1.12 or 1), xlabel="accuracy on the test images (dotted: all templates together)")
    without = f", {left_out} in the middle left out" if left_out > 0 else ""
    axes.set_title(f"Prompts: each template alone{without}", fontsize=12)
    save(figure, path)


def plot_reliability(before: Reliability, after: Reliability, path: Path) -> None:
    """Accuracy against confidence before and after the fitted temperature, with the images of each bin below."""
    figure = Figure(figsize=(9.5, 5.2), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=[3, 1])
    centres = (np.arange(BINS) + 0.5) / BINS
    for column, (found, title) in enumerate(((before, "The model's own temperature"), (after, "Fitted temperature"))):
        axes, counts = grid[:, column]
        filled = found.counts > 0
        accuracy, confidence = found.accuracy[filled], found.confidence[filled]
        axes.bar(centres[filled], accuracy, 0.9 / BINS, color=PALE, label="accuracy")
        lower, gap = np.minimum(accuracy, confidence), np.abs(accuracy - confidence)
        hatched = {"facecolor": "none", "edgecolor": WRONG, "hatch": "///", "label": "gap to the confidence"}
        axes.bar(centres[filled], gap, 0.9 / BINS, lower, **hatched)
        axes.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="perfect calibration")
        axes.set_ylim(0, 1)
        temperatures = " and ".join(f"{temperature:.3g}" for temperature in found.temperatures)
        axes.set_title(f"{title}, {temperatures}\nECE {found.ece:.3f}", fontsize=11)
        counts.bar(centres, found.counts / found.counts.sum(), 0.9 / BINS, color="grey")
        counts.set(xlabel="confidence", xlim=(0, 1))
    grid[0, 0].set_ylabel("accuracy")
    grid[1, 0].set_ylabel("share of\nthe images")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)


# Probe


def plot_classifiers(figures: Mapping[str, Mapping[str, float]], chance: float, path: Path) -> None:
    """Bars of accuracy and macro F1 for each classifier, by its title; dotted: always the most frequent class."""
    figure = Figure(figsize=(2.2 + 1.5 * len(figures), 4.2), layout="constrained")
    axes = figure.add_subplot()
    series = {words(key): [of_one[key] for of_one in figures.values()] for key in ("accuracy", "macro_f1")}
    _pair_of_bars(axes, series, [title.replace(" ", "\n") for title in figures])
    axes.axhline(chance, color="grey", linestyle=":", label=f"the most frequent class ({chance:.3f})")
    axes.set_title("Classifiers on frozen image embeddings")
    save(figure, path, legend_columns=3)


def plot_few_shot(curves: Mapping[str, Sequence[FewShot]], full: Mapping[str, float], path: Path) -> None:
    """Accuracy against images per class with the deviation over draws; dashed: the accuracy with all images, `full`."""
    figure = Figure(figsize=(7.4, 4.8), layout="constrained")
    axes = figure.add_subplot()
    # Side by side, so that the whiskers of two classifiers do not lie on each other.
    shifts = 2.0 ** np.linspace(-0.06, 0.06, len(curves))
    for (title, curve), shift, colour, marker in zip(curves.items(), shifts, COLOURS, MARKERS, strict=False):
        shots = np.array([point.shots for point in curve]) * shift
        means, deviations = [point.mean for point in curve], [point.deviation for point in curve]
        label = f"{title} (all: {full[title]:.3f})"
        axes.errorbar(shots, means, deviations, color=colour, marker=marker, capsize=3, markersize=5, label=label)
        axes.axhline(full[title], color=colour, linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    ticks = sorted({point.shots for curve in curves.values() for point in curve})
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()  # their labels would be formulas
    axes.set(
        xlabel="training images per class (whiskers: standard deviation over draws; dashed: all images)",
        ylabel="accuracy",
        ylim=(0, 1.04),
    )
    axes.grid(alpha=0.3)
    axes.set_title("Accuracy with few labels")
    save(figure, path, legend_columns=2)


# Generic prompts


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
    maximum = f"maximum, log {prompts} = {most:.3f}"
    above.text(0.02, most * 1.03, maximum, color="dimgrey", transform=above.get_yaxis_transform())
    above.set(ylabel="mean entropy (nats)", title="Entropy of the softmax over the prompts")
    for key, style, colour, name in (("accuracy", "o-", RIGHT, "linear SVM"), ("mlp_accuracy", "s-", WRONG, "MLP")):
        below.plot(temperatures, [sweep[t][key] for t in temperatures], style, color=colour, label=name)
    for (name, value), line in zip(references.items(), ("-.", "--", ":"), strict=True):
        below.axhline(value, color="dimgrey", linestyle=line, linewidth=1.2, label=f"{name} ({value:.3f})")
    below.set(ylim=(0, 1.04), xscale="log")
    below.set_xticks(temperatures, [f"{t:g}" for t in temperatures], rotation=45)
    below.minorticks_off()
    below.set(xlabel="temperature", ylabel="accuracy", title="Accuracy of classifiers on the softmax over the prompts")
    save(figure, path, legend_columns=1)


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
    save(figure, path)


def plot_carriers(prompts: Sequence[str], between: Sequence[float], lost: Sequence[float], path: Path) -> None:
    """Bars of how well each prompt separates the classes, the best one on top.

    between: share of the similarity's variance between classes; lost: accuracy that its shuffling costs.
    """
    names = [wrapped(prompt, PROMPT_WIDTH) for prompt in prompts[:MOST_PROMPTS]]
    heights = np.array([name.count("\n") + 1.0 for name in names])
    figure = Figure(figsize=(10, 1.5 + 0.23 * heights.sum()), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, values, label in (
        (left, between[: len(names)], "share of its variance between classes"),
        (right, lost[: len(names)], "accuracy the SVM loses when it is shuffled"),
    ):
        horizontal_bars(axes, values, names, ".3f", heights=heights)
        axes.axvline(0, color="black", linewidth=0.8)
        least, most = min(0.0, *values), max(0.0, *values)
        room = 0.18 * max(most - least, 1e-3)  # for the numbers, on both sides of zero
        axes.set_xlim(least - (room if least < 0 else 0), most + room)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(label)
    which = "" if len(names) == len(prompts) else f", {len(names)} of {len(prompts)}"
    save(figure, path, f"Prompts that separate the classes{which}")


# Comparison


def plot_intervals(figures: Mapping[str, Mapping[str, Interval]], path: Path) -> None:
    """A panel for each figure, in it a point with its 95% interval for each model, the first on top."""
    columns = min(3, len(figures))
    rows = -(-len(figures) // columns)
    names = [wrapped(name, 30) for name in next(iter(figures.values()))]
    height = 0.9 + row_height(names, 9, 0.4) * len(names)
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
    save(figure, path, "95% intervals")


def plot_blends(points: Mapping[str, tuple[float, float]], best: str, axes_labels: Sequence[str], path: Path) -> None:
    """A point for each blend by its label, (other data, user's data), joined in their order; the best one is marked."""
    figure = Figure(figsize=(6.4, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*points.values(), strict=True), "o-", color=RIGHT)
    axes.plot(*points[best], "o", color=WRONG, markersize=10, label=f"best on validation images: {best}")
    for point in set(points.values()):
        label = ", ".join(name for name, each in points.items() if each == point)
        axes.annotate(label, point, (0, 8), textcoords="offset points", ha="center", fontsize=9)
    axes.set(xlabel=wrapped(axes_labels[0], 60), ylabel=wrapped(axes_labels[1], 50))
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    axes.set_title("Blends, by their share of trained weights", fontsize=12)
    save(figure, path, legend_columns=1)


def plot_training(trainings: Mapping[str, Training], path: Path) -> None:
    """Training loss against epoch, losses of different kinds in separate panels, and the time of an epoch."""
    kinds = list(dict.fromkeys(training.kind for training in trainings.values()))
    panels = [[name for name, training in trainings.items() if training.kind == kind] for kind in kinds]
    timed = {name: each.seconds_per_epoch for name, each in trainings.items() if each.in_epochs}
    columns = len(panels) + bool(timed)
    figure = Figure(figsize=(4.4 * columns, 4), layout="constrained")
    grid = figure.subplots(1, columns, squeeze=False)[0]
    colour = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(trainings)}
    for axes, names, kind in zip(grid, panels, kinds, strict=False):
        for name in names:
            training = trainings[name]
            axes.plot(training.epochs, training.losses, color=colour[name], label=wrapped(name, 30))
            if training.memory_from is not None:  # more negatives from here on: the loss jumps, nothing broke
                axes.axvline(training.memory_from, color=colour[name], linestyle=":", linewidth=1)
        dotted = " (dotted: memory bank used from here on)" if any(trainings[n].memory_from for n in names) else ""
        axes.set(xlabel=("epoch" if all(trainings[name].in_epochs for name in names) else "step") + dotted, ylabel=kind)
        axes.set_title("Training loss", fontsize=11)
        axes.legend(frameon=False, fontsize=9)
    if timed:
        axes, names = grid[-1], [wrapped(name, 16) for name in timed]
        bars = axes.bar(range(len(timed)), timed.values(), 0.6, color=[colour[name] for name in timed])
        axes.bar_label(bars, [f"{seconds:.3g}" for seconds in timed.values()], padding=2)
        axes.set_xticks(range(len(timed)), names, fontsize=9)
        axes.margins(y=0.12)
        axes.set_ylabel("seconds")
        axes.set_title("Mean time of an epoch", fontsize=11)
    save(figure, path)
