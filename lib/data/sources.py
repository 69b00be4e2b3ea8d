"""Owns what --data means: the embedded digits, class folders, tables of captions or tar shards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lib.data.captions import table_evaluation, table_source
from lib.data.digits import digits_evaluation, digits_source
from lib.data.evaluation_set import EvaluationSet
from lib.data.folders import ClassFolders, find_class_folders, folder_evaluation, folder_source
from lib.data.pairs import Source
from lib.data.prompt_banks import load_templates
from lib.data.shard_evaluation import shard_evaluation
from lib.data.shards import shard_source
from lib.data.tables import SUFFIXES, Table, read_table
from lib.errors import InputError

# "all" stands for data without splits; "train" comes last because looking at it flatters.
_TO_EVALUATE = ("test", "val", "all", "train")
_TO_VALIDATE = ("val", "test", "all", "train")
_HELD_OUT = ("val", "test")


def open_sources(
    data: str, val_data: str | None, prompts: str | None, captions: Literal["one", "all"] = "all"
) -> tuple[Source, EvaluationSet | None]:
    """The training source, and what to validate on: of `val_data`, else held out of `data`, else nothing.

    Raises InputError, naming --data, --val-data or --prompts, for what cannot be used.
    """
    opened = _open(data, "--data")
    source = _training(opened, data, prompts, captions)
    if val_data is not None:
        validation = _evaluation(_open(val_data, "--val-data"), val_data, "--val-data", _TO_VALIDATE, prompts)
    else:
        validation = _evaluation(opened, data, "--data", _HELD_OUT, prompts)
    _check_prompts(prompts, data, source, validation)
    return source, validation


def open_evaluation(data: str, split: str, prompts: str | None) -> EvaluationSet:
    """The images of one split, train, val or test, to evaluate on; "auto": test, else val, else all there is.

    Raises InputError, naming --data, --split or --prompts, for what cannot be used.
    """
    wanted = {"auto": _TO_EVALUATE, "train": ("train", "all"), "val": ("val",), "test": ("test",)}
    if split not in wanted:
        raise InputError(f"--split {split} is not one of {', '.join(wanted)}")
    opened = _open(data, "--data")
    evaluation_set = _evaluation(opened, data, "--data", wanted[split], prompts)
    if evaluation_set is None:
        raise InputError(f"--split {split}: {data} has only {', '.join(_splits(opened))}; try --split auto")
    _check_prompts(prompts, data, evaluation_set)
    return evaluation_set


_Opened = Literal["digits", "shards"] | ClassFolders | Table


def _open(data: str, flag: str) -> _Opened:
    """Find out what kind of data is meant, and list it where listing is needed to know its splits."""
    path = Path(data)
    if data == "digits":
        return "digits"
    if data.endswith((".tar", ".tar}")) or data.startswith("pipe:") or "://" in data:
        return "shards"
    if path.suffix.lower() in SUFFIXES and path.is_file():
        return read_table(path, flag)
    if path.is_dir():
        return find_class_folders(path, flag)
    what = "is of no kind that is read here" if path.is_file() else "is not there"
    raise InputError(
        f"{flag} {data} {what}; give digits, a folder of class folders, a table of captions "
        f"({', '.join(SUFFIXES)}) or uncompressed tar shards ('shards/*.tar')"
    )


def _splits(opened: _Opened) -> Sequence[str]:
    if opened == "digits":
        return ("train", "test")
    if opened == "shards":
        return ("all",)
    return sorted(opened.splits)


def _training(opened: _Opened, data: str, prompts: str | None, captions: Literal["one", "all"]) -> Source:
    if opened == "digits":
        return digits_source(load_templates(prompts or "digits"))
    if opened == "shards":
        return shard_source(data, captions, load_templates(prompts or "simple"))
    if isinstance(opened, Table):
        return table_source(opened, captions)
    return folder_source(opened, load_templates(prompts or "simple"))


def _evaluation(
    opened: _Opened, data: str, flag: str, wanted: Sequence[str], prompts: str | None
) -> EvaluationSet | None:
    """The first of the wanted splits that is there, or None."""
    split = next((split for split in wanted if split in _splits(opened)), None)
    if split is None:
        return None
    if opened == "digits":
        return digits_evaluation(split, load_templates(prompts or "digits"))
    if opened == "shards":
        return shard_evaluation(data, flag, load_templates(prompts or "simple"))
    if isinstance(opened, Table):
        return table_evaluation(opened, split, flag)
    return folder_evaluation(opened, split, load_templates(prompts or "simple"))


def _check_prompts(prompts: str | None, data: str, *opened: Source | EvaluationSet | None) -> None:
    if prompts is not None and not any(each is not None and each.templates for each in opened):
        raise InputError(f"--prompts {prompts} goes with class names, and {data} has captions; leave it out")
