"""The charts of a retrieval report, each drawn to one PNG file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from lib.evaluation.drawing import DPI, RIGHT, WRONG, shorten, show_image, wrapped
from lib.evaluation.retrieval.answers import Answer

BINS = 60
LINE = 0.17  # inches, of a label's line


def plot_recall(metrics: dict[str, dict[str, float]], path: Path) -> None:
    """Bars of Recall@1/5/10 for both directions; metrics as `retrieval_metrics` returns them."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for offset, colour, (direction, numbers) in zip((-0.2, 0.2), (RIGHT, WRONG), metrics.items(), strict=True):
        recalls = {key: value for key, value in numbers.items() if key.startswith("R@")}
        summary = f"MRR {numbers['MRR']:.3f}, median rank {numbers['median_rank']:g}"
        label = f"{direction.replace('_', ' ')} ({summary})"
        bars = axes.bar(np.arange(len(recalls)) + offset, list(recalls.values()), 0.38, color=colour, label=label)
        axes.bar_label(bars, fmt="%.3f", padding=2)
    axes.set_xticks(range(len(recalls)), recalls)
    axes.set_ylim(0, 1.08)
    axes.set_ylabel("fraction of queries")
    axes.set_title("The right one is among the first K")
    figure.legend(loc="outside lower center", frameon=False)
    figure.savefig(path, dpi=DPI)


def plot_similarities(matched: np.ndarray, unmatched: np.ndarray, path: Path) -> None:
    """Distributions of the cosine similarity of matched (P,) and of unmatched (Q,) image-text pairs."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    values = {f"unmatched ({len(unmatched):,} pairs)": unmatched, f"matched ({len(matched):,} pairs)": matched}
    _histograms(axes, values, (WRONG, RIGHT))
    axes.set_xlabel("cosine similarity of image and text (dashed: mean)")
    axes.set_ylabel("share of pairs")
    axes.set_title("Similarity of matched and of unmatched pairs")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=DPI)


def plot_margins(margins: dict[str, np.ndarray], path: Path) -> None:
    """Distributions of the right answer's similarity less the best wrong one's, a chart for each direction."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, (direction, values) in zip(figure.subplots(1, 2, sharey=True), margins.items(), strict=True):
        name = direction.replace("_", " ")
        _histograms(axes, {name: values}, (RIGHT,))
        axes.axvline(0, color="black", linewidth=1)
        above = f"{np.mean(values > 0):.1%} above 0" if len(values) else "nothing is wrong here"
        axes.set_title(f"{name}: {above} ({len(values):,} queries)", fontsize=11)
        axes.set_xlabel("best right less best wrong similarity (dashed: mean)")
    figure.axes[0].set_ylabel("share of queries")
    figure.suptitle("Margin between the right answer and the best wrong one", fontsize=12)
    figure.savefig(path, dpi=DPI)


def _histograms(axes: Axes, values: dict[str, np.ndarray], colours: Sequence[str]) -> None:
    """Shares of each kind of values over common bins, and their means."""
    together = np.concatenate(list(values.values()))
    if not len(together):
        return
    # Some width even where all values are equal.
    edges = np.linspace(together.min(), max(together.max(), together.min() + 0.02), BINS + 1)
    for (name, numbers), colour in zip(values.items(), colours, strict=True):
        if len(numbers):
            share = np.full(len(numbers), 1 / len(numbers))
            axes.hist(numbers, edges.tolist(), weights=share, color=colour, alpha=0.6, label=name)
            axes.axvline(numbers.mean(), color=colour, linestyle="--", linewidth=1.2)


def plot_candidates(image: Image.Image, name: str, answers: Sequence[Answer[str]], path: Path) -> None:
    """Bars of one image's similarity to candidate captions, the most similar first, its own ones marked."""
    labels = [wrapped(shorten(answer.content, 180), 62) for answer in answers]
    heights = [LINE * max(1.6, 1 + label.count("\n")) for label in labels]
    figure = Figure(figsize=(12, max(3.4, sum(heights) * 1.15 + 1.3)), layout="constrained")
    picture, axes = figure.subplots(1, 2, width_ratios=[1, 3])
    show_image(picture, image)
    picture.set_title(wrapped(name, 28), fontsize=8)
    middles = np.cumsum(heights) - np.array(heights) / 2
    colours = [RIGHT if answer.right else WRONG for answer in answers]
    scores = [answer.score for answer in answers]
    bars = axes.barh(middles, scores, np.array(heights) * 0.7, color=colours)
    axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=9)
    axes.set_yticks(middles, labels, fontsize=9)
    for label, colour in zip(axes.get_yticklabels(), colours, strict=True):
        label.set_color(RIGHT if colour == RIGHT else "black")
    axes.set_ylim(sum(heights), 0)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("cosine similarity")
    figure.suptitle("One image against candidate captions (blue: its own; red: others)", fontsize=12)
    figure.savefig(path, dpi=DPI)
