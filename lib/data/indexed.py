"""Reading of indexed sources: by chunk number, or as one stream of a mixture."""

from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from torch.utils.data import Dataset

from lib.data.batch import Chunk
from lib.data.images import BadImage
from lib.data.order import Parts, draw, locate, permutation, substitutes
from lib.data.pairs import IndexedSource, Skip
from lib.data.prepare import Pair, Prepare
from lib.data.streams.positions import IndexedPosition, StreamPosition
from lib.errors import InputError


@dataclass
class Tally:
    """Samples read for the first time while some pairs were made: how many were used, and why others were not."""

    used: int = 0
    skips: list[Skip] = field(default_factory=list)


class Progress(NamedTuple):
    """Record of some pairs, entered when they are handed out."""

    tally: Tally
    stream: int = 0
    """of streams: which of this rank's they were read from"""
    position: StreamPosition | None = None
    """of streams: where that one stands after these pairs"""


class Prepared(NamedTuple):
    """Pairs as a worker sends them."""

    pairs: Chunk
    progress: Progress


class IndexedParts(Dataset):
    """Item `number` is that part of the endless order, whichever worker makes it."""

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
            pair = self._read(index, epoch, index)
            tally.used += epoch == 0
            return pair
        except BadImage as bad:
            if epoch == 0:
                tally.skips.append(Skip(self.source.where, self.source.key(index), bad.reason))
            reason = bad.reason
        for substitute in substitutes(self.source.size, self.seed, epoch, index):
            with suppress(BadImage):
                return self._read(substitute, epoch, index)
        raise InputError(
            f"--data {self.source.where}: hundreds of images in a row cannot be read, "
            f"{self.source.key(index)!r} among them ({reason}); check that they are images"
        )

    def _read(self, pair: int, epoch: int, place: int) -> Pair:
        return read_pair(self.source, self.prepare, pair, epoch, place, self.seed)


class IndexedStream:
    """Endless reading of one stream's share of every pass over an indexed source, a part of a mixture."""

    def __init__(self, source: IndexedSource, seed: int, stream: int, streams: int, position: IndexedPosition) -> None:
        self.source, self.seed, self.stream, self.streams = source, seed, stream, streams
        self._begin(position.epoch)
        self.place = position.place

    @property
    def position(self) -> IndexedPosition:
        """Where the stream stands: what `__init__` takes to go on with the same pairs."""
        return IndexedPosition(self.epoch, self.place)

    def next(self) -> tuple[int, int]:
        """The pass and the number of the next pair."""
        while self.place >= len(self.share):
            self._begin(self.epoch + 1)
        self.place += 1
        return self.epoch, int(self.share[self.place - 1])

    def prepared(self, prepare: Prepare, epoch: int, pair: int) -> Pair:
        """A pair that `next` named; raises BadImage."""
        return read_pair(self.source, prepare, pair, epoch, pair, self.seed)

    def skip(self, pair: int, reason: str) -> Skip:
        """The note of a pair that cannot be used."""
        return Skip(self.source.where, self.source.key(pair), reason)

    def _begin(self, epoch: int) -> None:
        self.epoch, self.place = epoch, 0
        # Moved on by one each pass, so that a stream that gets nothing of a tiny source does so once.
        first = (self.stream + epoch) % self.streams
        self.share = permutation(self.source.size, self.seed, epoch)[first :: self.streams].copy()


def read_pair(source: IndexedSource, prepare: Prepare, pair: int, epoch: int, place: int, seed: int) -> Pair:
    """The pair, with the text and the augmentation that belong to its place in the epoch; raises BadImage."""
    image = int(source.image[pair])
    text = int(source.first_text[pair])
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
