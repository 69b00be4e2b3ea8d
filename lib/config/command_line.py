"""Where settings come from: defaults, a YAML file, the command line; and --help, a box for each group."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import tyro

from lib.config.arguments import command_line, parse
from lib.config.flags import (
    Batch,
    Data,
    Evaluation,
    FineTuning,
    Images,
    Loss,
    Model,
    MostUsed,
    Optimizer,
    Run,
    flag,
)
from lib.config.train_config import TrainConfig
from lib.config.yaml_file import read_settings
from lib.errors import InputError, on_rank_0

T = TypeVar("T")


@dataclass(frozen=True)
class File:
    """Settings from a file; the command line wins."""

    config: Path | None = None
    """YAML file of settings, `name: value` a line, as those in configs/ and the config.yaml that a run leaves."""


@dataclass(frozen=True)
class Groups:
    """The command line: the flags of TrainConfig, a box of --help for each group."""

    most_used: MostUsed
    data: Data
    images: Images
    model: Model
    fine_tuning: FineTuning
    batch: Batch
    loss: Loss
    optimizer: Optimizer
    evaluation: Evaluation
    run: Run
    file: File

    @classmethod
    def of(cls, config: TrainConfig) -> "Groups":
        """The settings, group by group."""
        return cls(
            most_used=_group(config, MostUsed),
            data=_group(config, Data),
            images=_group(config, Images),
            model=_group(config, Model),
            fine_tuning=_group(config, FineTuning),
            batch=_group(config, Batch),
            loss=_group(config, Loss),
            optimizer=_group(config, Optimizer),
            evaluation=_group(config, Evaluation),
            run=_group(config, Run),
            file=File(),
        )

    def flat(self) -> TrainConfig:
        """All groups' settings in one."""
        groups = [group for group in vars(self).values() if not isinstance(group, File)]
        return TrainConfig(**{name: value for group in groups for name, value in vars(group).items()})


def _group(config: TrainConfig, group: type[T]) -> T:
    fields = dataclasses.fields(cast(Any, group))
    return group(**{field.name: getattr(config, field.name) for field in fields})


def parse_config(
    defaults: TrainConfig,
    description: str,
    arguments: Sequence[str] | None = None,
    of_another_script: Mapping[str, str] | None = None,
) -> TrainConfig:
    """The settings of this run: `defaults`, then the YAML file of --config, then the command line.

    `of_another_script` names fields that this script's loss does not have, with the script that has them.
    Raises InputError with all problems at once; tyro itself exits with code 2 on an unknown or malformed flag.
    """
    arguments, file = _take_config_file(command_line(arguments))
    from_yaml = [] if file is None else read_settings(file, partial(_parse, defaults, description, told=False))
    config = _parse(defaults, description, [*from_yaml, *arguments], told=on_rank_0()).flat()
    problems = config.problems(int(os.environ.get("WORLD_SIZE", "1")))
    for name, script in (of_another_script or {}).items():
        if getattr(config, name) != getattr(defaults, name):
            problems.append(f"{flag(name)} {getattr(config, name)} has no meaning here; it belongs to {script}")
    if problems:
        raise InputError("; ".join(problems))
    return config


def _parse(defaults: TrainConfig, description: str, arguments: Sequence[str], told: bool) -> Groups:
    """As `lib.config.arguments.parse`."""
    flat = (tyro.conf.OmitArgPrefixes,)
    return parse(Groups, arguments, told=told, default=Groups.of(defaults), description=description, config=flat)


def _take_config_file(arguments: list[str]) -> tuple[list[str], str | None]:
    """Split `--config FILE` (or `--config=FILE`) off the other arguments."""
    rest, file = [], None
    queue = iter(arguments)
    for argument in queue:
        if argument == "--config":
            file = next(queue, "--")
        elif argument.startswith("--config="):
            file = argument.removeprefix("--config=")
        else:
            rest.append(argument)
    if file is not None and (not file.strip() or file.startswith("--")):
        raise InputError("--config needs a YAML file; name one, as in --config configs/digits_clip.yaml")
    return rest, file
