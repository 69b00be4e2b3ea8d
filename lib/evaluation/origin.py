"""The run that a model comes from, and whether it was trained on what it is measured on."""

from contextlib import suppress
from pathlib import Path

from lib.config.safe_yaml import read_yaml
from lib.data.sources import split_weight
from lib.errors import InputError
from lib.evaluation.options import Examined
from lib.runs.reporter import CONFIG, METRICS


def run_of(model: str) -> Path | None:
    """The run's folder, which a model, checkpoint or export is or lies in; None of what we did not train."""
    path = Path(model).resolve()
    return next((folder for folder in (path, *list(path.parents)[:2]) if (folder / METRICS).is_file()), None)


def trained_on(model: str, examined: Examined, part: str) -> str | None:
    """What to say where the images of `part` were trained on without its name telling so; None where they were not.

    part: "train", "val", "test", or "all" of data without parts.
    """
    run = run_of(model)
    if run is None or not (run / CONFIG).is_file():
        return None
    config = None
    with suppress(InputError):
        config = read_yaml(run / CONFIG, str(run / CONFIG))
    if not isinstance(config, dict):
        return f"{run / CONFIG} is damaged: it is unknown whether {run} was trained on these images"
    data, kept = config.get("data") or (), config.get("hold_out") or 0
    same = {_where(each) for each in ([data] if isinstance(data, str) else data)} & {_where(examined.data)}
    # What --hold-out keeps is the same images and more for a larger fraction.
    if not same or (part != "all" and (examined.hold_out or 0) <= kept):
        return None
    told = f"{run} has seen these images, or some of them, in training: figures are too good"
    if kept:
        return f"{told}; --hold-out {kept:g} measures on those that were kept back"
    return f"{told}; train and evaluate with --hold-out 0.1 for figures of unseen images"


def _where(data: str) -> str:
    """A source without its weight in a mixture; a path in full."""
    name, _ = split_weight(data)
    return str(Path(name).resolve()) if Path(name).exists() else name
