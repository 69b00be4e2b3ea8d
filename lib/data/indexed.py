"""Owns the reading of indexed sources: chunk numbers in, decoded and tokenized chunks out."""

from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from torch.utils.data import Dataset

from lib.data.batch import Chunk
from lib.data.images import BadImage
from lib.data.order import ChunkPlan, draw, locate, substitutes
from lib.data.pairs import IndexedSource, Skip
from lib.data.prepare import Pair, Prepare
from lib.errors import InputError


@dataclass
class Tally:
    """What became of the samples met for the first time while one chunk was made."""

    used: int = 0
    skips: list[Skip] = field(default_factory=list)


class Prepared(NamedTuple):
    """A chunk and what must be known when it is handed out."""

    chunk: Chunk
    tally: Tally
    stream: int = 0
    """of shards: which of this rank's streams it was read from"""
    position: tuple[int, int] = (0, 0)
    """of shards: (pass, samples consumed in that pass) of the stream after this chunk"""


class IndexedChunks(Dataset):
    """Item `number` is that chunk of the endless order, whichever worker makes it."""

    def __init__(self, source: IndexedSource, prepare: Prepare, plan: ChunkPlan, seed: int):
        self.source, self.prepare, self.plan, self.seed = source, prepare, plan, seed

    def __getitem__(self, number: int) -> Prepared | InputError:
        tally = Tally()
        try:
            pairs = [self._pair(position, tally) for position in self.plan.positions(number)]
        except InputError as error:
            return error  # raised in a worker it would arrive wrapped in a traceback
        return Prepared(self.prepare.chunk(pairs), tally)

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
            try:
                return self._read(substitute, epoch, index)
            except BadImage:
                continue
        raise InputError(
            f"--data {self.source.where}: hundreds of images in a row cannot be read, "
            f"{self.source.key(index)!r} among them ({reason}); check that they are images"
        )

    def _read(self, pair: int, epoch: int, place: int) -> Pair:
        """The pair, with the text and the augmentation that belong to its place in the epoch."""
        source = self.source
        image = int(source.image[pair])
        text = int(source.first_text[pair])
        if source.text_count[pair] > 1:
            text += draw("text", self.seed, epoch, place) % int(source.text_count[pair])
        return self.prepare.pair(
            partial(source.images.open, image),
            int(source.image_id[image]),
            source.texts[text],
            int(source.group[pair]),
            source.sample_id(pair, text),
            draw("augment", self.seed, epoch, place),
        )
