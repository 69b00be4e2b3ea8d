"""Complete training runs in temporary folders, and means of their last evaluations over seeds."""

import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_clip  # noqa: E402
import train_siglip  # noqa: E402
from lib.runs.reporter import SUMMARY  # noqa: E402

SCRIPTS = {"clip": train_clip.main, "siglip": train_siglip.main}


@dataclass(frozen=True)
class Recipe:
    """Common settings of all runs."""

    data: str
    """--data of the training scripts."""
    image_tower: str
    """--image-tower of the training scripts."""
    text_tower: str
    """--text-tower of the training scripts."""
    output: Path
    """JSON file of the raw results."""
    config: Path | None = None
    """The recipe; default: none."""
    cache_dir: Path | None = None
    """Folder for stored outputs of the trunks; default: that of the training scripts."""
    seeds: int = 3
    """Runs of each combination."""
    steps: int | None = None
    """Optimizer steps; default: those of the recipe."""

    def runs(self, loss: str, *flags: str) -> list[dict]:
        """summary.json of one run per seed."""
        return [self._run(loss, [*flags, f"--seed={seed}"]) for seed in range(self.seeds)]

    def _run(self, loss: str, flags: Sequence[str]) -> dict:
        own = [f"--config={self.config}"] if self.config else []
        own += [f"--data={self.data}", f"--image-tower={self.image_tower}", f"--text-tower={self.text_tower}"]
        own += [f"--cache-dir={self.cache_dir}"] if self.cache_dir else []
        own += [f"--steps={self.steps}", f"--eval-every={self.steps}"] if self.steps else []
        with tempfile.TemporaryDirectory() as folder:
            SCRIPTS[loss]([*own, *flags, f"--output-dir={folder}/run"])
            return json.loads(Path(folder, "run", SUMMARY).read_text())

    def write(self, rows: list[dict]) -> None:
        """Write the raw results."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text(json.dumps(rows, indent=1) + "\n")


def spread(runs: Sequence[Mapping[str, float]], name: str) -> str:
    """Mean and sample standard deviation of one metric over the runs."""
    values = [run[name] for run in runs]
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"
