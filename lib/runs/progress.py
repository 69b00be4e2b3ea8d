"""Progress of a run: its steps, the best evaluation, and what ends it early (patience, divergence)."""

from dataclasses import dataclass, field

from lib.errors import RunError

NONFINITE_LIMIT = 10  # updates in a row that --on-nonfinite skip may leave out
MOST_OVERFLOWS = 50  # fp16 updates skipped in a row: by then the loss scale is far below any useful one


@dataclass
class Progress:
    """Counters of the training loop."""

    steps: int
    """of the whole run"""
    patience: int
    """evaluations without a better one that end the run; 0: none do"""
    first_step: int = 0
    """Steps that were done before this process began."""
    best: dict = field(default_factory=dict)
    """{"step", "metric", "value", "loss"} of the best evaluation so far."""
    stale: int = 0
    """Evaluations in a row that improved nothing."""
    overflows: int = 0
    """fp16 updates skipped in a row."""
    nonfinite: int = 0
    """Updates left out in a row because loss or gradient were not finite."""

    @property
    def out_of_patience(self) -> bool:
        return bool(self.patience) and self.stale >= self.patience

    def is_over(self, step: int) -> bool:
        """True if no step follows this one."""
        return step >= self.steps or self.out_of_patience

    def note_evaluation(self, step: int, metric: str, value: float, loss: float, better: bool) -> None:
        """Keep a better evaluation as the best so far; count those that are worse, or the same to the last digit."""
        same = (value, loss) == (self.best.get("value"), self.best.get("loss"))
        self.stale = 0 if better and not same else self.stale + 1
        if better:
            self.best = {"step": step, "metric": metric, "value": value, "loss": loss}

    def patience_ended(self) -> str:
        """Message for a run that --patience ends."""
        return (
            f"{self.stale} evaluations in a row were not better than {self.best['metric']} {self.best['value']:.4f} of "
            f"step {self.best['step']}, as --patience {self.patience} allows: the run ends"
        )

    def nothing_left(self) -> str:
        """Message for a resumed run that is complete."""
        if self.out_of_patience:
            return f"{self.patience_ended()}: nothing is left to do; more with a larger --patience"
        return f"the run has its {self.steps} steps: nothing is left to do; more with a larger --steps or --epochs"

    def count_overflow(self, step: int, loss: float, grad_norm: float) -> None:
        """Count an fp16 update that overflowed: usual, as the loss scale is found by it, unless there is no end."""
        self.overflows += 1
        if self.overflows > MOST_OVERFLOWS:
            raise self._diverged(step, loss, grad_norm)

    def count_nonfinite(self, step: int, loss: float, grad_norm: float, skip: bool) -> None:
        """Count an update that is left out; RunError without `skip`, and for more than NONFINITE_LIMIT in a row."""
        self.nonfinite += 1
        if not skip or self.nonfinite > NONFINITE_LIMIT:
            raise self._diverged(step, loss, grad_norm)

    def _diverged(self, step: int, loss: float, grad_norm: float) -> RunError:
        times = f" in {self.nonfinite} steps in a row" if self.nonfinite > 1 else ""
        return RunError(
            f"step {step}: loss {loss}, gradient norm {grad_norm}{times}: training diverged. Lower --lr, lengthen "
            "--warmup-steps or lower --grad-clip"
        )
