"""A task from its options to metrics.json, pictures and report."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState

from lib.backends.device import is_out_of_memory
from lib.backends.precision import set_up_kernels
from lib.distributed import meeting
from lib.errors import InputError, RunError
from lib.evaluation.agnostic.task import agnostic
from lib.evaluation.compare.task import compare
from lib.evaluation.html import aligned, write_report
from lib.evaluation.outcome import Outcome
from lib.evaluation.probe.task import probe
from lib.evaluation.retrieval.task import retrieve
from lib.evaluation.subject import Subject
from lib.evaluation.table import table
from lib.evaluation.tasks import Agnostic, Compare, Probe, Retrieval, Table, Task, Zeroshot
from lib.evaluation.zeroshot.task import classify
from lib.files import write_text


def carry_out(options: Task) -> None:
    """Measure on all ranks together, write and print on rank 0; InputError for what cannot be measured."""
    # Set by `accelerate launch --cpu`.
    cpu_wanted = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true")
    started = time.perf_counter()
    with meeting():
        state = PartialState(cpu=cpu_wanted or not torch.accelerator.is_available())
    try:
        if options.output_dir is not None:
            _make_folder(options.output_dir)
        set_up_kernels(state.device, deterministic=False)
        with _out_of_memory_reported(options):
            outcome = measure(options, state.device)
        if outcome is not None and options.output_dir is not None:
            _write(outcome, options.output_dir)
            print(f"\n{time.perf_counter() - started:.1f} s on {state.num_processes} x {state.device.type}")
    finally:
        state.destroy_process_group()


@contextmanager
def _out_of_memory_reported(options: Task) -> Iterator[None]:
    try:
        yield
    except RunError:
        raise
    except RuntimeError as error:
        if not is_out_of_memory(error) or isinstance(options, Table):
            raise
        size = options.run.batch_size
        raise RunError(f"out of memory ({error}); use --batch-size {max(1, size // 2)} instead of {size}") from error


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


def _make_folder(folder: Path) -> None:
    """Make the output folder before the long work, so that a bad --output-dir is told at once."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise InputError(f"--output-dir {folder} cannot be made: {fault.strerror}; choose another folder") from None


def _write(outcome: Outcome, folder: Path) -> None:
    """Write metrics.json, pictures and report.html; print the facts, the first table and where it all is."""
    # One line a key: a confusion matrix is long, and nobody reads it number by number.
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in outcome.metrics.items())
    write_text(folder / "metrics.json", "{\n" + lines + "\n}\n")
    pictures = outcome.draw(folder)
    title, table = next(iter(outcome.tables.items()))
    write_report(folder / "report.html", title, outcome.facts, outcome.tables, pictures)
    print("\n" + "\n".join(f"{name}: {fact}" for name, fact in outcome.facts.items()))
    print("\n" + aligned(table))
    print(f"\nreport: {folder / 'report.html'}")
    print("pictures: " + ", ".join(str(picture.path) for picture in pictures))
