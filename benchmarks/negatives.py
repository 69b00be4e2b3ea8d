"""Effect of a larger batch and of a memory bank: every batch with and without remembered pairs.

    python benchmarks/negatives.py --data captions.csv --image-tower TOWER --text-tower TOWER

trains configs/flickr8k.yaml with stored outputs of its frozen trunks (--config: another recipe), for each loss, batch
and memory size, with the same number of epochs. It prints mean and standard deviation of the validation figures (R@5 of
both directions, or accuracy where the texts are class prompts) and of the seconds. Raw results go to a JSON file.
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
    seeds: int = 5
    """Runs of each combination."""
    batches: tuple[int, ...] = (128, 1024)
    """Effective batches."""
    memories: tuple[int, ...] = (0, 1, 8, 32)
    """Sizes of the memory bank, in batches."""
    losses: tuple[Literal["clip", "siglip"], ...] = ("clip", "siglip")
    """InfoNCE and the sigmoid loss."""


def main(settings: Settings) -> None:
    """Train all combinations and print their table."""
    rows = []
    for loss, batch, memory in product(settings.losses, settings.batches, settings.memories):
        flags = [f"--effective-batch={batch}", f"--xbm-size={memory * batch}", "--eval-every=1000000", "--save-every=0"]
        kind = {"loss": loss, "batch": batch, "memory": memory * batch}
        rows.append(kind | {"runs": list(map(figures, settings.runs(loss, *flags)))})
    settings.write(rows)
    print("\n" + "\n".join(table(rows)))


def figures(summary: dict) -> dict[str, float]:
    """The validation figures, steps and seconds of a run."""
    found = summary["eval"]
    if "accuracy" in found:
        measured = {"accuracy": found["accuracy"]}
    else:
        measured = {direction: found[direction]["R@5"] for direction in ("image_to_text", "text_to_image")}
    return measured | {"steps": summary["steps"], "seconds": summary["wall_seconds"]}


def table(rows: list[dict]) -> list[str]:
    """Markdown table of the rows."""
    names = [name for name in rows[0]["runs"][0] if name not in ("steps", "seconds")]
    shown = [name if name == "accuracy" else f"{name.replace('_', ' ')} R@5" for name in names]
    lines = [f"| {' | '.join(['loss', 'batch', 'remembered', 'steps', *shown, 'seconds'])} |"]
    lines.append("|---" * (5 + len(names)) + "|")
    for row in rows:
        runs = row["runs"]
        cells = [row["loss"], f"{row['batch']:,}", f"{row['memory']:,}", runs[0]["steps"]]
        cells += [*(spread(runs, name) for name in names), spread(runs, "seconds").split(".")[0]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
