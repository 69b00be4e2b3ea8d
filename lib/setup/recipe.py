"""Settings that suit model, data and device: a value for every flag that is `auto`, and the reason in one line.

benchmarks/defaults.py compares the rules with grids (docs/results.md, "Defaults that fit the data").
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, log2
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from lib.config import FITTED, FittedConfig, TrainConfig, flag
from lib.data import Source
from lib.data.pairs import parts_of
from lib.data.shard_source import ShardSource, count_pairs
from lib.distributed import rank_and_world_size
from lib.setup.model import is_preset
from lib.towers import Family, TwoTowers
from lib.towers.trainable import batch_norms, blocks

PROTOCOL: dict[Family, int] = {"clip": 4096, "siglip": 32768}
"""Batch and memory of the digits, and the largest batch: as published."""
STEPS_A_PASS = 56  # that a batch leaves to a pass over the data, at least
SMALLEST_BATCH = 32
MANY = 100_000  # pairs from which on fewer passes do
CPU_BUDGET = 4e13  # floating-point operations of a fine-tuning on a CPU: about 20 minutes on two cores
NEW_HEADS = 1e-3  # learning rate, alone or beside a trunk; also from scratch

Start = Literal["scratch", "heads", "pretrained"]
"""Nothing is pretrained; two pretrained encoders get new heads; the whole model is pretrained."""


@dataclass(frozen=True)
class Facts:
    """Facts about model, data and device that the choices depend on."""

    start: Start
    pairs: int | None
    """pairs in a pass; None where they would have to be read to be counted"""
    of_classes: bool
    """texts are class prompts, not captions"""
    on_cpu: bool
    operations: float
    """floating-point operations of the image trunk for one image; 0 where they decide nothing"""
    convolutional: bool
    """the image trunk"""
    batch_norms: bool
    blocks: bool
    """the blocks of both trunks are known"""
    storable: bool
    """outputs of frozen trunks can be stored"""

    @classmethod
    def of(cls, config: TrainConfig, source: Source, towers: TwoTowers, device: torch.device) -> "Facts":
        """The facts of these settings, data and towers; the towers are still on the CPU."""
        parts, trunks = parts_of(source), (towers.image.trunk, towers.text.trunk)
        known = config.steps is None or all(part.size is not None for part in parts)
        on_cpu, start = device.type == "cpu", start_of(config)
        return cls(
            start=start,
            pairs=count_pairs(source) if known else None,  # --epochs, which counts them too, has the same error
            of_classes=source.classes is not None,
            on_cpu=on_cpu,
            operations=_operations(towers) if on_cpu and start == "heads" else 0.0,
            convolutional=towers.image.convolutional,
            batch_norms=bool(batch_norms(towers)),
            blocks=all(map(blocks, trunks)),
            storable=config.store_outputs == "auto" and len(parts) == 1 and not isinstance(parts[0], ShardSource),
        )


def start_of(config: TrainConfig) -> Start:
    """Parts of the model that are pretrained."""
    if config.image_tower is None:
        return "scratch" if is_preset(config) else "pretrained"
    if config.image_tower.endswith(":random"):
        return "scratch"
    halves = config.image_tower.endswith("#image") and (config.text_tower or "").endswith("#text")
    return "pretrained" if halves or set(config.projection) == {"none"} else "heads"


def fitted(config: TrainConfig, family: Family, facts: Callable[[], Facts]) -> tuple[FittedConfig, list[str]]:
    """The settings without auto, and a line for each choice with its reason.

    facts: called where something is auto and the data are not the embedded digits, which keep the published protocol.
    """
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
    auto = [name for name in FITTED if given[name] in ("auto", ("auto",))]
    known = {name: value for name, value in given.items() if name not in auto}
    if config.data == ("digits",) or not auto:
        lr = known.get("lr", FittedConfig.lr)
        protocol = {"effective_batch": PROTOCOL[family], "xbm_size": PROTOCOL[family], "head_lr": lr}
        return FittedConfig(**protocol | known), []
    choices = Choices(known)
    _choose(choices, family, facts(), bool(config.lora))
    return FittedConfig(**choices.values), choices.lines


class Choices:
    """Values of settings: those that are given, and those that are chosen, each with a line that says why."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.lines: list[str] = []

    def choose(self, name: str, value: Any, reason: str) -> Any:
        """Set the value unless it is given; returns the one that holds."""
        if name not in self.values:
            self.values[name] = value
            shown = " ".join(value) or "none" if isinstance(value, tuple) else value
            self.lines.append(f"{flag(name)} {shown}: {reason}")
        return self.values[name]


def _choose(choices: Choices, family: Family, facts: Facts, lora: bool) -> None:
    choose = choices.choose
    batch = choose("effective_batch", *_batch(facts, PROTOCOL[family]))
    choose("xbm_size", *_memory(facts, batch, PROTOCOL[family]))
    freeze = choose("freeze", *_freeze(facts, choices.values, lora))
    trains = not {"image", "image.trunk"} & set(freeze)
    choose("epochs", *_epochs(facts, trains))
    lr = choose("lr", *_rate(facts, trains, lora))
    new_heads = facts.start == "heads"
    if facts.start == "pretrained" and facts.blocks and not lora and trains:
        choose("layer_decay", 0.8, "the lower blocks of a pretrained model change less")
    else:
        choose("layer_decay", 1.0, "no blocks of a pretrained model train")
    if not (new_heads and trains):
        choose("head_epochs", 0.0, "no new heads on a trunk that trains")
    elif not facts.storable:
        choose("head_epochs", 0.0, "outputs of this data are not stored")
    else:
        passes = _epochs(facts, trains=False)[0]
        choose("head_epochs", passes, "new heads train alone first, so that they do not spoil the trunk")
    random_heads = new_heads and trains and not choices.values["head_epochs"]
    choose("head_lr", *((NEW_HEADS, "new heads") if random_heads else (lr, "as --lr")))
    choose("augment", *(("light", "the image trunk trains") if trains else ("none", "the image trunk is frozen")))
    choose("positives", "group", "pairs of one class or image are no negatives of each other")


def _batch(facts: Facts, published: int) -> tuple[int, str]:
    ranks = rank_and_world_size()[1]
    size, reason = published, "as published; the pairs of this data are not counted"
    if facts.pairs is not None:
        size = max(min(SMALLEST_BATCH, facts.pairs), 2, 2 ** round(log2(max(facts.pairs, 1) / STEPS_A_PASS)))
        reason = f"{facts.pairs:,} pairs; a larger batch means fewer updates"
    if size >= published:
        size, reason = published, "as published"
    return ceil(size / ranks) * ranks, reason


def _memory(facts: Facts, batch: int, published: int) -> tuple[int, str]:
    if facts.pairs is not None and facts.pairs < 2 * batch:
        return 0, "a memory would only hold copies of the batch's pairs"
    if batch < published:
        return 0, "remembered embeddings gained nothing measurable at this size"
    return batch, "as published"


def _freeze(facts: Facts, values: dict[str, Any], lora: bool) -> tuple[tuple[str, ...], str]:
    norms = ("batchnorm",) if facts.batch_norms else ()
    if facts.start == "scratch" or lora:
        return (), "everything trains" if facts.start == "scratch" else "adapters train"
    if facts.start == "pretrained":
        return norms, "everything else trains, at a low rate"
    passes = values.get("epochs", _epochs(facts, trains=True)[0])
    operations = 3 * facts.operations * (facts.pairs or MANY) * passes  # a backward pass costs two forwards
    if facts.on_cpu and operations > CPU_BUDGET:
        hours = operations / CPU_BUDGET / 3
        return ("image.trunk", "text.trunk"), f"training the image trunk would take about {hours:.1f} hours on a CPU"
    return ("text.trunk", *norms), "the image trunk and the heads train"


def _epochs(facts: Facts, trains: bool) -> tuple[float, str]:
    """Passes over the data; trains: the image trunk does."""
    if facts.pairs is None or facts.pairs > MANY:
        return (2.0, "many pairs") if facts.start != "scratch" else (10.0, "many pairs, from scratch")
    if facts.start == "scratch":
        return 30.0, "from scratch"
    if trains:
        return 5.0, "fine-tuning overfits few pairs with more"
    return (10.0 if facts.of_classes else 4.0), "heads alone overfit few pairs with more"


def _rate(facts: Facts, trains: bool, lora: bool) -> tuple[float, str]:
    if facts.start == "scratch":
        return NEW_HEADS, "from scratch"
    if facts.start == "pretrained":
        return (1e-4, "adapters") if lora else (1e-5, "a pretrained model")
    if not trains:
        return NEW_HEADS, "new heads"
    return (2e-4, "a pretrained convolutional trunk") if facts.convolutional else (3e-5, "a pretrained transformer")


def _operations(towers: TwoTowers) -> float:
    """Floating-point operations of the image trunk for one image."""
    training = towers.training
    pixels = torch.zeros(1, 3, towers.image_size, towers.image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        towers.eval().image.pooled(pixels)
    towers.train(training)
    return float(counter.get_total_flops())
