"""The way from a run to one of its models; no process group and no accelerator is needed."""

import json
from pathlib import Path

from lib.errors import InputError
from lib.export.checked import RECORD, is_export
from lib.runs.checkpoint import BEST, MANIFEST, is_whole, newest_whole


def find_checkpoint(run: Path, name: str) -> Path:
    """The folder of a model: best (of a run without evaluations the last), last, step_000100, or a path.

    Of a run that kept no checkpoint, best and last are its export. The number of ranks that wrote a checkpoint does not
    matter. Raises InputError where there is no such model, or not whole.
    """
    root = run / "checkpoints"
    if name in (BEST, "last"):
        best = (root / BEST).resolve()
        found = best if name == BEST and is_whole(best) else newest_whole(root)
        if found is None and is_export(run / "export"):
            found = run / "export"
        if found is None:
            raise InputError(
                f"RUN {run} holds no whole checkpoint and no export; name a run, or a model by --checkpoint PATH"
            )
        return found
    folder = root / name if (root / name).exists() else Path(name)
    known = sorted(each.name for each in root.glob("step_*") if is_whole(each))
    choices = f"choose best, last, {', '.join(known)} or the path of a model folder"
    if not (folder / "config.json").is_file():
        raise InputError(f"--checkpoint {name}: no such model; {choices}")
    if not is_whole(folder) and ((folder / MANIFEST).exists() or folder.parent == root):
        raise InputError(f"--checkpoint {name} is not whole; {choices}")
    return folder


def step_of(run: Path, folder: Path) -> int | None:
    """The step that a checkpoint or the run's export was written after; None for another model folder."""
    if (folder / MANIFEST).is_file():
        return json.loads((folder / MANIFEST).read_text())["progress"]["step"]
    own = folder.resolve() == (run / "export").resolve() and is_export(folder)
    return json.loads((folder / RECORD).read_text()).get("step") if own else None
