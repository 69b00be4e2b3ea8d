"""A task from its flags to the files of its results."""

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
from lib.errors import InputError, RunError, raised_as
from lib.evaluation.report import write_results
from lib.evaluation.tasks import Table, Task
from lib.files import fault_of


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
            outcome = options.measure(state.device)
        if outcome is not None and options.output_dir is not None:
            write_results(outcome, options.output_dir)
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


def _make_folder(folder: Path) -> None:
    """Make the output folder before the long work, so that a bad --output-dir fails at once."""
    asked = f"--output-dir {folder}"
    with raised_as(lambda e: InputError(f"{asked} cannot be made: {fault_of(e)}; choose another folder"), OSError):
        folder.mkdir(parents=True, exist_ok=True)
