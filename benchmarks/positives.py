"""Effect of groups and of a memory bank with class prompts: both losses, groups or diagonal, memory on or off.

    python benchmarks/positives.py --data har --image-tower TOWER --text-tower TOWER

trains configs/har_small.yaml in the eight combinations, with three seeds each, and prints mean and standard deviation
of the final accuracy and macro F1 on the held-out images. Raw results go to a JSON file.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import tyro
from training_runs import ROOT, SCRIPTS, Recipe, spread

FIGURES = ("accuracy", "macro_f1")


@dataclass(frozen=True)
class Settings(Recipe):
    """Data and towers."""

    config: Path = ROOT / "configs" / "har_small.yaml"
    """The recipe."""
    output: Path = ROOT / "benchmarks" / "results" / "positives.json"
    """JSON file of the raw results."""


def main(settings: Settings) -> None:
    """Train all combinations and print their table."""
    rows = []
    for loss, positives, memory in product(SCRIPTS, ("pair", "group"), (False, True)):
        summaries = settings.runs(loss, f"--positives={positives}", *([] if memory else ["--xbm-size=0"]))
        runs = [{name: summary["eval"][name] for name in FIGURES} for summary in summaries]
        rows.append({"loss": loss, "positives": positives, "memory": memory, "runs": runs})
    settings.write(rows)
    print("\n" + "\n".join(table(rows)))


def table(rows: list[dict]) -> list[str]:
    """Markdown table of the rows."""
    lines = ["| loss | positives | memory | accuracy | macro F1 |", "|---|---|---|---|---|"]
    for row in rows:
        figures = [spread(row["runs"], name) for name in FIGURES]
        memory = "on" if row["memory"] else "off"
        lines.append(f"| {row['loss']} | {row['positives']} | {memory} | {' | '.join(figures)} |")
    return lines


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
