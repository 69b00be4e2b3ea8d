"""One optimizer step, ours beside what a user would use instead: same towers, same batch, taking turns.

python benchmarks/step.py [--subject small --sizes 512 1024 2048 4096 8192 --chunk-sizes 64] writes
benchmarks/results/step_SUBJECT.json. The ways are those of benchmarks/floor.py and peers.py; ours comes as training
runs it and with the graphs that --keep-graphs auto keeps; on an accelerator, where training's pass 1 takes larger
forwards, also chunk by chunk in both passes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from floor import ours, plain
from measured import RESULTS, megabytes, take_turns, write
from peers import open_clip_step, sentence_transformers_step
from subjects import SUBJECTS, Autocast, chunked, flops_of_a_pair, make_batch, make_towers
from torch.optim import AdamW

from lib.logit_tiles import tile_side
from lib.plan import BatchPlan, graphs_that_fit, measure_activations, pass_1_pairs
from lib.trunk_options import compile_trunks


@dataclass(frozen=True)
class Settings:
    """What to step and how often."""

    subject: str = "small"
    """small, narrow, wide, vit-b-32 or vit-b-16 (see benchmarks/subjects.py)."""
    sizes: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    """Effective batches."""
    chunk_sizes: tuple[int, ...] = (64,)
    """Pairs per forward."""
    repeats: int = 5
    """Steps of each way; the median counts."""
    largest_open_clip: int = 4096
    """open_clip's step, which takes the loss once per chunk, is measured up to this batch."""
    largest_peer: int = 8192
    """sentence-transformers' step is measured up to this batch."""
    compile: bool = False
    """Compile the trunks, for every way alike."""
    output: Path | None = None
    """File of the figures; by default benchmarks/results/step_SUBJECT.json."""


def main(settings: Settings) -> None:
    if settings.subject not in SUBJECTS:
        raise SystemExit(f"--subject {settings.subject} is not one of {', '.join(SUBJECTS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    towers = Autocast(make_towers(settings.subject, device), device)
    if settings.compile:
        compile_trunks(towers.towers, "inductor", device)
    rate, flops = matrix_rate(device), flops_of_a_pair(settings.subject)
    rows = []
    for chunk_size in settings.chunk_sizes:
        for size in settings.sizes:
            row = measure(settings, towers, size, min(chunk_size, size), device)
            row["share_of_matrix_rate"] = flops * size / row["ways"]["ours"]["seconds"] / rate
            rows.append(row)
            print(told(row), flush=True)
    suffix = "_compiled" if settings.compile else ""
    output = settings.output or RESULTS / f"step_{settings.subject}{suffix}.json"
    content = {"subject": settings.subject, "compile": settings.compile, "repeats": settings.repeats}
    content["parameters"] = sum(parameter.numel() for parameter in towers.parameters())
    write(output, device, content | {"matrix_flops_per_second": rate, "flops_per_pair": flops, "rows": rows})


def measure(settings: Settings, towers: Autocast, size: int, chunk_size: int, device: torch.device) -> dict:
    """All ways at one batch and chunk."""
    chunks = chunked(make_batch(settings.subject, size), chunk_size)
    kept = graphs_kept(settings.subject, towers, size, chunk_size, device)
    together = max(1, pass_1_pairs(device) // chunk_size)
    gradients = {
        "plain": plain,
        "ours": partial(ours, together=together),
        "ours_kept": partial(ours, together=together, keep_graphs=kept),
    }
    if together > 1:
        gradients["chunk_by_chunk"] = ours
    if size <= settings.largest_peer:
        gradients["sentence_transformers"] = sentence_transformers_step
    if size <= settings.largest_open_clip:
        gradients["open_clip"] = open_clip_step
    optimizer = AdamW(towers.parameters(), lr=1e-4, fused=True)
    one_step(plain, towers, chunks[:1], optimizer)  # makes the optimizer's state, which is no way's own memory
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


def graphs_kept(subject: str, towers: Autocast, size: int, chunk_size: int, device: torch.device) -> int:
    """What --keep-graphs auto chooses."""
    batch = make_batch(subject, 4).to(device)
    image_bytes = batch.pixel_values[0].nbytes
    with torch.autocast(device.type, torch.bfloat16, enabled=towers.enabled):
        activations = measure_activations(towers.towers, batch.inputs)
    state = 4 * sum(parameter.nbytes for parameter in towers.parameters())  # weights, gradients, two moments
    plan = BatchPlan(
        size, 1, chunk_size, 0, 0, towers.towers.embed_dim, image_bytes, activations, state, tile_side(device),
        pass_1_pairs(device),
    )  # fmt: skip
    return graphs_that_fit(plan, device, 1)


def matrix_rate(device: torch.device) -> float:
    """Floating-point operations a second of a large matrix product: bfloat16 on an accelerator, float32 on a CPU."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    result = take_turns({"product": partial(torch.mm, left, right)}, 5, device)
    return 2 * side**3 / min(result["product"]["all_seconds"])


def told(row: dict) -> str:
    """Ratios to the floor first."""
    ways, floor = row["ways"], row["ways"]["plain"]["seconds"]
    ratios = "  ".join(f"{name} x{way['seconds'] / floor:.2f}" for name, way in ways.items() if name != "plain")
    memory = ", ".join(f"{name} {megabytes(way['peak_bytes'])}" for name, way in ways.items())
    return f"N {row['effective_batch']:6} C {row['chunk_size']:4}  {ratios}  plain {floor:.2f} s; {memory}"


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
