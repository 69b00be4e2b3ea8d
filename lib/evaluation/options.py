"""The flags that every task of evaluate.py takes, in groups: what is measured on, and how to run."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lib.config.flags import LARGEST_SEED, MOST_WORKERS, PrecisionFlag, Settings
from lib.errors import InputError


@dataclass(frozen=True)
class Examined(Settings):
    """Data to evaluate on."""

    data: str = "digits"
    """As in training: digits, class folders, imagefolders, a table of captions or classes, COCO, Flickr or Karpathy
    files, tar shards, parquet files, a folder of save_to_disk, or hub:OWNER/NAME[:SPLIT]."""
    image_root: str | None = None
    """Folder of the images that a table or annotation file names; None: beside it."""
    image_column: str | None = None
    """Column of a table or of hub or parquet data that holds or names the image; None: found by its name and type."""
    caption_column: str | None = None
    """The same for the captions, or for the class; None: found by its name and type."""
    split: Literal["auto", "train", "val", "test"] = "auto"
    """Part of the data; auto: test where there is one, else val, else everything."""
    hold_out: float | None = None
    """Of data without parts, evaluate on this fraction of the images: what training kept back by the same flag."""
    captions: Literal["all", "lines"] = "all"
    """lines: each line of the .txt members of tar shards is a caption of its own."""
    limit: int | None = None
    """Take only this many images of each part that is used, evenly spaced."""
    allow_pipe: bool = False
    """Run what follows `pipe:` in --data as a command that writes a tar."""

    def faults(self) -> list[str]:
        """What cannot work, a clause for each flag."""
        return super().faults() + self.at_least_one("limit")


@dataclass(frozen=True, kw_only=True)
class Running(Settings):
    """How to run, and where the results go."""

    output_dir: Path
    """Folder for metrics.json, the pictures and report.html."""
    batch_size: int = 256
    """Images or texts in one forward of one rank."""
    workers: int | Literal["auto"] = "auto"
    """Processes of each rank that decode images; auto: all of its cores but one, none for the digits."""
    precision: PrecisionFlag = "auto"
    """Number format in which the towers compute; embeddings are float32. auto: bf16 where the accelerator has it, fp16
    on older CUDA cards, fp32 on a CPU; accelerate launch --mixed_precision overrides auto."""
    cache_dir: Path | None = None
    """Folder for remote shards and for embeddings; None: contrastive-training in ~/.cache."""
    seed: int = 0
    """Decides whatever is drawn at random."""

    def faults(self) -> list[str]:
        """What cannot work, a clause for each flag."""
        return [*super().faults(), *self.at_least_one("batch_size"), *self._out_of_range()]

    def _out_of_range(self) -> Iterator[str]:
        for flag, value, most in (("--workers", self.workers, MOST_WORKERS), ("--seed", self.seed, LARGEST_SEED)):
            if value != "auto" and not 0 <= value <= most:
                yield f"{flag} {value} must be at {f'most {most}' if value > most else 'least 0'}"


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every task takes."""

    data: Examined = Examined()
    run: Running

    @property
    def output_dir(self) -> Path:
        """Where the results go."""
        return self.run.output_dir

    def check(self) -> None:
        """Raise InputError naming every flag whose value cannot work."""
        faults = self.faults()
        if faults:
            raise InputError("; ".join(faults))

    def faults(self) -> list[str]:
        """What cannot work, a clause for each flag."""
        return self.data.faults() + self.run.faults()


@dataclass(frozen=True, kw_only=True)
class OneModel(Common):
    """What a task on one model takes."""

    model: str
    """Run, checkpoint or export folder, or the hub id or folder of a CLIP or SigLIP model."""

    def faults(self) -> list[str]:
        """What cannot work, a clause for each flag."""
        return super().faults() + ["--model '' is empty: name a folder or a hub id"] * (not self.model)
