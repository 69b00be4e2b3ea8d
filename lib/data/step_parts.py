"""Parts of steps as worker processes make them: torch datasets over pairs by number, and over endless streams.

A part is the run of pairs that a worker sends at a time; `TrainingData` cuts chunks from the parts.
"""

from bisect import bisect
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import NamedTuple

from torch.utils.data import Dataset, IterableDataset, get_worker_info

from lib.data.batch import Chunk
from lib.data.dealing import Dealing, IndexedPosition, ShardPosition, StreamPosition, part_seed
from lib.data.images import BadImage
from lib.data.order import Parts, draw, locate, permutation, substitutes
from lib.data.pairs import IndexedSource, MixedSource, Skip, Source, parts_of
from lib.data.prepare import Pair, Prepare
from lib.data.shard_source import ShardSource
from lib.data.shard_stream import ShardStream
from lib.errors import InputError

_MOST_BAD_IN_A_ROW = 20_000
_UNREACHABLE = 1_000  # counts as so many bad pairs: each attempt takes long


@dataclass
class Tally:
    """Samples read for the first time while some pairs were made: the number used, and the skipped ones."""

    used: int = 0
    skips: list[Skip] = field(default_factory=list)


class Progress(NamedTuple):
    """Record of some pairs, entered when they are handed out: workers are ahead, and what they read may be lost."""

    tally: Tally
    stream: int = 0
    """number of this rank's stream from which they were read"""
    position: StreamPosition | None = None
    """position of that stream after these pairs"""


class Prepared(NamedTuple):
    """Pairs as a worker sends them."""

    pairs: Chunk
    progress: Progress


class IndexedParts(Dataset):
    """Item `number` is that part of the endless order of pairs by number, whichever worker makes it."""

    def __init__(self, source: IndexedSource, prepare: Prepare, parts: Parts, seed: int):
        self.source, self.prepare, self.parts, self.seed = source, prepare, parts, seed

    def __getitem__(self, number: int) -> Prepared | InputError:
        tally = Tally()
        try:
            pairs = [self._pair(position, tally) for position in self.parts.positions(number)]
        except InputError as error:
            return error  # raised in a worker it would arrive wrapped in a traceback
        return Prepared(self.prepare.stack(pairs), Progress(tally))

    def _pair(self, position: int, tally: Tally) -> Pair:
        epoch, index = locate(position, self.source.size, self.seed)
        try:
            pair = read_pair(self.source, self.prepare, index, epoch, index, self.seed)
            tally.used += epoch == 0
            return pair
        except BadImage as bad:
            if epoch == 0:
                tally.skips.append(Skip(self.source.where, self.source.key(index), bad.reason))
            reason = bad.reason
        # A pure function of the place too, so that all ranks and a resumed run choose the same substitute.
        for substitute in substitutes(self.source.size, self.seed, epoch, index):
            with suppress(BadImage):
                return read_pair(self.source, self.prepare, substitute, epoch, index, self.seed)
        raise InputError(
            f"--data {self.source.where}: hundreds of images in a row cannot be read, "
            f"{self.source.key(index)!r} among them ({reason}); check that they are images"
        )


def read_pair(source: IndexedSource, prepare: Prepare, pair: int, epoch: int, place: int, seed: int) -> Pair:
    """Read a pair with the text and the augmentation of its place in the epoch; raises BadImage."""
    image, text = int(source.image[pair]), int(source.first_text[pair])
    if source.text_count[pair] > 1:
        text += draw("text", seed, epoch, place) % int(source.text_count[pair])
    return prepare.pair(
        partial(source.images.open, image),
        int(source.image_id[image]),
        source.texts[text],
        source.group_id(pair),
        source.sample_id(pair, text),
        draw("augment", seed, epoch, place),
    )


class StreamParts(IterableDataset):
    """The parts `numbers`, each from the stream that its number names, whatever the first one is.

    With K workers a rank has K streams, and part n comes from stream n mod K: torch's DataLoader takes parts from its
    workers in turn, so worker w of a loader that starts at part n serves stream (n + w) mod K. A stream therefore
    gives out the same pairs in an unbroken and in a resumed run.
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
        readers: list[ShardStream | IndexedStream] = []
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
        weights = self.source.weights if isinstance(self.source, MixedSource) else (1.0,)
        return _Stream(self.prepare, readers, weights, draw("mixture", self.seed, stream), position.draws)


class IndexedStream:
    """Endless reading of one stream's share of every pass over an indexed source, a part of a mixture."""

    def __init__(self, source: IndexedSource, seed: int, stream: int, streams: int, position: IndexedPosition) -> None:
        self.source, self.seed, self.stream, self.streams = source, seed, stream, streams
        self._begin(position.epoch)
        self.place = position.place

    @property
    def position(self) -> IndexedPosition:
        """The position from which `__init__` continues with the next pair."""
        return IndexedPosition(self.epoch, self.place)

    def next(self) -> tuple[int, int]:
        """The pass and the number of the next pair."""
        while self.place >= len(self.share):
            self._begin(self.epoch + 1)
        self.place += 1
        return self.epoch, int(self.share[self.place - 1])

    def prepared(self, prepare: Prepare, epoch: int, pair: int) -> Pair:
        """Prepare a pair that `next` named; raises BadImage."""
        return read_pair(self.source, prepare, pair, epoch, pair, self.seed)

    def skip(self, pair: int, reason: str) -> Skip:
        """The note of a pair that cannot be used."""
        return Skip(self.source.where, self.source.key(pair), reason)

    def _begin(self, epoch: int) -> None:
        self.epoch, self.place = epoch, 0
        # Rotated by one each pass, so that no stream of a tiny source gets nothing twice in a row.
        first = (self.stream + epoch) % self.streams
        self.share = permutation(self.source.size, self.seed, epoch)[first :: self.streams].copy()


class _Stream:
    """Draws by weight the part of the source from which each next pair is read."""

    def __init__(
        self,
        prepare: Prepare,
        readers: list[ShardStream | IndexedStream],
        weights: tuple[float, ...],
        seed: int,
        draws: int,
    ) -> None:
        self.prepare, self.readers, self.seed, self.draws = prepare, readers, seed, draws
        self.bounds = list(accumulate(weights))[:-1]

    @property
    def position(self) -> StreamPosition:
        return StreamPosition(self.draws, tuple(reader.position for reader in self.readers))

    def pair(self, tally: Tally) -> Pair:
        """The next usable pair; `tally` counts the unusable ones, in the first pass over their part."""
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
