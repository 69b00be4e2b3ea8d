"""Settings in a YAML file: read as command-line flags, and written so that the file repeats a run."""

import dataclasses
import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from lib.config.arguments import fault_of_words
from lib.config.flags import flag
from lib.config.safe_yaml import read_yaml, yaml_text
from lib.config.train_config import TrainConfig
from lib.errors import InputError
from lib.files import without_secrets, write_text


def read_settings(file: str, parse: Callable[[Sequence[str]], object]) -> list[str]:
    """The file's settings as command-line words, so that one parser reads both.

    parse: reads such words, and exits on an error. Raises InputError for an unknown setting and for a value that
    the flag does not take, naming the file and the line's beginning.
    """
    settings = _read(file)
    words = {name: _words(name, value) for name, value in settings.items()}
    together = [word for of_setting in words.values() for word in of_setting]
    if fault := fault_of_words(together):
        raise InputError(f"--config {file}: {fault}")
    if not _understood(parse, together):
        for name, of_setting in words.items():
            if not _understood(parse, of_setting):
                taken = next(field.type for field in dataclasses.fields(TrainConfig) if field.name == name)
                taken = taken.__name__ if isinstance(taken, type) else str(taken).replace("typing.", "")
                taken = re.sub(r"^Union\[(\w+), Literal\['auto'\]\]$", r"\1 or auto", taken)
                raise InputError(f"--config {file}: {name}: {_shown(settings[name])} must be {taken}")
    return together


_SECRETS = "# Holds passwords or tokens of addresses, which no other file of the run does: for its owner alone.\n"


def _understood(parse: Callable[[Sequence[str]], object], words: Sequence[str]) -> bool:
    try:
        parse(words)
    except SystemExit:
        return False
    return True


def save_config(config: TrainConfig, file: Path) -> None:
    """Write every setting, so that `--config FILE` repeats the run: passwords and tokens too, for its owner alone."""
    values = _values(config)
    secret = any(without_secrets(str(value)) != str(value) for value in values.values())
    write_text(file, _SECRETS * secret + yaml_text(values), private=secret)


def changed_settings(config: TrainConfig, file: Path) -> list[str]:
    """Differences of the settings from those that `save_config` wrote, as `--lr 0.001 (was 0.0005)`.

    Nothing is said of where the run goes on from and is written, of settings that the file does not have, nor of a
    file that is missing or was cut short.
    """
    try:
        before = _read(str(file)) if file.exists() else {}
    except InputError:
        return []
    now = {name: value for name, value in _values(config).items() if name not in ("resume", "output_dir")}
    return [
        f"{flag(name)} {_shown(value)} (was {_shown(before[name])})"
        for name, value in now.items()
        if name in before and before[name] != value
    ]


def _values(config: TrainConfig) -> dict[str, object]:
    """Every setting as YAML knows it."""
    return {
        name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
    }


def _read(file: str) -> dict[str, object]:
    """The file's settings by the names of fields."""
    known = [field.name for field in dataclasses.fields(TrainConfig)]
    settings = read_yaml(file, f"--config {file}", "; name a YAML file of settings") or {}
    if not isinstance(settings, dict):
        raise InputError(f"--config {file} must hold `name: value` lines, not a {type(settings).__name__}")
    found = {}
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else "--help lists the settings"
            raise InputError(f"--config {file}: unknown setting {key!r}; {hint}")
        if isinstance(value, dict):
            raise InputError(f"--config {file}: {name} holds lines of its own; write it as {name}: value")
        if name in found:
            raise InputError(f"--config {file}: {name} is there twice, as {key} too; leave one out")
        found[name] = value
    return found


def _words(name: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [flag(name) if value else "--no-" + flag(name)[2:]]
    return [flag(name), *(map(str, value) if isinstance(value, list) else [str(value)])]


def _shown(value: object) -> str:
    """A value as it stands in the file."""
    return yaml_text(value, default_flow_style=True).removesuffix("...\n").strip()
