"""Positives and negatives of the loss, and the logit scale."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lib.config.settings import Settings


@dataclass(frozen=True)
class Loss(Settings):
    """Positives, negatives and the logit scale."""

    positives: Literal["group", "pair"] = "group"
    """group: all pairs of a class or image are positives of each other; pair: only the diagonal, as in the papers."""
    remembered_positives: Literal["use", "ignore"] = "use"
    """Remembered pairs of the anchor's group: positives, or left out (with --positives group)."""
    same_text: Literal["auto", "exclude", "positive", "negative"] = "auto"
    """Pairs of equal text and different group: left out for each other, positives, or negatives.
    auto: exclude for captions; negative for class prompts, whose equal texts are of one class."""
    negative_prompts: Path | None = None
    """YAML list of texts that fit no image, such as hard prompts; {} stands for each class name.
    Every step encodes them all, as further negatives of every image."""
    label_smoothing: float = 0.0
    """InfoNCE only: fraction of the target mass that is spread over all candidates."""
    pos_weight: float | Literal["balanced"] = 1.0
    """Sigmoid loss only: weight of the positives' terms; balanced: as many times as there are negatives for each."""
    scale_max: float = 0.0
    """Largest logit scale; the parameter is clamped after each step. 0: no limit."""
    scale_schedule: tuple[float, float] | None = None
    """Logit scale (1 / temperature) of the first and the last step, in equal ratios between them, such as 10 100,
    or 20 20 for a constant. None: it is learned, up to --scale-max."""
    verify_gradients: bool = False
    """At start, compare the cached step with plain autograd on a small batch, and stop if they differ."""

    def faults(self) -> list[str]:
        """As in Settings."""
        found = super().faults() + self.fractions("label_smoothing", whole=False)
        found += self.above_zero("pos_weight") + self.not_negative("scale_max")
        if self.positives == "pair" and self.remembered_positives == "ignore":
            found.append("--remembered-positives ignore has no meaning with --positives pair; leave it out")
        if self.scale_schedule and min(self.scale_schedule) <= 0:
            found.append(f"--scale-schedule {self.shown('scale_schedule')} must be greater than 0")
        return found
