"""Checkpoints of a run, found and loaded for export; no process group and no accelerator is needed."""

import json
from pathlib import Path

from lib.checkpoint import BEST, MANIFEST, is_whole, newest_whole
from lib.errors import InputError


def find_checkpoint(run: Path, name: str) -> Path:
    """The folder of a model: best (of a run without evaluations the last), last, step_000100, or a path.

    The number of ranks that wrote it does not matter. Raises InputError where there is no such model, or not whole.
    """
    root = run / "checkpoints"
    if name in (BEST, "last"):
        best = (root / BEST).resolve()
        found = best if name == BEST and is_whole(best) else newest_whole(root)
        if found is None:
            raise InputError(f"RUN {run} holds no whole checkpoint; name a run, or a model by --checkpoint PATH")
        return found
    folder = root / name if (root / name).exists() else Path(name)
    known = sorted(each.name for each in root.glob("step_*") if is_whole(each))
    choices = f"choose best, last, {', '.join(known)} or the path of a model folder"
    if not (folder / "config.json").is_file():
        raise InputError(f"--checkpoint {name}: no such model; {choices}")
    if not is_whole(folder) and ((folder / MANIFEST).exists() or folder.parent == root):
        raise InputError(f"--checkpoint {name} is not whole; {choices}")
    return folder


def step_of(folder: Path) -> int | None:
    """The step that a checkpoint was written after; None for a model folder that is no checkpoint."""
    manifest = folder / MANIFEST
    return json.loads(manifest.read_text())["progress"]["step"] if manifest.is_file() else None
