"""A kill or a full disk at each write of every script: nothing finished is lost, and one line says what to do."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file

from lib.data.durable import find_damage
from lib.export.checked import RECORD
from lib.runs.checkpoint import MANIFEST
from lib.runs.reporter import read_metrics

TIMED = {"pairs_per_second", "step_seconds", "data_seconds", "peak_memory_bytes"}


@dataclass
class Outcome:
    """Outcome of a script: exit code (negative: a signal), names of its writes, and output."""

    code: int
    writes: list[str]
    printed: str


class Server:
    """Forks a script's process from one that has imported everything: most of a second for each, not many."""

    def __init__(self, root: Path) -> None:
        self.root = root
        environment = os.environ | {
            "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "fault_server.py"), str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, script: str, *arguments: object, fault: tuple[str, str] | None = None) -> Outcome:
        assert self.process.stdin and self.process.stdout
        out = self.root.parent / "out.txt"
        command = {"script": script, "arguments": list(map(str, arguments)), "fault": fault, "out": str(out)}
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return Outcome(answer["code"], answer["writes"], out.read_text(errors="replace"))


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("faults") / "root")
    server.root.mkdir()
    for index, name in enumerate(("red", "green", "blue")):
        (server.root / "data" / name).mkdir(parents=True)
        for number in range(8):
            image = Image.new("RGB", (24, 24), (80 * index + number, 9 * number, number))
            image.save(server.root / "data" / name / f"{number}.png")
    yield server
    server.process.stdin.close()
    server.process.wait(timeout=60)


def train(server: Server, *flags: str, fault: tuple[str, str] | None = None) -> Outcome:
    """Six steps with stored outputs, a memory, evaluations, checkpoints and an export, resumed where it can be."""
    root = server.root
    return server.run(
        "train", f"--data={root}/data", "--hold-out=0.25", f"--output-dir={root}/run", f"--cache-dir={root}/cache",
        "--freeze=text.trunk", "--effective-batch=8", "--chunk-size=4", "--xbm-size=8", "--xbm-start=1",
        "--workers=0", "--steps=4", "--save-every=2", "--eval-every=2", "--keep-checkpoints=1", "--dropout=0.1",
        "--warmup-steps=0", "--resume=auto", *flags, fault=fault,
    )  # fmt: skip


def clean(server: Server) -> None:
    for name in ("run", "cache", "out"):
        shutil.rmtree(server.root / name, ignore_errors=True)


def outcome(run: Path) -> tuple:
    """Results that are equal in equal runs: weights, metrics of the steps, the exported model."""
    last = run / "checkpoints" / "step_000004"
    assert find_damage(last, MANIFEST) is None and find_damage(run / "export", RECORD) is None
    weights = {name: load_file(last / f"{name}.safetensors") for name in ("model", "memory")}
    weights["export"] = load_file(run / "export" / "model.safetensors")
    tensors = {(file, name): tensor.tolist() for file, of_file in weights.items() for name, tensor in of_file.items()}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 4 and "export_difference" in summary
    metrics = [{name: value for name, value in line.items() if name not in TIMED} for line in read_metrics(run)]
    return tensors, metrics, summary["eval"], summary["data"]


@pytest.fixture(scope="module")
def unbroken(server) -> tuple[list[str], tuple]:
    """Names of the writes of an uninterrupted run, in order, and its files."""
    whole = train(server)
    assert whole.code == 0, whole.printed
    return list(dict.fromkeys(whole.writes)), outcome(server.root / "run")


def told_once(outcome: Outcome, words: str, fault: object) -> bool:
    """True if the script ended with one line with these words and without a traceback."""
    lines = [line for line in outcome.printed.splitlines() if line.startswith(("error: ", "stopped: "))]
    assert len(lines) == 1 and words in lines[0] and "Traceback" not in outcome.printed, (fault, outcome.printed)
    return True


def test_a_run_that_is_killed_at_a_write_resumes_as_the_unbroken_one_and_has_an_export(server, unbroken):
    """Start-up, stores, checkpoints, evaluation, summary and export are among the writes."""
    names, expected = unbroken
    assert {"run/config.yaml", "run/summary.json", "run/export", "run/checkpoints/best"} <= set(names)
    for name in names[::2]:
        clean(server)
        assert train(server, fault=("SIGKILL", name)).code == -9, name
        resumed = train(server)
        assert resumed.code == 0 and outcome(server.root / "run") == expected, (name, resumed.printed)
    again = train(server)
    assert again.code == 0 and "nothing is left to do" in again.printed
    assert outcome(server.root / "run") == expected


def test_a_full_disk_at_a_write_of_a_run_is_told_in_one_line_and_nothing_finished_is_lost(server, unbroken):
    names, expected = unbroken
    clean(server)
    for name in names[1::2]:  # in order: each attempt resumes what the one before could write
        full = train(server, fault=("full", name))
        assert full.code in (1, 2) and told_once(full, "No space left", name)
        assert full.code == 2 or ("make room" in full.printed and "--resume auto" in full.printed), full.printed
    assert train(server).code == 0 and outcome(server.root / "run") == expected


@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_a_signal_at_start_up_or_in_a_store_exits_with_75_and_the_run_resumes(number, server, unbroken):
    names, expected = unbroken
    clean(server)
    places = ["run/.lock", "run/config.yaml", next(name for name in names if "block_00000" in name)]
    for name in sorted(places, key=names.index):
        stopped = train(server, fault=(number, name))
        assert stopped.code == 75 and told_once(stopped, f"by {number}", name), stopped.printed
    assert train(server).code == 0 and outcome(server.root / "run") == expected


def test_a_full_disk_in_evaluate_and_export_is_told_in_one_line(server, unbroken):
    """Embeddings that cannot be kept are no fault: the evaluation has its results."""
    clean(server)
    assert train(server).code == 0
    root = server.root
    commands = {
        "evaluate": [
            "zeroshot", f"--model={root}/run", f"--data={root}/data", f"--output-dir={root}/out", "--workers=0",
            f"--cache-dir={root}/cache",
        ],
        "export": [f"{root}/run", f"--output={root}/out"],
    }  # fmt: skip
    for script, command in commands.items():
        shutil.rmtree(root / "out", ignore_errors=True)
        whole = server.run(script, *command)
        assert whole.code == 0, whole.printed
        for name in dict.fromkeys(whole.writes):
            shutil.rmtree(root / "out", ignore_errors=True)
            shutil.rmtree(root / "cache" / "embeddings", ignore_errors=True)
            full = server.run(script, *command, fault=("full", name))
            if name.startswith(("out", ".out")):
                assert full.code in (1, 2) and told_once(full, "No space left", name)
            else:
                assert "embeddings are not stored for later evaluations" in full.printed


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_real_small_disk_is_told_in_one_line(server, unbroken):
    """safetensors, tokenizers and torch write in Rust and in C++, past Python's hooks, with errors of their own."""
    small = server.root / "small"
    small.mkdir()
    clean(server)
    assert train(server).code == 0
    run = f"{server.root}/run"
    commands = {
        "export": [run, f"--output={small}/out"],
        "evaluate": [
            "zeroshot",
            f"--model={run}",
            f"--data={server.root}/data",
            f"--output-dir={small}/o",
            "--workers=0",
        ],
    }
    for size in ("64k", "500k", "1200k", "3m"):
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(small)], check=False)
        if mounted.returncode:
            pytest.skip("this container cannot mount a small disk")
        try:
            full = train(server, f"--output-dir={small}/run", f"--cache-dir={small}/cache")
            assert full.code == 1 and told_once(full, "make room", size)
            if size == "64k":
                for script, command in commands.items():
                    full = server.run(script, *command)
                    assert full.code in (1, 2) and told_once(full, "No space left", script)
        finally:
            subprocess.run(["umount", str(small)], check=True)
