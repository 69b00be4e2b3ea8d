"""The training run that a model comes from: its losses and times, and whether it saw the evaluated images."""

import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lib.config.safe_yaml import read_yaml
from lib.data.sources import TO_VALIDATE, split_weight
from lib.errors import InputError
from lib.evaluation.tasks import DataFlags
from lib.runs.curve import PER_CANDIDATE, readable
from lib.runs.reporter import CONFIG, METRICS, read_metrics


def run_of(model: str) -> Path | None:
    """Folder of the run that a model, checkpoint or export is or lies in; None for a model trained elsewhere."""
    path = Path(model).resolve()
    return next((folder for folder in (path, *list(path.parents)[:2]) if (folder / METRICS).is_file()), None)


def seen_before(model: str, evaluated: DataFlags, split: str, splits: Collection[str]) -> str | None:
    """A warning if the model's run trained on the images of `split` or chose its checkpoint by them, else None.

    split: "train", "val", "test", or "all" for data without splits; None for "train", whose name says it. splits: all
    that the data has.
    """
    run = run_of(model)
    if run is None or not (run / CONFIG).is_file():
        return None
    config = _config(run)
    if config is None:
        return f"{run / CONFIG} is damaged: it is unknown whether {run} was trained on these images"
    kept, val_data = config.get("hold_out") or 0, config.get("val_data")
    same = _where(evaluated.data) in _trained_on(config)
    # A larger --hold-out holds out the images of a smaller one and more, so only an equal or smaller one is unseen.
    if same and (split == "all" or (evaluated.hold_out or 0) > kept):
        warning = f"{run} has seen these images, or some of them, in training: figures are too good"
        if kept:
            return f"{warning}; use --hold-out {kept:g} to evaluate on the images that its training held out"
        return f"{warning}; train and evaluate with --hold-out 0.1 for figures of unseen images"
    if val_data:
        validated = _where(val_data) == _where(evaluated.data)
        chose = validated and (evaluated.hold_out or split == next(name for name in TO_VALIDATE if name in splits))
    else:
        chose = same and split == "val"
    if not chose or not config.get("eval_every"):
        return None
    return f"{run} chose its checkpoint by these images, or some of them: figures are too good; use a test split"


def has_trained_on(model: str, evaluated: DataFlags) -> bool:
    """True if the model's run trained on images of this data or of a folder in it, or if its config is damaged."""
    run = run_of(model)
    config = _config(run) if run and (run / CONFIG).is_file() else {}
    return config is None or any(Path(each).is_relative_to(_where(evaluated.data)) for each in _trained_on(config))


def _config(run: Path) -> dict | None:
    """The settings of a run; None if their file is damaged."""
    with suppress(InputError):
        config = read_yaml(run / CONFIG, str(run / CONFIG))
        return config if isinstance(config, dict) else None
    return None


def _trained_on(config: dict) -> list[str]:
    """The sources of a run's training pairs."""
    data = config.get("data") or ()
    return [_where(each) for each in ([data] if isinstance(data, str) else data)]


def _where(data: str) -> str:
    """A source without its weight in a mixture; a path in full."""
    name, _ = split_weight(data)
    return str(Path(name).resolve()) if Path(name).exists() else name


@dataclass(frozen=True)
class Training:
    """Losses and times of a run's steps."""

    epochs: list[float]
    """at the end of each step; the step's number if the size of the data was not known"""
    losses: list[float]
    """as they are shown: per candidate for the sigmoid loss"""
    kind: str
    """of the losses: those of one kind compare"""
    seconds: float
    """of all steps together, without evaluations and checkpoints"""
    in_epochs: bool
    """false if `epochs` counts steps"""
    memory_from: float | None
    """epoch in which the memory bank entered the loss; None if it never did, or from the first step on"""

    @property
    def seconds_per_epoch(self) -> float | None:
        """Mean time of an epoch; None if epochs are not known."""
        return self.seconds / self.epochs[-1] if self.in_epochs else None

    def metrics(self) -> dict:
        """Its entry in metrics.json."""
        span = {"epochs": self.epochs[-1]} if self.in_epochs else {"steps": len(self.epochs)}
        return span | {
            "seconds_per_epoch": self.seconds_per_epoch,
            "final_loss": self.losses[-1],
            "kind_of_loss": self.kind,
        }


def training_of(model: str) -> Training | None:
    """Training of the run that a model comes from, up to the step of a checkpoint; None without a run."""
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
    memory_from = next((line[key] for line in steps if line.get("xbm_used")), None)
    return Training(
        epochs=[line[key] for line in steps],
        losses=[readable(line) for line in steps],
        kind="loss per candidate" if PER_CANDIDATE in steps[-1] else "loss",
        seconds=sum(line["step_seconds"] for line in steps),
        in_epochs=in_epochs,
        memory_from=None if memory_from == steps[0][key] else memory_from,
    )
