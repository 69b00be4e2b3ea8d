"""From a training source to this rank's chunks of each step, with counts and resume."""

import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import cached_property
from threading import Event
from typing import NamedTuple, TypeVar

import torch
from torch.utils.data import DataLoader

from lib.data.batch import Chunk, joined
from lib.data.dealing import ShardPosition, Start, dealings, excluded_in, fresh_start, layout, loaded, saved, take_over
from lib.data.loading import LARGEST_PART, PARTS_A_WORKER, ImageBuffer, ReadAhead, end_workers, start_worker
from lib.data.order import Parts, stable_hash
from lib.data.pairs import IndexedSource, Skip, Source, parts_of
from lib.data.prepare import Prepare
from lib.data.step_parts import IndexedParts, Prepared, Progress, StreamParts
from lib.errors import InputError

T = TypeVar("T")


@dataclass
class Counts:
    """Pairs read in the first pass over the data: read == used + the sum of skipped."""

    read: int = 0
    used: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """by reason"""

    def add(self, used: int, skips: list[Skip]) -> None:
        """Add `used` pairs and the skipped ones."""
        self.read += used + len(skips)
        self.used += used
        self.skipped = dict(Counter(self.skipped) + Counter(skip.reason for skip in skips))


class _Filled(NamedTuple):
    """A chunk, and the records of the parts that begin in it."""

    chunk: Chunk
    progress: list[Progress]


class StepChunks:
    """This rank's chunks of one step, each as soon as it is ready; the next step overwrites their images."""

    def __init__(self, count: int, chunks: Iterator[Chunk], ready: int) -> None:
        self._count, self._chunks = count, chunks
        self.ready = ready
        """Chunks that waited already when the step was asked for."""

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Chunk]:
        return self._chunks


class TrainingData:
    """This rank's part of every step's pairs, decoded and tokenized by worker processes.

    The pairs of a step from an indexed source are a pure function of its number, the seed and `effective_batch`, the
    same for any number of ranks, workers and chunks: so a resumed run needs no more than the number of the step, and
    ranks need not communicate. Shards and mixtures are endless streams, one for each worker of each rank, whose
    positions are saved.

    chunks_ahead: chunks of the next step read while the current one is computed; only with workers.
    part_size: most pairs that a worker sends at a time.
    shuffle_buffer: undecoded samples of shards that each stream holds, to give them out in random order.
    pin_memory: put the chunks into page-locked memory, for a GPU.
    """

    def __init__(
        self,
        source: Source,
        prepare: Prepare,
        *,
        effective_batch: int,
        chunk_size: int,
        rank: int,
        world_size: int,
        workers: int,
        seed: int,
        chunks_ahead: int = 1,
        part_size: int = LARGEST_PART,
        shuffle_buffer: int = 1000,
        pin_memory: bool = False,
    ):
        self._source, self._prepare = source, prepare
        self._chunks = Parts(effective_batch, chunk_size, rank, world_size)
        self._parts = Parts(effective_batch, part_size, rank, world_size)
        self._workers, self._seed, self._pin_memory = workers, seed, pin_memory
        self._chunks_ahead = chunks_ahead if workers else 0
        self._step = 0
        self._shuffle_buffer = shuffle_buffer
        self._begin(fresh_start(source))
        self._new_skips: list[Skip] = []
        self.counts = Counts()
        """Pairs that this rank handed out in the first pass; rank 0 also counts those that indexing left out."""
        if rank == 0:
            for part in parts_of(source):
                self._count(0, [Skip(part.where, key, reason) for key, reason in part.skipped])

    def steps(self, first: int, last: int) -> Generator[StepChunks, None, None]:
        """This rank's chunks of steps `first` to `last` - 1: B pairs a step, in chunks of at most C.

        The images of a step are overwritten once the next is asked for: copies to a device must be complete then.
        Streams continue where they stopped or where `load_state_dict` put them, which must be step `first`.
        Raises InputError where no pair can be read, also from the chunks of a step.
        """
        if first >= last:
            return
        a_step = self._chunks.per_step
        slots, rows = a_step + self._chunks_ahead, max(map(self._chunks.size, range(a_step)))
        numbers, closed = range(first * a_step, last * a_step), Event()
        with ExitStack() as stack:
            parts = iter(self._loader(first, last))
            stack.callback(end_workers, parts)
            buffer = stack.enter_context(closing(ImageBuffer(slots, rows, self._prepare.blank, self._pin_memory)))
            filled = stack.enter_context(closing(self._filled(numbers, parts, buffer, closed)))
            if not self._workers:  # a thread would augment with the main thread's random generator
                for _ in range(first, last):
                    yield from self._one_step(filled, 0)
                return
            ahead = stack.enter_context(closing(ReadAhead(filled, slots, closed)))
            for _ in range(first, last):
                yield from self._one_step(ahead, min(a_step, ahead.ready))
                ahead.give_back(a_step)

    def _one_step(self, filled: Iterator[_Filled], ready: int) -> Iterator[StepChunks]:
        """Yield the step, and take the rest of its chunks when the next is asked for."""
        chunks = self._handed_out(filled)
        yield StepChunks(self._chunks.per_step, chunks, ready)
        for _ in chunks:
            pass

    def _handed_out(self, filled: Iterator[_Filled]) -> Iterator[Chunk]:
        for number in range(self._chunks.per_step):
            chunk, begun = next(filled)
            # Counted here and not when they are read: workers are steps ahead, and a checkpoint must not count those.
            for tally, stream, position in begun:
                if position is not None:
                    self._positions[stream] = position
                self._count(tally.used, tally.skips)
            self._step += number == self._chunks.per_step - 1
            yield chunk

    def new_skips(self) -> list[Skip]:
        """The pairs found unusable since the last call."""
        found, self._new_skips = self._new_skips, []
        return found

    @property
    def waiting(self) -> int:
        """Pairs of shards that were read in the first pass and wait in the shuffle buffers."""
        parts = (part for position in self._positions for part in position.parts)
        return sum(len(part.buffer) for part in parts if isinstance(part, ShardPosition) and part.epoch == 0)

    def state_dict(self) -> dict:
        """Position of this rank after the steps handed out, and its counts."""
        state = {"step": self._step, "counts": asdict(self.counts)}
        if isinstance(self._source, IndexedSource):
            return state | {"data": self._identity}
        positions = [saved(position) for position in self._positions]
        excluded = [{epoch: sorted(shards) for epoch, shards in part.items()} for part in self._excluded]
        return state | {"layout": self._layout(), "positions": positions, "excluded": excluded}

    def load_state_dict(self, state: dict, all_ranks: Callable[[], Sequence[dict]] | None = None) -> None:
        """Resume after the step of `state`: exactly, at the same number of ranks and workers.

        Indexed sources resume exactly at any number of them. Streams then continue the pass without the shards that
        were finished; samples of the others may be repeated in it, and are counted again. `all_ranks` returns the
        states of all ranks, and is called only then. One warning says so.
        """
        self._step = state["step"]
        self._new_skips = []
        self.counts = Counts(**state["counts"])
        if isinstance(self._source, IndexedSource):
            if state.get("data", self._identity) != self._identity and self._parts.rank == 0:
                warnings.warn(
                    "--data is not what it was at the checkpoint: the order of its pairs changes from here on, so some "
                    "are repeated and some come later",
                    stacklevel=2,
                )
            return
        if state.get("layout") == self._layout():
            self._positions = [loaded(position) for position in state["positions"]]
            self._excluded = excluded_in(state)
            return
        states = all_ranks() if all_ranks else [state]
        self._begin(take_over(self._source, self._seed, states) if "layout" in state else fresh_start(self._source))
        if self._parts.rank == 0:
            done = sum(len(shards) for part in self._excluded for shards in part.values())
            warnings.warn(
                "the data, ranks or workers are not those of the checkpoint: training continues the pass without the "
                f"{done} shards that were finished in it; samples of the others may be repeated, pairs of sources that "
                "are not shards begin a new pass",
                stacklevel=2,
            )

    def _begin(self, start: Start) -> None:
        self._positions = [start.position] * max(1, self._workers)
        self._excluded = start.excluded

    def _layout(self) -> dict:
        return layout(self._source, self._parts.world_size, self._workers, self._parts.per_step)

    def _count(self, used: int, skips: list[Skip]) -> None:
        self.counts.add(used, skips)
        self._new_skips += skips

    def _filled(
        self, numbers: range, parts: Iterator[Prepared | InputError], buffer: ImageBuffer, closed: Event
    ) -> Generator[_Filled, None, None]:
        """Cut the chunks of these numbers from the parts, and copy their images into the buffer's next slots."""
        pairs: Chunk | None = None
        for number in numbers:
            images, count, pieces, progress = buffer[number][: self._chunks.size(number)], 0, [], []
            while count < len(images):
                if closed.is_set():
                    return
                if not pairs:
                    prepared = next(parts)
                    if isinstance(prepared, InputError):
                        raise prepared
                    pairs = prepared.pairs
                    progress.append(prepared.progress)
                missing = len(images) - count
                piece, pairs = pairs.rows(0, missing), pairs.rows(missing, len(pairs))
                # Copied out of shared memory at once: there is little of it, and every tensor in it holds a file open.
                pieces.append(piece.moved(images[count : count + len(piece)]))
                count += len(piece)
            chunk = joined(pieces, images)
            yield _Filled(chunk.pin_texts() if self._pin_memory else chunk, progress)

    def _loader(self, first: int, last: int) -> DataLoader:
        numbers = range(first * self._parts.per_step, last * self._parts.per_step)
        common = (self._prepare, self._parts, self._seed)
        dataset: StreamParts | IndexedParts
        sampler: range | None
        if isinstance(self._source, IndexedSource):
            self._step = first
            dataset, sampler = IndexedParts(self._source, *common), numbers
        else:
            if first != self._step:
                raise ValueError(f"streams stand at step {self._step}, not {first}: load that step's state")
            dealt = dealings(self._source, self._seed, self._layout()["streams"], self._excluded)
            positions = list(self._positions)
            dataset = StreamParts(self._source, *common, dealt, self._shuffle_buffer, positions, numbers)
            sampler = None
        return DataLoader(
            dataset,
            batch_size=None,  # the items are parts already
            sampler=sampler,
            collate_fn=_unchanged,
            num_workers=self._workers,
            prefetch_factor=PARTS_A_WORKER if self._workers else None,
            worker_init_fn=start_worker,
            # Without a generator of its own, every loader would advance the one from which dropout draws.
            generator=torch.Generator(),
        )

    @cached_property
    def _identity(self) -> int:
        """A hash of the pairs in their order; cached, as it takes half a second for 590,000 pairs."""
        source = self._source
        assert isinstance(source, IndexedSource)
        return stable_hash(
            source.size, source.image_id[source.image].tobytes().hex(), source.first_text.tobytes().hex()
        )


def _unchanged(prepared: T) -> T:
    return prepared
