"""Communication, memory and time of one rank of a large world for the loss of a step, measured on this machine.

python benchmarks/scaling.py [--worlds 1 8 64 512] writes benchmarks/results/scaling.json.
torch's fake process group replaces the other ranks: collectives return at once, and their bytes are counted.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from torch.testing._internal.distributed.fake_pg import FakeStore

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lib.distributed import gather_rows, logsumexp_over_ranks, sum_over_ranks  # noqa: E402
from lib.losses import Pairs, infonce, sigmoid  # noqa: E402


@dataclass(frozen=True)
class Settings:
    """World sizes to measure."""

    worlds: tuple[int, ...] = (1, 8, 64, 512)
    """W"""
    effective_batch: int = 8192
    """N"""
    xbm_size: int = 8192
    """Q"""
    embed_dim: int = 512
    """D"""
    measure: str | None = None
    """Internal: LOSS:W to measure in this process."""


def main(settings: Settings) -> None:
    if settings.measure:
        loss, world_size = settings.measure.split(":")
        print(json.dumps(measure(loss, int(world_size), settings)))
        return
    rows = []
    for loss in ("sigmoid", "infonce"):
        for world_size in settings.worlds:
            rows.append({"loss": loss, "world_size": world_size} | in_a_process(loss, world_size, settings))
            print(rows[-1], flush=True)
    sizes = {name: getattr(settings, name) for name in ("effective_batch", "xbm_size", "embed_dim")}
    machine = f"{platform.machine()}, one thread, torch {torch.__version__}"
    file = ROOT / "benchmarks" / "results" / "scaling.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"machine": machine} | sizes | {"rows": rows}, indent=1) + "\n")


def measure(loss: Literal["sigmoid", "infonce"], world_size: int, settings: Settings) -> dict:
    """Bytes that a rank passes to all_gather and all_reduce, seconds, and peak memory without the memory bank."""
    n, q, d = settings.effective_batch, settings.xbm_size, settings.embed_dim
    per_rank = n // world_size
    own, bank = random_pairs(per_rank, d), random_pairs(q, d)
    kinds = {"sigmoid": sigmoid, "infonce": partial(infonce, merge_logsumexp=logsumexp_over_ranks)}
    if world_size > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    given, before, began = counted(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    fresh = Pairs(*map(gather_rows, (own.image_embeds, own.text_embeds, *own.ids)))
    if world_size > 1:  # the fake group does not fill the buffers
        fresh = random_pairs(n, d)
    share = kinds[loss](fresh, bank, torch.tensor(10.0), torch.tensor(-10.0), slice(0, per_rank))
    sum_over_ranks(share.text_embeds)
    sum_over_ranks(torch.stack([share.loss, share.logit_scale, share.logit_bias]))
    seconds = time.perf_counter() - began
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return dict(given) | {"seconds": seconds, "peak_bytes": peak}


def counted() -> Counter:
    """Start counting the bytes that this rank passes to each kind of collective."""
    given: Counter = Counter(all_gather=0, all_reduce=0)
    gather, reduce = dist.all_gather, dist.all_reduce

    def all_gather(pieces: list, tensor: torch.Tensor) -> None:
        given["all_gather"] += tensor.nbytes
        gather(pieces, tensor)

    def all_reduce(tensor: torch.Tensor) -> None:
        given["all_reduce"] += tensor.nbytes
        reduce(tensor)

    dist.all_gather, dist.all_reduce = all_gather, all_reduce
    return given


def random_pairs(count: int, embed_dim: int) -> Pairs:
    generator = torch.Generator().manual_seed(count)
    embeds = [torch.nn.functional.normalize(torch.randn(count, embed_dim, generator=generator)) for _ in range(2)]
    zeros = torch.zeros(count)
    ids = torch.arange(count)
    return Pairs(*embeds, ids, ids, ids, image_normalizer=zeros, text_normalizer=zeros)


def in_a_process(loss: str, world_size: int, settings: Settings) -> dict:
    flags = [f"--measure={loss}:{world_size}"]
    flags += [f"--{n.replace('_', '-')}={getattr(settings, n)}" for n in ("effective_batch", "xbm_size", "embed_dim")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *flags]
    finished = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(finished.stdout.splitlines()[-1])


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
