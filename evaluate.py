"""Measure a model: `python evaluate.py retrieval|zeroshot --model RUN --data DATA --output-dir OUT`.

Runs as it is on one process, and under `accelerate launch` or `torchrun` on several.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from accelerate import PartialState

from lib.data.remote.fetch import default_fetcher
from lib.data.sources import open_evaluation
from lib.errors import InputError
from lib.evaluation.html import aligned, write_report
from lib.evaluation.subset import limited
from lib.evaluation.tasks import Outcome, Subject, classify, retrieve
from lib.processing import Processing
from lib.towers import TwoTowers


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every task takes."""

    model: str
    """Run, checkpoint or export folder, or the hub id or folder of a CLIP or SigLIP model."""
    data: str = "digits"
    """As in training: digits, class folders, a table of captions, COCO, Flickr or Karpathy files, or tar shards."""
    image_root: str | None = None
    """Folder of the images that a table or annotation file names, where they do not lie beside it."""
    cache_dir: Path | None = None
    """Folder for remote shards; default: contrastive-training in ~/.cache."""
    allow_pipe: bool = False
    """Run what follows `pipe:` in --data as a command that writes a tar."""
    output_dir: Path
    """Folder for metrics.json, the pictures and report.html."""
    split: Literal["auto", "train", "val", "test"] = "auto"
    """Part of the data; auto: test where there is one, else val, else everything."""
    batch_size: int = 256
    """Images or texts in one forward of one rank."""
    workers: int = 2
    """Processes of each rank that decode images; 0: the rank does it itself."""
    limit: int | None = None
    """Take only this many images, evenly spaced."""

    def check(self) -> None:
        """Raise InputError naming every flag whose value cannot work."""
        least = {
            "--batch-size": (self.batch_size, 1),
            "--workers": (self.workers, 0),
            "--limit": (self.limit, 1),
        }
        faults = [
            f"{flag} {value} must be at least {bound}"
            for flag, (value, bound) in least.items()
            if value is not None and value < bound
        ]
        if faults:
            raise InputError("; ".join(faults))


@dataclass(frozen=True, kw_only=True)
class Retrieval(Common):
    """Recall@1/5/10, MRR and median rank, image to text and text to image; the data needs captions."""


@dataclass(frozen=True, kw_only=True)
class Zeroshot(Common):
    """Accuracy, top-5, precision, recall, F1 and confusion by class prompts; the data needs classes."""

    prompts: str | None = None
    """Prompt bank (digits, activities, objects, simple) or a YAML file with a list of templates."""


Task = Annotated[Retrieval, tyro.conf.subcommand("retrieval")] | Annotated[Zeroshot, tyro.conf.subcommand("zeroshot")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 after a fault of the user's."""
    on_rank_0 = os.environ.get("RANK", "0") == "0"
    config = tyro.cli(Task, args=arguments, description=__doc__, console_outputs=on_rank_0)
    cpu_wanted = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in (
        "1",
        "true",
    )  # accelerate launch --cpu
    state = PartialState(cpu=cpu_wanted or not torch.accelerator.is_available())
    try:
        evaluate(config, state)
    except InputError as fault:
        if state.is_main_process:
            print(f"error: {fault}", file=sys.stderr)
        return 2
    finally:
        state.destroy_process_group()
    return 0


def evaluate(config: Retrieval | Zeroshot, state: PartialState) -> None:
    """Measure on all ranks; rank 0 writes the files and prints the table."""
    started = time.perf_counter()
    config.check()
    make_folder(config.output_dir)
    zeroshot = isinstance(config, Zeroshot)
    prompts = config.prompts if zeroshot else None
    fetcher = default_fetcher()
    fetcher = replace(fetcher, cache=config.cache_dir or fetcher.cache, allow_pipe=config.allow_pipe)
    data = open_evaluation(config.data, config.split, prompts, image_root=config.image_root, fetcher=fetcher)
    if zeroshot and data.classes is None:
        raise InputError(f"{data.name} has captions and no classes: run `evaluate.py retrieval` on it instead")
    if not zeroshot and data.captions is None:
        raise InputError(f"{data.name} has classes and no captions: run `evaluate.py zeroshot` on it instead")
    if config.limit is not None:
        data = limited(data, config.limit)
    folder = model_folder(config.model)
    towers, processing = TwoTowers.from_pretrained(folder), Processing.from_pretrained(folder)
    subject = Subject(towers.to(state.device), processing, data, state.device, config.batch_size, config.workers)
    outcome = classify(subject) if zeroshot else retrieve(subject)
    if state.is_main_process:
        outcome.facts["model"] = folder
        write(outcome, config.output_dir)
        print(f"\n{time.perf_counter() - started:.1f} s on {state.num_processes} x {state.device.type}")


def model_folder(model: str) -> str:
    """Where the weights are: of a run its export, else its best checkpoint; a hub id stays as it is."""
    root = Path(model)
    if not root.is_dir():
        return model
    for folder in (root, root / "export", root / "checkpoints" / "best"):
        if (folder / "config.json").is_file():
            return str(folder)
    raise InputError(
        f"--model {model} holds no model: no config.json in it, in its export/ or in its checkpoints/best/; "
        "name a finished run, a checkpoint or an export"
    )


def make_folder(folder: Path) -> None:
    """Make the output folder before the long work, so that a bad --output-dir is told at once."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise InputError(f"--output-dir {folder} cannot be made: {fault.strerror}; choose another folder") from None


def write(outcome: Outcome, folder: Path) -> None:
    """Write metrics.json, pictures and report.html; print the facts, the first table and where it all is."""
    # One line a key: a confusion matrix is long, and nobody reads it number by number.
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in outcome.metrics.items())
    (folder / "metrics.json").write_text("{\n" + lines + "\n}\n", encoding="utf-8")
    pictures = outcome.draw(folder)
    title, table = next(iter(outcome.tables.items()))
    write_report(folder / "report.html", title, outcome.facts, outcome.tables, pictures)
    print("\n" + "\n".join(f"{name}: {fact}" for name, fact in outcome.facts.items()))
    print("\n" + aligned(table))
    print(f"\nreport: {folder / 'report.html'}")
    print("pictures: " + ", ".join(str(picture.path) for picture in pictures))


if __name__ == "__main__":
    sys.exit(main())
