"""Pack any data that training reads into WebDataset shards: `python -m lib.data.pack SOURCE --out DIR`.

Train on it with `--data DIR`. After an interruption, the same command resumes where it stopped.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from lib.config.arguments import parse
from lib.data.fetcher import Fetcher, default_fetcher
from lib.data.fields import Columns
from lib.data.order import permutation
from lib.data.pack.entries import Entry, Listing, list_samples
from lib.data.pack.writer import ImageOrReason, Record, ShardWriter, Skips, members_of, read_ahead, read_image
from lib.data.recognize import Output, open_data
from lib.data.shards import SPLITS, ShardIndex, ShardSet, write_index
from lib.data.sources import check_columns
from lib.errors import InputError, RunError, machine_errors_reported, one_line_errors, raised_as
from lib.files import write_text

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SAMPLES = 1000


@dataclass(frozen=True)
class PackConfig:
    """Settings of a pack."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """As --data in training: class folders, a table, COCO, Flickr or Karpathy files, a set's name, shards, parquet
    files, a folder of save_to_disk, hub:OWNER/NAME."""
    out: Path
    """New or empty folder for the shards, or that of an interrupted pack."""
    shard_size: int | None = None
    """Samples per shard; default: 1000 without --shard-bytes."""
    shard_bytes: str | None = None
    """Largest size of a shard, as 500M or 2G."""
    max_side: int | None = None
    """Shrink images with a longer side to this many pixels, upright, as JPEG; others stay as they are."""
    quality: int = 95
    """JPEG quality of the images that --max-side shrinks."""
    verify: bool = False
    """Decode every image, and leave out what cannot be decoded."""
    shuffle: int | None = None
    """Seed of the order within a split; default: 0, and shards keep their order."""
    no_shuffle: bool = False
    """Keep the order of the source."""
    captions: Literal["all", "lines"] = "all"
    """lines: each line of a .txt member of shards is a caption of its own."""
    image_root: str | None = None
    """Folder of the images that a table or annotation file names, if it is not the file's own."""
    image_column: str | None = None
    """Column of a table or of hub or parquet data that holds or names the image, if it is not found by its name."""
    caption_column: str | None = None
    """The same for the captions, or for the class."""
    cache_dir: Path | None = None
    """Folder for remote shards; default: contrastive-training in ~/.cache."""
    allow_pipe: bool = False
    """Run what follows `pipe:` in SOURCE as a command that writes a tar."""

    def check(self) -> None:
        """Raise InputError for values that cannot be used."""
        for flag, value in (("shard-size", self.shard_size), ("max-side", self.max_side)):
            if value is not None and value < 1:
                raise InputError(f"--{flag} {value} must be at least 1")
        if not 1 <= self.quality <= 100:
            raise InputError(f"--quality {self.quality} must be from 1 to 100")
        if self.no_shuffle and self.shuffle is not None:
            raise InputError(f"--shuffle {self.shuffle} and --no-shuffle exclude each other")
        _ = self.most_bytes

    @property
    def most_bytes(self) -> int | None:
        """--shard-bytes as a number."""
        if self.shard_bytes is None:
            return None
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", self.shard_bytes.strip(), re.IGNORECASE)
        if not match or not float(match[1]):
            raise InputError(f"--shard-bytes {self.shard_bytes} is no size; write it as 500M or 2G")
        return int(float(match[1]) * _UNITS[match[2].upper()])

    @property
    def most_samples(self) -> int | None:
        """Samples a shard, None for any number."""
        return self.shard_size or (None if self.shard_bytes else _SAMPLES)

    def seed(self, of_shards: bool) -> int | None:
        """Seed of the order, None for that of the source."""
        if self.no_shuffle or (of_shards and self.shuffle is None):
            return None
        return self.shuffle or 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Pack with the settings of the command line (or `arguments`)."""
    config: PackConfig = parse(
        PackConfig,
        arguments,
        prog="python -m lib.data.pack",
        description=__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    config.check()
    fetcher = Fetcher(config.cache_dir or default_fetcher().cache, default_fetcher().cache_bytes, config.allow_pipe)
    columns = Columns(config.image_column, config.caption_column)
    opened = open_data(config.source, "SOURCE", config.image_root, fetcher, columns, Output("--out", config.out))
    check_columns(columns, config.source, [opened])
    listing = list_samples(opened, "SOURCE", fetcher, config.captions == "lines")
    seed = config.seed(isinstance(opened, ShardSet))
    with (
        machine_errors_reported(lambda: "finished shards are safe, the same command resumes"),
        raised_as(lambda fault: RunError(f"--out {config.out}: {fault}"), OSError),
        closing(Record(config.out, _settings(config, listing, seed))) as record,
    ):
        if record.done:
            print(f"{config.out} is done already: {_summary(record)}")
            return
        if record.shards:
            print(f"{config.out}: resuming after shard {len(record.shards)}", flush=True)
        _pack(config, listing, seed, record)


def _settings(config: PackConfig, listing: Listing, seed: int | None) -> dict[str, object]:
    """All settings that determine the bytes of the shards."""
    source = os.path.abspath(config.source) if os.path.exists(config.source) else config.source
    return {
        "source": source,
        "image-root": config.image_root and os.path.abspath(config.image_root),
        "image-column": config.image_column,
        "caption-column": config.caption_column,
        "shard-size": config.most_samples,
        "shard-bytes": config.most_bytes,
        "max-side": config.max_side,
        "quality": config.quality if config.max_side else None,
        "verify": config.verify,
        "shuffle": seed,
        "listing": listing.digest(),
    }


def _pack(config: PackConfig, listing: Listing, seed: int | None, record: Record) -> None:
    total, begun = len(listing.entries), sum(record.consumed.values())
    with tqdm(total=total, initial=begun, desc="packing", unit="sample") as bar:
        for split in SPLITS:
            entries = [entry for entry in listing.entries if entry.split == split]
            if seed is not None:
                entries = [entries[number] for number in permutation(len(entries), seed, 0)]
            if len(entries) > record.consumed.get(split, 0):
                _pack_split(config, split, entries, listing.classes, record, bar)
    if not record.shards:
        left_out = _counted(listing.malformed + record.skips)
        record.give_up()
        raise InputError(f"SOURCE {config.source}: nothing can be packed ({left_out})")
    skips = listing.malformed + record.skips
    lines = ({"shard": config.source, "key": key, "reason": reason} for key, reason in skips)
    write_text(config.out / "skipped.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_index(config.out, ShardIndex(record.shards, listing.classes))
    record.finish()
    print(f"{config.out}: {_summary(record)}")
    if skips:
        print(f"left out: {_counted(skips)}; see {config.out / 'skipped.jsonl'}")


def _pack_split(
    config: PackConfig, split: str, entries: list[Entry], classes: tuple[str, ...] | None, record: Record, bar: tqdm
) -> None:
    """Write the rest of a split's shards; a shard ends before the first sample for which it has no room."""
    begun = record.consumed.get(split, 0)
    finished = [entry for entry in record.shards.values() if entry.split == split]
    shard, number = len(finished), sum(entry.samples for entry in finished)
    writer, skips = None, []
    read = partial(read_image, max_side=config.max_side, quality=config.quality, verify=config.verify)
    try:
        for position, (entry, image) in enumerate(read_ahead(read, entries[begun:]), start=begun):
            bar.update()
            members = {} if isinstance(image, str) else members_of(number, entry, *image, classes)
            if members and writer and _is_full(writer, members, config):
                record.add(writer.path.name, writer.finish(), split, position, skips)
                writer, shard, skips = None, shard + 1, []
            skips += _skips(entry, image)
            if members:
                writer = writer or ShardWriter(config.out, split, shard)
                writer.add(members, entry.pairs)
                number += 1
        name, written = (writer.path.name, writer.finish()) if writer else (None, None)
        record.add(name, written, split, len(entries), skips)
    finally:
        if writer:
            writer.close()


def _is_full(writer: ShardWriter, members: dict[str, bytes], config: PackConfig) -> bool:
    if config.most_samples is not None and writer.samples >= config.most_samples:
        return True
    return config.most_bytes is not None and writer.size_with(members) > config.most_bytes


def _skips(entry: Entry, image: ImageOrReason) -> Skips:
    left_out = [] if not isinstance(image, str) or entry.image is None else [(entry.key, image)]
    return [*entry.faults, *left_out]


def _summary(record: Record) -> str:
    shards = record.shards.values()
    splits = Counter(entry.split for entry in shards)
    parts = ", ".join(f"{count} {split}" for split, count in splits.items())
    samples, pairs = sum(entry.samples for entry in shards), sum(entry.pairs for entry in shards)
    return f"{samples:,} samples, {pairs:,} pairs in {len(shards)} shard{'s' * (len(shards) > 1)} ({parts})"


def _counted(skips: Skips) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in Counter(reason for _, reason in skips).most_common())


if __name__ == "__main__":
    with one_line_errors():
        main()
