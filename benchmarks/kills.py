"""Kill a run on two ranks at random moments and check that every resumed run equals the uninterrupted run bit for bit.

python benchmarks/kills.py [--kills 20 --seed 0] writes benchmarks/results/kills.json; exit code 1: a check failed.
Every complete checkpoint and line of metrics must equal the uninterrupted run's, and no process may remain 60 s after a
kill.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lib.runs.checkpoint import is_whole  # noqa: E402
from lib.runs.reporter import read_metrics  # noqa: E402

Victim = Literal["all", "one rank", "launcher"]
VICTIMS: tuple[Victim, ...] = ("all", "one rank", "launcher")
LONGEST_END = 60.0
TIMED = ("pairs_per_second", "step_seconds", "data_seconds", "peak_memory_bytes")


@dataclass(frozen=True)
class Settings:
    """Number of kills, and the run that is killed."""

    kills: int = 20
    seed: int = 0
    """Seed of the random moments."""
    ranks: int = 2
    steps: int = 1000
    """Steps of the run: enough for all kills."""
    most_seconds: float = 4.0
    """Longest time from the first new step to a kill."""


@dataclass
class Kill:
    """One kill and its consequences."""

    victim: Victim
    during_a_save: bool
    at_step: int
    seconds_to_end: float
    standing: str
    identical: bool


def main(settings: Settings) -> None:
    with tempfile.TemporaryDirectory() as folder:
        unbroken, broken = Path(folder) / "unbroken", Path(folder) / "broken"
        if start(settings, unbroken).wait() != 0:
            sys.exit("the uninterrupted run failed")
        draw, kills = random.Random(settings.seed), []
        for number in range(settings.kills):
            kill = kill_once(settings, VICTIMS[number % len(VICTIMS)], broken, unbroken, draw)
            if kill is None:
                break
            kills.append(kill)
            print(f"{len(kills)}/{settings.kills}: {kill}", flush=True)
        finished = start(settings, broken).wait() == 0
        identical = finished and same_files(broken, unbroken) and metrics(broken) == metrics(unbroken)
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    content = {"settings": asdict(settings), "end_identical": identical, "kills": [asdict(kill) for kill in kills]}
    (results / "kills.json").write_text(json.dumps(content, indent=1) + "\n")
    slowest = max(kill.seconds_to_end for kill in kills)
    kept = all(kill.identical for kill in kills) and slowest <= LONGEST_END and identical
    print(f"{len(kills)} kills, slowest end {slowest:.1f} s, final run identical: {identical}")
    sys.exit(0 if kept and len(kills) == settings.kills else 1)


def start(settings: Settings, folder: Path) -> subprocess.Popen:
    """Start the run in its own process group; the same command resumes it."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={settings.ranks}",
        "train_clip.py", "--effective-batch=48", "--chunk-size=8", "--xbm-size=96", "--xbm-start=2", "--dropout=0.2",
        "--augment=strong", "--workers=1", f"--steps={settings.steps}", "--warmup-steps=4", "--eval-every=0",
        "--save-every=2", "--keep-checkpoints=0", f"--output-dir={folder}", "--resume=auto",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **quiet)


def kill_once(settings: Settings, victim: Victim, folder: Path, unbroken: Path, draw: random.Random) -> Kill | None:
    """Start or resume, wait for a random moment, kill, and check the checkpoints; None: the run finished first."""
    in_save, delay, rank = draw.random() < 0.4, draw.uniform(0, settings.most_seconds), draw.randrange(settings.ranks)
    before, launcher = last_step(folder), start(settings, folder)
    while last_step(folder) <= before and launcher.poll() is None:
        time.sleep(0.02)
    time.sleep(delay)
    while in_save and launcher.poll() is None and not list((folder / "checkpoints").glob(".unfinished_step_*")):
        time.sleep(0.0005)
    if launcher.poll() is not None:
        return None
    everyone = psutil.Process(launcher.pid).children(recursive=True)
    ranks = [process for process in everyone if process.ppid() == launcher.pid]
    began = time.monotonic()
    for process in {"all": [launcher, *everyone], "one rank": [ranks[rank]], "launcher": [launcher]}[victim]:
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            process.kill()
    launcher.wait()
    _, left = psutil.wait_procs(everyone, timeout=2 * LONGEST_END)
    seconds = time.monotonic() - began
    for process in left:
        process.kill()
    standing = sorted(f.name for f in (folder / "checkpoints").glob("step_*") if is_whole(f))
    return Kill(
        victim, in_save, last_step(folder), seconds, standing[-1] if standing else "none", same_files(folder, unbroken)
    )


def last_step(folder: Path) -> int:
    return max((line["step"] for line in read_metrics(folder)), default=0) if folder.exists() else 0


def same_files(folder: Path, unbroken: Path) -> bool:
    """True if all complete checkpoints have the uninterrupted run's weights and memory bank; removes compared ones."""
    same = True
    for checkpoint in sorted((folder / "checkpoints").glob("step_*")):
        if not is_whole(checkpoint):
            continue
        for name in ("model.safetensors", "memory.safetensors"):
            twin = unbroken / "checkpoints" / checkpoint.name / name
            same &= (checkpoint / name).read_bytes() == twin.read_bytes()
    for checkpoint in sorted((folder / "checkpoints").glob("step_*"))[:-3]:
        shutil.rmtree(checkpoint)
    return same


def metrics(folder: Path) -> list[dict]:
    """Lines of metrics without the fields that depend on time."""
    return [{name: value for name, value in line.items() if name not in TIMED} for line in read_metrics(folder)]


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
