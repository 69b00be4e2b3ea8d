"""Failures and their messages: signals in a step, full disks, second jobs, lost ranks, NaN losses."""

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from filelock import FileLock
from safetensors.torch import load_file

import train_clip
from lib import losses
from lib.errors import InputError, RunError, StoppedEarly, heard_signals, one_line_errors
from lib.gradcache.random_state import batch_norm_statistics, restore_statistics
from lib.runs import folder as run_folder
from lib.runs import signals as stopping
from lib.runs.reporter import Reporter, read_metrics
from lib.runs.signals import StopSignal

FLAGS = [
    "--effective-batch=48", "--chunk-size=8", "--xbm-size=60", "--xbm-start=2", "--steps=4", "--warmup-steps=0",
    "--augment=strong", "--dropout=0.2", "--eval-every=0", "--save-every=0", "--workers=0",
]  # fmt: skip
TIMED = ("pairs_per_second", "step_seconds", "data_seconds", "peak_memory_bytes")


def train(folder: Path, *flags: str) -> Path:
    train_clip.main([*FLAGS, f"--output-dir={folder}", *flags])
    return folder


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step_{step:06d}" / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def told(folder: Path) -> list[dict]:
    return [{name: value for name, value in line.items() if name not in TIMED} for line in read_metrics(folder)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("unbroken") / "run", "--save-every=2")


@pytest.fixture
def told_at_look(monkeypatch):
    """Send this process SIGUSR1 at so-many-th look between chunks; every chunk looks."""
    monkeypatch.setattr(stopping, "SECONDS_BETWEEN_LOOKS", 0)

    def arrange(number: int) -> None:
        looks, look = [], StopSignal.look

        def counted(self) -> None:
            looks.append(1)
            if len(looks) == number:
                os.kill(os.getpid(), signal.SIGUSR1)
            look(self)

        monkeypatch.setattr(StopSignal, "look", counted)

    return arrange


# A step of 6 chunks looks 5 times in the first pass, and 6 times in the second.
@pytest.mark.parametrize("look", [2 * 11 + 3, 2 * 11 + 8], ids=["first pass", "second pass"])
def test_a_signal_in_mid_step_drops_the_step_and_the_resumed_run_is_the_unbroken_one(
    look, unbroken, told_at_look, monkeypatch, tmp_path
):
    with monkeypatch.context():
        told_at_look(look)
        with pytest.raises(StoppedEarly, match="after step 2 of 4.*step_000002"):
            train(tmp_path / "run")
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2]
    assert same(weights(tmp_path / "run", 2), weights(unbroken, 2))
    monkeypatch.undo()
    train(tmp_path / "run", "--resume=auto", "--save-every=4")
    assert same(weights(tmp_path / "run", 4), weights(unbroken, 4))
    assert told(tmp_path / "run") == told(unbroken)


def test_a_signal_before_the_first_update_saves_nothing(told_at_look, tmp_path):
    told_at_look(2)
    with pytest.raises(StoppedEarly, match="after step 0 of 4"):
        train(tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


def test_looks_are_rare_where_chunks_are_quick():
    with StopSignal(torch.device("cpu"), lambda: "") as stop:
        stop.pace(seconds=10.0, chunks=100)
        stop.received = True
        for _ in range(19):
            stop.look()
        with pytest.raises(stopping.StepGivenUp):  # 20 chunks of 0.1 s
            stop.look()


def test_a_stop_that_takes_long_says_which_checkpoint_stands(monkeypatch, capfd):
    monkeypatch.setattr(stopping, "SECONDS_UNTIL_TOLD", 0.05)
    with StopSignal(torch.device("cpu"), lambda: "--resume auto resumes from step_000007"):
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.3)
    told = capfd.readouterr().err
    assert "SIGUSR1: stopping; what was learned is saved first" in told
    assert "if killed meanwhile: --resume auto resumes from step_000007" in told


def test_a_stop_has_an_exit_code_of_its_own(capsys):
    with pytest.raises(SystemExit, match="75"), one_line_errors():
        raise StoppedEarly("by a signal")
    assert capsys.readouterr().err == "stopped: by a signal\n"


def test_names_that_are_not_utf8_are_printed_with_escapes(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", stdout)
    with one_line_errors():
        print("caf\udce9 é")
    assert stdout.buffer.getvalue().decode() == "caf\\udce9 é\n"


@pytest.mark.parametrize(("name", "words"), [("caf\udce9", "is not UTF-8"), ("n" * 300, "a name of 300 bytes")])
def test_a_folder_whose_name_no_file_can_hold_is_refused(name, words, tmp_path):
    with pytest.raises(InputError, match=f"^--output-dir .*{words}"):
        train(tmp_path / name)


@pytest.mark.parametrize(
    ("rank", "ended", "told", "waits"),
    [
        (0, InputError("--x 1"), "error: --x 1\n", False),
        (1, InputError("--x 1"), "", True),
        (1, RunError("step 3"), "", True),
        (1, RunError("step 3", of_one_rank=True), "error: step 3\n", False),
        (1, StoppedEarly("by a signal"), "", True),
        (1, SystemExit(2), "", True),
        (0, SystemExit(2), "", False),
        (1, SystemExit(0), "", False),
    ],
    ids=repr,
)
def test_ranks_leave_rank_0_the_time_to_tell(rank, ended, told, waits, monkeypatch, capsys):
    """A launcher ends rank 0 as soon as another has ended, maybe before its word is out."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("RANK", str(rank))
    with pytest.raises(SystemExit), one_line_errors():
        raise ended
    assert capsys.readouterr().err == told and bool(waited) == waits


def test_statistics_of_a_dropped_step_are_put_back():
    norm = torch.nn.BatchNorm1d(3)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    statistics = batch_norm_statistics(norm)
    norm(torch.randn(8, 3))
    assert not torch.equal(norm.running_mean, before["running_mean"])
    restore_statistics(statistics)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


@pytest.fixture
def broken_from(monkeypatch):
    """Make the loss of some steps not a number, gradients included."""
    clean, calls = losses.infonce, []

    def arrange(*steps: int) -> None:
        def loss(*arguments, **options):
            calls.append(1)
            share = clean(*arguments, **options)
            if len(calls) in steps:
                broken = {name: value * float("nan") for name, value in vars(share).items() if value is not None}
                return replace(share, **broken)
            return share

        monkeypatch.setattr(losses, "infonce", loss)

    return arrange


def test_an_update_that_is_not_finite_is_left_out(broken_from, tmp_path):
    broken_from(2)
    run = train(tmp_path / "run", "--on-nonfinite=skip", "--save-every=1", "--keep-checkpoints=0")
    assert same(weights(run, 1), weights(run, 2)) and not same(weights(run, 2), weights(run, 3))
    lines = read_metrics(run)
    assert [line.get("skipped") for line in lines] == [None, "not finite", None, None]
    assert lines[1]["loss"] is None and lines[1]["xbm_filled"] == 48 and lines[2]["xbm_filled"] == 60


def test_updates_are_left_out_up_to_a_limit(broken_from, tmp_path, monkeypatch):
    monkeypatch.setattr("lib.runs.progress.NONFINITE_LIMIT", 2)
    broken_from(2, 3, 4)
    with pytest.raises(RunError, match="step 4: loss nan.*in 3 steps in a row"):
        train(tmp_path / "run", "--on-nonfinite=skip")


def test_a_failed_run_leaves_no_data_workers(broken_from, tmp_path):
    """They ignore SIGTERM, which is how a process ends them and then waits: it would never end."""
    broken_from(1)
    with pytest.raises(RunError, match="step 1: loss nan"):
        train(tmp_path / "run", "--workers=1")
    assert not multiprocessing.active_children()  # even while the traceback is held


def test_a_folder_in_use_is_refused_with_its_holder(monkeypatch, tmp_path):
    monkeypatch.setattr(run_folder, "SECONDS_FOR_THE_LAST_JOB", 0)
    (tmp_path / run_folder.HOLDER).write_text(json.dumps({"host": "node7", "process": 42}))
    with FileLock(tmp_path / run_folder.LOCK):
        with pytest.raises(InputError, match="in use by .*process 42 on node7"):
            train(tmp_path)
        with pytest.raises(SystemExit, match="2"), one_line_errors():
            train(tmp_path)
    train(tmp_path, "--steps=1")  # free again


def test_a_data_worker_that_is_killed_ends_the_run_in_one_line_that_says_what_to_resume_from(tmp_path, monkeypatch):
    record = Reporter.step

    def killing(reporter, metrics: dict) -> None:
        record(reporter, metrics)
        if metrics["step"] == 3:
            for worker in multiprocessing.active_children():
                worker.kill()
            time.sleep(0.5)

    monkeypatch.setattr(Reporter, "step", killing)
    with pytest.raises(RunError, match=r"a data worker was killed.*; --resume auto resumes from .*step_000002"):
        train(tmp_path / "run", "--workers=1", "--steps=40", "--save-every=2")


def test_files_of_a_run_have_the_permissions_that_the_umask_gives(tmp_path):
    before = os.umask(0o022)
    try:
        run = train(tmp_path / "run", "--steps=1", "--save-every=1")
    finally:
        os.umask(before)
    found = {
        file: oct(file.stat().st_mode & 0o777) for file in run.rglob("*") if file.is_file() and file.name != ".lock"
    }
    assert run / "export" / "model.safetensors" in found and set(found.values()) == {"0o644"}, found


def test_a_hidden_hangup_is_not_heard():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert signal.SIGHUP not in heard_signals() and signal.SIGTERM in heard_signals()
    finally:
        signal.signal(signal.SIGHUP, before)


def claim(output_dir: Path | None, start, held, claims) -> None:
    start.wait()
    try:
        with run_folder.claimed_folder(replace(train_clip.DEFAULTS, output_dir=output_dir), "clip") as folder:
            (folder / run_folder.METRICS).touch()
            claims.put(str(folder))
            held.wait()  # nobody lets go before all have tried
    except InputError as refused:
        claims.put(f"refused: {refused}")
        held.wait()


@pytest.mark.parametrize("named", [True, False])
def test_jobs_that_start_at_one_moment_never_share_a_folder(named, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "SECONDS_FOR_THE_LAST_JOB", 0)
    monkeypatch.chdir(tmp_path)
    forking = multiprocessing.get_context("fork")
    start, held, claims = forking.Barrier(4), forking.Barrier(4), forking.Queue()
    output_dir = tmp_path / "run" if named else None
    jobs = [forking.Process(target=claim, args=(output_dir, start, held, claims)) for _ in range(4)]
    for job in jobs:
        job.start()
    told = sorted(claims.get(timeout=60) for _ in jobs)
    for job in jobs:
        job.join(timeout=60)
    if named:
        assert told[0] == str(output_dir) and all("is in use by another job" in each for each in told[1:])
    else:
        assert told == ["runs/clip", "runs/clip-2", "runs/clip-3", "runs/clip-4"]


def test_a_full_disk_names_the_checkpoint_that_stands(tmp_path, full_beyond):
    train(tmp_path / "run", "--steps=2", "--save-every=2")
    with full_beyond(300_000), pytest.raises(RunError, match="disk refuses a file.*make room.*step_000002"):
        train(tmp_path / "run", "--save-every=1", "--resume=auto")
    train(tmp_path / "run", "--resume=auto")
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_cut_checkpoint_is_named_and_passed_over(tmp_path, capsys):
    train(tmp_path / "run", "--steps=2", "--save-every=1")
    cut = tmp_path / "run" / "checkpoints" / "step_000002"
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1000])
    capsys.readouterr()
    train(tmp_path / "run", "--steps=3", "--resume=auto")
    printed = capsys.readouterr().out
    assert "steps      3 (from 1)" in printed and f"{cut} is not a whole checkpoint" in printed


FREEZE = """
import os, signal, sys, time
import torch.distributed as dist
from lib.runs.watchdog import Watchdog
dist.init_process_group("gloo")
with Watchdog(beat=0.2, limit=1.5):
    dist.barrier()
    time.sleep(0.6)
    if dist.get_rank() == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGSTOP if sys.argv[2] == "freezes" else signal.SIGKILL)
    time.sleep(60)
"""


@pytest.mark.parametrize(("lost", "how"), [(1, "freezes"), (0, "dies")])
def test_a_lost_rank_ends_the_others(lost, how):
    """One that stands still holds its connections open; rank 0 has the store."""
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29300 + os.getpid() % 500 + lost)}
    command = [sys.executable, "-c", FREEZE, str(lost), how]
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | {"RANK": str(rank), "WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        assert ranks[1 - lost].wait(timeout=60) == 1
        assert "--resume auto resumes" in ranks[1 - lost].stderr.read()
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
            rank.stderr.close()
