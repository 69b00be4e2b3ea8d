"""XBM, the cross-batch memory: embeddings of past steps, kept as further negatives at no encoder cost.

Source: Wang et al., Cross-Batch Memory for Embedding Learning, 2020. Every rank holds the same bank, in rank order.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.losses.positives import Pairs

ENOUGH = 16  # fresh pairs from which on their mean and deviation are worth following


@torch.no_grad()
def aligned(old: Tensor, fresh: Tensor) -> Tensor:
    """Remembered embeddings (Q, D) with the mean and deviation of the fresh ones (N, D) in every dimension; unit norm.

    While the towers learn, the cloud of their embeddings moves as a whole, and remembered ones stay behind: that is
    most of their error. Source: Ajanthan et al., Adaptive Cross Batch Normalization for Metric Learning, 2023.
    """
    if len(fresh) < ENOUGH:
        return old
    deviation = old.std(0, correction=0).clamp_(min=torch.finfo(old.dtype).eps)
    return F.normalize((old - old.mean(0)) * (fresh.std(0, correction=0) / deviation) + fresh.mean(0), dim=1)


@dataclass(frozen=True)
class Drift:
    """How far remembered embeddings have moved: 1 - mean cosine to the fresh embedding of the same sample."""

    image: float
    text: float
    samples: int
    """Fresh pairs that were found in the memory; 0 means that there is no reading (image and text are nan)."""


def no_drift(device: torch.device) -> Tensor:
    """(3,), the numbers of a `Drift` without a reading; nothing waits for the device."""
    return torch.cat([torch.full((2,), float("nan"), device=device), torch.zeros(1, device=device)])


class CrossBatchMemory:
    """A ring buffer of Q embedded pairs of both towers, with their ids and the step that embedded them.

    Dropping one side would unbalance the gradient norms of the towers, so both are always kept.
    """

    def __init__(
        self,
        size: int,
        embed_dim: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.size = size
        self.image_embeds = torch.zeros(size, embed_dim, device=device, dtype=dtype)
        self.text_embeds = torch.zeros(size, embed_dim, device=device, dtype=dtype)
        self.group = torch.zeros(size, dtype=torch.int64, device=device)
        self.sample_id = torch.zeros(size, dtype=torch.int64, device=device)
        self.text_id = torch.zeros(size, dtype=torch.int64, device=device)
        self.step = torch.zeros(size, dtype=torch.int64, device=device)
        self.image_normalizer = torch.zeros(size, device=device, dtype=dtype)
        self.text_normalizer = torch.zeros(size, device=device, dtype=dtype)
        self.pointer = 0
        self.filled = 0

    def __len__(self) -> int:
        return self.filled

    @torch.no_grad()
    def enqueue(self, fresh: Pairs, step: int) -> None:
        """Put the newest pairs in place of the oldest; of more than Q pairs only the last Q are kept."""
        count = min(len(fresh), self.size)
        if count == 0:
            return
        start = (self.pointer + len(fresh) - count) % self.size
        slots = (start + torch.arange(count, device=self.group.device)) % self.size
        self.image_embeds[slots] = fresh.image_embeds[-count:].to(self.image_embeds.dtype)
        self.text_embeds[slots] = fresh.text_embeds[-count:].to(self.text_embeds.dtype)
        self.group[slots] = fresh.group[-count:]
        self.sample_id[slots] = fresh.sample_id[-count:]
        self.text_id[slots] = fresh.text_id[-count:]
        self.step[slots] = step
        if fresh.image_normalizer is not None and fresh.text_normalizer is not None:
            self.image_normalizer[slots] = fresh.image_normalizer[-count:].to(self.image_normalizer.dtype)
            self.text_normalizer[slots] = fresh.text_normalizer[-count:].to(self.text_normalizer.dtype)
        self.pointer = (self.pointer + len(fresh)) % self.size
        self.filled = min(self.filled + len(fresh), self.size)

    def pairs(self) -> Pairs | None:
        """The remembered pairs, or None while there are none."""
        if self.filled == 0:
            return None
        rows = slice(0, self.filled)  # slots fill from 0 on, so the filled ones are always the first
        ids = self.group[rows], self.sample_id[rows], self.text_id[rows]
        return Pairs(
            self.image_embeds[rows],
            self.text_embeds[rows],
            *ids,
            image_normalizer=self.image_normalizer[rows],
            text_normalizer=self.text_normalizer[rows],
        )

    def mean_age(self, step: int) -> Tensor:
        """Mean age of the remembered pairs at this step, in steps: (), nan while there are none."""
        return (step - self.step[: self.filled]).float().mean()

    @torch.no_grad()
    def drift(self, fresh: Pairs) -> Tensor:
        """Compare fresh pairs with the newest remembered copy of the same sample: (3,), the numbers of a `Drift`.

        They stay on the device: who reads them waits for it.
        """
        if self.filled == 0:
            return no_drift(fresh.sample_id.device)
        # Sorted by sample, and by age within a sample: the last of equal ids is the newest copy.
        by_age = self.step[: self.filled].argsort(stable=True)
        order = by_age[self.sample_id[by_age].argsort(stable=True)]
        ids = self.sample_id[order]
        place = (torch.searchsorted(ids, fresh.sample_id, right=True) - 1).clamp_(min=0)
        found, old = ids[place] == fresh.sample_id, order[place]
        samples = found.sum()
        drifts = [
            1 - (new * remembered[old]).sum(1).mul(found).sum() / samples
            for new, remembered in (
                (fresh.image_embeds, self.image_embeds),
                (fresh.text_embeds, self.text_embeds),
            )
        ]
        return torch.stack([*drifts, samples])

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only, pointer and fill level included, so that safetensors can hold it."""
        tensors = {name: getattr(self, name) for name in self._tensors}
        return tensors | {"pointer": torch.tensor(self.pointer), "filled": torch.tensor(self.filled)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a bank of the same size and dimension; raises ValueError naming both otherwise."""
        saved, here = tuple(state["image_embeds"].shape), tuple(self.image_embeds.shape)
        if saved != here:
            raise ValueError(f"the saved memory holds {saved[0]} pairs of dimension {saved[1]}, this one {here}")
        if not set(self._tensors) <= set(state):  # an earlier version's, without normalizers: it fills anew
            self.pointer = self.filled = 0
            return
        for name in self._tensors:
            getattr(self, name).copy_(state[name])
        self.pointer, self.filled = int(state["pointer"]), int(state["filled"])

    _tensors = (
        "image_embeds", "text_embeds", "group", "sample_id", "text_id", "step", "image_normalizer", "text_normalizer",
    )  # fmt: skip


DRIFT_LIMIT = 0.1  # 1 - cosine; above it remembered embeddings belong to another model than today's


class MemorySwitch:
    """Decides from which step on the memory is used: a given step, or ("auto") once its embeddings are still valid.

    Early in training embeddings move fast and stale negatives mislead, so auto waits for the end of warm-up and for
    a drift reading of at most `DRIFT_LIMIT` in both towers. Where no sample recurs within a full memory there is no
    reading, and the end of warm-up decides. Once on, it stays on.
    """

    def __init__(self, start: int | Literal["auto"], warmup_steps: int) -> None:
        self.start, self.warmup_steps = start, warmup_steps
        self.on = start == 0
        self._had_reading = False

    def update(self, step: int, drift: Drift, was_full: bool) -> None:
        """Take note of a finished step (the first is 1); from then on `on` holds for the next.

        was_full: the memory that the step's pairs were compared with was full.
        """
        self._had_reading |= drift.samples > 0
        if self.on:
            return
        if self.start != "auto":
            self.on = step + 1 >= self.start
        elif step >= self.warmup_steps:
            still = drift.samples > 0 and max(drift.image, drift.text) <= DRIFT_LIMIT
            self.on = still or (was_full and not self._had_reading)

    def state_dict(self) -> dict:
        return {"on": self.on, "had_reading": self._had_reading}

    def load_state_dict(self, state: dict) -> None:
        self.on, self._had_reading = state["on"], state["had_reading"]
