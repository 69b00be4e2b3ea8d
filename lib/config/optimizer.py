"""How long and how fast is learned."""

from dataclasses import dataclass
from typing import Literal

from lib.config.settings import LARGEST_SEED, Settings


@dataclass(frozen=True)
class Optimizer(Settings):
    """How long and how fast is learned."""

    epochs: float = 30.0
    """Passes over the data, unless --steps is given."""
    steps: int | None = None
    """Optimizer steps; None: as many as --epochs makes."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """AdamW, Adam (weight decay is a part of the gradient), or plain SGD."""
    lr: float = 1e-3
    """Peak learning rate. The default suits training from scratch; about 1e-5 fine-tunes a pretrained model."""
    image_lr: float | None = None
    """Peak learning rate of the image trunk; None: --lr."""
    text_lr: float | None = None
    """Peak learning rate of the text trunk; None: --lr."""
    head_lr: float | None = None
    """Peak learning rate of both heads; None: --lr."""
    layer_decay: float = 1.0
    """Factor on a trunk's learning rate from each block to the one below; 1: none.
    The last block has it once, the embeddings most often."""
    warmup_steps: int | Literal["auto"] = "auto"
    """Steps of linear warm-up; auto: a tenth of all steps."""
    schedule: Literal["cosine", "constant", "linear"] = "cosine"
    """Learning rate after warm-up."""
    weight_decay: float = 0.1
    """Decay of matrices; norms, biases, scale and bias have none."""
    beta2: float = 0.98
    """Second-moment decay of AdamW and Adam."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0: no clipping."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite (fp16 overflows aside) ends the run, or its update is left out."""
    nonfinite_limit: int = 10
    """Updates in a row that --on-nonfinite skip may leave out before it stops."""
    ema: float = 0.0
    """Keep a moving average of the weights with this decay per step, such as 0.999; 0: none."""
    seed: int = 0
    """Seed of weights, order, augmentation and dropout."""

    def faults(self) -> list[str]:
        """As in Settings."""
        found = super().faults() + self.at_least_one("steps", "nonfinite_limit")
        found += self.above_zero("epochs", "lr", "image_lr", "text_lr", "head_lr")
        found += self.not_negative("warmup_steps", "weight_decay", "grad_clip")
        found += self.fractions("beta2", "ema", whole=False)
        if not 0 < self.layer_decay <= 1:
            found.append(f"--layer-decay {self.layer_decay} must be a fraction greater than 0, up to 1")
        if not 0 <= self.seed <= LARGEST_SEED:
            found.append(f"--seed {self.seed} must be from 0 to {LARGEST_SEED}")
        return found
