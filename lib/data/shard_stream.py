"""Endless reading of shards by one stream: pass after pass, shuffled in a buffer, from any exact position."""

import threading
from collections import defaultdict
from collections.abc import Iterator
from functools import partial

import numpy as np

from lib.data.dealing import Dealing, ShardPosition
from lib.data.images import BadImage, decode_image
from lib.data.order import draw, sample_id
from lib.data.pairs import Skip
from lib.data.prepare import Pair, Prepare
from lib.data.shard_source import Item, ShardSource
from lib.errors import InputError

_MOST_EMPTY_PASSES = 20  # times the number of streams: one that gets a few samples of a small set may see many


class ShardStream:
    """Gives out the items of this stream's parts, drawn at random from a buffer of at most `buffer_size`."""

    def __init__(
        self, source: ShardSource, dealing: Dealing, stream: int, buffer_size: int, position: ShardPosition
    ) -> None:
        self.source, self.dealing, self.stream = source, dealing, stream
        self.buffer_size = max(1, buffer_size)
        self._begin(position.epoch)
        self.part, self.sample, self.taken, self.handed = position[1:5]
        self._refill(position.buffer)

    @property
    def position(self) -> ShardPosition:
        """The position from which `__init__` continues with the same items."""
        buffer = self.places[: len(self.items)].copy()
        return ShardPosition(self.epoch, self.part, self.sample, self.taken, self.handed, buffer)

    def next(self) -> tuple[int, Item]:
        """The pass and the next item, which may be one that cannot be used."""
        for _ in range(_MOST_EMPTY_PASSES * self.dealing.streams):
            while len(self.items) < self.buffer_size and self._ready():
                self._take()
            if self.items:
                return self.epoch, self._hand_out()
            self._begin(self.epoch + 1)
        raise InputError(f"--data {self.source.where}: there are no samples in the tar files; check them")

    def prepared(self, prepare: Prepare, epoch: int, item: Item) -> Pair:
        """Prepare the pair of an item that `next` gave out; raises BadImage."""
        if item.reason is not None:
            raise BadImage(item.reason)
        seed, image_id = self.dealing.seed, item.image_id
        choice = draw("text", seed, epoch, image_id) % len(item.texts)
        number = item.numbers[choice]
        return prepare.pair(
            partial(decode_image, item.image),
            image_id,
            item.texts[choice],
            item.group,
            sample_id(image_id, number),
            draw("augment", seed, epoch, image_id, number),
        )

    def skip(self, item: Item, reason: str) -> Skip:
        """The note of an item that cannot be used."""
        return Skip(item.where, item.key, reason)

    def _begin(self, epoch: int) -> None:
        self.epoch, self.parts = epoch, self.dealing.parts(epoch, self.stream)
        self.part, self.sample, self.taken, self.handed = 0, -1, 0, 0
        self.items: list[Item] = []
        self.places = np.empty((self.buffer_size, 3), dtype=np.int64)
        self.reading: Iterator[tuple[int, list[Item]]] | None = None
        self.upcoming: list[Item] = []

    def _ready(self) -> bool:
        """Open the next part if necessary; False at the end of the pass, where no item is left to take."""
        while not self.upcoming and self.part < len(self.parts):
            opened = self.part
            shard, samples = self.parts[opened]
            if self.sample >= 0:
                samples = range(self.sample, samples.stop, samples.step)
            self.reading = self.source.read(shard, samples)
            self._advance()
            self._fetch_after(opened)
        return bool(self.upcoming)

    def _advance(self) -> None:
        """Go to the part's next sample, or to the next part once the last item of this one is taken."""
        assert self.reading is not None
        number, self.upcoming = next(self.reading, (-1, []))
        # Equal where a stream resumes in the middle of a sample.
        if number != self.sample or self.taken >= len(self.upcoming):
            self.taken = 0
        self.sample = number
        self.part += not self.upcoming

    def _take(self) -> None:
        """Move an item into the buffer."""
        self.places[len(self.items)] = self.part, self.sample, self.taken
        self.items.append(self.upcoming[self.taken])
        self.taken += 1
        if self.taken >= len(self.upcoming):
            self._advance()

    def _hand_out(self) -> Item:
        """Take a random item out of the buffer; the last one fills its place."""
        place = draw("buffer", self.dealing.seed, self.epoch, self.stream, self.handed) % len(self.items)
        self.handed += 1
        last = self.items.pop()
        if place == len(self.items):
            return last
        self.places[place] = self.places[len(self.items)]
        item, self.items[place] = self.items[place], last
        return item

    def _refill(self, places: np.ndarray) -> None:
        """Read again the items that waited in the buffer, and nothing else."""
        self.places = np.empty((max(self.buffer_size, len(places)), 3), dtype=np.int64)
        wanted = defaultdict(set)
        for part, sample, _ in places.tolist():
            wanted[part].add(sample)
        found = {
            (part, sample): items
            for part, samples in wanted.items()
            for sample, items in self.source.read(self.parts[part].shard, frozenset(samples))
        }
        lost = set()
        for part, sample, number in places.tolist():
            items = found.get((part, sample), [])
            if number < len(items):
                item = items[number]
            elif part in lost:
                continue
            else:  # the shard cannot be read any more: counted once, as any shard that is down
                lost.add(part)
                item = self.source.fault(self.parts[part].shard, "unreachable")
            self.places[len(self.items)] = part, sample, number
            self.items.append(item)

    def _fetch_after(self, part: int) -> None:
        """Download the shard after that part while the part is read, so that the stream need not wait at its end."""
        following = self.parts[part + 1 :] or self.dealing.parts(self.epoch + 1, self.stream)
        if following and self.source.is_away(following[0].shard):
            # A daemon: a download that is no longer needed must not keep the process alive.
            shard = following[0].shard
            threading.Thread(target=self.source.fetch, args=(shard,), name=f"fetch {shard}", daemon=True).start()
