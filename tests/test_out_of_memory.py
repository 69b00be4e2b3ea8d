"""Running out of memory anywhere gives one line with the amount, the chunk size, the remedy, and the checkpoint."""

import sys

import pytest
import torch
from accelerate.state import AcceleratorState

import evaluate
import train_clip
from lib.backends.device import is_out_of_memory
from lib.errors import RunError, one_line_errors
from lib.runs.checkpoint import newest_whole, save_checkpoint
from lib.towers import TwoTowers

FLAGS = ["--effective-batch=16", "--chunk-size=4", "--xbm-size=0", "--eval-every=0", "--save-every=1", "--steps=4"]
FAULT = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 3.50 GiB. GPU 0 has a total capacity of 23.65 GiB of which 1.00 GiB is free."
)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def fails_at(call: int, function, when=lambda: True):
    """The function, which runs out of memory at one of the calls that `when` is about."""
    calls = []

    def failing(*given, **options):
        calls.append(when())
        if calls[-1] and sum(calls) == call:
            raise FAULT
        return function(*given, **options)

    return failing


# With four chunks a step and shared texts, pass 1 is four forwards without a graph and pass 2 four with one.
PLACES = {
    "pass 1": (TwoTowers, "forward", 14, lambda: not torch.is_grad_enabled()),
    "pass 2": (TwoTowers, "forward", 14, torch.is_grad_enabled),
    "backward": (torch.Tensor, "backward", 10, lambda: True),
    "optimizer": (torch.optim.AdamW, "step", 3, lambda: True),
}


@pytest.mark.parametrize("place", PLACES)
def test_out_of_memory_in_a_run_is_one_line_and_loses_no_finished_step(place, tmp_path, monkeypatch, capsys):
    owner, name, call, when = PLACES[place]
    monkeypatch.setattr(owner, name, fails_at(call, getattr(owner, name), when))
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as ended, one_line_errors():
        train_clip.main([*FLAGS, f"--output-dir={run}"])
    last = newest_whole(run / "checkpoints")
    assert ended.value.code == 1 and last is not None
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert line == (
        "error: out of memory with chunks of 4 pairs (3.50 GiB more were asked for): use --chunk-size 2; "
        f"--resume auto resumes from {last}"
    )
    monkeypatch.undo()
    AcceleratorState._reset_state(reset_partial_state=True)
    train_clip.main([*FLAGS, f"--output-dir={run}", "--resume=auto"])
    assert (run / "export" / "model.safetensors").exists()


def test_out_of_memory_before_the_first_step_says_that_nothing_was_saved(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.setup.build.make_optimizer", fails_at(1, None))
    with pytest.raises(RunError, match=r"chunks of 4 pairs \(3.50 GiB .*; there is no checkpoint yet"):
        train_clip.main([*FLAGS, f"--output-dir={tmp_path / 'run'}"])


def test_out_of_memory_before_there_are_chunks_names_no_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.setup.build.make_prepare", fails_at(1, None))
    with pytest.raises(
        RunError,
        match=r"before the first chunk \(3.50 GiB .*: end other processes .* smaller model; there is no checkpoint",
    ):
        train_clip.main([*FLAGS, f"--output-dir={tmp_path / 'run'}"])


def test_evaluation_that_runs_out_of_memory_names_its_batch(tmp_path, monkeypatch, capsys):
    train_clip.main([*FLAGS[:-1], "--steps=1", f"--output-dir={tmp_path / 'run'}"])
    monkeypatch.setattr(TwoTowers, "forward", fails_at(1, TwoTowers.forward))
    common = [f"--model={tmp_path / 'run'}", "--batch-size=64", f"--cache-dir={tmp_path}", f"--output-dir={tmp_path}"]
    with pytest.raises(RunError, match="out of memory .*3.50 GiB.*; use --batch-size 32 instead of 64"):
        evaluate.main(["zeroshot", *common])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FAULT, True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."), True),
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (OSError(28, "No space left on device"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


def test_a_fault_of_the_device_while_saving_is_not_taken_for_one_of_the_disk(tmp_path, monkeypatch):
    """CUDA reports a failed kernel at the next copy, which may be the checkpoint's."""
    copy = torch.Tensor.cpu

    def failing(tensor):
        if save_checkpoint.__code__ in callers():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return copy(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", failing)
    with pytest.raises(RuntimeError, match="illegal memory access") as raised:
        train_clip.main([*FLAGS, f"--output-dir={tmp_path / 'run'}"])
    assert not isinstance(raised.value, RunError)


def callers() -> set:

    frame, found = sys._getframe(1), set()
    while frame:
        found.add(frame.f_code)
        frame = frame.f_back
    return found
