"""How the compared models were trained: loss and time from the metrics.jsonl of their runs."""

import re
from dataclasses import dataclass
from pathlib import Path

from lib.evaluation.origin import run_of
from lib.runs.reporter import read_metrics


@dataclass(frozen=True)
class Training:
    """The steps of a run."""

    epochs: list[float]
    """where each step ended; the step's number where the size of the data was not known"""
    losses: list[float]
    seconds: float
    """of all steps together: without evaluations and checkpoints"""
    in_epochs: bool
    """false where `epochs` counts steps"""
    remembered_from: float | None
    """where remembered pairs entered the loss after a while without; None where they never or always were in it"""

    @property
    def seconds_per_epoch(self) -> float | None:
        """Mean time of an epoch, None where epochs are not known."""
        return self.seconds / self.epochs[-1] if self.in_epochs else None

    def metrics(self) -> dict:
        """As metrics.json has it."""
        span = {"epochs": self.epochs[-1]} if self.in_epochs else {"steps": len(self.epochs)}
        return span | {"seconds_per_epoch": self.seconds_per_epoch, "final_loss": self.losses[-1]}


def training_of(model: str) -> Training | None:
    """The training of a run, or of the run that a checkpoint or export lies in; None of what we did not train."""
    run = run_of(model)
    # A step whose loss was not finite has null for it.
    steps = [line for line in read_metrics(run) if line.get("loss") is not None] if run else []
    of_checkpoint = re.fullmatch(r"step_(\d+)", Path(model).resolve().name)
    if of_checkpoint:
        steps = [line for line in steps if line["step"] <= int(of_checkpoint[1])]
    if not steps:
        return None
    in_epochs = all(line.get("epoch") is not None for line in steps)
    key = "epoch" if in_epochs else "step"
    remembered = next((line[key] for line in steps if line.get("xbm_used")), None)
    return Training(
        epochs=[line[key] for line in steps],
        losses=[line["loss"] for line in steps],
        seconds=sum(line["step_seconds"] for line in steps),
        in_epochs=in_epochs,
        remembered_from=None if remembered == steps[0][key] else remembered,
    )
