"""Peak memory of one step against the effective batch: the cached step and plain autograd, on the same towers.

python benchmarks/memory.py [--sizes 256 1024 4096] writes benchmarks/results/memory.json and docs/memory.png.
Every measurement runs in its own process: peak resident memory, minus that before the step.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lib.backends import usable_cores  # noqa: E402
from lib.data import Chunk  # noqa: E402
from lib.gradcache.step import GradCache, cached_step  # noqa: E402
from lib.losses import Pairs, infonce  # noqa: E402
from lib.losses.objective import dense_infonce  # noqa: E402
from lib.losses.positives import Ids  # noqa: E402
from lib.towers import TwoTowers, load_towers  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


@dataclass(frozen=True)
class Settings:
    """Batches to measure."""

    sizes: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    """Effective batches."""
    largest_plain: int = 4096
    """Largest batch for plain autograd."""
    chunk_size: int = 64
    """Pairs per forward of the cached step."""
    output: Path = ROOT / "benchmarks" / "results" / "memory.json"
    """JSON file of the results."""
    picture: Path = ROOT / "docs" / "memory.png"
    """PNG file of the plot."""
    measure: str | None = None
    """Internal: METHOD:SIZE to measure in this process."""


def main(settings: Settings) -> None:
    if settings.measure:
        method, size = settings.measure.split(":")
        print(json.dumps(measure(method, int(size), settings.chunk_size)))
        return
    rows = []
    for size in settings.sizes:
        row = {"effective_batch": size, "cached": in_a_process("cached", size, settings.chunk_size)}
        if size <= settings.largest_plain:
            row["plain"] = in_a_process("plain", size, settings.chunk_size)
        rows.append(row)
        print(line(row), flush=True)
    machine = f"{usable_cores()} cores, {platform.machine()}, torch {torch.__version__}"
    content = {"machine": machine, "chunk_size": settings.chunk_size, "rows": rows}
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    settings.output.write_text(json.dumps(content, indent=1) + "\n")
    draw(rows, settings.chunk_size, settings.picture)


def measure(method: str, size: int, chunk_size: int) -> dict:
    """Bytes and seconds of one step with a tiny CLIP pair on random pairs."""
    torch.set_num_threads(usable_cores())
    towers, processing = load_towers(family="clip", model="tiny", texts=lambda: ["a photo of a thing"])
    towers.train()
    tokens = processing.tokenize(["a photo of a thing"] * size)
    pixels = torch.randint(256, (size, 3, 32, 32), dtype=torch.uint8)
    batch = Chunk(pixels, *tokens, *(torch.arange(size) for _ in range(3)))
    step = {"cached": cached, "plain": plain}[method]
    step(towers, batch.rows(0, 8), 8)  # the first step allocates memory that stays
    before, began = peak_bytes(), time.perf_counter()
    step(towers, batch, chunk_size)
    return {"bytes": peak_bytes() - before, "seconds": time.perf_counter() - began}


def cached(towers: TwoTowers, batch: Chunk, chunk_size: int) -> None:
    chunks = [batch.rows(start, start + chunk_size) for start in range(0, len(batch), chunk_size)]
    cached_step(GradCache(towers, torch.device("cpu")), chunks, infonce, None)


def plain(towers: TwoTowers, batch: Chunk, chunk_size: int) -> None:
    output = towers(batch.pixel_values, batch.input_ids, batch.attention_mask)
    fresh = Pairs(output.image_embeds, output.text_embeds, *Ids.of(batch))
    dense_infonce(fresh, None, output.logit_scale, output.logit_bias).backward()


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_a_process(method: str, size: int, chunk_size: int) -> dict:
    command = [sys.executable, __file__, f"--measure={method}:{size}", f"--chunk-size={chunk_size}"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(finished.stdout.splitlines()[-1])


def line(row: dict) -> str:
    """A line of results, ratios first."""
    cached_row, plain_row = row["cached"], row.get("plain")
    cached_text = f"cached {cached_row['bytes'] / 2**20:7.0f} MiB {cached_row['seconds']:6.1f} s"
    if not plain_row:
        return f"N {row['effective_batch']:6}                                     {cached_text}"
    memory = plain_row["bytes"] / max(cached_row["bytes"], 1)
    seconds = cached_row["seconds"] / plain_row["seconds"]
    return (
        f"N {row['effective_batch']:6}  memory 1/{memory:<5.1f} time x{seconds:<5.2f}  {cached_text}  "
        f"plain {plain_row['bytes'] / 2**20:7.0f} MiB {plain_row['seconds']:6.1f} s"
    )


def draw(rows: list[dict], chunk_size: int, file: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for method, label in (("plain", "plain autograd"), ("cached", f"cached step, chunks of {chunk_size}")):
        points = [(row["effective_batch"], row[method]["bytes"] / 2**20) for row in rows if method in row]
        axes.plot(*zip(*points, strict=True), "o-", label=label)
    axes.set(xlabel="effective batch N (pairs)", ylabel="MiB of a step", title="Peak memory of one step")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
