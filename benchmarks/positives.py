"""What groups and the memory are worth with class prompts: both losses, groups or the diagonal, memory on or off.

    python benchmarks/positives.py --data har --image-tower TOWER --text-tower TOWER

trains configs/har_small.yaml in each of the eight ways, three seeds each, and prints the final accuracy and macro F1
on the held-out images: mean and standard deviation over the seeds. Raw figures go to a JSON file.
"""

import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train_clip  # noqa: E402
import train_siglip  # noqa: E402

SCRIPTS = {"clip": train_clip.main, "siglip": train_siglip.main}


@dataclass(frozen=True)
class Settings:
    """Where data and towers are."""

    data: str
    """Class folders, as --data of the training scripts."""
    image_tower: str
    """As --image-tower of the training scripts."""
    text_tower: str
    """As --text-tower of the training scripts."""
    cache_dir: Path | None = None
    """Folder for the trunks' stored outputs; default: that of the training scripts."""
    config: Path = ROOT / "configs" / "har_small.yaml"
    """The recipe."""
    seeds: int = 3
    """Runs of each kind."""
    steps: int | None = None
    """Optimizer steps, where not those of the recipe."""
    output: Path = ROOT / "benchmarks" / "results" / "positives.json"
    """File for the raw figures."""


def main() -> None:
    """Run the grid and print its table."""
    settings = tyro.cli(Settings, description=__doc__)
    rows = []
    for loss, positives, memory in product(SCRIPTS, ("pair", "group"), (False, True)):
        runs = [run(settings, loss, positives, memory, seed) for seed in range(settings.seeds)]
        rows.append({"loss": loss, "positives": positives, "memory": memory, "runs": runs})
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    settings.output.write_text(json.dumps(rows, indent=1) + "\n")
    print("\n" + "\n".join(table(rows)))


def run(settings: Settings, loss: str, positives: str, memory: bool, seed: int) -> dict[str, float]:
    """The last evaluation of one run, in a folder that goes away."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--data={settings.data}", f"--seed={seed}", f"--positives={positives}", f"--output-dir={folder}/run"]
        flags += [f"--image-tower={settings.image_tower}", f"--text-tower={settings.text_tower}"]
        flags += [] if memory else ["--xbm-size=0"]
        flags += [f"--cache-dir={settings.cache_dir}"] if settings.cache_dir else []
        flags += [f"--steps={settings.steps}", f"--eval-every={settings.steps}"] if settings.steps else []
        SCRIPTS[loss]([f"--config={settings.config}", *flags])
        evaluation = json.loads(Path(folder, "run", "summary.json").read_text())["eval"]
    return {name: evaluation[name] for name in ("accuracy", "macro_f1")}


def table(rows: list[dict]) -> list[str]:
    """The rows as Markdown."""
    lines = ["| loss | positives | memory | accuracy | macro F1 |", "|---|---|---|---|---|"]
    for row in rows:
        figures = [spread([one[name] for one in row["runs"]]) for name in ("accuracy", "macro_f1")]
        memory = "on" if row["memory"] else "off"
        lines.append(f"| {row['loss']} | {row['positives']} | {memory} | {' | '.join(figures)} |")
    return lines


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


if __name__ == "__main__":
    main()
