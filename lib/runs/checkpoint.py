"""Checkpoints: written whole or not at all, found again, resumed from exactly, pruned.

A folder step_000100/ holds the model as `TwoTowers.from_pretrained` and `Processing.from_pretrained` load it, the
weights as they train where these are others (adapters, or an average is the model), their average, the optimizer and
schedule, one file per rank (random states, data position), the memory, and checkpoint.json, which names every other
file with its hash: a folder without it, or with a file of another size, is not a checkpoint.
"""

import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_map

from lib.data.durable import find_damage, flush, read_manifest, save_tensors, seal
from lib.errors import InputError
from lib.towers import TwoTowers
from lib.towers.processing import Processing

MANIFEST = "checkpoint.json"
BEST = "best"


@dataclass(frozen=True)
class TrainingState:
    """Everything that a checkpoint holds besides the model."""

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
    """Reads every rank's data position from the checkpoint: streams of another layout resume from them all."""


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
    torch.save(own, unfinished / _rank_file(rank))
    if rank == 0:
        towers.save_pretrained(unfinished, model)
        processing.save_pretrained(unfinished)
        torch.save(optimizer, unfinished / "optimizer.pt")
        for name, tensors in stores.items():
            if tensors:
                save_tensors(tensors, unfinished / f"{name}.safetensors")
    barrier()
    if rank == 0:
        # The manifest is written last, and a rename is atomic: whenever the process is killed, step_... is either whole
        # or absent, and the checkpoint before it is still there.
        seal(unfinished, MANIFEST, {"progress": state.progress})
        if final.exists():  # the same step of an earlier attempt
            outdated = root / f".outdated_step_{step:06d}"
            shutil.rmtree(outdated, ignore_errors=True)
            final.rename(outdated)
        unfinished.rename(final)
        flush(root)
    barrier()
    return final


def load_state(folder: Path, rank: int, world_size: int) -> TrainingState:
    """Read a checkpoint's training state for this rank of a run on `world_size` ranks.

    At another number of ranks than the checkpoint's there are no random states to resume from, and rank 0 takes over
    the counts of all ranks.
    """
    content = read_manifest(folder, MANIFEST)
    assert content is not None, "find_resume names whole folders"
    progress = content["progress"]
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


def find_resume(resume: str, root: Path) -> tuple[Path | None, list[str]]:
    """Find the checkpoint that --resume names, all of whose files have their hashes; return it with warnings.

    none; auto: the newest under `root`; or a path. A damaged checkpoint of a run is passed over for the one before.
    """
    if resume == "none":
        return None, []
    folder = root if resume == "auto" else Path(resume)
    runs = folder if resume == "auto" else folder / "checkpoints"
    warnings: list[str] = []
    if resume == "auto" or runs.is_dir():
        for step, checkpoint in reversed(step_folders(runs).items()):
            damaged = find_damage(checkpoint, MANIFEST)
            if damaged is None:
                return checkpoint, warnings
            if damaged == MANIFEST:
                warnings.append(f"{checkpoint} is not a whole checkpoint, or was cut short: it is passed over")
            else:
                aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
                warnings.append(
                    f"{checkpoint} is damaged: its {damaged} is not what was written; the run resumes from the "
                    f"checkpoint before step {step}"
                )
                if resume == "auto":  # or it would be named as one to resume from
                    shutil.rmtree(aside, ignore_errors=True)
                    checkpoint.rename(aside)
        if resume == "auto":
            return None, warnings
    elif (damaged := find_damage(folder, MANIFEST)) is None:
        return folder, []
    elif damaged != MANIFEST:
        raise InputError(f"--resume {resume} is damaged: its {damaged} is not what was written; name another one")
    raise InputError(f"--resume {resume} is not a whole checkpoint folder; use auto, none, or RUN/checkpoints/step_...")


def step_folders(root: Path) -> dict[int, Path]:
    """Checkpoint folders by step, ascending; whatever else lies there, as step_000004.bak, is none."""
    found = {
        int(named[1]): folder
        for folder in root.glob("step_*")
        if (named := re.fullmatch(r"step_(\d{6,})", folder.name)) and folder.is_dir()
    }
    return dict(sorted(found.items()))


def newest_whole(root: Path) -> Path | None:
    """The checkpoint of the highest step that has all its files, or None."""
    return next((folder for folder in reversed(step_folders(root).values()) if is_whole(folder)), None)


def is_whole(folder: Path) -> bool:
    """True if every file that checkpoint.json names is there with its size."""
    return read_manifest(folder, MANIFEST) is not None


def mark_best(folder: Path) -> None:
    """Point checkpoints/best at this checkpoint, in one atomic rename."""
    link, best = folder.parent / f".{BEST}", folder.parent / BEST
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    if best.is_dir() and not best.is_symlink():  # a copy of the run that followed the link: the step has its own folder
        shutil.rmtree(best)
    link.replace(best)


def prune(root: Path, keep: int, best: int | None) -> None:
    """Remove all but the `keep` newest checkpoints and that of the best step, and what an interrupted save left.

    keep: 0 keeps all.
    """
    for left in (*root.glob(".unfinished_step_*"), *root.glob(".outdated_step_*")):
        shutil.rmtree(left)
    folders = step_folders(root)
    kept = [step for step, folder in folders.items() if is_whole(folder)][-keep:] if keep else []
    for step, folder in folders.items():
        if kept and step < kept[0] and step != best:
            (folder / MANIFEST).unlink(missing_ok=True)  # a removal cut short leaves no checkpoint behind
            shutil.rmtree(folder)


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
