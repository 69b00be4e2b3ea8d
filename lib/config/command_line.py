"""Where settings come from: defaults, a YAML file, the command line; and --help, a box for each group."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

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
    Optimizer,
    Run,
    Settings,
    TrainConfig,
    flag,
)
from lib.config.yaml_file import read_settings
from lib.errors import InputError, on_rank_0

Group = TypeVar("Group", bound=Settings)
USUAL = (
    "Most runs name five: --data, --model (or --image-tower and --text-tower), --effective-batch, --lr, --output-dir. "
    "Without any it trains the smallest preset on the embedded digits."
)


@dataclass(frozen=True)
class File:
    """Settings from a file; the command line wins."""

    config: Path | None = None
    """YAML file of settings, `name: value` a line, as those in configs/ and the config.yaml that a run leaves."""


@dataclass(frozen=True)
class Groups:
    """The command line: the same flags as TrainConfig, told group by group."""

    file: File
    data: Data
    images: Images
    model: Model
    fine_tuning: FineTuning
    batch: Batch
    loss: Loss
    optimizer: Optimizer
    evaluation: Evaluation
    run: Run

    @classmethod
    def of(cls, config: TrainConfig) -> "Groups":
        """The settings, group by group."""
        return cls(
            file=File(),
            data=_part(config, Data),
            images=_part(config, Images),
            model=_part(config, Model),
            fine_tuning=_part(config, FineTuning),
            batch=_part(config, Batch),
            loss=_part(config, Loss),
            optimizer=_part(config, Optimizer),
            evaluation=_part(config, Evaluation),
            run=_part(config, Run),
        )

    def flat(self) -> TrainConfig:
        """All groups' settings in one."""
        groups = [getattr(self, field.name) for field in dataclasses.fields(self)[1:]]
        return TrainConfig(**{name: value for group in groups for name, value in vars(group).items()})


def _part(config: TrainConfig, group: type[Group]) -> Group:
    return group(**{field.name: getattr(config, field.name) for field in dataclasses.fields(group)})


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
    told_first = f"{description}\n\n{USUAL}"
    return parse(Groups, arguments, told=told, default=Groups.of(defaults), description=told_first, config=flat)


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
