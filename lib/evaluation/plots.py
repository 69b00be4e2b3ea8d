"""The charts of an evaluation, each drawn to one PNG file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

# Blue and orange stay apart for colour-blind eyes and in grey.
RIGHT, WRONG = "#2166ac", "#d6604d"
DPI = 110
ANNOTATED_CLASSES = 20  # up to here a confusion cell has room for its number
LABELLED_CLASSES = 150  # up to here every class has room for its name
BARS_PER_COLUMN, MOST_BARS = 40, 120


def plot_recall(metrics: dict[str, dict[str, float]], path: Path) -> None:
    """Bars of Recall@1/5/10 for both directions; metrics as `retrieval_metrics` returns them."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for offset, colour, (direction, numbers) in zip((-0.2, 0.2), (RIGHT, WRONG), metrics.items(), strict=True):
        recalls = {key: value for key, value in numbers.items() if key.startswith("R@")}
        summary = f"MRR {numbers['MRR']:.3f}, median rank {numbers['median_rank']:g}"
        label = f"{direction.replace('_', ' ')} ({summary})"
        bars = axes.bar(np.arange(len(recalls)) + offset, recalls.values(), 0.38, color=colour, label=label)
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
    together = np.concatenate([matched, unmatched])
    # Some width even where all similarities are equal.
    edges = np.linspace(together.min(), max(together.max(), together.min() + 0.02), 61)
    for values, colour, name in ((unmatched, WRONG, "unmatched"), (matched, RIGHT, "matched")):
        if len(values):
            share, label = np.full(len(values), 1 / len(values)), f"{name} ({len(values)} pairs)"
            axes.hist(values, edges, weights=share, color=colour, alpha=0.6, label=label)
            axes.axvline(values.mean(), color=colour, linestyle="--", linewidth=1.2)
    axes.set_xlabel("cosine similarity of image and text (dashed: mean)")
    axes.set_ylabel("share of pairs")
    axes.set_title("Similarity of matched and of unmatched pairs")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=DPI)


def plot_confusion(confusion: Sequence[Sequence[int]], classes: Sequence[str], path: Path) -> None:
    """Confusion matrix (K, K) as shares of each true class; every cell with its number up to 20 classes."""
    counts = np.asarray(confusion, dtype=float)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    count = len(classes)
    inches = (0.5 if count <= ANNOTATED_CLASSES else 0.165) * min(count, LABELLED_CLASSES)
    figure = Figure(figsize=(max(inches, 3) + 2.9, max(inches, 3) + 2.2), layout="constrained")
    axes = figure.add_subplot()
    # The square root lifts the small shares, which are the ones to look for.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    figure.colorbar(image, ax=axes, shrink=0.7, label="share of the true class")
    if count <= ANNOTATED_CLASSES:
        for row, column in zip(*np.nonzero(shares), strict=True):
            share = shares[row, column]
            colour = "white" if share > 0.35 else "black"
            axes.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=8, color=colour)
    step = -(-count // LABELLED_CLASSES)
    names = [shorten_name(name) for name in classes[::step]]
    size = 9 if count <= ANNOTATED_CLASSES else 7
    axes.set_xticks(range(0, count, step), names, rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(range(0, count, step), names, fontsize=size, parse_math=False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    accuracy = np.trace(counts) / max(counts.sum(), 1)
    axes.set_title(f"Confusion of {count} classes, accuracy {accuracy:.3f}")
    figure.savefig(path, dpi=DPI)


def plot_class_f1(per_class: dict[str, dict], path: Path) -> None:
    """F1 of each class as bars, best first, with the number of its images; of many classes the 120 lowest."""
    ranked = sorted(per_class.items(), key=lambda entry: (-entry[1]["f1"], entry[0]))
    shown = ranked[-MOST_BARS:]
    columns = -(-len(shown) // BARS_PER_COLUMN)
    per_column = -(-len(shown) // columns)
    width = 6.4 if columns == 1 else 4.4 * columns
    figure = Figure(figsize=(width, 1.2 + 0.22 * per_column), layout="constrained")
    for column in range(columns):
        axes = figure.add_subplot(1, columns, column + 1)
        part = shown[column * per_column : (column + 1) * per_column]
        bars = axes.barh(range(len(part)), [numbers["f1"] for _, numbers in part], 0.75, color=RIGHT)
        axes.bar_label(bars, [f"{numbers['f1']:.2f}" for _, numbers in part], padding=2, fontsize=8)
        names = [f"{shorten_name(name)} ({numbers['support']})" for name, numbers in part]
        axes.set_yticks(range(len(part)), names, fontsize=8, parse_math=False)
        axes.set_ylim(per_column - 0.5, -0.5)
        axes.set_xlim(0, 1.14)
        axes.set_xticks([0, 0.5, 1])
        axes.spines[["top", "right"]].set_visible(False)
    which = "each class" if len(shown) == len(ranked) else f"the {len(shown)} lowest of {len(ranked)} classes"
    figure.suptitle(f"F1 of {which} (number of images)", fontsize=12)
    figure.savefig(path, dpi=DPI)


def shorten(text: str, length: int, tail: int = 0) -> str:
    """The text on one line in at most `length` characters; an ellipsis stands before its last `tail` ones."""
    text = " ".join(text.split())
    if len(text) <= length:
        return text
    return text[: length - 1 - tail].rstrip() + "…" + text[len(text) - tail :].lstrip()


def shorten_name(name: str) -> str:
    """A class name for an axis; kept at both ends, since long names often begin alike."""
    return shorten(name, 26, tail=9)
