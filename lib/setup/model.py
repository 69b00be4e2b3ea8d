"""From settings to the model: its towers, the parts that train, and their learning rates."""

from dataclasses import replace
from pathlib import Path

from torch.optim import Optimizer

from lib.backends.optim import Rates, build_optimizer
from lib.config import FittedConfig, TrainConfig
from lib.data import Source
from lib.data.pipeline import Resize
from lib.errors import InputError
from lib.runs.checkpoint import TrainingState
from lib.towers import PRESETS, Family, TwoTowers, load_towers
from lib.towers.load import SIZES
from lib.towers.lora import add_adapters
from lib.towers.processing import Processing
from lib.towers.trainable import set_trainable
from lib.towers.trunk_options import checkpoint_activations


def make_towers(
    config: TrainConfig, family: Family, source: Source, resume_from: Path | None
) -> tuple[TwoTowers, Processing]:
    """The towers, in which everything trains yet, and their processing of inputs."""
    towers, processing = _load(config, family, source, resume_from)
    if config.resize != "auto":
        own_form = Resize(config.resize, channels=processing.resize.channels)
        processing = replace(processing, resize=own_form)
    return towers, processing


def choose_what_trains(config: FittedConfig, towers: TwoTowers, state: TrainingState | None) -> None:
    """Freeze parts, add adapters, and load the weights of a checkpoint whose names only then fit."""
    scheduled = ("scale",) if config.scale_schedule else ()
    set_trainable(towers, (*config.freeze, *scheduled), config.unfreeze)
    if config.lora:
        add_adapters(towers, config.lora, config.dropout, config.seed)
    if not any(parameter.requires_grad for parameter in towers.parameters()):
        raise InputError(f"--freeze {' '.join(config.freeze)} leaves nothing to train")
    if config.gradient_checkpointing:
        checkpoint_activations(towers)
    if state and state.weights:
        towers.load_state_dict(state.weights)


def is_preset(config: TrainConfig) -> bool:
    """All weights start from random numbers."""
    return config.image_tower is None and config.model in (*PRESETS, *SIZES)


def make_optimizer(config: FittedConfig, towers: TwoTowers, fused: bool) -> Optimizer:
    """The optimizer over what trains, with a rate for each part and block; see `build_optimizer` for fused."""
    image_lr, text_lr = config.trunk_lr or (None, None)
    rates = Rates(config.lr, image_lr, text_lr, config.head_lr, config.layer_decay)
    decay, beta2 = config.weight_decay, config.beta2
    return build_optimizer(towers, config.optimizer, rates=rates, weight_decay=decay, beta2=beta2, fused=fused)


def _load(
    config: TrainConfig, family: Family, source: Source, resume_from: Path | None
) -> tuple[TwoTowers, Processing]:
    if resume_from:
        return TwoTowers.from_pretrained(resume_from), Processing.from_pretrained(resume_from)
    adapters_only = config.lora and not is_preset(config) and not (config.image_tower and "mlp" in config.projection)
    return load_towers(
        family=family,
        model=None if config.image_tower else config.model,
        image_tower=config.image_tower,
        text_tower=config.text_tower,
        projection=config.projection[0],
        text_projection=config.projection[1] if len(config.projection) == 2 else "same",
        projection_dim=config.projection_dim,
        projection_hidden=config.projection_hidden,
        image_size=config.image_size,
        resize=config.resize,
        texts=source.sample_texts,
        use_bias=family == "siglip",
        dropout=0.0 if adapters_only else config.dropout,
        seed=config.seed,
    )
