"""What encoding each distinct text of a step once is worth: the time of a step with --shared-texts auto and off.

    python benchmarks/shared_texts.py --config configs/har.yaml --data har --image-tower TOWER --text-tower TOWER

trains a few steps with each in turns, in one process, and prints the median time of a step of both and their ratio.
"""

import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train_siglip  # noqa: E402


@dataclass(frozen=True)
class Settings:
    """What to train, and how often."""

    data: str = "digits"
    """As --data of the training scripts."""
    config: Path | None = None
    """A recipe of the training scripts."""
    image_tower: str | None = None
    """As --image-tower of the training scripts."""
    text_tower: str | None = None
    """As --text-tower of the training scripts."""
    freeze: tuple[str, ...] = ()
    """As --freeze of the training scripts: a text tower with dropout has to be frozen, or its texts are not shared."""
    effective_batch: int | None = None
    """As --effective-batch of the training scripts, where not that of the recipe."""
    steps: int = 6
    """Steps of a run; the first is left out."""
    rounds: int = 2
    """Runs of each kind."""
    output: Path = ROOT / "benchmarks" / "results" / "shared_texts.json"
    """File for the raw figures."""


def main() -> None:
    """Run both in turns and print the ratio."""
    settings = tyro.cli(Settings, description=__doc__)
    seconds: dict[str, list[float]] = {"auto": [], "off": []}
    for _ in range(settings.rounds):
        for choice, of_steps in seconds.items():
            of_steps += run(settings, choice)
    medians = {choice: statistics.median(of_steps) for choice, of_steps in seconds.items()}
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    settings.output.write_text(json.dumps({"step_seconds": seconds}) + "\n")
    each, once = medians["off"], medians["auto"]
    print(f"\nratio {each / once:.2f}: {each:.2f} s a step where every pair's text is encoded, {once:.2f} s where each")
    print(f"distinct text is, once (medians of {len(seconds['auto'])} steps)")


def run(settings: Settings, choice: str) -> list[float]:
    """The seconds of each step of one run but the first, without the wait for data, in a folder that goes away."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--data={settings.data}", f"--shared-texts={choice}", f"--output-dir={folder}/run"]
        flags += [f"--steps={settings.steps}", "--eval-every=0", "--save-every=0", "--augment=none"]
        flags += [f"--config={settings.config}"] if settings.config else []
        if settings.image_tower:
            flags += [f"--image-tower={settings.image_tower}", f"--text-tower={settings.text_tower}"]
        flags += ["--freeze", *settings.freeze] if settings.freeze else []
        flags += [f"--effective-batch={settings.effective_batch}"] if settings.effective_batch else []
        train_siglip.main(flags)
        lines = map(json.loads, Path(folder, "run", "metrics.jsonl").read_text().splitlines())
        return [line["step_seconds"] - line["data_seconds"] for line in lines][1:]


if __name__ == "__main__":
    main()
