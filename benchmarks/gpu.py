"""Smoke checks and all benchmarks of one GPU, in one process; called by gpu.sh.

Every stage adds its results to one JSON file. If a stage fails or runs out of memory, that is recorded as its result,
and the next stage runs.
"""

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import measured
import numpy as np
import torch
from floor import ours, plain
from peers import open_clip_step, sentence_transformers_step
from PIL import Image
from subjects import SUBJECTS, flops_of_a_pair
from torch.profiler import ProfilerActivity, profile
from trainee import Trainee, remembered

from lib.backends import auto_workers
from lib.backends.device import free_memory, is_out_of_memory
from lib.backends.precision import full_float32, set_up_kernels
from lib.data import ImagePipeline, Prepare, TrainingData, open_sources
from lib.losses import infonce, sigmoid
from lib.setup.chunk_memory import even_chunk
from lib.setup.plan import MARGIN
from lib.towers.trunk_options import compile_trunks


@dataclass(frozen=True)
class Sizes:
    """Sizes of the stages."""

    subjects: tuple[str, ...]
    """Towers of the main measurements, the smaller ones first."""
    batch: int
    """N and Q"""
    peers: int
    """N of the comparison with peers and of kept graphs."""
    peer_chunk: int
    budget_batch: int
    images: int
    """Number of photographs that the loader decodes."""
    side: tuple[int, int]
    """Size of the photographs in pixels."""
    compiler: str


REAL = Sizes(("vit-b-32", "vit-b-16"), 32768, 4096, 256, 8192, 8192, (640, 480), "inductor")
TOY = Sizes(("narrow",), 64, 32, 16, 32, 64, (80, 60), "aot_eager")
BUDGET = 24 * 10**9
SMOKE_SECONDS = 240


class Bench:
    """Runs the stages in order and writes their results to a file."""

    def __init__(self, device: torch.device, sizes: Sizes, file: Path) -> None:
        self.device, self.sizes, self.file = device, sizes, file
        self.began = time.perf_counter()
        self.content: dict = {"machine": measured.machine(device), "toy": sizes is TOY, "stages": {}}

    def stage(self, name: str, run: Callable[[], dict]) -> None:
        """Run a stage, record its result or failure, and write all results so far."""
        began = time.perf_counter()
        try:
            found = run()
        except Exception as error:  # any failure: the other stages still run
            traceback.print_exc()
            kind = "out_of_memory" if is_out_of_memory(error) else "error"
            found = {kind: str(error).strip().split("\n")[0]}
        found["stage_seconds"] = round(time.perf_counter() - began, 1)
        self.content["stages"][name] = found
        self.content["seconds"] = round(time.perf_counter() - self.began, 1)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.content, indent=1) + "\n")
        print(f"[{self.content['seconds']:6.1f} s] {name}: {json.dumps(found)[:600]}", flush=True)
        gc.collect()
        torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def run(self) -> None:
        """Run all stages: correctness, main measurements, the others."""
        first = self.sizes.subjects[0]
        self.stage("smoke checks", partial(smoke_checks, self.file.parent))
        set_up_kernels(self.device, deterministic=False)
        self.stage("matrix rate", lambda: {"flops_per_second": measured.matrix_rate(self.device)})
        for subject in self.sizes.subjects:
            for compiled in (False, True):
                name = f"step {subject}{' compiled' if compiled else ''}"
                self.stage(name, partial(self.headline, subject, compiled))
        self.stage(f"profile {first}", partial(self.where_the_time_goes, first))
        self.stage(f"floor {first}", partial(self.floor, first))
        self.stage(f"kept graphs {first}", partial(self.kept_graphs, first))
        self.stage(f"peers {first}", partial(self.peers, first))
        self.stage("losses alone", self.losses)
        self.stage("loader", self.loader)
        self.stage(f"24 GB budget {first}", partial(self.budget, first))

    def headline(self, subject: str, compiled: bool, batch: int | None = None, room: float | None = None) -> dict:
        """A training step of the whole batch with a full memory bank: chunk size, seconds, rate, memory."""
        batch = batch or self.sizes.batch
        trainee = Trainee(subject, self.device)
        began = time.perf_counter()
        chunk_size = trainee.largest_chunk(batch, room)
        if compiled:
            chunk_size = even_chunk(batch, chunk_size)
            compile_trunks(trainee.towers.towers, self.sizes.compiler, self.device)
        chunks = trainee.chunks(batch, chunk_size)
        memory = remembered(batch, SUBJECTS[subject].embed_dim, self.device)
        # The first step allocates and compiles, and the last chunk may be of another size.
        trainee.step([chunks[0], chunks[-1]], memory)
        found = measured.once(partial(trainee.step, chunks, memory), self.device)
        found |= {"effective_batch": batch, "remembered": batch, "chunk_size": chunk_size, "chunks": len(chunks)}
        found["first_seconds"] = round(time.perf_counter() - began - found["seconds"], 1)
        return found | self.rates(subject, batch, found["seconds"])

    def rates(self, subject: str, pairs: int, seconds: float) -> dict:
        """Pairs a second, and shares of the matrix rate: for one forward and backward of every pair, and with the
        second forward of gradient caching."""
        rate = self.content["stages"].get("matrix rate", {}).get("flops_per_second")
        share = flops_of_a_pair(subject) * pairs / seconds / rate if rate else None
        with_pass_1 = None if share is None else share * 4 / 3
        return {
            "pairs_per_second": pairs / seconds,
            "share_of_matrix_rate": share,
            "share_with_pass_1": with_pass_1,
        }

    def where_the_time_goes(self, subject: str) -> dict:
        """Share of the time of a few chunks that the GPU is busy, and the slowest operations."""
        trainee = Trainee(subject, self.device)
        chunks = trainee.chunks(4 * self.sizes.peer_chunk, self.sizes.peer_chunk)
        memory = remembered(64, SUBJECTS[subject].embed_dim, self.device)
        trainee.step(chunks, memory)
        on_gpu = self.device.type == "cuda"
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        began = time.perf_counter()
        with profile(activities=kinds) as recorded:
            trainee.step(chunks, memory)
            if on_gpu:
                torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        own = lambda event: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6  # noqa: E731
        events = sorted(measured.own_events(recorded, self.device), key=own, reverse=True)
        total = sum(map(own, events))
        return {
            "chunk_size": self.sizes.peer_chunk,
            "busy": total / seconds,
            "largest": {event.key[:80]: own(event) / total for event in events[:12]},
        }

    def floor(self, subject: str) -> dict:
        """The floor: plain accumulation over the same chunks, without shared negatives."""
        trainee = Trainee(subject, self.device)
        chunks = trainee.chunks(self.sizes.batch, trainee.largest_chunk(self.sizes.batch))
        step = partial(trainee.update, plain, chunks)
        trainee.update(plain, [chunks[0], chunks[-1]])
        found = measured.once(step, self.device)
        return found | {"chunk_size": len(chunks[0])} | self.rates(subject, self.sizes.batch, found["seconds"])

    def kept_graphs(self, subject: str) -> dict:
        """The cached step without kept graphs, and with as many as fit."""
        trainee, size = Trainee(subject, self.device), self.sizes.peers
        chunks = trainee.chunks(size, self.sizes.peer_chunk)
        graph = trainee.memory(self.sizes.peer_chunk)
        spare = MARGIN * free_memory(self.device) - trainee.state_bytes - graph.peak
        count = max(1, min(len(chunks), int(spare // max(graph.graph, 1))))
        ways = {
            "none": partial(trainee.update, ours, chunks),
            "kept": partial(trainee.update, partial(ours, keep_graphs=count), chunks),
            "floor": partial(trainee.update, plain, chunks),
        }
        ways = measured.take_turns(ways, 2, self.device)
        return {"effective_batch": size, "chunk_size": self.sizes.peer_chunk, "graphs_kept": count, "ways": ways}

    def peers(self, subject: str) -> dict:
        """Ours, open_clip's accumulation and sentence-transformers' cached loss, if installed."""
        trainee, size = Trainee(subject, self.device), self.sizes.peers
        chunks = trainee.chunks(size, self.sizes.peer_chunk)
        ways = {"ours": ours, "floor": plain}
        not_run = {}
        for name, way in {"open_clip": open_clip_step, "sentence_transformers": sentence_transformers_step}.items():
            try:
                trainee.update(way, chunks[:2])
                ways[name] = way
            except Exception as error:  # not installed, or a version with another interface
                not_run[name] = f"{type(error).__name__}: {error}"[:200]
        found = {name: partial(trainee.update, way, chunks) for name, way in ways.items()}
        results = measured.take_turns(found, 2, self.device)
        shape = {"effective_batch": size, "chunk_size": self.sizes.peer_chunk}
        return shape | {"not_run": not_run, "ways": results}

    def losses(self) -> dict:
        """Both losses over N fresh and N remembered pairs, in full float32 as training runs them, and with TF32."""
        dimension = 512 if self.sizes is REAL else 16
        fresh = remembered(self.sizes.batch, dimension, self.device, first_id=0)
        old = remembered(self.sizes.batch, dimension, self.device)
        scale, bias = torch.tensor(14.3, device=self.device), torch.tensor(-9.0, device=self.device)
        ways = {}
        for name, loss in (("infonce", infonce), ("sigmoid", sigmoid)):
            step = partial(loss, fresh, old, scale, bias, slice(0, len(fresh)))
            ways |= {name: full_float32()(step), f"{name}, TF32": step}
        ways = measured.take_turns(ways, 2, self.device)
        return {"pairs": len(fresh), "remembered": len(old), "dimension": dimension, "ways": ways}

    def loader(self) -> dict:
        """The loader: photographs from disk into page-locked memory, with the workers of `auto`."""
        size, workers = self.sizes.images, auto_workers()
        with tempfile.TemporaryDirectory() as folder:
            write_photographs(Path(folder), min(size, 256), self.sizes.side)
            source, _ = open_sources(folder, None, None)
            data = TrainingData(
                source,
                Prepare(ImagePipeline(224, augment="light"), tokens_of),
                effective_batch=size,
                chunk_size=max(1, size // 8),
                chunks_ahead=8,
                rank=0,
                world_size=1,
                workers=workers,
                seed=0,
                pin_memory=self.device.type == "cuda",
            )
            took, began = [], time.perf_counter()
            for step in data.steps(0, 4):
                ready = step.ready / len(step)
                for _ in step:
                    pass
                took.append(time.perf_counter() - began)
                if len(took) == 3:  # the next step is read while a model would compute
                    time.sleep(self.compute_seconds(size))
                began = time.perf_counter()
        seconds = took[2]  # the first starts the workers, the second was partly read before
        return {
            "workers": workers,
            "images": size,
            "side": self.sizes.side,
            "seconds": seconds,
            "images_per_second": size / seconds,
            "all_seconds": took,
            "compute_seconds": self.compute_seconds(size),
            "ready_after_them": ready,
        }

    def compute_seconds(self, pairs: int) -> float:
        """Seconds for the pairs at the fastest measured rate of the smaller towers; 0 if none was measured."""
        stages = self.content["stages"]
        names = (f"step {self.sizes.subjects[0]}{suffix}" for suffix in ("", " compiled"))
        rate = max(stages.get(name, {}).get("pairs_per_second", 0.0) for name in names)
        return pairs / rate if rate else 0.0

    def budget(self, subject: str) -> dict:
        """The main step within 24 GB of memory, the limit of the process."""
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, BUDGET / total), self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            return {"budget_bytes": BUDGET} | self.headline(subject, False, self.sizes.budget_batch, BUDGET)
        finally:
            if self.device.type == "cuda":
                torch.cuda.set_per_process_memory_fraction(1.0, self.device)


def smoke_checks(folder: Path) -> dict:
    """Run the GPU tests, four at a time if pytest-xdist is installed; `lines` names failures, and is pytest's last."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    command += ["--durations=12", *(["-n", "4"] if find_spec("xdist") and torch.cuda.is_available() else [])]
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "smoke_checks.txt"
    with log.open("w") as file:
        running = subprocess.Popen(
            command, cwd=measured.ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = running.wait(SMOKE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)  # also ends the runs that it started, which would use the GPU
            running.wait()
            code = None
    everything = log.read_text().strip().splitlines()
    lines = [line[:300] for line in everything if line.startswith(("FAILED ", "ERROR "))] + everything[-1:]
    failed = {0: {}, None: {"error": f"not finished after {SMOKE_SECONDS} s"}}
    return {"exit_code": code, "lines": lines} | failed.get(code, {"error": lines[-1] if lines else "no output"})


def write_photographs(folder: Path, count: int, side: tuple[int, int]) -> None:
    """Write JPEG files of two classes that decode as slowly as photographs: noise of several scales."""
    generator = np.random.default_rng(0)
    for number in range(count):
        noise = [generator.integers(0, 256, (scale, scale, 3), dtype=np.uint8) for scale in (4, 32)]
        layers = [np.asarray(Image.fromarray(each).resize(side, Image.Resampling.BICUBIC), np.uint16) for each in noise]
        picture = Image.fromarray(((layers[0] + layers[1]) // 2).astype(np.uint8))
        (folder / f"class_{number % 2}").mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"class_{number % 2}" / f"{number:05d}.jpg", quality=90)


def tokens_of(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Dummy tokens of CLIP's length for any texts."""
    input_ids = torch.ones(len(texts), 77, dtype=torch.int64)
    return input_ids, torch.ones_like(input_ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true", help="all stages at toy size, on a CPU too")
    parser.add_argument("--output", type=Path, default=measured.RESULTS, help="folder of the JSON file")
    settings = parser.parse_args()
    if not settings.toy and not torch.cuda.is_available():
        sys.exit("error: no GPU found; use bash benchmarks/gpu.sh --toy to run all stages at toy size on a CPU")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    sizes, name = (TOY, "gpu_toy.json") if settings.toy else (REAL, "gpu.json")
    bench = Bench(device, sizes, settings.output / name)
    bench.run()
    print(f"{bench.content['seconds']:.0f} s in total; results: {bench.file}")
    failed = [name for name, found in bench.content["stages"].items() if "error" in found]
    if failed:
        sys.exit(f"error: {', '.join(failed)} failed; {bench.file} has the reasons")


if __name__ == "__main__":
    main()
