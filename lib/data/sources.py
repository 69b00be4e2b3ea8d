"""Opening of data for training, validation and evaluation: the choice of splits, held-out images, mixtures."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from lib.data.caption_table import CaptionTable
from lib.data.evaluation_set import EvaluationSet
from lib.data.fetcher import Fetcher, default_fetcher
from lib.data.fields import FOUND_COLUMNS, Columns
from lib.data.labelled_table import LabelledTable
from lib.data.pairs import Captions, MixedSource, Source
from lib.data.prompt_banks import load_templates
from lib.data.recognize import OpenedData, Output, has_columns, open_data
from lib.data.shard_images import shard_evaluation
from lib.data.shard_source import shard_source
from lib.data.shards import ShardSet
from lib.errors import InputError

# "all" stands for data without splits. "train" comes last: figures on images that were trained on flatter.
_TO_EVALUATE = ("test", "val", "all", "train")
TO_VALIDATE = ("val", "test", "all", "train")
_HELD_OUT = ("val", "test")
_HALVES = {"val": "chooses", "test": "does not choose"}


def open_sources(
    data: str | Sequence[str],
    val_data: str | None,
    prompts: str | None,
    captions: Captions = "all",
    *,
    image_root: str | None = None,
    columns: Columns = FOUND_COLUMNS,
    held_out_fraction: float | None = None,
    class_names: Path | None = None,
    fetcher: Fetcher | None = None,
    output: Output | None = None,
) -> tuple[Source, EvaluationSet | None]:
    """Return the training source, and the validation set: `val_data`, else a split of `data`, else None.

    Several `data` are mixed: a::0.7 b::0.3 by weight, a b by size; the first with a val split is validated on, else the
    first with a test split, which chooses nothing. held_out_fraction: of data without splits, see `hold_out`.
    class_names: a file, see `renamed`.
    output: the folder of the run, which may not lie in folders of images.
    Raises InputError, naming --data, --val-data, --hold-out, --captions, --prompts or --class-names, for what cannot be
    used.
    """
    fetcher = fetcher or default_fetcher()
    weighted = [split_weight(each) for each in ([data] if isinstance(data, str) else data)]
    if not weighted:
        raise InputError("--data is given without a source; name one, or digits")
    found = [open_data(name, "--data", image_root, fetcher, columns, output) for name, _ in weighted]
    opened = [hold_out(each, held_out_fraction, name) for each, (name, _) in zip(found, weighted, strict=True)]
    texts = _Texts(prompts, captions, class_names)
    sources = [_training(each, texts, fetcher) for each in opened]
    source = sources[0] if len(sources) == 1 else _mix(sources, weighted)
    held_out: OpenedData | None
    if val_data is not None:
        held_out = open_data(val_data, "--val-data", image_root, fetcher, columns, output)
        split = next(name for name in TO_VALIDATE if name in held_out.splits)
        validation: EvaluationSet | None = _evaluation(held_out, "--val-data", split, texts, fetcher)
    else:
        split, held_out = next(
            ((name, each) for name in _HELD_OUT for each in opened if name in each.splits), ("", None)
        )
        validation = _evaluation(held_out, "--data", split, texts, fetcher) if held_out else None
        if validation and split == "test":
            validation = replace(validation, chooses=False)
    names = " ".join(name for name, _ in weighted)
    _check_prompts(prompts, names, *sources, validation)
    _check_image_root(image_root, names, [*opened, held_out])
    _check_lines(captions, names, [*opened, held_out])
    _check_class_names(class_names, names, opened)
    check_columns(columns, names, [*opened, held_out])
    return source, validation


def hold_out(opened: OpenedData, fraction: float | None, data: str) -> OpenedData:
    """Divide data without splits, or with a train split alone, into train, val and test; as it is without a fraction.

    fraction: of the images of each class, or of all captioned images, for val and test together, see `divided_names`.
    val chooses the checkpoint, test is reported: a choice would flatter its own images.
    Raises InputError, naming --hold-out, for data that has splits already or cannot be divided.
    """
    if fraction is None:
        return opened
    if not 0 < fraction < 1:
        raise InputError(f"--hold-out {fraction:g} must be between 0 and 1; 0.1 keeps a tenth of the images")
    if isinstance(opened, ShardSet) or (isinstance(opened, LabelledTable) and opened.divisible is None):
        raise InputError(
            f"--hold-out {fraction:g} divides class folders, captions, parquet and hub data, and --data {data} is none"
        )
    if len(opened.splits) != 1 or not set(opened.splits) & {"all", "train"}:
        splits = ", ".join(opened.splits)
        raise InputError(f"--hold-out {fraction:g}: --data {data} has its splits already ({splits}); leave it out")
    divided = opened.held_out(fraction)
    if not {"val", "test"} <= set(divided.splits):
        raise InputError(
            f"--hold-out {fraction:g} of --data {data} has no images for two halves, one to choose the checkpoint and "
            "one to evaluate: add images until a class (or the whole of captioned data) has three; or leave the flag "
            "out and name other images by --val-data"
        )
    return divided


@dataclass(frozen=True)
class EvaluationData:
    """Data to evaluate on, recognized once; its splits are listed when they are asked for."""

    data: str
    prompts: str | None
    fetcher: Fetcher
    opened: OpenedData
    captions: Captions = "all"
    held_out_fraction: float | None = None

    @classmethod
    def find(
        cls,
        data: str,
        prompts: str | None,
        image_root: str | None = None,
        columns: Columns = FOUND_COLUMNS,
        held_out_fraction: float | None = None,
        captions: Captions = "all",
        fetcher: Fetcher | None = None,
        output: Output | None = None,
    ) -> "EvaluationData":
        """Recognize the data; raises InputError, naming the flag, for what cannot be used."""
        fetcher = fetcher or default_fetcher()
        opened = hold_out(open_data(data, "--data", image_root, fetcher, columns, output), held_out_fraction, data)
        _check_image_root(image_root, data, [opened])
        check_columns(columns, data, [opened])
        _check_lines(captions, data, [opened])
        return cls(data, prompts, fetcher, opened, captions, held_out_fraction)

    def part_for(self, split: str) -> str:
        """Return the split that --split means: for "auto" test, else val, else all there is; InputError for none."""
        wanted = {"auto": _TO_EVALUATE, "train": ("train", "all"), "val": ("val",), "test": ("test",)}
        if split not in wanted:
            raise InputError(f"--split {split} is not one of {', '.join(wanted)}")
        found = next((each for each in wanted[split] if each in self.opened.splits), None)
        if found is None:
            raise InputError(f"--split {split}: {self.data} has only {', '.join(self.opened.splits)}; try --split auto")
        return found

    def of(self, split: str) -> EvaluationSet | None:
        """Return the images of train, val, test, or "all" of data without splits; None if there is no such split."""
        return self.of_split(split) if split in self.opened.splits else None

    def of_split(self, split: str) -> EvaluationSet:
        """Return the images of a split that the data has, as `part_for` names it."""
        evaluation_set = _evaluation(self.opened, "--data", split, _Texts(self.prompts, self.captions), self.fetcher)
        _check_prompts(self.prompts, self.data, evaluation_set)
        if self.held_out_fraction is None or split == "train":
            return evaluation_set
        half = f"the half of --hold-out {self.held_out_fraction:g} that {_HALVES[split]} the checkpoint"
        return replace(evaluation_set, name=f"{evaluation_set.name}, {half}")


def open_evaluation(
    data: str,
    split: str,
    prompts: str | None,
    *,
    image_root: str | None = None,
    columns: Columns = FOUND_COLUMNS,
    held_out_fraction: float | None = None,
    captions: Captions = "all",
    fetcher: Fetcher | None = None,
) -> EvaluationSet:
    """Return the images of one split, train, val or test, to evaluate on; "auto": test, else val, else all there is.

    Raises InputError, naming --data, --split or --prompts, for what cannot be used.
    """
    found = EvaluationData.find(data, prompts, image_root, columns, held_out_fraction, captions, fetcher)
    return found.of_split(found.part_for(split))


class _Texts(NamedTuple):
    """Settings of the texts."""

    prompts: str | None
    captions: Captions
    class_names: Path | None = None

    def templates(self, bank: str) -> tuple[str, ...]:
        return load_templates(self.prompts or bank)


def _training(opened: OpenedData, texts: _Texts, fetcher: Fetcher) -> Source:
    if isinstance(opened, ShardSet):
        return shard_source(opened, texts.captions, texts.templates("simple"), fetcher)
    if isinstance(opened, CaptionTable):
        return opened.source(texts.captions)
    return opened.source(texts.templates(opened.bank), texts.class_names)


def _evaluation(opened: OpenedData, flag: str, split: str, texts: _Texts, fetcher: Fetcher) -> EvaluationSet:
    if isinstance(opened, ShardSet):
        return shard_evaluation(opened, split, flag, texts.templates("simple"), fetcher, texts.captions == "lines")
    if isinstance(opened, CaptionTable):
        return opened.evaluation(split)
    return opened.evaluation(split, texts.templates(opened.bank), texts.class_names)


def split_weight(data: str) -> tuple[str, float | None]:
    """Return a source and the weight that may follow it after two colons."""
    name, _, number = data.rpartition("::")
    weight = None
    if name and not os.path.exists(data):
        with suppress(ValueError):
            weight = float(number)
    if weight is None:
        return data, None
    if not 0 < weight < float("inf"):
        raise InputError(f"--data {data}: a weight must be a number above 0")
    return name, weight


def _mix(sources: list[Source], weighted: list[tuple[str, float | None]]) -> MixedSource:
    """Mix several sources by their weights or, where none has one, by their sizes."""
    names, given = zip(*weighted, strict=True)
    if None in given and any(weight is not None for weight in given):
        bare = names[given.index(None)]
        raise InputError(f"--data {bare} has no weight and others have; write {bare}::0.5, or no weights at all")
    sizes = [source.size for source in sources if source.size is not None]
    all_known = len(sizes) == len(sources)
    if None in given and not all_known:
        unknown = next(name for name, source in zip(names, sources, strict=True) if source.size is None)
        raise InputError(f"--data {unknown}: its size is not known, so give each source a weight: {unknown}::0.5")
    shares: list[float] = [*sizes] if None in given else [*given]
    weights = tuple(share / sum(shares) for share in shares)
    parts = (f"{weight:.3g} of {source.description}" for weight, source in zip(weights, sources, strict=True))
    return MixedSource(
        where=" ".join(names),
        description="; ".join(parts),
        size=sum(sizes) if all_known else None,
        parts=tuple(sources),
        weights=weights,
    )


def _check_prompts(prompts: str | None, data: str, *opened: Source | EvaluationSet | None) -> None:
    if prompts is not None and not any(each is not None and each.templates for each in opened):
        raise InputError(f"--prompts {prompts} goes with class names, and {data} has captions; leave it out")


def _check_class_names(class_names: Path | None, data: str, opened: Sequence[OpenedData]) -> None:
    if class_names is None or any(isinstance(each, LabelledTable) for each in opened):
        return
    if any(isinstance(each, ShardSet) for each in opened):
        raise InputError(f"--class-names {class_names}: shards have their class names in classes.txt next to them")
    raise InputError(f"--class-names {class_names} goes with class names, and {data} has captions; leave it out")


def _check_lines(captions: Captions, data: str, opened: Sequence[OpenedData | None]) -> None:
    if captions == "lines" and not any(isinstance(each, ShardSet) for each in opened):
        raise InputError(f"--captions lines splits the .txt members of tar shards, and {data} has none; leave it out")


def _check_image_root(image_root: str | None, data: str, opened: Sequence[OpenedData | None]) -> None:
    if image_root is not None and not any(_takes_image_root(each) for each in opened):
        raise InputError(
            f"--image-root {image_root} is for files that name images, and {data} holds its own; leave it out"
        )


def _takes_image_root(opened: OpenedData | None) -> bool:
    """True for data that names image files, and for torchvision's sets, whose folder it is."""
    if isinstance(opened, LabelledTable):
        return opened.has_columns or opened.kind == "torchvision"
    return isinstance(opened, CaptionTable)


def check_columns(columns: Columns, data: str, opened: Sequence[OpenedData | None]) -> None:
    """Raise InputError where columns are chosen and none of the data has any."""
    if any(columns) and not any(each is not None and has_columns(each) for each in opened):
        meaning, name = next((meaning, name) for meaning, name in columns._asdict().items() if name)
        raise InputError(f"--{meaning}-column {name} is for tables and data sets of the hub, not {data}; leave it out")
