"""Measure a model: `python evaluate.py TASK --model RUN --data DATA --output-dir OUT`; TASK --help tells its flags.

Runs as it is on one process, and under `accelerate launch` or `torchrun` on several.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import tyro
from accelerate import PartialState

from lib.collectives import meeting
from lib.errors import InputError, on_rank_0, silenced
from lib.evaluation.agnostic.task import Agnostic, agnostic
from lib.evaluation.compare.task import Compare, compare
from lib.evaluation.html import aligned, write_report
from lib.evaluation.outcome import Outcome
from lib.evaluation.probe.task import Probe, probe
from lib.evaluation.retrieval.task import Retrieval, retrieve
from lib.evaluation.subject import Subject
from lib.evaluation.table import Table, table
from lib.evaluation.zeroshot.task import Zeroshot, classify

Task = (
    Annotated[Retrieval, tyro.conf.subcommand("retrieval")]
    | Annotated[Zeroshot, tyro.conf.subcommand("zeroshot")]
    | Annotated[Probe, tyro.conf.subcommand("probe")]
    | Annotated[Agnostic, tyro.conf.subcommand("agnostic")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Table, tyro.conf.subcommand("table")]
)

FLAT = (tyro.conf.OmitArgPrefixes,)
"""--data of the group `data`, not --data.data"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 after a fault of the user's."""
    with silenced(not on_rank_0()):
        options = tyro.cli(Task, args=arguments, description=__doc__, console_outputs=on_rank_0(), config=FLAT)
    # Set by `accelerate launch --cpu`.
    cpu_wanted = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true")
    started = time.perf_counter()
    state = None
    try:
        with meeting():
            state = PartialState(cpu=cpu_wanted or not torch.accelerator.is_available())
        options.check()
        if options.output_dir is not None:
            make_folder(options.output_dir)
        outcome = measure(options, state.device)
        if outcome is not None and options.output_dir is not None:
            write(outcome, options.output_dir)
            print(f"\n{time.perf_counter() - started:.1f} s on {state.num_processes} x {state.device.type}")
    except InputError as fault:
        if on_rank_0():
            print(f"error: {fault}", file=sys.stderr)
        return 2
    finally:
        if state is not None:
            state.destroy_process_group()
    return 0


def measure(options: Task, device: torch.device) -> Outcome | None:
    """Measure on all ranks together; rank 0 gets the outcome, the others None."""
    match options:
        case Retrieval():
            return retrieve(options, Subject.open(options.model, options, device, needs="captions"))
        case Zeroshot():
            subject = Subject.open(options.model, options, device, needs="classes", prompts=options.prompts)
            return classify(options, subject)
        case Probe():
            return probe(options, Subject.open(options.model, options, device, needs="classes"))
        case Agnostic():
            return agnostic(options, Subject.open(options.model, options, device, needs="classes"))
        case Compare():
            return compare(options, device)
        case Table():
            table(options)
            return None


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
