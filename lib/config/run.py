"""What a run leaves, goes on from, and is computed by."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lib.config.settings import PrecisionFlag, Settings


@dataclass(frozen=True)
class Run(Settings):
    """What a run leaves, what it goes on from, and how it is computed."""

    output_dir: Path | None = None
    """Folder of the run; None: the next free runs/clip, runs/siglip, runs/siglip-2, ..."""
    resume: str = "none"
    """auto: go on from the newest whole checkpoint of --output-dir, if there is one; none; or a checkpoint folder."""
    save_every: int = 100
    """Steps between checkpoints (one is also written at the end); 0: none."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep, besides the best; 0: all."""
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """Experiment tracker, through Accelerate."""
    precision: PrecisionFlag = "auto"
    """Number format in which the towers compute; weights, losses and sums stay float32. auto: bf16 where the
    accelerator has it, fp16 on older CUDA cards, fp32 on a CPU; accelerate launch --mixed_precision overrides auto."""
    deterministic: bool = False
    """On CUDA, use reproducible kernels only, so that a resumed run is bit-identical there too; slower.
    On a CPU runs are bit-identical without it."""
    compile: bool = False
    """Compile the trunks with torch.compile: the first step takes a minute or more longer, the others less time."""
    compile_backend: Literal["inductor", "aot_eager"] = "inductor"
    """inductor generates code (on a CPU it needs a C++ compiler); aot_eager only traces, to find faults."""

    def faults(self) -> list[str]:
        """As in Settings."""
        found = super().faults() + self.not_negative("save_every", "keep_checkpoints")
        if self.resume == "auto" and self.output_dir is None:
            found.append("--resume auto needs the --output-dir whose run should go on")
        if self.given("compile_backend") and not self.compile:
            found.append(f"--compile-backend {self.compile_backend} has no meaning without --compile; add it")
        return found
