"""The flags that every task of evaluate.py takes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lib.config.settings import LARGEST_SEED, MOST_WORKERS
from lib.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every task takes: the data and how to run."""

    data: str = "digits"
    """As in training: digits, class folders, a table of captions, COCO, Flickr or Karpathy files, or tar shards."""
    image_root: str | None = None
    """Folder of the images that a table or annotation file names, where they do not lie beside it."""
    hold_out: float | None = None
    """Of data without parts, evaluate on this fraction of the images: what training kept back by the same flag."""
    cache_dir: Path | None = None
    """Folder for remote shards and for embeddings; default: contrastive-training in ~/.cache."""
    allow_pipe: bool = False
    """Run what follows `pipe:` in --data as a command that writes a tar."""
    output_dir: Path
    """Folder for metrics.json, the pictures and report.html."""
    split: Literal["auto", "train", "val", "test"] = "auto"
    """Part of the data; auto: test where there is one, else val, else everything."""
    batch_size: int = 256
    """Images or texts in one forward of one rank."""
    workers: int = 2
    """Processes of each rank that decode images; 0: the rank does it itself."""
    limit: int | None = None
    """Take only this many images of each part that is used, evenly spaced."""
    seed: int = 0
    """Decides whatever is drawn at random."""

    def check(self) -> None:
        """Raise InputError naming every flag whose value cannot work."""
        faults = self.faults()
        if faults:
            raise InputError("; ".join(faults))

    def faults(self) -> list[str]:
        """What cannot work, a clause for each flag."""
        least = {
            "--batch-size": (self.batch_size, 1),
            "--workers": (self.workers, 0),
            "--limit": (self.limit, 1),
            "--seed": (self.seed, 0),
        }
        most = {"--workers": (self.workers, MOST_WORKERS), "--seed": (self.seed, LARGEST_SEED)}
        return [
            f"{flag} {value} must be at least {bound}"
            for flag, (value, bound) in least.items()
            if value is not None and value < bound
        ] + [f"{flag} {value} must be at most {bound}" for flag, (value, bound) in most.items() if value > bound]


@dataclass(frozen=True, kw_only=True)
class OneModel(Common):
    """What a task on one model takes."""

    model: str
    """Run, checkpoint or export folder, or the hub id or folder of a CLIP or SigLIP model."""

    def faults(self) -> list[str]:
        """What cannot work, a clause for each flag."""
        return super().faults() + ["--model '' is empty: name a folder or a hub id"] * (not self.model)
