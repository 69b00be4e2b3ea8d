"""One optimizer step: ours, open_clip's and sentence-transformers', alternating on the same towers and batch.

python benchmarks/step.py [--subject small --sizes 512 1024 2048 4096 8192 --chunk-sizes 64] writes
benchmarks/results/step_SUBJECT.json. The ways are those of benchmarks/floor.py and peers.py; ours is measured
without kept graphs and with as many as --keep-graphs auto keeps. gpu.py measures steps on a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from floor import ours, plain
from measured import RESULTS, matrix_rate, megabytes, take_turns, write
from peers import open_clip_step, sentence_transformers_step
from subjects import SUBJECTS, Autocast, chunked, flops_of_a_pair, make_batch, make_towers
from torch.optim import AdamW

from lib.backends.device import free_memory
from lib.losses.tiles import tile_side
from lib.setup.chunk_memory import measure_activations
from lib.setup.plan import BatchPlan, graphs_that_fit
from lib.towers import TwoTowers
from lib.towers.trunk_options import compile_trunks


@dataclass(frozen=True)
class Settings:
    """Steps to measure, and repeats."""

    subject: str = "small"
    """small, narrow, wide, vit-b-32 or vit-b-16 (see benchmarks/subjects.py)."""
    sizes: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    """Effective batches."""
    chunk_sizes: tuple[int, ...] = (64,)
    """Pairs per forward."""
    repeats: int = 5
    """Steps of each way, of which the median counts."""
    largest_open_clip: int = 4096
    """Largest batch for open_clip's step, which computes the loss once per chunk."""
    largest_peer: int = 8192
    """Largest batch for sentence-transformers' step."""
    compile: bool = False
    """Compile the trunks for all ways."""
    output: Path | None = None
    """JSON file of the results; by default benchmarks/results/step_SUBJECT.json."""


def main(settings: Settings) -> None:
    if settings.subject not in SUBJECTS:
        raise SystemExit(f"--subject {settings.subject} is not one of {', '.join(SUBJECTS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    towers = Autocast(make_towers(settings.subject, device), device)
    a_pair = activations(settings.subject, towers)
    if settings.compile:  # after the measurement: its forward of few pairs would make torch compile for all sizes
        compile_trunks(towers.towers, "inductor", device)
    rate, flops = matrix_rate(device), flops_of_a_pair(settings.subject)
    rows = []
    for chunk_size in settings.chunk_sizes:
        for size in settings.sizes:
            row = measure(settings, towers, a_pair, size, min(chunk_size, size), device)
            row["share_of_matrix_rate"] = flops * size / row["ways"]["ours"]["seconds"] / rate
            rows.append(row)
            print(as_line(row), flush=True)
    suffix = "_compiled" if settings.compile else ""
    output = settings.output or RESULTS / f"step_{settings.subject}{suffix}.json"
    content = {"subject": settings.subject, "compile": settings.compile, "repeats": settings.repeats}
    content["parameters"] = sum(parameter.numel() for parameter in towers.parameters())
    write(output, device, content | {"matrix_flops_per_second": rate, "flops_per_pair": flops, "rows": rows})


def measure(
    settings: Settings, towers: Autocast, a_pair: int, size: int, chunk_size: int, device: torch.device
) -> dict:
    """Measure all ways at one batch and chunk size; a_pair: bytes of one pair's activations."""
    chunks = chunked(make_batch(settings.subject, size), chunk_size)
    kept = graphs_kept(towers.towers, a_pair, size, chunk_size, chunks[0].images[0].nbytes)
    gradients = {"plain": plain, "ours": ours, "ours_kept": partial(ours, keep_graphs=kept)}
    if size <= settings.largest_peer:
        gradients["sentence_transformers"] = sentence_transformers_step
    if size <= settings.largest_open_clip:
        gradients["open_clip"] = open_clip_step
    optimizer = AdamW(towers.parameters(), lr=1e-4, fused=True)
    one_step(plain, towers, chunks[:1], optimizer)  # creates the optimizer's state, which all ways share
    ways = {name: partial(one_step, way, towers, chunks, optimizer) for name, way in gradients.items()}
    results = take_turns(ways, settings.repeats, device)
    embeddings = 2 * size * SUBJECTS[settings.subject].embed_dim * 4
    return {
        "effective_batch": size,
        "chunk_size": chunk_size,
        "graphs_kept": kept,
        "embedding_bytes": embeddings,
        "ways": results,
    }


def one_step(gradients: Callable, towers: Autocast, chunks: list, optimizer: AdamW) -> None:
    gradients(towers, chunks)
    optimizer.step()
    optimizer.zero_grad()


def activations(subject: str, towers: Autocast) -> int:
    """Bytes that autograd keeps of one pair."""
    batch = make_batch(subject, 4).to(towers.device)
    with torch.autocast(towers.device.type, torch.bfloat16, enabled=towers.enabled):
        return measure_activations(towers.towers, batch.inputs)


def graphs_kept(towers: TwoTowers, a_pair: int, size: int, chunk_size: int, image_bytes: int) -> int:
    """The choice of --keep-graphs auto for activations of `a_pair` bytes per pair."""
    device, weights = towers.logit_scale.device, sum(parameter.nbytes for parameter in towers.parameters())
    plan = BatchPlan(
        effective_batch=size,
        world_size=1,
        chunk_size=chunk_size,
        keep_graphs=0,
        xbm_size=0,
        embed_dim=towers.embed_dim,
        image_bytes=image_bytes,
        graph_bytes=chunk_size * a_pair,
        chunk_bytes=chunk_size * (a_pair + 5 * image_bytes),
        state_bytes=4 * weights,  # weights, gradients, two moments
        tile=tile_side(device),
    )
    return graphs_that_fit(plan, free_memory(device) + weights, device)


def as_line(row: dict) -> str:
    """A line of results, ratios to the floor first."""
    ways, floor = row["ways"], row["ways"]["plain"]["seconds"]
    ratios = "  ".join(f"{name} x{way['seconds'] / floor:.2f}" for name, way in ways.items() if name != "plain")
    memory = ", ".join(f"{name} {megabytes(way['peak_bytes'])}" for name, way in ways.items())
    return f"N {row['effective_batch']:6} C {row['chunk_size']:4}  {ratios}  plain {floor:.2f} s; {memory}"


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
