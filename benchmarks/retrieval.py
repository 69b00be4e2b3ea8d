"""Time and memory of ranking strict pairs, compared with the matrix products alone, which are the lower bound.

python benchmarks/retrieval.py [--pairs 135930 --dimensions 512] writes benchmarks/results/retrieval.json. Two ways
alternate, each in its own process on all cores:

products: every image with every text, float32, block by block, with the results discarded.
ranks: the exact ranks of both directions as in evaluate.py, with ties counted against the model.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor
from torch.nn.functional import normalize

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lib.backends import usable_cores  # noqa: E402
from lib.evaluation.retrieval_ranks import retrieval_ranks, summarize_ranks  # noqa: E402

ROWS, COLUMNS = 2048, 8192  # block of the bare products: larger blocks are not faster
WAYS = ("products", "ranks")


@dataclass(frozen=True)
class Settings:
    """Sizes and repeats."""

    pairs: int = 135_930
    """Images, and as many texts."""
    dimensions: int = 512
    """Dimensions of the embeddings."""
    signal: float = 0.1
    """Weight of the image in its text's embedding, with noise of weight 1; 0: no text can be found."""
    repeats: int = 3
    """Turns of each way, of which the median counts."""
    output: Path = ROOT / "benchmarks" / "results" / "retrieval.json"
    """JSON file of the results."""
    measure: str | None = None
    """Internal: a way to measure in this process."""


def main(settings: Settings) -> None:
    if settings.measure:
        print(json.dumps(measure(settings)))
        return
    turns = {way: [] for way in WAYS}
    for _ in range(settings.repeats):
        for way, found in turns.items():
            found.append(in_a_process(settings, way))
            print(as_line(way, found[-1]), flush=True)
    seconds = {way: statistics.median(turn["seconds"] for turn in found) for way, found in turns.items()}
    ratio = round(seconds["ranks"] / seconds["products"], 3)
    peak = max(turn["peak_bytes"] for turn in turns["ranks"])
    print(f"time x{ratio} of the bare products, {peak / 2**30:.2f} GiB in all")
    machine = f"{usable_cores()} cores, {platform.machine()}, torch {torch.__version__}"
    asked = {name: value for name, value in asdict(settings).items() if name not in ("output", "measure")}
    content = {"machine": machine} | asked | {"ratio": ratio, "peak_bytes": peak, "turns": turns}
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    settings.output.write_text(json.dumps(content, indent=1) + "\n")


def as_line(way: str, turn: dict) -> str:
    seconds, cpu_seconds = turn["seconds"], turn["cpu_seconds"]
    return f"{way:8}  {seconds:8.1f} s, {cpu_seconds:8.1f} s of CPU, {turn['peak_bytes'] / 2**30:5.2f} GiB"


def measure(settings: Settings) -> dict:
    """Seconds of one way, and peak memory of this process, including embeddings and libraries."""
    torch.set_num_threads(usable_cores())
    images, texts = embeddings(settings)
    started, busy = time.perf_counter(), time.process_time()
    if settings.measure == "products":
        products(images, texts)
        found = {}
    else:
        to_text, to_image = retrieval_ranks(images, texts, torch.arange(settings.pairs))
        found = {"image_to_text": summarize_ranks(to_text), "text_to_image": summarize_ranks(to_image)}
    timed = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - busy}
    return timed | {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024} | found


def embeddings(settings: Settings) -> tuple[Tensor, Tensor]:
    """Images and texts, each (pairs, dimensions) float32 of unit norm."""
    generator = torch.Generator().manual_seed(0)
    shape = (settings.pairs, settings.dimensions)
    images = normalize(torch.randn(shape, generator=generator))
    noise = normalize(torch.randn(shape, generator=generator))
    return images, normalize(noise.add_(images, alpha=settings.signal))


def products(images: Tensor, texts: Tensor) -> None:
    buffer = torch.empty(ROWS * COLUMNS)
    for rows in images.split(ROWS):
        for columns in texts.split(COLUMNS):
            torch.mm(rows, columns.T, out=buffer[: len(rows) * len(columns)].view(len(rows), len(columns)))


def in_a_process(settings: Settings, way: str) -> dict:
    flags = [f"--{name}={getattr(settings, name)}" for name in ("pairs", "dimensions", "signal")]
    command = [sys.executable, __file__, *flags, f"--measure={way}"]
    finished = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    return json.loads(finished.stdout.splitlines()[-1])


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
