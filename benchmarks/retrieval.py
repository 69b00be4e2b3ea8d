"""Time and memory of exact ranks of strict pairs, compared with the bare matrix products.

python benchmarks/retrieval.py [--pairs 135930 --dimensions 512] writes benchmarks/results/retrieval.json. Two ways
take turns, each in a process of its own on all cores:

products: every image with every text, float32, block by block, without using the results.
ranks: as in evaluate.py, the exact ranks of both directions, ties counted against the model.
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

ROWS, COLUMNS = 2048, 8192  # of a block of the bare products: larger ones are no faster
WAYS = ("products", "ranks")


@dataclass(frozen=True)
class Settings:
    """Size of the ranking, and number of turns."""

    pairs: int = 135_930
    """Images, and as many texts."""
    dimensions: int = 512
    """Of the embeddings."""
    signal: float = 0.1
    """Weight of its image in a text's embedding, against a weight of 1 for noise; 0: nothing can be found."""
    repeats: int = 3
    """Turns of each way; the medians count."""
    output: Path = ROOT / "benchmarks" / "results" / "retrieval.json"
    """File of the figures."""
    measure: str | None = None
    """Used by the script itself: a way, measured in this process."""


def main(settings: Settings) -> None:
    if settings.measure:
        print(json.dumps(measure(settings)))
        return
    turns = {way: [] for way in WAYS}
    for _ in range(settings.repeats):
        for way, found in turns.items():
            found.append(in_a_process(settings, way))
            print(described(way, found[-1]), flush=True)
    seconds = {way: statistics.median(turn["seconds"] for turn in found) for way, found in turns.items()}
    ratio = round(seconds["ranks"] / seconds["products"], 3)
    peak = max(turn["peak_bytes"] for turn in turns["ranks"])
    print(f"time x{ratio} of the bare products, {peak / 2**30:.2f} GiB in all")
    machine = f"{usable_cores()} cores, {platform.machine()}, torch {torch.__version__}"
    asked = {name: value for name, value in asdict(settings).items() if name not in ("output", "measure")}
    content = {"machine": machine} | asked | {"ratio": ratio, "peak_bytes": peak, "turns": turns}
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    settings.output.write_text(json.dumps(content, indent=1) + "\n")


def described(way: str, turn: dict) -> str:
    seconds, cpu_seconds = turn["seconds"], turn["cpu_seconds"]
    return f"{way:8}  {seconds:8.1f} s, {cpu_seconds:8.1f} s of CPU, {turn['peak_bytes'] / 2**30:5.2f} GiB"


def measure(settings: Settings) -> dict:
    """Seconds of one way, and the most memory that this process ever held, embeddings and libraries included."""
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
