"""The batch of a step, and the memory that it takes."""

from dataclasses import dataclass
from typing import Literal

from lib.config.settings import Settings


@dataclass(frozen=True)
class Batch(Settings):
    """How large the batch of a step is, and how it fits into memory."""

    effective_batch: int = 4096
    """N: pairs in one optimizer step over all ranks, all with exact gradient."""
    chunk_size: int | Literal["auto"] = "auto"
    """C: pairs per tower forward on one rank; sets the activation memory. auto: measured."""
    keep_graphs: int | Literal["auto"] = 0
    """Chunks whose graph is kept instead of recomputed: faster, more memory. auto: as many as fit."""
    gradient_checkpointing: bool = False
    """Keep the inputs of each block only and run it again in the backward pass: larger chunks fit, slower steps."""
    shared_texts: Literal["auto", "off"] = "auto"
    """Encode each distinct text of a step once, as with class prompts.
    auto: where nothing in the text tower is drawn at random (dropout), so that it is exact."""
    xbm_size: int = 4096
    """Q: remembered pairs of past steps, extra negatives for every anchor; 0: none."""
    xbm_start: int | Literal["auto"] = "auto"
    """Step from which the memory is used; auto: after warm-up, once remembered embeddings have stopped drifting."""
    xbm_gradients: Literal["both", "anchors"] = "both"
    """InfoNCE only, while the memory is used. both: the loss's gradients, through anchors and candidates;
    anchors: through the anchors alone, twice: better where the memory is much larger than the batch."""

    def faults(self) -> list[str]:
        """As in Settings."""
        found = super().faults() + self.at_least_one("effective_batch", "chunk_size")
        found += self.not_negative("keep_graphs", "xbm_size", "xbm_start")
        if self.effective_batch == 1 and not self.xbm_size:
            found.append("--effective-batch 1 without memory has no negatives; use at least 2")
        if self.xbm_gradients == "anchors" and not self.xbm_size:
            found.append("--xbm-gradients anchors has no meaning without a memory; leave it out, or give --xbm-size")
        return found

    def undivided(self, world_size: int) -> list[str]:
        """The fault of a batch that the ranks cannot share alike."""
        if self.effective_batch < 1 or not self.effective_batch % world_size:
            return []
        nearest = max(1, round(self.effective_batch / world_size)) * world_size
        return [
            f"--effective-batch {self.effective_batch} is not divisible by {world_size} ranks; "
            f"the nearest that is: {nearest}"
        ]
