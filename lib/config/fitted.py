"""Settings with a value in place of every `auto` that the data decides on."""

from dataclasses import dataclass
from typing import Literal

from lib.config.train_config import TrainConfig

FITTED = (
    "effective_batch", "xbm_size", "epochs", "lr", "head_lr", "layer_decay", "head_epochs", "freeze", "augment",
    "positives",
)  # fmt: skip
"""Fields that are chosen where they are auto."""


@dataclass(frozen=True)
class FittedConfig(TrainConfig):
    """TrainConfig without auto in the fields of FITTED; the defaults are those of the embedded digits."""

    effective_batch: int = 4096
    xbm_size: int = 4096
    epochs: float = 30.0
    lr: float = 1e-3
    head_lr: float = 1e-3
    layer_decay: float = 1.0
    head_epochs: float = 0.0
    freeze: tuple[str, ...] = ()
    augment: Literal["none", "crop", "light", "jitter", "strong"] = "none"
    positives: Literal["group", "pair"] = "group"
