"""Pairs read from endless streams, one for each worker of each rank: shards and mixtures."""

from bisect import bisect
from collections.abc import Iterator
from itertools import accumulate

from torch.utils.data import IterableDataset, get_worker_info

from lib.data.images import BadImage
from lib.data.indexed import IndexedStream, Prepared, Progress, Tally
from lib.data.order import Parts, draw
from lib.data.pairs import IndexedSource, MixedSource, Source, parts_of
from lib.data.prepare import Pair, Prepare
from lib.data.shards.source import ShardSource
from lib.data.streams.dealing import Dealing
from lib.data.streams.positions import IndexedPosition, ShardPosition, StreamPosition
from lib.data.streams.shard_stream import ShardStream
from lib.errors import InputError

_MOST_BAD_IN_A_ROW = 20_000
_UNREACHABLE = 1_000  # as bad as so many bad pairs: each is waited for


class StreamParts(IterableDataset):
    """The parts `numbers`, each from the stream that its number names, whatever the first one is.

    With K workers a rank has K streams, and part n comes from stream n mod K: torch's DataLoader takes
    parts from its workers in turn, so worker w of a loader that starts at part n serves stream
    (n + w) mod K.
    """

    def __init__(
        self,
        source: Source,
        prepare: Prepare,
        parts: Parts,
        seed: int,
        dealings: list[Dealing | None],
        buffer_size: int,
        positions: list[StreamPosition],
        numbers: range,
    ):
        self.source, self.prepare, self.parts, self.seed = source, prepare, parts, seed
        self.dealings, self.buffer_size = dealings, buffer_size
        self.positions, self.numbers = positions, numbers

    def __iter__(self) -> Iterator[Prepared | InputError]:
        worker = get_worker_info()
        offset, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        own = (self.numbers.start + offset) % workers
        try:
            stream = self._stream(own, workers)
            for number in self.numbers[offset::workers]:
                tally = Tally()
                pairs = [stream.pair(tally) for _ in range(self.parts.size(number))]
                yield Prepared(self.prepare.stack(pairs), Progress(tally, own, stream.position))
        except InputError as error:
            yield error  # raised in a worker it would arrive wrapped in a traceback

    def _stream(self, own: int, workers: int) -> "_Stream":
        stream, streams = self.parts.rank * workers + own, self.parts.world_size * workers
        readers: list[_Reader] = []
        weights = self.source.weights if isinstance(self.source, MixedSource) else None
        position = self.positions[own]
        parts = zip(parts_of(self.source), self.dealings, position.parts, strict=True)
        for number, (part, dealing, where) in enumerate(parts):
            if isinstance(part, ShardSource):
                assert dealing is not None and isinstance(where, ShardPosition)
                readers.append(ShardStream(part, dealing, stream, self.buffer_size, where))
            else:
                assert isinstance(part, IndexedSource) and isinstance(where, IndexedPosition)
                seed = part_seed(self.source, self.seed, number)
                readers.append(IndexedStream(part, seed, stream, streams, where))
        return _Stream(self.prepare, readers, weights or (1.0,), draw("mixture", self.seed, stream), position.draws)


_Reader = ShardStream | IndexedStream


class _Stream:
    """Draws the part for each next pair by weight, and reads that part on."""

    def __init__(
        self, prepare: Prepare, readers: list[_Reader], weights: tuple[float, ...], seed: int, draws: int
    ) -> None:
        self.prepare, self.readers, self.seed, self.draws = prepare, readers, seed, draws
        self.bounds = list(accumulate(weights))[:-1]

    @property
    def position(self) -> StreamPosition:
        return StreamPosition(self.draws, tuple(reader.position for reader in self.readers))

    def pair(self, tally: Tally) -> Pair:
        """The next pair that can be used; what cannot is noted in `tally` in its part's first pass."""
        reader = self.readers[bisect(self.bounds, draw(self.seed, self.draws) / 2**63)]
        self.draws += 1
        bad_in_a_row = 0
        while bad_in_a_row < _MOST_BAD_IN_A_ROW:
            epoch, item = reader.next()
            try:
                pair = reader.prepared(self.prepare, epoch, item)  # type: ignore[arg-type]  # the item is its own
            except BadImage as bad:
                bad_in_a_row += _UNREACHABLE if bad.reason == "unreachable" else 1
                if epoch == 0:
                    tally.skips.append(reader.skip(item, bad.reason))  # type: ignore[arg-type]  # as above
                continue
            tally.used += epoch == 0
            return pair
        raise InputError(
            f"--data {reader.source.where}: no pair that can be used is found any more; check the files and the "
            "images in them"
        )


def part_seed(source: Source, seed: int, number: int) -> int:
    """The seed that shuffles part `number` of a source: the seed itself where it is not a part of a mixture."""
    return draw("part", seed, number) if isinstance(source, MixedSource) else seed
