"""Time of a step with each way to recompute less, divided by the floor's (with the same frozen parts).

python benchmarks/savings.py [--size 1024] writes benchmarks/results/savings.json.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from floor import plain
from measured import RESULTS, take_turns, write
from subjects import Autocast, chunked, make_batch, make_towers

from lib.data import Chunk
from lib.gradcache.step import GradCache, cached_step
from lib.losses import Pairs, infonce


@dataclass(frozen=True)
class Settings:
    """The step to measure."""

    subject: str = "small"
    """A subject of benchmarks/subjects.py."""
    size: int = 1024
    """Effective batch."""
    chunk_size: int = 64
    """Pairs per forward."""
    repeats: int = 5
    """Repeats, of which the median counts."""
    output: Path = RESULTS / "savings.json"
    """JSON file of the results."""


def main(settings: Settings) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    towers, frozen = (Autocast(make_towers(settings.subject, device), device) for _ in range(2))
    frozen.towers.image.trunk.requires_grad_(False)
    frozen.towers.train()
    batch = make_batch(settings.subject, settings.size)
    chunks = chunked(batch, settings.chunk_size)
    old = other_samples(7 * settings.size, towers.towers.embed_dim, device)
    gradients = partial(ours, towers, chunks)
    count = len(chunks)
    ways = {
        "floor": partial(plain, towers, chunks),
        "floor, image trunk frozen": partial(plain, frozen, chunks),
        "chunk by chunk": gradients,
        "half of the graphs kept": partial(gradients, keep_graphs=count // 2),
        "all graphs kept": partial(gradients, keep_graphs=count),
        "15 distinct texts, encoded once": partial(ours, towers, prompted(chunks, 15), share_texts=True),
        "image trunk frozen": partial(ours, frozen, chunks, image_recompute="head"),
        f"memory of {len(old)} pairs": partial(gradients, remembered=old),
    }
    results = take_turns(ways, settings.repeats, device)
    content = {"subject": settings.subject, "effective_batch": settings.size, "chunk_size": settings.chunk_size}
    write(settings.output, device, content | {"repeats": settings.repeats, "ways": results})
    for name, result in results.items():
        print(f"x{result['seconds'] / results['floor']['seconds']:.2f}  {name}  {result['seconds']:.2f} s")


def ours(towers: Autocast, chunks: list[Chunk], remembered: Pairs | None = None, **options) -> None:
    cached_step(GradCache(towers, towers.device, **options), chunks, infonce, remembered)


def other_samples(size: int, dimension: int, device: torch.device) -> Pairs:
    """Remembered pairs that do not occur in the batch."""
    embeds = (F.normalize(torch.randn(size, dimension), dim=1).to(device) for _ in range(2))
    ids = torch.arange(size, device=device) + 10**9
    zeros = torch.zeros(size, device=device)
    return Pairs(*embeds, ids, ids, ids, image_normalizer=zeros, text_normalizer=zeros)


def prompted(chunks: list[Chunk], texts: int) -> list[Chunk]:
    """The chunks with a few texts repeated, like class prompts."""
    table = chunks[0].input_ids[:texts]
    prompts = [torch.arange(len(chunk)) % len(table) for chunk in chunks]
    return [replace(chunk, input_ids=table[ids], text_id=ids) for chunk, ids in zip(chunks, prompts, strict=True)]


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
