"""Owns the way from a training source to this rank's chunks of each step: workers, counts and resume."""

import ctypes
import os
import shutil
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TypeVar

import torch
from torch.utils.data import DataLoader

from lib.data.ahead import ahead
from lib.data.batch import Chunk
from lib.data.indexed import IndexedChunks, Prepared
from lib.data.order import ChunkPlan, stable_hash
from lib.data.pairs import IndexedSource, Skip, Source, parts_of
from lib.data.prepare import Prepare
from lib.data.streams.chunks import StreamChunks
from lib.data.streams.layouts import Start, dealings, excluded_in, fresh_start, layout, take_over
from lib.data.streams.positions import loaded, saved
from lib.errors import InputError

_PR_SET_PDEATHSIG = 1
_BYTES_AHEAD = 2**31
"""Pixels of the next step that may wait on this rank while the current one is computed."""

T = TypeVar("T")


@dataclass
class Counts:
    """Pairs met in the first pass over the data: read == used + the sum of skipped."""

    read: int = 0
    used: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """by reason"""

    def add(self, used: int, skips: list[Skip]) -> None:
        """Count `used` more pairs that were used, and those that were not."""
        self.read += used + len(skips)
        self.used += used
        self.skipped = dict(Counter(self.skipped) + Counter(skip.reason for skip in skips))


class TrainingData:
    """This rank's part of every step's pairs, decoded and tokenized by worker processes.

    A step's pairs of an indexed source depend on its number, the seed and `effective_batch` alone, not on
    ranks, workers or chunk size. Shards and mixtures are endless streams, one for each worker of each rank.
    shuffle_buffer: undecoded samples of shards that each stream keeps, to give out in random order.
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
        shuffle_buffer: int = 1000,
        pin_memory: bool = False,
    ):
        self._source, self._prepare = source, prepare
        self._plan = ChunkPlan(effective_batch, chunk_size, rank, world_size)
        self._workers, self._seed, self._pin_memory = workers, seed, pin_memory
        self._step = 0
        self._shuffle_buffer = shuffle_buffer
        self._begin(fresh_start(source))
        self._new_skips: list[Skip] = []
        self.counts = Counts()
        """What this rank handed out in the first pass; what indexing left out is counted on rank 0."""
        if rank == 0:
            for part in parts_of(source):
                self._count(0, [Skip(part.where, key, reason) for key, reason in part.skipped])

    def steps(self, first: int, last: int) -> Generator[list[Chunk], None, None]:
        """This rank's chunks of steps `first` to `last` - 1: B pairs a step, in chunks of at most C.

        Streams go on where they stopped or where `load_state_dict` put them, which must be step `first`.
        Raises InputError where nothing can be read.
        """
        step: list[Prepared] = []
        prepared_chunks: Iterator[Prepared | InputError] = iter(self._loader(first, last))
        if self._workers:
            # Only with workers: without, the thread would augment, drawing from the main thread's generator.
            prepared_chunks = ahead(map(self._own, prepared_chunks), self._chunks_ahead())
        for prepared in prepared_chunks:
            if isinstance(prepared, InputError):
                raise prepared
            step.append(prepared)
            if len(step) == self._plan.chunks_per_step:
                self._hand_out(step)
                yield [prepared.chunk for prepared in step]
                step = []

    def new_skips(self) -> list[Skip]:
        """(where, key, reason) of the pairs found unusable since the last call."""
        found, self._new_skips = self._new_skips, []
        return found

    def state_dict(self) -> dict:
        """Where this rank stands after the steps handed out, and its counts."""
        state = {"step": self._step, "counts": asdict(self.counts)}
        if isinstance(self._source, IndexedSource):
            return state | {"data": _identity(self._source)}
        positions = [saved(position) for position in self._positions]
        excluded = [{epoch: sorted(shards) for epoch, shards in part.items()} for part in self._excluded]
        return state | {"layout": self._layout(), "positions": positions, "excluded": excluded}

    def load_state_dict(self, state: dict, all_ranks: Callable[[], Sequence[dict]] | None = None) -> None:
        """Go on after the step of `state`: exactly, at the same number of ranks and workers.

        Indexed sources go on exactly at any number of them. Streams then go on with the pass, without the shards that
        were finished; samples of the others may come again in it, and are counted again. `all_ranks` gives the states
        of all ranks, and is called only then. One warning says so.
        """
        self._step = state["step"]
        self._new_skips = []
        self.counts = Counts(**state["counts"])
        if isinstance(self._source, IndexedSource):
            if state.get("data", _identity(self._source)) != _identity(self._source) and self._plan.rank == 0:
                warnings.warn(
                    "--data is not what it was at the checkpoint: the order of its pairs is another one from here on, "
                    "so that some come again and some later",
                    stacklevel=2,
                )
            return
        if state.get("layout") == self._layout():
            self._positions = [loaded(position) for position in state["positions"]]
            self._excluded = excluded_in(state)
            return
        states = all_ranks() if all_ranks else [state]
        self._begin(take_over(self._source, self._seed, states) if "layout" in state else fresh_start(self._source))
        if self._plan.rank == 0:
            done = sum(len(shards) for part in self._excluded for shards in part.values())
            warnings.warn(
                "the data, ranks or workers are not those of the checkpoint: training goes on with the pass, without "
                f"the {done} shards that were finished in it; samples of the others may come again, pairs of sources "
                "that are not shards begin a new pass",
                stacklevel=2,
            )

    def _begin(self, start: Start) -> None:
        self._positions = [start.position] * max(1, self._workers)
        self._excluded = start.excluded

    def _layout(self) -> dict:
        return layout(self._source, self._plan.world_size, self._workers)

    def _hand_out(self, step: list[Prepared]) -> None:
        self._step += 1
        for prepared in step:
            if prepared.position is not None:
                self._positions[prepared.stream] = prepared.position
            self._count(prepared.tally.used, prepared.tally.skips)

    def _count(self, used: int, skips: list[Skip]) -> None:
        self.counts.add(used, skips)
        self._new_skips += skips

    def _loader(self, first: int, last: int) -> DataLoader:
        numbers = range(first * self._plan.chunks_per_step, last * self._plan.chunks_per_step)
        common = (self._prepare, self._plan, self._seed)
        dataset: StreamChunks | IndexedChunks
        sampler: range | None
        if isinstance(self._source, IndexedSource):
            self._step = first
            dataset, sampler = IndexedChunks(self._source, *common), numbers
        else:
            if first != self._step:
                raise ValueError(f"streams stand at step {self._step}, not {first}: load that step's state")
            dealt = dealings(self._source, self._seed, self._layout()["streams"], self._excluded)
            positions = list(self._positions)
            dataset = StreamChunks(self._source, *common, dealt, self._shuffle_buffer, positions, numbers)
            sampler = None
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            collate_fn=_unchanged,
            num_workers=self._workers,
            prefetch_factor=self._prefetch_factor(),
            worker_init_fn=start_worker,
            pin_memory=self._pin_memory,
            # Without its own, every loader would draw a number from the generator that dropout draws from.
            generator=torch.Generator(),
        )

    def _own(self, prepared: Prepared | InputError) -> Prepared | InputError:
        """Move a chunk out of shared memory, which containers have little of and which holds files open."""
        if isinstance(prepared, InputError) or self._pin_memory:
            return prepared
        return prepared._replace(chunk=prepared.chunk.clone())

    def _chunk_bytes(self) -> int:
        return self._plan.size(0) * self._prepare.image_bytes

    def _chunks_ahead(self) -> int:
        return max(1, min(self._plan.chunks_per_step, _BYTES_AHEAD // self._chunk_bytes()))

    def _prefetch_factor(self) -> int | None:
        """Chunks that each worker may have waiting in shared memory."""
        if not self._workers:
            return None
        if not os.path.isdir("/dev/shm"):
            return 2
        needed, free = self._workers * self._chunk_bytes(), shutil.disk_usage("/dev/shm").free
        if needed > free:
            flags = f"--workers {self._workers} with --chunk-size {self._plan.chunk_size}"
            raise InputError(
                f"{flags} needs {needed >> 20} MiB of shared memory, /dev/shm has {free >> 20} MiB free; "
                "lower either, or enlarge it (docker run --shm-size)"
            )
        return 2 if 3 * needed < free else 1


def _identity(source: IndexedSource) -> int:
    """A hash of which pairs there are, in their order."""
    return stable_hash(source.size, source.image_id[source.image].tobytes().hex(), source.first_text.tobytes().hex())


def _unchanged(prepared: T) -> T:
    return prepared


def start_worker(_: int) -> None:
    """What a DataLoader worker does first: leave signals to the main process, end with it, and keep to one thread."""
    # A cluster signals every process of a job, and Ctrl-C every one of a terminal: the main process saves and
    # then stops the workers, so they must outlive the signal.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # A rank that is killed must not live on in them: they hold its connections and the run folder's lock open.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The workers are the parallelism; a tokenizer's own threads do not survive the fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
