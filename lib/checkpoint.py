"""Checkpoints: written whole or not at all, found again, resumed from exactly, pruned.

A folder step_000100/ holds the model as `TwoTowers.from_pretrained` and `Processing.from_pretrained` load it, the
weights as they train where these are others (adapters, or an average is the model), their average, the optimizer and
schedule, one file per rank (random states, data position), the memory, and checkpoint.json, which names every other
file with its size: a folder without it, or with a file of another size, is not a checkpoint.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_map

from lib.errors import InputError
from lib.processing import Processing
from lib.redaction import write_text
from lib.towers import TwoTowers

MANIFEST = "checkpoint.json"
BEST = "best"


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint holds besides the model."""

    progress: dict
    """JSON values: step, world_size, workers, chunk_size, ..."""
    optimizer: dict
    """The optimizer's moments by parameter, the updates done, the (fp16) gradient scaler; the same on every rank."""
    rank: dict
    """This rank's random states and data position."""
    memory: dict[str, torch.Tensor] = field(default_factory=dict)
    """The memory bank's tensors; empty without one."""
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    """The towers' own state dict, where the folder's model is another; else empty."""
    average: dict[str, torch.Tensor] = field(default_factory=dict)
    """The state dict of the weights' moving average; empty without one."""
    data_of_all_ranks: Callable[[], list[dict]] = list
    """Of a checkpoint: reads every rank's data position, which streams of another layout go on from."""


def save_checkpoint(
    root: Path,
    step: int,
    towers: TwoTowers,
    model: dict[str, torch.Tensor],
    processing: Processing,
    state: TrainingState,
    *,
    rank: int,
    barrier: Callable[[], None],
) -> Path:
    """Write root/step_000100 through a temporary folder and a rename; all ranks call it, and all wait for it.

    model: the weights that the folder's model has.
    """
    final, unfinished = root / f"step_{step:06d}", root / f".unfinished_step_{step:06d}"
    if rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    barrier()
    # Everything is on the host before a file is opened: here a fault of the device is not taken for one of the disk.
    own = _on_host(state.rank)
    if rank == 0:
        optimizer, model = _on_host(state.optimizer), _on_host(model)
        stores = _on_host({"memory": state.memory, "weights": state.weights, "average": state.average})
    with _disk_errors():
        torch.save(own, unfinished / _rank_file(rank))
        if rank == 0:
            towers.save_pretrained(unfinished, model)
            processing.save_pretrained(unfinished)
            torch.save(optimizer, unfinished / "optimizer.pt")
            for name, tensors in stores.items():
                if tensors:
                    save_file(tensors, unfinished / f"{name}.safetensors")
    barrier()
    if rank == 0:
        _seal(unfinished, state.progress)
        if final.exists():  # the same step of an earlier attempt
            shutil.rmtree(final)
        unfinished.rename(final)
        _sync(root)
    barrier()
    return final


def load_state(folder: Path, rank: int, world_size: int) -> TrainingState:
    """Read a checkpoint's training state for this rank of a run on `world_size` ranks.

    At another number of ranks than the checkpoint's there are no random states to go on from, and rank 0 takes over
    what all ranks had counted.
    """
    progress = json.loads((folder / MANIFEST).read_text())["progress"]
    saved = progress["world_size"]
    if saved == world_size:
        own = _load(folder / _rank_file(rank))
    else:
        data = _data_of_ranks(folder, saved)
        counts = merge_counts([state["counts"] for state in data] if rank == 0 else [])
        own = {"random": None, "data": data[0] | {"counts": counts}}
    return TrainingState(
        progress=progress,
        optimizer=_load(folder / "optimizer.pt"),
        rank=own,
        memory=_tensors(folder / "memory.safetensors"),
        weights=_tensors(folder / "weights.safetensors"),
        average=_tensors(folder / "average.safetensors"),
        data_of_all_ranks=partial(_data_of_ranks, folder, saved),
    )


def merge_counts(counts: Sequence[dict]) -> dict:
    """Sum pairs read, used and skipped by reason over ranks."""
    skipped = sum((Counter(of_rank["skipped"]) for of_rank in counts), Counter())
    return {
        "read": sum(of_rank["read"] for of_rank in counts),
        "used": sum(of_rank["used"] for of_rank in counts),
        "skipped": dict(skipped),
    }


def find_resume(resume: str, root: Path) -> Path | None:
    """The folder that --resume names: none, the newest whole one under `root` (auto), or a path."""
    if resume == "none":
        return None
    if resume == "auto":
        return newest_whole(root)
    folder = Path(resume)
    if (folder / "checkpoints").is_dir():
        folder = newest_whole(folder / "checkpoints") or folder
    if not is_whole(folder):
        raise InputError(
            f"--resume {resume} is not a whole checkpoint folder; use auto, none, or RUN/checkpoints/step_..."
        )
    return folder


def newest_whole(root: Path) -> Path | None:
    """The checkpoint of the highest step that has all its files, or None."""
    folders = sorted(root.glob("step_*"), key=lambda folder: int(folder.name.removeprefix("step_")))
    return next((folder for folder in reversed(folders) if is_whole(folder)), None)


def is_whole(folder: Path) -> bool:
    """Whether every file that checkpoint.json names is there with its size."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def mark_best(folder: Path) -> None:
    """Point checkpoints/best at this checkpoint, in one atomic rename."""
    link = folder.parent / f".{BEST}"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.replace(folder.parent / BEST)


def prune(root: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints and the best one, and what an interrupted save left; 0 keeps all."""
    for unfinished in root.glob(".unfinished_step_*"):
        shutil.rmtree(unfinished)
    best = (root / BEST).resolve() if (root / BEST).exists() else None
    folders = sorted(root.glob("step_*"), key=lambda folder: int(folder.name.removeprefix("step_")))
    for folder in folders[:-keep] if keep else []:
        if folder.resolve() != best:
            (folder / MANIFEST).unlink(missing_ok=True)  # a removal that is cut short leaves no checkpoint behind
            shutil.rmtree(folder)


@contextmanager
def _disk_errors() -> Iterator[None]:
    """torch and safetensors raise errors of their own where a file cannot be written: make an OSError of them.

    Nothing within may compute or copy on a device, whose errors come late and are RuntimeErrors too.
    """
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        raise OSError(str(error)) from error


def _on_host(values: dict) -> dict:
    """The same with every tensor in the host's memory."""
    move = lambda value: value.detach().cpu().contiguous() if isinstance(value, torch.Tensor) else value  # noqa: E731
    return tree_map(move, values)


def _data_of_ranks(folder: Path, world_size: int) -> list[dict]:
    return [_load(folder / _rank_file(number))["data"] for number in range(world_size)]


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    return load_file(file) if file.exists() else {}


def _load(file: Path) -> dict:
    return torch.load(file, map_location="cpu", weights_only=True)


def _rank_file(rank: int) -> str:
    return f"rank_{rank:04d}.pt"


def _seal(folder: Path, progress: dict) -> None:
    """Flush every file to the disk, then write the manifest that declares the folder whole."""
    files = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
    for name in files:
        _sync(folder / name)
    write_text(folder / MANIFEST, json.dumps({"progress": progress, "files": files}, indent=1))
    _sync(folder / MANIFEST)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
