"""Layout of streams: their shards, their number, and the rest of a pass that another layout takes over."""

from collections.abc import Sequence
from dataclasses import dataclass

from lib.data.pairs import IndexedSource, Source, parts_of
from lib.data.shards.source import ShardSource
from lib.data.streams.dealing import Dealing
from lib.data.streams.parts import part_seed
from lib.data.streams.positions import IndexedPosition, ShardPosition, StreamPosition, loaded

Excluded = dict[int, frozenset[int]]
"""Numbers of the shards left out, by pass."""


def layout(source: Source, world_size: int, workers: int, per_step: int) -> dict:
    """Describe as plain values the layout that positions of streams refer to; per_step: parts of a rank's step."""
    parts: list[dict] = []
    for part in parts_of(source):
        if isinstance(part, ShardSource):
            parts.append({"shards": list(part.names), "samples": part.samples and list(part.samples)})
        else:
            parts.append({"pairs": part.size})
    return {"parts": parts, "world_size": world_size, "streams": world_size * max(1, workers), "per_step": per_step}


def dealings(source: Source, seed: int, streams: int, excluded: Sequence[Excluded]) -> list[Dealing | None]:
    """How each part's passes are dealt; None for parts that are read by number."""
    return [
        Dealing(len(part.shards), part.samples, part_seed(source, seed, number), streams, excluded[number])
        if isinstance(part, ShardSource)
        else None
        for number, part in enumerate(parts_of(source))
    ]


@dataclass(frozen=True)
class Start:
    """Where all streams of a layout begin."""

    position: StreamPosition
    excluded: list[Excluded]
    """for each part"""


def fresh_start(source: Source) -> Start:
    """The beginning of the first pass."""
    parts = parts_of(source)
    positions = (ShardPosition() if isinstance(part, ShardSource) else IndexedPosition() for part in parts)
    return Start(StreamPosition(0, tuple(positions)), [{} for _ in parts])


def take_over(source: Source, seed: int, states: Sequence[dict]) -> Start:
    """Where streams of another layout begin, given what all ranks saved.

    Shards go on with the slowest stream's pass, without the shards that all streams had finished in it, and so do
    the passes that fast streams had begun. Pairs by number begin a new pass. Data of another kind begins anew.
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
        if isinstance(part, IndexedSource):
            parts.append(IndexedPosition(max(each.epoch for each in stood) + 1))
            excluded.append({})
            continue
        assert isinstance(part, ShardSource)
        in_shards = [each for each in stood if isinstance(each, ShardPosition)]
        names, samples = old[number]["shards"], old[number]["samples"]
        dealing = Dealing(
            len(names), samples, part_seed(source, seed, number), len(positions), excluded_in(states[0])[number]
        )
        finished = {epoch: {names[n] for n in numbers} for epoch, numbers in dealing.finished(in_shards).items()}
        parts.append(ShardPosition(min(finished)))
        excluded.append({epoch: _numbers(part.names, done) for epoch, done in finished.items()})
    draws = max(position.draws for position in positions)
    return Start(StreamPosition(draws, tuple(parts)), excluded)


def excluded_in(state: dict) -> list[Excluded]:
    """For each part, what a saved state says is left out."""
    return [{epoch: frozenset(shards) for epoch, shards in part.items()} for part in state["excluded"]]


def _numbers(names: tuple[str, ...], wanted: set[str]) -> frozenset[int]:
    return frozenset(number for number, name in enumerate(names) if name in wanted)
