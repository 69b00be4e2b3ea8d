"""Dealing of shards to streams: positions, the share of each stream in each pass, and resuming in another layout.

A stream is what one worker of one rank reads without end. Which samples it gets is a pure function of seed, pass and
number of streams, so every process computes it alone: ranks never communicate about data, and a resumed run deals the
same again.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from lib.data.order import draw, permutation
from lib.data.pairs import MixedSource, Source, parts_of
from lib.data.shard_source import ShardSource
from lib.data.tars import ALL

_EMPTY = np.empty((0, 3), dtype=np.int64)

Excluded = dict[int, frozenset[int]]
"""Numbers of the shards left out, by pass."""


class ShardPosition(NamedTuple):
    """Position of one stream in shards; it travels with every chunk."""

    epoch: int = 0
    part: int = 0
    """the next of its parts in this pass"""
    sample: int = -1
    """the next sample of that part; -1: the part is not begun"""
    taken: int = 0
    """pairs of that sample that are in the buffer already"""
    handed: int = 0
    """pairs given out in this pass"""
    buffer: np.ndarray = _EMPTY
    """(n, 3) int64: part, sample and pair of every item in the shuffle buffer, in the buffer's order"""


class IndexedPosition(NamedTuple):
    """Position of one stream in pairs by number."""

    epoch: int = 0
    place: int = 0
    """in the stream's share of the pass"""


class StreamPosition(NamedTuple):
    """Position of one stream in all parts of its source."""

    draws: int
    """pairs for which a part was drawn"""
    parts: tuple[ShardPosition | IndexedPosition, ...]


def saved(position: StreamPosition) -> dict:
    """The position as numbers, lists and tensors."""
    parts = []
    for part in position.parts:
        if isinstance(part, ShardPosition):
            parts.append({"cursor": list(part[:-1]), "buffer": torch.from_numpy(part.buffer)})
        else:
            parts.append({"cursor": list(part)})
    return {"draws": position.draws, "parts": parts}


def loaded(state: dict) -> StreamPosition:
    """The position that was saved."""
    parts = (
        ShardPosition._make([*part["cursor"], part["buffer"].numpy()])
        if "buffer" in part
        else IndexedPosition(*part["cursor"])
        for part in state["parts"]
    )
    return StreamPosition(state["draws"], tuple(parts))


class Part(NamedTuple):
    """The samples of one shard that one stream reads."""

    shard: int
    samples: range


@dataclass(frozen=True)
class Dealing:
    """Deals every pass over shards to `streams` streams; their parts together hold every sample once."""

    shards: int
    """number of shards"""
    samples: tuple[int, ...] | None
    """in each shard; None where that is not known"""
    seed: int
    streams: int
    excluded: Excluded
    """shards left out, by pass"""

    def parts(self, epoch: int, stream: int) -> list[Part]:
        """Parts that the stream reads in pass `epoch`, in order.

        With known counts the samples are cut into equal ranges, one for each stream. Else whole shards are dealt in
        turn; where there are fewer shards than streams, every stream takes each n-th sample of all of them.
        """
        excluded = self.excluded.get(epoch, frozenset())
        order = [int(shard) for shard in permutation(self.shards, self.seed, epoch) if shard not in excluded]
        # Rotated by one each pass, so that no stream of a tiny set gets nothing twice in a row.
        turn = (stream + epoch) % self.streams
        if self.samples is not None:
            return self._range(self.samples, order, turn)
        if len(order) >= self.streams:
            return [Part(shard, ALL) for shard in order[turn :: self.streams]]
        return [
            Part(shard, range((turn + place) % self.streams, sys.maxsize, self.streams))
            for place, shard in enumerate(order)
        ]

    def _range(self, samples: Sequence[int], order: list[int], turn: int) -> list[Part]:
        # One place more than samples in each shard, where its damage would be counted.
        places = np.array([samples[shard] + 1 for shard in order], dtype=np.int64)
        ends = np.cumsum(places)
        total = int(ends[-1]) if order else 0
        low, high = total * turn // self.streams, total * (turn + 1) // self.streams
        parts = []
        for number in range(int(np.searchsorted(ends, low, side="right")), len(order)):
            begin, end = int(ends[number] - places[number]), int(ends[number])
            if begin >= high:
                break
            # The last part is open: a shard with more samples than its index says loses none.
            stop = sys.maxsize if high >= end else high - begin
            parts.append(Part(order[number], range(max(low - begin, 0), stop)))
        return parts

    def finished(self, positions: Sequence[ShardPosition]) -> Excluded:
        """The shards of which no stream has a sample left, by pass, given the positions of all streams.

        From the slowest stream's pass to the last that is known; shards that were left out count as finished.
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


def part_seed(source: Source, seed: int, number: int) -> int:
    """The seed that shuffles part `number` of a mixture, or the seed itself for a source that is none."""
    return draw("part", seed, number) if isinstance(source, MixedSource) else seed


def dealings(source: Source, seed: int, streams: int, excluded: Sequence[Excluded]) -> list[Dealing | None]:
    """The dealing of each part of a source; None for parts that are read by number."""
    return [
        Dealing(len(part.shards), part.samples, part_seed(source, seed, number), streams, excluded[number])
        if isinstance(part, ShardSource)
        else None
        for number, part in enumerate(parts_of(source))
    ]


def layout(source: Source, world_size: int, workers: int, per_step: int) -> dict:
    """The layout that positions of streams refer to, as plain values; per_step: parts of a rank's step."""
    parts: list[dict] = []
    for part in parts_of(source):
        if isinstance(part, ShardSource):
            parts.append({"shards": list(part.names), "samples": part.samples and list(part.samples)})
        else:
            parts.append({"pairs": part.size})
    return {"parts": parts, "world_size": world_size, "streams": world_size * max(1, workers), "per_step": per_step}


class Start(NamedTuple):
    """First position of all streams of a layout."""

    position: StreamPosition
    excluded: list[Excluded]
    """for each part"""


def fresh_start(source: Source) -> Start:
    """The beginning of the first pass."""
    parts = parts_of(source)
    positions = (ShardPosition() if isinstance(part, ShardSource) else IndexedPosition() for part in parts)
    return Start(StreamPosition(0, tuple(positions)), [{} for _ in parts])


def take_over(source: Source, seed: int, states: Sequence[dict]) -> Start:
    """First position of the streams of another layout, given the saved states of all ranks.

    Shards continue in the slowest stream's pass, without the shards that all streams had finished in it, and so do
    the passes that faster streams had begun. Pairs by number begin a new pass. Other data begins anew.
    """
    old, new = states[0]["layout"]["parts"], layout(source, 1, 1, 1)["parts"]
    if [sorted(part) for part in old] != [sorted(part) for part in new]:
        return fresh_start(source)
    positions = [loaded(position) for state in states for position in state["positions"]]
    assert len(positions) == states[0]["layout"]["streams"], "the states of all ranks are needed"
    parts: list[ShardPosition | IndexedPosition] = []
    excluded: list[Excluded] = []
    for number, part in enumerate(parts_of(source)):
        stood = [position.parts[number] for position in positions]
        if not isinstance(part, ShardSource):
            parts.append(IndexedPosition(max(each.epoch for each in stood) + 1))
            excluded.append({})
            continue
        in_shards = [each for each in stood if isinstance(each, ShardPosition)]
        names, samples = old[number]["shards"], old[number]["samples"]
        left_out = excluded_in(states[0])[number]
        dealing = Dealing(len(names), samples, part_seed(source, seed, number), len(positions), left_out)
        finished = {epoch: {names[n] for n in numbers} for epoch, numbers in dealing.finished(in_shards).items()}
        parts.append(ShardPosition(min(finished)))
        # By name: the shards may be others now, or in another order.
        excluded.append(
            {
                epoch: frozenset(number for number, name in enumerate(part.names) if name in done)
                for epoch, done in finished.items()
            }
        )
    draws = max(position.draws for position in positions)
    return Start(StreamPosition(draws, tuple(parts)), excluded)


def excluded_in(state: dict) -> list[Excluded]:
    """The shards left out in a saved state, for each part."""
    return [{epoch: frozenset(shards) for epoch, shards in part.items()} for part in state["excluded"]]
