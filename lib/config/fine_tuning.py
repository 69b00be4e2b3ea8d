"""What of the model trains."""

from dataclasses import dataclass

from lib.config.settings import Settings


@dataclass(frozen=True)
class FineTuning(Settings):
    """What of the model trains; by default everything does."""

    freeze: tuple[str, ...] = ()
    """What does not train: image, text, image.trunk, image.head, text.trunk, text.head, scale, bias,
    image.last:N or text.last:N (a trunk's last N blocks), or re:PATTERN over the names of parameters."""
    unfreeze: tuple[str, ...] = ()
    """What of --freeze trains after all, named alike: --freeze image.trunk --unfreeze image.last:1."""
    lora: int = 0
    """Rank of low-rank adapters in every attention layer that --freeze leaves; 0: none.
    They train in the place of the trunks' own weights, and are merged into the exported model."""
    lora_alpha: float | None = None
    """Adapters' outputs are multiplied by this over the rank; None: twice the rank."""
    lora_dropout: float = 0.0
    """Dropout probability before the adapters."""

    def faults(self) -> list[str]:
        """As in Settings."""
        found = super().faults() + self.not_negative("lora") + self.above_zero("lora_alpha")
        found += self.fractions("lora_dropout", whole=False)
        if self.unfreeze and not self.freeze:
            found.append(f"--unfreeze {' '.join(self.unfreeze)} needs --freeze: without it, everything trains")
        if not self.lora and (self.lora_alpha is not None or self.lora_dropout):
            found.append("--lora-alpha and --lora-dropout shape adapters; give their rank with --lora")
        return found
