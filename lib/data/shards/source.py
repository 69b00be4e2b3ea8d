"""Owns tar shards as a training source: which files they are and the pairs that their samples make."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal, NamedTuple

from tqdm import tqdm

from lib.data.order import stable_hash
from lib.data.pairs import Source, fill, parts_of
from lib.data.remote.fetch import Fetcher, Unreachable
from lib.data.remote.transfer import ZIPPED, is_away
from lib.data.shards.annotations import Annotation, annotate, shard_names, shown
from lib.data.shards.kind import classes_of, notes
from lib.data.shards.shard_set import ShardSet
from lib.data.shards.tars import ALL, Damage, Sample, index_samples, read_samples
from lib.errors import InputError

COUNTED_AT_ONCE = 2**30
"""Bytes of local shards whose samples are counted when they are opened, which takes seconds."""

_SAMPLE_TEXTS = 100_000


class Item(NamedTuple):
    """An undecoded pair: an image file's bytes and the texts to choose from, or why there are none."""

    where: str
    key: str
    image: bytes = b""
    texts: tuple[str, ...] = ()
    numbers: tuple[int, ...] = ()
    """the texts' numbers within the image; zeros for prompts"""
    group: int = 0
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class ShardSource(Source):
    """Pairs in tar files; with templates the texts are class prompts, without they are captions."""

    shards: tuple[str, ...]
    """local paths, URLs or commands"""
    names: tuple[str, ...]
    """of the shards, as they appear in the samples' keys"""
    samples: tuple[int, ...] | None = None
    """in each shard, where that is known"""
    captions: Literal["one", "all"]
    fetcher: Fetcher

    def read(self, shard: int, wanted: range | frozenset[int] = ALL) -> Iterator[tuple[int, list[Item]]]:
        """The undecoded pairs of each wanted sample of a shard, by the sample's number.

        Where the rest cannot be read there is one item with the reason, at the number where the next sample would
        be: whoever wants that number has it. A shard that cannot be reached has it at 0.
        """
        try:
            path = self.fetcher.local(self.shards[shard])
        except Unreachable as error:
            if 0 in wanted:
                yield 0, [self.fault(shard, error.reason)]
            return
        for number, sample in read_samples(path, wanted):
            if isinstance(sample, Damage):
                yield number, [self.fault(shard, sample.reason)]
            else:
                yield number, list(self.items(shard, sample))

    def is_away(self, shard: int) -> bool:
        """Whether the shard has to be fetched or unpacked before it is read."""
        return is_away(self.shards[shard]) or self.shards[shard].lower().endswith(ZIPPED)

    def fetch(self, shard: int) -> None:
        """Bring the shard here in advance; whoever reads it will learn where that fails."""
        with suppress(Unreachable, InputError):
            self.fetcher.local(self.shards[shard])

    def fault(self, shard: int, reason: str) -> Item:
        """What is noted of a shard as a whole."""
        return Item(shown(self.shards[shard]), self.names[shard], reason=reason)

    def items(self, shard: int, sample: Sample) -> Iterator[Item]:
        """The pairs that one sample makes, and what is wrong with the others; at least one of either."""
        where = shown(self.shards[shard])
        note = annotate(sample.key, sample.members, self.names[shard], self.classes)
        if sample.image is None:
            yield Item(where, note.key, reason="no_image")
        elif note.reason:
            yield Item(where, note.key, reason=note.reason)
        elif self.templates:
            yield self._prompted(where, note, sample.image)
        else:
            yield from self._captioned(where, note, sample.image)

    def sample_texts(self, limit: int = _SAMPLE_TEXTS) -> list[str]:
        """At most `limit` texts, to train a tokenizer on.

        Remote shards are not all fetched for a sample: the first that has texts serves, unless more are asked for.
        """
        if self.templates and self.classes:
            return [fill(template, name) for name in self.classes for template in self.templates][:limit]
        texts: list[str] = []
        for shard, name in zip(self.shards, self.names, strict=True):
            if len(texts) >= limit or (texts and limit <= _SAMPLE_TEXTS and is_away(shard)):
                break
            try:
                found = notes(self.fetcher.local(shard), name, self.classes)
            except Unreachable:
                continue
            texts += islice(self._texts(found), limit - len(texts))
        return texts

    def _texts(self, found: Iterator[Annotation]) -> Iterator[str]:
        for note in found:
            if not self.templates:
                yield from (caption for caption in note.captions if caption)
            elif note.class_name:
                yield from (fill(template, note.class_name) for template in self.templates)

    def _prompted(self, where: str, note: Annotation, image: bytes) -> Item:
        if note.class_name is None:
            return Item(where, note.key, reason="no_text")
        prompts = tuple(fill(template, note.class_name) for template in self.templates or ())
        group = stable_hash(note.group or note.class_name)
        return Item(where, note.key, image, prompts, (0,) * len(prompts), group)

    def _captioned(self, where: str, note: Annotation, image: bytes) -> Iterator[Item]:
        written = [(number, caption) for number, caption in enumerate(note.captions) if caption]
        group = stable_hash(note.group or note.key)
        if not note.captions:
            yield Item(where, note.key, reason="no_text")
        elif self.captions == "one" and written:
            numbers, texts = zip(*written, strict=True)
            yield Item(where, note.key, image, texts, numbers, group)
        elif self.captions == "one":
            yield Item(where, note.key, reason="empty_caption")
        else:
            for number, caption in enumerate(note.captions):
                if caption:
                    yield Item(where, note.key, image, (caption,), (number,), group)
                else:
                    yield Item(where, note.key, reason="empty_caption")


def shard_source(
    shards: ShardSet, captions: Literal["one", "all"], templates: tuple[str, ...], fetcher: Fetcher
) -> ShardSource:
    """The shards to train on; captions where the first sample has some, else class prompts."""
    split = next((split for split in ("train", "all") if split in shards.splits), None)
    if split is None:
        raise InputError(f"--data {shards.where} has no shards of split train, only {', '.join(shards.splits)}")
    paths = shards.splits[split]
    classes, prompted = classes_of(shards, split, "--data", fetcher)
    source = ShardSource(
        where=shards.where,
        description="",
        size=None,
        classes=classes if prompted else None,
        templates=templates if prompted else None,
        distinct_texts=len(classes) * len(templates) if prompted and classes else None,
        shards=paths,
        names=shard_names(paths),
        captions=captions,
        fetcher=fetcher,
    )
    if shards.index:
        entries = [shards.index.shards[os.path.basename(shown(path))] for path in paths]
        samples = tuple(entry.samples for entry in entries)
        pairs = sum(entry.pairs for entry in entries) if captions == "all" and not prompted else sum(samples)
        source = replace(source, samples=samples, size=pairs)
    elif not any(map(is_away, paths)) and _bytes(paths) < COUNTED_AT_ONCE:
        samples, pairs = _count(source)
        source = replace(source, samples=samples, size=pairs)
    if source.size == 0:
        raise InputError(f"--data {shards.where}: not one sample has an image and a text that is not empty")
    texts = "class prompts" if prompted else f"captions ({captions})"
    known = "" if source.samples is None else f", {sum(source.samples):,} samples"
    return replace(source, description=f"shards {shards.where}: {len(paths)} tar files{known}, {texts}")


def count_pairs(source: Source) -> int:
    """Pairs in one pass: known, or counted from the headers and texts of local shards, with a progress bar.

    Raises InputError where that would mean to fetch remote shards.
    """
    return sum(_pairs(part) for part in parts_of(source))


def _pairs(source: Source) -> int:
    if source.size is not None:
        return source.size
    assert isinstance(source, ShardSource)
    if any(map(is_away, source.shards)):
        raise InputError(f"--epochs: nobody has counted the pairs of {source.where}; give --steps instead")
    return _count(source)[1]


def _count(source: ShardSource) -> tuple[tuple[int, ...], int]:
    """Samples of each shard, and pairs with a text of all."""
    samples, pairs = [], 0
    quiet = os.environ.get("RANK", "0") != "0"
    for shard, path in enumerate(tqdm(source.shards, desc="counting", unit="shard", delay=2, disable=quiet)):
        samples.append(0)
        try:
            found = index_samples(source.fetcher.local(path))
        except Unreachable:
            continue
        for sample in found:
            if isinstance(sample, Sample):
                samples[-1] += 1
                pairs += sum(item.reason is None for item in source.items(shard, sample))
    return tuple(samples), pairs


def _bytes(paths: tuple[str, ...]) -> int:
    return sum(os.path.getsize(path.removeprefix("file://")) for path in paths)
