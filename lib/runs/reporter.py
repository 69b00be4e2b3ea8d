"""Output of a run: printed lines, a progress bar, metrics.jsonl, trackers, summary.json and the loss curve."""

import json
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median

from accelerate import Accelerator
from tqdm import tqdm

from lib.files import append_text, write_text
from lib.runs.curve import CHANCE, PER_CANDIDATE, draw_curve, flatten, loss_words

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
SKIPPED, CURVE = "skipped.jsonl", "loss_curve.png"
CURVE_SECONDS = 10.0  # between two drawings, because one takes most of a second and small models evaluate often
STEPS_TIMED = 3  # before the remaining time is printed


class Reporter:
    """Writes and prints everything that a person or a script reads about a run, on rank 0 alone."""

    def __init__(self, folder: Path, accelerator: Accelerator, steps: int, first_step: int) -> None:
        self.folder, self.accelerator = folder, accelerator
        self.last_evaluation: dict = {}
        self.drawn = -math.inf
        self.active = accelerator.is_main_process
        if self.active:
            for name in (METRICS, SKIPPED):
                _drop_lines_after(folder / name, first_step)
            evaluations = [line["eval"] for line in read_metrics(folder) if "eval" in line]
            self.last_evaluation = evaluations[-1] if evaluations else {}
        self.steps, self.first_step = steps, first_step
        self.bar: tqdm | None = None  # created at the first step, below the plan
        self.seconds: list[float] = []

    def say(self, *lines: str) -> None:
        """Print lines on rank 0, above the progress bar."""
        if self.active:
            for line in lines:
                tqdm.write(line)

    def step(self, metrics: dict) -> None:
        """Record one optimizer step; `metrics` is a line of metrics.jsonl."""
        self._append(METRICS, metrics)
        self._advance(metrics)
        self.seconds.append(metrics["step_seconds"])
        left = self.steps - metrics["step"]
        if len(self.seconds) == STEPS_TIMED and left:
            a_step = median(self.seconds)
            self.say(f"about {_duration(left * a_step)} remaining: {left:,} steps of {a_step:.2g} s, and evaluations")
        self._track(metrics, metrics["step"])

    def evaluation(self, step: int, metrics: dict) -> None:
        """Record an evaluation on validation data, and draw the curve anew, if it was not just drawn."""
        self.last_evaluation = metrics
        self._append(METRICS, {"step": step, "eval": metrics})
        flat = flatten(metrics)
        others = {name: value for name, value in flat.items() if name not in ("loss", PER_CANDIDATE, CHANCE)}
        self.say(
            f"step {step}: {''.join(f'{name} {value:.4f}, ' for name, value in others.items())}{loss_words(metrics)}"
        )
        self._track({f"eval/{name}": value for name, value in flat.items()}, step)
        if time.monotonic() - self.drawn >= CURVE_SECONDS:
            self.curve()

    def skipped(self, step: int, skips: Sequence[tuple[str, str, str]]) -> None:
        """Name samples that could not be used: (shard or source, key, reason), encountered by any rank at this step."""
        for where, key, reason in skips:
            self._append(SKIPPED, {"step": step, "shard": where, "key": key, "reason": reason})

    def summary(self, values: dict) -> None:
        """Write summary.json, whole or not at all."""
        if self.active:
            write_text(self.folder / SUMMARY, json.dumps(_finite(values), indent=2) + "\n")

    def curve(self) -> None:
        """Draw training and validation loss, and the other validation figures, against the step."""
        if self.active:
            lines = read_lines(self.folder / METRICS)
            if lines:
                draw_curve(lines, self.folder / CURVE)
        self.drawn = time.monotonic()

    def close(self) -> None:
        """End the progress bar."""
        if self.bar is not None:
            self.bar.close()

    def _advance(self, metrics: dict) -> None:
        if self.bar is None:
            self.bar = tqdm(
                total=self.steps,
                initial=self.first_step,
                desc="steps",
                disable=not self.active,
                dynamic_ncols=True,
            )
        self.bar.set_postfix_str(f"{loss_words(metrics)}, {metrics['pairs_per_second']:.0f} pairs/s", refresh=False)
        self.bar.update()

    def _append(self, name: str, values: dict) -> None:
        if self.active:
            append_text(self.folder / name, json.dumps(_finite(values)) + "\n")

    def _track(self, values: dict, step: int) -> None:
        if self.accelerator.trackers:
            numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
            self.accelerator.log(numbers, step=step)


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return read_lines(folder / METRICS)


def read_lines(file: Path) -> list[dict]:
    """The lines of a JSONL file, none if there is no such file; lines that are damaged, as by a kill, are left out."""
    lines = []
    for line in file.read_text(errors="replace").splitlines() if file.exists() else []:
        with suppress(ValueError, RecursionError):
            values = json.loads(line)
            if isinstance(values, dict) and isinstance(values.get("step", 0), int):
                lines.append(values)
    return lines


def read_summary(folder: Path) -> dict:
    """The run's summary.json; nothing where there is none, or a damaged one."""
    with suppress(OSError, ValueError, RecursionError):
        values = json.loads((folder / SUMMARY).read_bytes())
        return values if isinstance(values, dict) else {}
    return {}


def _duration(seconds: float) -> str:
    """`40 s`, `12 min` or `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _finite(value: object) -> object:
    """JSON has no nan: it becomes null."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _drop_lines_after(file: Path, step: int) -> None:
    """A resumed run writes the steps after its checkpoint again: drop those of the killed run."""
    if not file.exists():
        return
    kept = [json.dumps(line) + "\n" for line in read_lines(file) if line.get("step", 0) <= step]
    write_text(file, "".join(kept))
