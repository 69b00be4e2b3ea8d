"""From settings to data: where it comes from, what is done to every pair, and how many steps an epoch has."""

import os
import sys
from collections.abc import Sequence
from math import ceil
from pathlib import Path

import torch

from lib.backends import usable_cores
from lib.collectives import rank_and_world_size
from lib.config import TrainConfig
from lib.data import EvaluationSet, ImagePipeline, Prepare, Source, open_sources
from lib.data.classes.prompt_banks import load_negative_prompts
from lib.data.remote.fetch import Fetcher, default_fetcher
from lib.data.shards.source import count_pairs
from lib.data_info.info import data_info
from lib.errors import InputError
from lib.processing import Processing
from lib.shared_texts import Inputs
from lib.tower_outputs import Caching
from lib.towers import TwoTowers


def make_fetcher(config: TrainConfig) -> Fetcher:
    """What brings remote shards here, and where it puts them."""
    cache = config.cache_dir or default_fetcher().cache
    return Fetcher(cache, int(config.shard_cache_gib * 2**30), config.allow_pipe)


def open_data(config: TrainConfig, fetcher: Fetcher) -> tuple[Source, EvaluationSet | None]:
    """The training source, and what to validate on, if there is anything."""
    source, validation = open_sources(
        config.data,
        config.val_data,
        config.prompts,
        config.captions,
        image_root=config.image_root,
        held_out_fraction=config.hold_out,
        fetcher=fetcher,
    )
    if source.classes is not None and len(source.classes) == 1 and config.negative_prompts is None:
        raise InputError(
            f"--data {' '.join(config.data)} has one class, {source.classes[0]!r}: no pair is a negative of another; "
            "give two classes or more"
        )
    return source, validation


def show_data(config: TrainConfig) -> None:
    """What --data-info asks for, from rank 0."""
    if os.environ.get("RANK", "0") == "0":
        source, validation = open_data(config, make_fetcher(config))
        folder = config.output_dir or Path("runs/data_info")
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
    config: TrainConfig,
    towers: TwoTowers,
    processing: Processing,
    source: Source,
    more_texts: Sequence[str],
    cache: Path,
    device: torch.device,
) -> Prepare:
    """What is done to every pair; frozen trunks run here, once, where their outputs are to be stored."""
    images = ImagePipeline(
        processing.image_size,
        processing.resize,
        config.augment,
        crop_scale=config.crop_scale,
        flip=config.flip,
        color_jitter=config.color_jitter,
        rotation=config.rotation,
        randaugment=config.randaugment,
    )
    workers = most_workers(config, rank_and_world_size()[1]) if config.workers == "auto" else config.workers
    caching = Caching(towers, processing, cache, device, workers)
    prepare = Prepare(images, processing.tokenize)
    return caching.fill(prepare, source, config.cache_image, config.cache_text, more_texts)


def most_workers(config: TrainConfig, world_size: int) -> int:
    """Processes for each rank's decoding; none for the digits, which need no decoding."""
    return 0 if config.data == ("digits",) else min(4, max(1, usable_cores() // world_size))


def sample_inputs(source: Source, prepare: Prepare, device: torch.device) -> Inputs:
    """What the towers' forward takes, of four pairs with texts like the data's, on the device."""
    side = prepare.images.size
    inputs: Inputs = {}
    if prepare.image_outputs is None:
        inputs["pixel_values"] = torch.zeros(4, 3, side, side, dtype=torch.uint8)
    else:
        inputs["image_pooled"] = torch.zeros(4, prepare.image_outputs.width)
    if prepare.text_outputs is None:
        texts = (source.sample_texts(64) or ["a text"]) * 4
        inputs["input_ids"], inputs["attention_mask"] = prepare.tokenize(texts)
    else:
        inputs["text_pooled"] = torch.zeros(4, prepare.text_outputs.width)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def steps_of_epochs(config: TrainConfig, source: Source) -> int:
    """Optimizer steps that --epochs stands for; local shards are counted for it, remote ones are an InputError."""
    return max(1, ceil(config.epochs * count_pairs(source) / config.effective_batch))
