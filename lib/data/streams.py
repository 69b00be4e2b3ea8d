"""Owns the endless streams that shards are read as: their order, their shuffling and their exact position."""

from collections.abc import Iterator
from functools import partial
from itertools import chain, islice

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from lib.data.images import BadImage, decode_image
from lib.data.indexed import Prepared, Tally
from lib.data.order import ChunkPlan, draw, permutation, sample_id, stable_hash
from lib.data.pairs import Skip
from lib.data.prepare import Pair, Prepare
from lib.data.shards import Item, ShardSource
from lib.errors import InputError

SHUFFLE_BUFFER = 1000
"""Undecoded samples each stream keeps, to give out in random order."""

_MOST_BAD_IN_A_ROW = 20_000
_MOST_EMPTY_PASSES = 20  # for each stream there is: one that gets a few samples of a small set may see many


class ShardChunks(IterableDataset):
    """The chunks `numbers`, each from the stream that its number names, whatever the first one is.

    With K workers a rank has K streams, and chunk n comes from stream n mod K: torch's DataLoader takes
    chunks from its workers in turn, so worker w of a loader that starts at chunk n serves stream
    (n + w) mod K.
    """

    def __init__(
        self,
        source: ShardSource,
        prepare: Prepare,
        plan: ChunkPlan,
        seed: int,
        positions: list[tuple[int, int]],
        numbers: range,
    ):
        self.source, self.prepare, self.plan, self.seed = source, prepare, plan, seed
        self.positions, self.numbers = positions, numbers

    def __iter__(self) -> Iterator[Prepared | InputError]:
        worker = get_worker_info()
        offset, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        own = (self.numbers.start + offset) % workers
        streams = self.plan.world_size * workers
        stream = _Stream(
            self.source, self.seed, self.plan.rank * workers + own, streams, self.positions[own], self.prepare
        )
        for number in self.numbers[offset::workers]:
            tally = Tally()
            try:
                pairs = [stream.pair(tally) for _ in range(self.plan.size(number))]
            except InputError as error:
                yield error  # raised in a worker it would arrive wrapped in a traceback
                return
            yield Prepared(self.prepare.chunk(pairs), tally, own, stream.position)


def undecoded(source: ShardSource, seed: int, epoch: int, stream: int, streams: int) -> Iterator[Item]:
    """One stream's part of a pass, shuffled; the parts of all streams together hold every sample once.

    Shards are dealt out to the streams; where there are fewer shards than streams, the samples are.
    """
    order = permutation(len(source.paths), seed, epoch)
    if len(order) >= streams:
        items = chain.from_iterable(source.items(shard) for shard in order[stream::streams])
    else:
        # Moved on by one each pass, so that a stream that gets nothing of a tiny set does so once.
        items = chain.from_iterable(source.items(shard) for shard in order)
        items = islice(items, (stream + epoch) % streams, None, streams)
    return shuffled(items, np.random.default_rng(draw("buffer", seed, epoch, stream)), SHUFFLE_BUFFER)


def shuffled(items: Iterator[Item], random: np.random.Generator, size: int) -> Iterator[Item]:
    """The same items, each given out at random from a buffer of `size`."""
    buffer: list[Item] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        place = int(random.integers(size))
        item, buffer[place] = buffer[place], item
        yield item
    random.shuffle(buffer)
    yield from buffer


class _Stream:
    """Reads pairs without end, and knows how many undecoded samples of which pass it consumed."""

    def __init__(
        self,
        source: ShardSource,
        seed: int,
        stream: int,
        streams: int,
        position: tuple[int, int],
        prepare: Prepare,
    ):
        self.source, self.seed, self.stream, self.streams, self.prepare = source, seed, stream, streams, prepare
        self.epoch, self.consumed = position
        self.empty_passes = 0
        # What was consumed before is read again and dropped undecoded: the shuffling repeats itself exactly.
        self.items = islice(self._pass(), self.consumed, None)

    @property
    def position(self) -> tuple[int, int]:
        return self.epoch, self.consumed

    def pair(self, tally: Tally) -> Pair:
        """The next pair that can be used; what cannot is noted in `tally` in the first pass."""
        for _ in range(_MOST_BAD_IN_A_ROW):
            item = self._next()
            try:
                pair = self._decoded(item)
            except BadImage as bad:
                if self.epoch == 0:
                    tally.skips.append(Skip(item.where, item.key, bad.reason))
                continue
            tally.used += self.epoch == 0
            self.empty_passes = 0
            return pair
        raise self._nothing_readable()

    def _next(self) -> Item:
        while True:
            for item in self.items:
                self.consumed += 1
                return item
            self.epoch, self.consumed = self.epoch + 1, 0
            self.empty_passes += 1
            if self.empty_passes > _MOST_EMPTY_PASSES * self.streams:
                raise self._nothing_readable()
            self.items = self._pass()

    def _pass(self) -> Iterator[Item]:
        return undecoded(self.source, self.seed, self.epoch, self.stream, self.streams)

    def _decoded(self, item: Item) -> Pair:
        if item.reason is not None:
            raise BadImage(item.reason)
        image_id = stable_hash(item.key)
        choice = draw("text", self.seed, self.epoch, image_id) % len(item.texts)
        number = item.numbers[choice]
        augmentation = draw("augment", self.seed, self.epoch, image_id, number)
        return self.prepare.pair(
            partial(decode_image, item.image),
            image_id,
            item.texts[choice],
            item.group,
            sample_id(image_id, number),
            augmentation,
        )

    def _nothing_readable(self) -> InputError:
        return InputError(
            f"--data {self.source.where}: no pair that can be used is found any more; check the tar files "
            "and the images in them"
        )
