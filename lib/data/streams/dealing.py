"""Dealing of one pass over shards to streams: a pure function, the same wherever it is computed."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lib.data.order import permutation
from lib.data.shards.tars import ALL
from lib.data.streams.positions import ShardPosition


class Part(NamedTuple):
    """The samples of one shard that one stream reads."""

    shard: int
    samples: range


@dataclass(frozen=True)
class Dealing:
    """How every pass is dealt to `streams` streams; the parts of all of them hold every sample once."""

    shards: int
    """how many there are"""
    samples: tuple[int, ...] | None
    """in each shard; None where that is not known"""
    seed: int
    streams: int
    excluded: dict[int, frozenset[int]]
    """shards left out, by pass"""

    def parts(self, epoch: int, stream: int) -> list[Part]:
        """Parts that the stream reads in pass `epoch`, in order.

        With known counts the samples are cut into equal ranges, one for each stream. Else whole shards are dealt in
        turn; where they are fewer than the streams, every stream takes each n-th sample of all of them.
        """
        excluded = self.excluded.get(epoch, frozenset())
        order = [int(shard) for shard in permutation(self.shards, self.seed, epoch) if shard not in excluded]
        # Moved on by one each pass, so that a stream that gets nothing of a tiny set does so once.
        turn = (stream + epoch) % self.streams
        if self.samples is not None:
            return self._range(self.samples, order, turn)
        if len(order) >= self.streams:
            return [Part(shard, ALL) for shard in order[turn :: self.streams]]
        firsts = [(turn + place) % self.streams for place in range(len(order))]
        return [
            Part(shard, range(first, sys.maxsize, self.streams)) for shard, first in zip(order, firsts, strict=True)
        ]

    def _range(self, samples: Sequence[int], order: list[int], turn: int) -> list[Part]:
        # After its samples a shard has one place more, where damage would stand.
        places = np.array([samples[shard] + 1 for shard in order], dtype=np.int64)
        ends = np.cumsum(places)
        total = int(ends[-1]) if order else 0
        low, high = total * turn // self.streams, total * (turn + 1) // self.streams
        parts = []
        for number in range(int(np.searchsorted(ends, low, side="right")), len(order)):
            begin, end = int(ends[number] - places[number]), int(ends[number])
            if begin >= high:
                break
            # The last part is open: a shard with more samples than was said loses none.
            stop = sys.maxsize if high >= end else high - begin
            parts.append(Part(order[number], range(max(low - begin, 0), stop)))
        return parts

    def finished(self, positions: Sequence[ShardPosition]) -> dict[int, frozenset[int]]:
        """The shards of which no stream has a sample left, by pass, given where all streams stand.

        The passes are those from the slowest stream's to the last that anything is known of; shards that were left
        out count as finished.
        """
        epochs = [position.epoch for position in positions]
        last = max(*epochs, *self.excluded, 0)
        return {
            epoch: frozenset(range(self.shards)).difference(
                *(self._unfinished(epoch, stream, position) for stream, position in enumerate(positions))
            )
            for epoch in range(min(epochs), last + 1)
        }

    def _unfinished(self, epoch: int, stream: int, position: ShardPosition) -> set[int]:
        if position.epoch > epoch:
            return set()
        parts = self.parts(epoch, stream)
        if position.epoch < epoch:
            return {part.shard for part in parts}
        waiting = {parts[number].shard for number in position.buffer[:, 0]}
        return waiting | {part.shard for part in parts[position.part :]}
