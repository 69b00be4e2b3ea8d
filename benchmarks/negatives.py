"""Effect of a larger batch and of a memory bank on captions: every batch with and without remembered pairs.

    python benchmarks/negatives.py --data captions.csv --image-tower TOWER --text-tower TOWER

trains configs/flickr8k.yaml with stored outputs of its frozen trunks, for each loss, batch and memory size, with three
seeds each and the same number of epochs. It prints mean and standard deviation of R@5 on the validation images and of
the seconds of training. InfoNCE with a memory bank is trained with both values of --xbm-gradients. Raw results go to a
JSON file.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import tyro
from training_runs import ROOT, Recipe, spread


@dataclass(frozen=True)
class Settings(Recipe):
    """Data, towers, and the settings to compare."""

    config: Path = ROOT / "configs" / "flickr8k.yaml"
    """The recipe."""
    output: Path = ROOT / "benchmarks" / "results" / "negatives.json"
    """JSON file of the raw results."""
    batches: tuple[int, ...] = (64, 256, 1024)
    """Effective batches."""
    memories: tuple[int, ...] = (0, 4096)
    """Sizes of the memory bank."""
    losses: tuple[Literal["clip", "siglip"], ...] = ("clip", "siglip")
    """InfoNCE and the sigmoid loss."""
    gradients: tuple[Literal["both", "anchors"], ...] = ("both", "anchors")
    """Values of --xbm-gradients of train_clip.py."""


def main(settings: Settings) -> None:
    """Train all combinations and print their table."""
    rows = []
    for loss, batch, memory in product(settings.losses, settings.batches, settings.memories):
        for gradients in settings.gradients if loss == "clip" and memory else ("both",):
            flags = [f"--effective-batch={batch}", f"--xbm-size={memory}", f"--xbm-gradients={gradients}"]
            flags += ["--eval-every=1000000", "--save-every=0"]
            kind = {"loss": loss, "batch": batch, "memory": memory, "gradients": gradients}
            rows.append(kind | {"runs": list(map(figures, settings.runs(loss, *flags)))})
    settings.write(rows)
    print("\n" + "\n".join(table(rows)))


def figures(summary: dict) -> dict[str, float]:
    """R@5 both ways on the validation images, steps and seconds of a run."""
    directions = {direction: summary["eval"][direction]["R@5"] for direction in ("image_to_text", "text_to_image")}
    return directions | {"steps": summary["steps"], "seconds": summary["wall_seconds"]}


def table(rows: list[dict]) -> list[str]:
    """Markdown table of the rows."""
    lines = ["| loss | batch | remembered | gradients | steps | image to text R@5 | text to image R@5 | seconds |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        runs = row["runs"]
        cells = [row["loss"], f"{row['batch']:,}", f"{row['memory']:,}", row["gradients"], runs[0]["steps"]]
        cells += [spread(runs, "image_to_text"), spread(runs, "text_to_image"), spread(runs, "seconds").split(".")[0]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
