"""The tasks of evaluate.py: the flags of each, and the function that carries it out.

A new task is a class here, its line in `Task`, and a file with its function. `measure` runs on all ranks together; rank
0 gets the outcome, the others None. `faults` lists flags whose values cannot work, a clause each.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from lib.config.flags import LARGEST_SEED, MOST_WORKERS, PrecisionFlag, Settings
from lib.errors import InputError

# Each `measure` imports its task when it is called: torch, scikit-learn and matplotlib take seconds, and neither --help
# nor a wrong flag should wait for them.
if TYPE_CHECKING:
    import torch

    from lib.evaluation.report import Outcome


@dataclass(frozen=True)
class DataFlags(Settings):
    """Data to evaluate on."""

    data: str = "digits"
    """As in training: digits, class folders, imagefolders, a table of captions or classes, COCO, Flickr or Karpathy
    files, tar shards, parquet files, a folder of save_to_disk, or hub:OWNER/NAME[:SPLIT]."""
    image_root: str | None = None
    """Folder of the images that a table or annotation file names; None: the folder of that file."""
    image_column: str | None = None
    """Column of a table or of hub or parquet data that holds or names the image; None: found by its name and type."""
    caption_column: str | None = None
    """The same for the captions, or for the class; None: found by its name and type."""
    split: Literal["auto", "train", "val", "test"] = "auto"
    """Split of the data; auto: test if the data has one, else val, else all images."""
    hold_out: float | None = None
    """For data without splits: evaluate on the half of this fraction of the images that training with the same flag
    neither used nor chose its checkpoint by."""
    captions: Literal["all", "lines"] = "all"
    """lines: each line of the .txt members of tar shards is a caption of its own."""
    limit: int | None = None
    """Use at most this many images of each split, evenly spaced."""
    allow_pipe: bool = False
    """Run what follows `pipe:` in --data as a command that writes a tar."""

    def faults(self) -> list[str]:
        return super().faults() + self.at_least_one("limit")


@dataclass(frozen=True, kw_only=True)
class RunFlags(Settings):
    """How to run, and where the results go."""

    output_dir: Path
    """Folder for metrics.json, the charts and report.html."""
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
    """Seed of everything that is drawn at random."""

    def faults(self) -> list[str]:
        return [*super().faults(), *self.at_least_one("batch_size"), *self._out_of_range()]

    def _out_of_range(self) -> Iterator[str]:
        for flag, value, most in (("--workers", self.workers, MOST_WORKERS), ("--seed", self.seed, LARGEST_SEED)):
            if value != "auto" and not 0 <= value <= most:
                yield f"{flag} {value} must be at {f'most {most}' if value > most else 'least 0'}"


@dataclass(frozen=True, kw_only=True)
class CommonFlags:
    """Flags of every task that embeds data."""

    data: DataFlags = DataFlags()
    run: RunFlags

    @property
    def output_dir(self) -> Path:
        """Folder of the results."""
        return self.run.output_dir

    def check(self) -> None:
        """Raise InputError naming every flag whose value cannot work."""
        faults = self.faults()
        if faults:
            raise InputError("; ".join(faults))

    def faults(self) -> list[str]:
        return self.data.faults() + self.run.faults()


@dataclass(frozen=True, kw_only=True)
class OneModel(CommonFlags):
    """Flags of a task on one model."""

    model: str
    """Run, checkpoint or export folder, or the hub id or folder of a CLIP or SigLIP model."""

    def faults(self) -> list[str]:
        return super().faults() + ["--model '' is empty: name a folder or a hub id"] * (not self.model)


@dataclass(frozen=True, kw_only=True)
class Retrieval(OneModel):
    """Recall@1/5/10, MRR and median rank, image to text and text to image; the data needs captions."""

    pairs: bool = False
    """Rank strict pairs: only its own caption is right for an image; the captions of its other pairs count as wrong."""
    query: tuple[str, ...] = ()
    """Texts of your own; the report shows the images found for each."""
    image: str | None = None
    """Name of the image that the report compares with candidate captions; default: one drawn by --seed."""

    def faults(self) -> list[str]:
        return super().faults() + [
            f"--query {query!r} is empty: write a text or leave it out" for query in self.query if not query.strip()
        ]

    def measure(self, device: "torch.device") -> "Outcome | None":
        from lib.evaluation.retrieval import retrieval

        return retrieval(self, device)


@dataclass(frozen=True, kw_only=True)
class Zeroshot(OneModel):
    """Accuracy, top-5, precision, recall, F1, confusion, prompts one by one, calibration; the data needs classes."""

    prompts: str | None = None
    """Prompt bank (digits, activities, objects, simple) or a YAML file with a list of templates."""
    class_names: Path | None = None
    """YAML file with names to use instead of the data's: a list in its order, or a mapping "data's name: name"."""

    def measure(self, device: "torch.device") -> "Outcome | None":
        from lib.evaluation.zeroshot import zeroshot

        return zeroshot(self, device)


@dataclass(frozen=True, kw_only=True)
class Probe(OneModel):
    """Linear SVM, logistic regression, MLP and k-NN on frozen image embeddings; the data needs classes."""

    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Images per class used for training; one point of the few-shot curves each. Empty: no curves."""
    draws: int = 5
    """Random draws of these few images; the curves show mean and deviation."""

    def faults(self) -> list[str]:
        faults = [f"--shots {shots} must be at least 1" for shots in self.shots if shots < 1]
        faults += [f"--draws {self.draws} must be at least 1"] if self.draws < 1 else []
        return super().faults() + faults

    def measure(self, device: "torch.device") -> "Outcome | None":
        from lib.evaluation.probe import probe

        return probe(self, device)


@dataclass(frozen=True, kw_only=True)
class Agnostic(OneModel):
    """Classifiers on similarities to generic prompts, which name no class; the data needs classes."""

    prompts: Path | None = None
    """YAML file with a list of texts; default: 32 generic prompts."""
    temperatures: tuple[float, ...] = (1.0, 0.5, 0.2, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01, 0.005, 0.002, 0.001)
    """Each divides the similarities before their softmax over the prompts."""
    standardize: bool = True
    """Standardize the probabilities for the classifiers; without it those of a high temperature hardly differ."""

    def faults(self) -> list[str]:
        bad = [t for t in self.temperatures if not 0 < t < math.inf]
        faults = [f"--temperatures {t:g} must be above 0" for t in bad]
        faults += [] if self.temperatures else ["--temperatures needs at least one"]
        return super().faults() + faults

    def measure(self, device: "torch.device") -> "Outcome | None":
        from lib.evaluation.agnostic import agnostic

        return agnostic(self, device)


@dataclass(frozen=True, kw_only=True)
class Compare(CommonFlags):
    """Two or more models on the same images: zero-shot if the data has classes, else retrieval."""

    models: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--model"])]
    """Two or more, each a run, checkpoint or export folder, or a hub id; the others are compared with the first. With
    --blend one run."""
    names: tuple[str, ...] = ()
    """Names of the models in the report; default: their folders."""
    prompts: str | None = None
    """Prompt bank (digits, activities, objects, simple) or a YAML file with a list of templates."""
    class_names: Path | None = None
    """YAML file with names to use instead of the data's: a list in its order, or a mapping "data's name: name"."""
    resamples: int = 1000
    """Bootstrap samples for the intervals."""
    blend: tuple[float, ...] = ()
    """Compare blends of one run instead: (1 - a) * initial + a * trained weights for each a of 0 0.25 0.5 0.75 1."""
    also: str | None = None
    """With --blend: other data, to see what fine-tuning forgets; its own test split, else val, else all images."""

    def faults(self) -> list[str]:
        return super().faults() + (self._faults_of_blends() if self.blend or self.also else self._faults_of_models())

    def _faults_of_blends(self) -> list[str]:
        faults = [f"--blend {a:g} must be between 0 (initial weights) and 1" for a in self.blend if not 0 <= a <= 1]
        if len(set(self.blend)) < max(2, len(self.blend)):
            faults.append("--blend needs two or more different numbers, as in --blend 0 0.25 0.5 0.75 1")
        if not self.also:
            faults.append("--blend needs other data to measure forgetting on: add --also OTHER_DATA")
        if len(self.models) != 1 or self.names:
            faults.append(f"--models {' '.join(self.models)}: with --blend name one run, and no --names")
        return faults

    def _faults_of_models(self) -> list[str]:
        faults = []
        different = {Path(model).resolve() for model in self.models}
        if len(different) < 2 or len(different) < len(self.models):
            faults.append(f"--models {' '.join(self.models)}: name two or more different ones, as in --models A B")
        if self.names and len(set(self.names)) != len(self.models):
            faults.append(f"--names {' '.join(self.names)} must be {len(self.models)} different ones, one per model")
        if self.resamples < 1:
            faults.append(f"--resamples {self.resamples} must be at least 1")
        return faults

    def measure(self, device: "torch.device") -> "Outcome | None":
        from lib.evaluation.compare import compare
        from lib.evaluation.compare_blends import compare_blends

        return compare_blends(self, device) if self.blend else compare(self, device)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Gather the results of runs and evaluations, one table for each kind of figures."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of evaluations or training runs; evaluations inside a run's folder are included."""
    mean: bool = False
    """Add mean and standard deviation, for runs that differ only in their seed."""
    output_dir: Path | None = None
    """Folder for table.csv and table.md; without it the tables are only printed."""

    def check(self) -> None:
        """Raise InputError if no folder is named."""
        if not self.runs:
            raise InputError("table needs folders of runs or evaluations, as in: evaluate.py table runs/a runs/b")

    def measure(self, device: "torch.device") -> None:
        """Print the tables and write the files; there is nothing to report."""
        from lib.evaluation.table import table

        table(self)


Task = (
    Annotated[Retrieval, tyro.conf.subcommand("retrieval")]
    | Annotated[Zeroshot, tyro.conf.subcommand("zeroshot")]
    | Annotated[Probe, tyro.conf.subcommand("probe")]
    | Annotated[Agnostic, tyro.conf.subcommand("agnostic")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Table, tyro.conf.subcommand("table")]
)
