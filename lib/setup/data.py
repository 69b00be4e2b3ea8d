"""From settings to data: sources, the preparation of every pair, workers, and the steps of an epoch."""

import heapq
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import torch
from torch import Tensor

from lib.backends import auto_workers
from lib.backends.device import free_memory, total_memory
from lib.config import FittedConfig, TrainConfig
from lib.config.arguments import LARGEST
from lib.data import EvaluationSet, ImagePipeline, IndexedSource, Prepare, Source, open_sources
from lib.data.batch import Tokenize, padded_to
from lib.data.fetcher import Fetcher, default_fetcher
from lib.data.fields import Columns
from lib.data.info import data_info
from lib.data.loading import LARGEST_PART, SHARED_MEMORY, free_shared_memory, shared_memory_for, workers_that_fit
from lib.data.pairs import parts_of
from lib.data.prompt_banks import load_negative_prompts
from lib.data.recognize import Output
from lib.data.remote import is_away
from lib.data.shard_source import ShardSource, count_pairs
from lib.distributed import gather_objects, local_ranks
from lib.errors import InputError
from lib.gradcache.prefetch import Inputs
from lib.runs.checkpoint import TrainingState
from lib.setup.plan import BatchPlan, gigabytes
from lib.setup.tower_outputs import FrozenTrunks
from lib.towers.processing import Processing

LONG_TEXTS = 64
MOST_STORED = 1_000_000  # pairs whose tower outputs are stored: 2 GiB of 512 dimensions
LOOKED_AT, LOOKED_AT_IN_SHARDS, LOOKED_AT_SHARDS = 20_000, 2_000, 10
"""Texts whose tokens are counted at the start; those of shards, the first ones, have to be read for it."""


def make_fetcher(config: TrainConfig) -> Fetcher:
    """The fetcher of remote shards, with its cache."""
    cache = config.cache_dir or default_fetcher().cache
    return Fetcher(cache, int(config.shard_cache_gib * 2**30), config.allow_pipe)


def open_data(config: TrainConfig, fetcher: Fetcher, folder: Path) -> tuple[Source, EvaluationSet | None]:
    """The training source, and the validation data if there is any; folder: of the run."""
    source, validation = open_sources(
        config.data,
        config.val_data,
        config.prompts,
        config.captions,
        image_root=config.image_root,
        columns=Columns(config.image_column, config.caption_column),
        held_out_fraction=config.hold_out,
        class_names=config.class_names,
        fetcher=fetcher,
        output=Output("--output-dir", folder),
    )
    if source.classes is not None and len(source.classes) == 1 and config.negative_prompts is None:
        raise InputError(
            f"--data {' '.join(config.data)} has one class, {source.classes[0]!r}: no pair is a negative of another; "
            "give two classes or more"
        )
    if config.patience and not (validation and validation.chooses):
        found = f"only a test split to measure on ({validation.name})" if validation else "no validation images"
        raise InputError(
            f"--patience {config.patience} ends a run by validation figures, and the data has {found}; give "
            "--val-data, a val split, or --hold-out 0.1 for data without splits, such as FOLDER/train"
        )
    return source, validation


def show_data(config: TrainConfig) -> None:
    """Report the data for --data-info, from rank 0."""
    if os.environ.get("RANK", "0") == "0":
        folder = config.output_dir or Path("runs/data_info")
        source, validation = open_data(config, make_fetcher(config), folder)
        try:
            data_info(source, validation, folder, config.seed)
        except OSError as error:
            raise InputError(
                f"--output-dir {folder} cannot be written ({error.strerror}); name another folder"
            ) from None


def negative_texts(config: TrainConfig, source: Source) -> tuple[str, ...]:
    """The texts of --negative-prompts; InputError for one that the data has too, where it has classes."""
    if config.negative_prompts is None:
        return ()
    texts = load_negative_prompts(config.negative_prompts, source.classes)
    both = set(texts) & set(source.sample_texts(sys.maxsize)) if source.classes else ()
    if both:
        raise InputError(
            f"--negative-prompts {config.negative_prompts}: {min(both)!r} is a prompt of a class too; leave it out"
        )
    return texts


def make_prepare(
    config: FittedConfig, processing: Processing, source: Source, more_texts: Sequence[str], trunks: FrozenTrunks
) -> Prepare:
    """The preparation of every pair; frozen trunks run here, once, where their outputs are to be stored."""
    prepare = Prepare(ImagePipeline(processing.image_size, processing.resize, config.augment), processing.tokenize)
    if config.store_outputs == "auto" and _reads_again(config, source):
        prepare = trunks.store(prepare, source, more_texts)
    if config.compile:
        usual = longest_text(source, prepare)[0].shape[1]
        prepare = replace(prepare, tokenize=TwoLengths(processing.tokenize, usual, processing.max_length))
    return prepare


def _reads_again(config: FittedConfig, source: Source) -> bool:
    """True where the run reads its pairs more than once and they are few enough to store."""
    shards = [shard for part in parts_of(source) if isinstance(part, ShardSource) for shard in part.shards]
    if any(map(is_away, shards)):
        return False
    pairs = count_pairs(source)
    asked = config.steps * config.effective_batch if config.steps else config.epochs * pairs
    return pairs < asked and pairs <= MOST_STORED


@dataclass(frozen=True)
class TwoLengths:
    """Pads every chunk's tokens to the usual length or to the largest: a trunk is compiled for each length it meets."""

    tokenize: Tokenize
    usual: int
    largest: int

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """As Tokenize."""
        input_ids, attention_mask = self.tokenize(texts)
        length = self.usual if input_ids.shape[1] <= self.usual else self.largest
        return padded_to("input_ids", input_ids, length), padded_to("attention_mask", attention_mask, length)


@dataclass(frozen=True)
class Loading:
    """Workers of this rank and the size of their messages: the same on every rank, and in a resumed run."""

    workers: int
    part_size: int
    """pairs in one message of a worker"""
    warning: str | None = None
    """the reason why loading is slow, and the remedy"""

    @classmethod
    def plan(
        cls, config: TrainConfig, state: TrainingState | None, prepare: Prepare, device: torch.device
    ) -> "Loading":
        """As --workers asks, or as suits the machine; all ranks call it."""
        stored = prepare.image_outputs is not None  # nothing to decode
        asked, wanted = 0 if config.workers == "auto" and stored else workers_asked(config, device), LARGEST_PART
        if state and config.workers in ("auto", state.progress["workers"]):
            # A stream of shards resumes exactly only with the same numbers.
            asked, wanted = state.progress["workers"], state.progress.get("part_size", LARGEST_PART)
        fits = gather_objects(workers_that_fit(asked, prepare.image_bytes))
        workers, part_size = min(workers for workers, _ in fits), min(size for _, size in fits)
        if workers == asked and part_size >= wanted:
            return cls(workers, wanted)
        whole = shared_memory_for(asked, wanted, prepare.image_bytes)
        reason = f"{SHARED_MEMORY}, through which they send images, has {gigabytes(free_shared_memory())} free"
        remedy = f"give it {gigabytes(whole)} (docker run --shm-size)"
        if workers == asked:
            return cls(workers, part_size, f"{workers} workers send {part_size} images at a time: {reason}; {remedy}")
        if config.workers != "auto":
            raise InputError(f"--workers {asked}: {reason}, which is enough for {workers}; lower it, or {remedy}")
        return cls(workers, part_size, f"{workers} of {asked} workers on each rank: {reason}; {remedy}")


def chunks_ahead(plan: BatchPlan, workers: int) -> int:
    """Chunks of the next step that the host reads while one is computed: up to a step, in a quarter of free memory.

    InputError where the images of one step do not fit into the machine's memory.
    """
    cpu, ranks = torch.device("cpu"), local_ranks()
    a_chunk = plan.chunk_pairs * plan.image_bytes
    if plan.chunks * a_chunk * ranks > total_memory(cpu):
        raise InputError(
            f"--effective-batch {plan.effective_batch}: the images of a step take "
            f"{gigabytes(plan.chunks * a_chunk * ranks)} on this machine, which has {gigabytes(total_memory(cpu))}; "
            "lower it"
        )
    if not workers:
        return 0
    fit = free_memory(cpu) // 4 // ranks // a_chunk
    return min(gather_objects(max(1, min(plan.chunks, fit))))


def workers_asked(config: TrainConfig, device: torch.device) -> int:
    """Data workers of --workers, or as suits machine and data."""
    if config.workers != "auto":
        return config.workers
    # The digits take a tenth of a millisecond each: next to the towers of a CPU that is nothing, but an accelerator
    # waited for them nine tenths of the time.
    return 0 if config.data == ("digits",) and device.type == "cpu" else auto_workers()


def sample_inputs(source: Source, prepare: Prepare, device: torch.device) -> Inputs:
    """Inputs of a forward on the device: four pairs with texts as long as the longest of the data."""
    inputs: Inputs = {}
    images = prepare.blank.expand(4, *prepare.blank.shape)
    inputs["pixel_values" if prepare.image_outputs is None else "image_pooled"] = images
    if prepare.text_outputs is None:
        inputs["input_ids"], inputs["attention_mask"] = longest_text(source, prepare)
    else:
        inputs["text_pooled"] = torch.zeros(4, prepare.text_outputs.width)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def longest_text(source: Source, prepare: Prepare) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), each (4, L), of the longest text; the full context where not all texts are known.

    Only the texts with most letters are tokenized, because there can be millions.
    """
    if isinstance(source, IndexedSource):
        longest = heapq.nlargest(LONG_TEXTS, source.texts, key=len)
    else:
        longest = ["a word " * 1000]
    input_ids, attention_mask = prepare.tokenize(longest or ["a text"])
    row = attention_mask.sum(1).argmax()
    return input_ids[row].repeat(4, 1), attention_mask[row].repeat(4, 1)


@dataclass(frozen=True)
class TextLengths:
    """Number of training texts that are longer than the model's context; of all texts, or of some evenly spaced."""

    looked_at: int
    cut: int
    token_limit: int

    @classmethod
    def of(cls, source: Source, processing: Processing) -> "TextLengths":
        """Count them; of shards those texts that can be read without fetching one."""
        parts = parts_of(source)
        texts = [text for part in parts for text in _texts_at_hand(part, len(parts))]
        return cls(len(texts), processing.count_cut(texts), processing.max_length)


def _texts_at_hand(source: Source, parts: int) -> list[str]:
    """Texts of one of so many parts of a mixture."""
    if isinstance(source, IndexedSource):
        most = LOOKED_AT // parts
        count = min(most, len(source.texts))
        return [source.texts[len(source.texts) * number // count] for number in range(count)]
    assert isinstance(source, ShardSource)
    first = source.shards[:LOOKED_AT_SHARDS]
    here = [number for number, shard in enumerate(first) if source.fetcher.is_here(shard)]
    shards, names = (tuple(values[number] for number in here) for values in (source.shards, source.names))
    return replace(source, shards=shards, names=names).sample_texts(LOOKED_AT_IN_SHARDS // parts)


def steps_of_epochs(config: FittedConfig, source: Source) -> int:
    """Optimizer steps in --epochs; counts the pairs of local shards, and raises InputError for remote ones."""
    steps = config.epochs * count_pairs(source) / config.effective_batch
    if steps > LARGEST:
        raise InputError(f"--epochs {config.epochs:g} make {steps:.3g} steps, more than are counted; lower it")
    return max(1, ceil(steps))
