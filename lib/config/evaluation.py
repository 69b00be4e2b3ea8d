"""When is evaluated, and what the figures decide."""

from dataclasses import dataclass

from lib.config.settings import Settings


@dataclass(frozen=True)
class Evaluation(Settings):
    """When is evaluated, and what the figures decide."""

    eval_every: int = 50
    """Steps between evaluations on validation data (one also runs at the end); 0: none."""
    best_metric: str = "auto"
    """Metric that picks the best checkpoint: auto (accuracy, or text_to_image.R@1), loss, macro_f1, ..."""
    patience: int = 0
    """Stop early after this many evaluations in a row without a better --best-metric; 0: never."""
    eval_ema: bool = False
    """Evaluate, choose the best of, and export the averaged weights of --ema instead of those of the last step."""

    def faults(self) -> list[str]:
        """As in Settings."""
        found = super().faults() + self.not_negative("eval_every", "patience")
        if self.patience and not self.eval_every:
            found.append(f"--patience {self.patience} counts evaluations; --eval-every 0 switches them off")
        return found
