"""Command lines of all scripts: parsed by tyro, between the checks that all flags share."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import tyro

from lib.errors import InputError, silenced
from lib.files import without_secrets

LARGEST = 10**12
"""Of any number that counts something: a million times as many still fit into 64 bits."""
LONGEST_NAME, LONGEST_PATH = 255, 4096
"""Bytes that file systems take."""

USUAL_NAMES = {
    "--batch-size": "--effective-batch",
    "--global-batch-size": "--effective-batch",
    "--train-batch-size": "--effective-batch",
    "--micro-batch-size": "--chunk-size",
    "--per-device-train-batch-size": "--chunk-size",
    "--accum-freq": "--chunk-size",
    "--grad-accum": "--chunk-size",
    "--grad-accum-steps": "--chunk-size",
    "--gradient-accumulation-steps": "--chunk-size",
    "--learning-rate": "--lr",
    "--lr-scheduler": "--schedule",
    "--lr-scheduler-type": "--schedule",
    "--lr-schedule": "--schedule",
    "--warmup": "--warmup-steps",
    "--wd": "--weight-decay",
    "--max-grad-norm": "--grad-clip",
    "--clip-grad": "--grad-clip",
    "--epoch": "--epochs",
    "--num-epochs": "--epochs",
    "--num-train-epochs": "--epochs",
    "--max-steps": "--steps",
    "--num-workers": "--workers",
    "--dataloader-num-workers": "--workers",
    "--output": "--output-dir",
    "--out": "--output-dir",
    "--save-dir": "--output-dir",
    "--dataset": "--data",
    "--data-dir": "--data",
    "--train-data": "--data",
    "--eval-data": "--val-data",
    "--model-name": "--model",
    "--model-name-or-path": "--model",
    "--pretrained": "--model",
    "--image-encoder": "--image-tower",
    "--text-encoder": "--text-tower",
    "--mixed-precision": "--precision",
    "--amp": "--precision",
    "--fp16": "--precision fp16",
    "--bf16": "--precision bf16",
    "--img-size": "--image-size",
    "--checkpoint": "--resume",
    "--resume-from-checkpoint": "--resume",
    "--save-steps": "--save-every",
    "--eval-steps": "--eval-every",
    "--save-total-limit": "--keep-checkpoints",
    "--report-to": "--tracker",
    "--logger": "--tracker",
    "--cache-image": "--store-outputs",
    "--cache-text": "--store-outputs",
    "--eval-ema": "--ema",
    "--image-lr": "--trunk-lr",
    "--text-lr": "--trunk-lr",
    "--text-projection": "--projection",
    "--projection-dropout": "--dropout",
    "--lora-dropout": "--dropout",
}
"""Names of flags in other programs or in earlier versions, each with its name here."""

_WORDS = ("query", "names", "freeze", "unfreeze", "image")
"""Fields of text that are no names of files."""


def command_line(arguments: Sequence[str] | None) -> list[str]:
    """The arguments, or those of this process; sys.argv, which trackers log, loses its secrets."""
    if arguments is None:
        arguments = sys.argv[1:]
        sys.argv[1:] = map(without_secrets, arguments)
    return list(arguments)


def parse(form: Any, arguments: Sequence[str] | None, *, told: bool = True, **options: Any) -> Any:
    """The arguments as `form`, a dataclass or a union of such; None: those of this process.

    Raises InputError for values that suit no flag; tyro prints other errors, if `told`, and exits.
    """
    words = command_line(arguments)
    if fault := fault_of_words(words) or _other_name(words, form):
        raise InputError(fault)
    settings = _parsed(form, words, told, options)
    if fault := next(_faults(settings), None):
        raise InputError(fault)
    return settings


def fault_of_words(words: Sequence[str]) -> str | None:
    """The fault of the first word that no flag takes: an empty one, as of an unset variable, or one not in UTF-8."""
    for before, word in zip(("", *words), words, strict=False):  # the last of the words has none after it
        flag, has_value, value = word.partition("=")
        if not (word.startswith("--") and has_value):
            flag, value = before if before.startswith("--") else "an argument", word
        if not value.strip():
            return f"{flag} {value!r} is empty, as a shell variable is that is not set; write a value, or leave it out"
        if not _is_utf8(value):
            return f"{flag} {ascii(value)} is not UTF-8; rename the file, or name a link to it"
        if "\0" in value:
            return f"{flag} {ascii(value)} has a zero byte in it; leave it out"
    return None


def _is_utf8(text: str) -> bool:
    return text == text.encode("utf-8", "replace").decode()


def _other_name(words: Sequence[str], form: Any) -> str | None:
    """The error for a flag that has another name here."""
    known = {"--" + name.replace("_", "-") for name in _names(form)}
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        here = USUAL_NAMES.get(name)
        if here and name not in known and here.split()[0] in known:
            return f"{word.partition('=')[0]} is called {here} here; --help lists all flags"
    return None


def _names(form: Any) -> Iterator[str]:
    """The names of all fields of a dataclass, and of those within it, or of a union's."""
    if dataclasses.is_dataclass(form):
        for field in dataclasses.fields(form):
            yield field.name
            yield from _names(field.type)
    elif get_origin(form) is Annotated:
        yield from _names(get_args(form)[0])
    else:
        for part in get_args(form):
            yield from _names(part)


def _parsed(form: Any, words: list[str], told: bool, options: dict[str, Any]) -> Any:
    safe = [without_secrets(word) for word in words]
    if safe != words:
        with suppress(SystemExit), silenced(True):
            return tyro.cli(form, args=words, console_outputs=False, **options)
        words = safe  # tyro breaks lines, in which nobody finds a secret again: it tells of words without
    with silenced(not told):
        return tyro.cli(form, args=words, console_outputs=told, **options)


def _faults(settings: Any) -> Iterator[str]:
    """Faults of numbers that are too large and of file names that are too long."""
    for field in dataclasses.fields(settings):
        value, flag = getattr(settings, field.name), "--" + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from _faults(value)
            continue
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, int) and abs(each) > LARGEST:
                yield f"{flag} {each} is larger than any number that is counted here, {LARGEST}; lower it"
            elif isinstance(each, Path) or (isinstance(each, str) and field.name not in _WORDS and "://" not in each):
                yield from _length_faults(flag, str(each))


def _length_faults(flag: str, path: str) -> Iterator[str]:
    longest = max((len(name.encode()) for name in path.split("/")), default=0)
    if "{" in path or path.startswith("pipe:"):
        return
    if longest > LONGEST_NAME or len(path.encode()) > LONGEST_PATH:
        what = f"a name of {longest} bytes" if longest > LONGEST_NAME else f"{len(path.encode())} bytes"
        yield (
            f"{flag} {path[:80]}... has {what}; file systems take {LONGEST_NAME} in a name and {LONGEST_PATH} in all: "
            "give a shorter one"
        )
