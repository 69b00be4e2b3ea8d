"""Random order as pure functions of seed and position: no state to save, and equal for any number of ranks and workers.

Every draw hashes its seed and place instead of advancing a generator. So a process can compute any position without
those before it, ranks agree without communicating, and a resumed run draws what the unbroken one would have drawn.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import numpy as np


def stable_hash(*parts: object) -> int:
    """Signed 64-bit hash of the parts' text, the same on every machine and in every process (Python's hash is not)."""
    text = "\x1f".join(map(str, parts))
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def sample_id(image_id: int, text_number: int) -> int:
    """Id of a pair, signed 64 bits: the hash of its image's key plus the number of its caption."""
    return (image_id + text_number + 2**63) % 2**64 - 2**63


def salted(number: int, salt: int | None) -> int:
    """The id in one part of a mixture, so that equal keys of two parts differ; unchanged without salt."""
    return number if salt is None else stable_hash("part", salt, number)


def draw(*parts: object) -> int:
    """A pseudo-random number from 0 to 2**63 - 1, a function of the parts."""
    return stable_hash(*parts) & (2**63 - 1)


@lru_cache(maxsize=4)
def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one pass over `size` items: (size,) int64, a pure function of (seed, epoch)."""
    return np.random.default_rng(draw("permutation", seed, epoch)).permutation(size)


def locate(position: int, size: int, seed: int) -> tuple[int, int]:
    """(epoch, index) at a position of the endless order, one permutation after another."""
    epoch, offset = divmod(position, size)
    return epoch, int(permutation(size, seed, epoch)[offset])


def substitutes(size: int, seed: int, epoch: int, index: int) -> Iterator[int]:
    """Indices to try in turn when item `index` cannot be read: random ones first, then its successors.

    Ends after about a thousand, so that unreadable data is an error and not an endless loop.
    """
    for attempt in range(32):
        yield draw("substitute", seed, epoch, index, attempt) % size
    for offset in range(1, min(size, 1000)):
        yield (index + offset) % size


@dataclass(frozen=True)
class Parts:
    """Division of a step's N pairs: rank r has places r B to (r + 1) B - 1, in parts of at most `largest` pairs.

    The parts of a step are as equal as possible: streams then give out equally many pairs, and a compiled tower sees
    one or two sizes. Parts are numbered from the first of step 0.
    """

    effective_batch: int
    """N"""
    largest: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        if self.effective_batch < 1 or self.effective_batch % self.world_size:
            raise ValueError(f"effective batch {self.effective_batch} does not divide over {self.world_size} ranks")
        if self.largest < 1:
            raise ValueError(f"parts of {self.largest} pairs must have at least 1")

    @property
    def per_rank(self) -> int:
        """B, this rank's pairs of a step."""
        return self.effective_batch // self.world_size

    @property
    def per_step(self) -> int:
        """Parts of a step."""
        return -(-self.per_rank // self.largest)

    def positions(self, number: int) -> range:
        """The places of part `number` in the endless order of all ranks."""
        step, part = divmod(number, self.per_step)
        first = step * self.effective_batch + self.rank * self.per_rank
        return range(first + self._start(part), first + self._start(part + 1))

    def size(self, number: int) -> int:
        """Pairs in part `number`."""
        return len(self.positions(number))

    def _start(self, part: int) -> int:
        return part * self.per_rank // self.per_step
