"""Time and memory of the losses and their gradients alone: ours compared with open_clip's modules and plain autograd.

python benchmarks/loss.py [--sizes 1024 4096 8192 32768 --dimensions 512 768] writes benchmarks/results/loss.json.
Ours is measured without groups (every pair its own), with groups of five, with a memory bank of N pairs, and with both.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from measured import RESULTS, Way, megabytes, take_turns, write
from open_clip import ClipLoss
from open_clip.loss import SigLipLoss

from lib.losses import Loss, Pairs, infonce, sigmoid
from lib.losses.objective import DenseLoss, dense_infonce, dense_sigmoid

SCALE, BIAS = {"infonce": 14.3, "sigmoid": 10.0}, {"infonce": 0.0, "sigmoid": -9.0}


@dataclass(frozen=True)
class Settings:
    """Losses and sizes to measure."""

    sizes: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)
    """Effective batches."""
    dimensions: tuple[int, ...] = (512, 768)
    """Dimensions of the embeddings."""
    largest_peer: int = 8192
    """Largest batch for open_clip's losses and plain autograd, which hold all logits."""
    largest_variant: int = 8192
    """Largest batch for groups and memory bank."""
    repeats: int = 5
    """Repeats, of which the median counts."""
    output: Path = RESULTS / "loss.json"
    """JSON file of the results."""


def main(settings: Settings) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name in ("infonce", "sigmoid"):
        for dimension in settings.dimensions:
            for size in settings.sizes:
                ways = ways_to_do_it(settings, name, size, dimension, device)
                results = take_turns(ways, settings.repeats if size <= settings.largest_peer else 1, device)
                rows.append({"loss": name, "pairs": size, "dimension": dimension, "ways": results})
                print(as_line(rows[-1]), flush=True)
    write(settings.output, device, {"repeats": settings.repeats, "rows": rows})


def ways_to_do_it(settings: Settings, name: str, size: int, dimension: int, device: torch.device) -> dict[str, Way]:
    fresh, old = (random_pairs(size, dimension, seed, device) for seed in (0, 1))
    grouped, old_grouped = in_groups(fresh), in_groups(old)
    scale, bias = torch.tensor(SCALE[name], device=device), torch.tensor(BIAS[name], device=device)
    loss, dense, module = LOSSES[name]
    ours = partial(tiled, loss, scale, bias)
    ways = {"ours": partial(ours, fresh, None)}
    if size <= settings.largest_variant:
        ways |= {
            "ours_groups": partial(ours, grouped, None),
            "ours_memory": partial(ours, fresh, old),
            "ours_groups_memory": partial(ours, grouped, old_grouped),
        }
    if size <= settings.largest_peer:
        ways["open_clip"] = partial(of_open_clip, module, scale, bias, fresh)
        ways["autograd"] = partial(by_autograd, dense, scale, bias, fresh)
    return ways


def tiled(loss: Loss, scale: torch.Tensor, bias: torch.Tensor, fresh: Pairs, remembered: Pairs | None) -> None:
    loss(fresh, remembered, scale, bias, slice(0, len(fresh)))


def of_open_clip(module: Callable, scale: torch.Tensor, bias: torch.Tensor, fresh: Pairs) -> None:
    images, texts, scale, bias = leaves(fresh, scale, bias)
    numbers = (scale, bias) if module is SigLipLoss else (scale,)
    module()(images, texts, *numbers).backward()


def by_autograd(dense: DenseLoss, scale: torch.Tensor, bias: torch.Tensor, fresh: Pairs) -> None:
    images, texts, scale, bias = leaves(fresh, scale, bias)
    dense(replace(fresh, image_embeds=images, text_embeds=texts), None, scale, bias).backward()


def leaves(fresh: Pairs, scale: torch.Tensor, bias: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.detach().requires_grad_() for tensor in (fresh.image_embeds, fresh.text_embeds, scale, bias)]


LOSSES = {
    "infonce": (infonce, dense_infonce, ClipLoss),
    "sigmoid": (sigmoid, dense_sigmoid, SigLipLoss),
}


def random_pairs(size: int, dimension: int, seed: int, device: torch.device) -> Pairs:
    """Random unit embeddings, each pair its own group; another seed gives other samples."""
    generator = torch.Generator().manual_seed(seed)
    embeds = (F.normalize(torch.randn(size, dimension, generator=generator), dim=1).to(device) for _ in range(2))
    ids = torch.arange(size, device=device) + seed * size
    zeros = torch.zeros(size, device=device)
    return Pairs(*embeds, ids, ids, ids, image_normalizer=zeros, text_normalizer=zeros)


def in_groups(pairs: Pairs) -> Pairs:
    """Five pairs per group, like captions of one image; a quarter of the samples recurs with another seed."""
    count = len(pairs)
    return replace(pairs, group=pairs.group % count // 5, sample_id=pairs.sample_id % (3 * count // 4))


def as_line(row: dict) -> str:
    """A line of results, ratios of time and memory first."""
    ways, ours = row["ways"], row["ways"]["ours"]
    parts = [f"{row['loss']:8} N {row['pairs']:6} D {row['dimension']:4}"]
    if peer := ways.get("open_clip"):
        parts.append(f"x{ours['seconds'] / peer['seconds']:.2f} of open_clip's time")
        parts.append(f"x{ours['peak_bytes'] / peer['peak_bytes']:.3f} of its memory")
    parts += [f"{name} {way['seconds']:.2f} s {megabytes(way['peak_bytes'])}" for name, way in ways.items()]
    return "  ".join(parts)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
