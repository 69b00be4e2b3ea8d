"""Training data, and how it is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lib.config.settings import MOST_WORKERS, Settings


@dataclass(frozen=True)
class Data(Settings):
    """Training data, and how it is read."""

    data: tuple[str, ...] = ("digits",)
    """Training pairs: `digits` (embedded), a folder with train/<class>/ images, images with metadata.csv or
    metadata.jsonl (imagefolder), a .csv/.tsv/.jsonl table of captions or classes, COCO, Flickr or Karpathy files,
    cifar10, cifar100, imagenette, WebDataset .tar shards (glob, braces, URL), parquet files or their folder, a folder
    of save_to_disk, or hub:OWNER/NAME[:SPLIT] of the Hugging Face Hub.
    Several are mixed, by weight where each has one: a::0.7 b::0.3."""
    val_data: str | None = None
    """Validation pairs, as --data; None: the val or test part of --data where it has one."""
    hold_out: float | None = None
    """Fraction of the images of --data without parts (class folders, captions) that is kept from training, to validate
    and evaluate on: evaluate.py takes the same flag. None: nothing is kept."""
    prompts: str | None = None
    """Prompt templates for class names: a shipped bank (digits, activities, objects, simple) or a YAML file.
    None: those of the data set, or simple."""
    class_names: Path | None = None
    """YAML file with names to use instead of the data's, as n01440764: a list in its order, or a mapping "data's name:
    name"; evaluate.py takes the same flag."""
    captions: Literal["all", "one", "lines"] = "all"
    """all: every caption is a pair; one: one pair per image with a caption drawn anew in each epoch; lines: every line
    of the .txt members of tar shards is a pair."""
    image_root: str | None = None
    """Folder of the images that a table or annotation file names; None: beside it."""
    image_column: str | None = None
    """Column of a table or of hub or parquet data that holds or names the image; None: found by its name and type."""
    caption_column: str | None = None
    """The same for the captions, or for the class; None: found by its name and type."""
    max_bad: float = 0.5
    """Stop when more than this fraction of the pairs cannot be read."""
    workers: int | Literal["auto"] = "auto"
    """Processes that decode images on each rank; auto: none for the digits, else up to 4 of the rank's cores."""
    shuffle_buffer: int = 1000
    """Undecoded samples that each stream of shards keeps, to give out in random order."""
    cache_dir: Path | None = None
    """Folder for remote shards and stored tower outputs; None: contrastive-training in ~/.cache."""
    shard_cache_gib: float = 50.0
    """GiB of remote shards kept in --cache-dir, the least recently used go first; 0: all are kept."""
    allow_pipe: bool = False
    """Run what follows `pipe:` in --data as a command that writes a tar."""
    cache_text: bool = False
    """Compute a frozen text trunk's outputs once and store them in --cache-dir."""
    cache_image: bool = False
    """The same for a frozen image trunk, while nothing is augmented."""
    data_info: bool = False
    """Print what the data holds, leave a picture of random pairs in --output-dir, and exit."""

    def faults(self) -> list[str]:
        """As in Settings."""
        found = super().faults() + self.fractions("max_bad") + self.at_least_one("shuffle_buffer")
        found += self.not_negative("workers", "shard_cache_gib")
        if self.workers != "auto" and self.workers > MOST_WORKERS:
            found.append(
                f"--workers {self.workers} must be at most {MOST_WORKERS}, on each rank; auto suits most machines"
            )
        return found
