"""The tasks of evaluate.py as its command line tells them: the flags of each, and what they may be."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lib.errors import InputError
from lib.evaluation.options import Common, OneModel


@dataclass(frozen=True, kw_only=True)
class Retrieval(OneModel):
    """Recall@1/5/10, MRR and median rank, image to text and text to image; the data needs captions."""

    pairs: bool = False
    """Take each caption with its image as a pair of its own: all else is wrong, the image in its other pairs too."""
    query: tuple[str, ...] = ()
    """Texts of your own; the report shows the pictures found for each."""
    image: str | None = None
    """Name of the image that the report holds against candidate captions; default: one drawn by --seed."""

    def faults(self) -> list[str]:
        """What cannot work, a clause for each flag."""
        return super().faults() + [
            f"--query {query!r} is empty: write a text or leave it out" for query in self.query if not query.strip()
        ]


@dataclass(frozen=True, kw_only=True)
class Zeroshot(OneModel):
    """Accuracy, top-5, precision, recall, F1, confusion, prompts one by one, calibration; the data needs classes."""

    prompts: str | None = None
    """Prompt bank (digits, activities, objects, simple) or a YAML file with a list of templates."""
    class_names: Path | None = None
    """YAML file with names to use instead of the data's: a list in its order, or a mapping "data's name: name"."""


@dataclass(frozen=True, kw_only=True)
class Probe(OneModel):
    """Linear SVM, logistic regression, MLP and k-NN on frozen image embeddings; the data needs classes."""

    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Images a class to learn from, a point of the few-shot curves each; none: no curves."""
    draws: int = 5
    """Times that the few images are drawn anew; the curves show mean and deviation."""

    def faults(self) -> list[str]:
        """What cannot work, a clause for each flag."""
        faults = [f"--shots {shots} must be at least 1" for shots in self.shots if shots < 1]
        faults += [f"--draws {self.draws} must be at least 1"] if self.draws < 1 else []
        return super().faults() + faults


@dataclass(frozen=True, kw_only=True)
class Agnostic(OneModel):
    """What similarities to prompts that name no class tell about the classes; the data needs classes."""

    prompts: Path | None = None
    """YAML file with a list of texts; default: 32 generic prompts."""
    temperatures: tuple[float, ...] = (1.0, 0.5, 0.2, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01, 0.005, 0.002, 0.001)
    """Each divides the similarities before their softmax over the prompts."""
    standardize: bool = True
    """Standardize the shares for the classifiers; as they are, those of a high temperature hardly differ."""

    def faults(self) -> list[str]:
        """What cannot work, a clause for each flag."""
        bad = [t for t in self.temperatures if not 0 < t < math.inf]
        faults = [f"--temperatures {t:g} must be above 0" for t in bad]
        faults += [] if self.temperatures else ["--temperatures needs at least one"]
        return super().faults() + faults


@dataclass(frozen=True, kw_only=True)
class Compare(Common):
    """Two or more models on the same images: zero-shot where the data has classes, else retrieval."""

    models: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--model"])]
    """Two or more, each a run, checkpoint or export folder, or a hub id; the others are compared with the first."""
    names: tuple[str, ...] = ()
    """What the report calls them; without, by their folders."""
    prompts: str | None = None
    """Prompt bank (digits, activities, objects, simple) or a YAML file with a list of templates."""
    class_names: Path | None = None
    """YAML file with names to use instead of the data's: a list in its order, or a mapping "data's name: name"."""
    resamples: int = 1000
    """Samples of the bootstrap, for the intervals."""

    def faults(self) -> list[str]:
        """What cannot work, a clause for each flag."""
        faults = super().faults()
        different = {Path(model).resolve() for model in self.models}
        if len(different) < 2 or len(different) < len(self.models):
            faults.append(f"--models {' '.join(self.models)}: name two or more different ones, as in --models A B")
        if self.names and len(set(self.names)) != len(self.models):
            faults.append(f"--names {' '.join(self.names)} must be {len(self.models)} different ones, one a model")
        if self.resamples < 1:
            faults.append(f"--resamples {self.resamples} must be at least 1")
        return faults


@dataclass(frozen=True, kw_only=True)
class Table:
    """Gather the results of runs and evaluations, in a table for each kind of figures."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders that evaluate.py or a training script left; evaluations in a run's folder come with it."""
    mean: bool = False
    """Add mean and standard deviation, for runs that differ in their seed alone."""
    output_dir: Path | None = None
    """Folder for table.csv and table.md; without, the tables are printed only."""

    def check(self) -> None:
        """Raise InputError where there is nothing to gather."""
        if not self.runs:
            raise InputError("table needs folders of runs or evaluations, as in: evaluate.py table runs/a runs/b")


Task = (
    Annotated[Retrieval, tyro.conf.subcommand("retrieval")]
    | Annotated[Zeroshot, tyro.conf.subcommand("zeroshot")]
    | Annotated[Probe, tyro.conf.subcommand("probe")]
    | Annotated[Agnostic, tyro.conf.subcommand("agnostic")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Table, tyro.conf.subcommand("table")]
)
