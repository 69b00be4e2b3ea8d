"""Tar shards as a training source: their files, and the pairs that their samples make."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import NamedTuple

from tqdm import tqdm

from lib.data.order import salted, stable_hash
from lib.data.pairs import Captions, Source, fill, parts_of
from lib.data.remote.fetch import Fetcher, Unreachable, copy_note
from lib.data.remote.transfer import ZIPPED, is_away
from lib.data.shards.annotations import Annotation, TextForm, annotate, shard_names, shown
from lib.data.shards.kind import notes, text_form
from lib.data.shards.shard_set import ShardSet
from lib.data.shards.tars import ALL, Damage, Sample, index_shard, read_samples
from lib.errors import InputError

COUNTED_AT_ONCE = 2**30
"""Bytes of local shards whose samples are counted when they are opened, which takes seconds."""

_SAMPLE_TEXTS = 100_000


class Item(NamedTuple):
    """An undecoded pair: an image file's bytes and the texts to choose from, or why there are none."""

    where: str
    key: str
    image: bytes = b""
    image_id: int = 0
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
    form: TextForm
    one_caption: bool
    """an image is one pair with a caption drawn each time; if not, every caption is a pair"""
    fetcher: Fetcher

    def read(self, shard: int, wanted: range | frozenset[int] = ALL) -> Iterator[tuple[int, list[Item]]]:
        """The undecoded pairs of each wanted sample of a shard, by the sample's number.

        Where the rest cannot be read there is one item with the reason, at the number where the next sample would
        be: whoever wants that number has it. A shard that cannot be reached has it at 0.
        """
        path = self.fetcher.reached(self.shards[shard])
        if isinstance(path, Unreachable):
            if 0 in wanted:
                yield 0, [self.fault(shard, path.reason)]
            return
        for number, sample in read_samples(path, wanted):
            if isinstance(sample, Damage):
                yield number, [self.fault(shard, sample.reason, path)]
            else:
                yield number, list(self.items(shard, sample))

    def is_away(self, shard: int) -> bool:
        """Whether the shard has to be fetched or unpacked before it is read."""
        return is_away(self.shards[shard]) or self.shards[shard].lower().endswith(ZIPPED)

    def fetch(self, shard: int) -> None:
        """Bring the shard here in advance; whoever reads it will learn where that fails."""
        with suppress(Unreachable, InputError):
            self.fetcher.local(self.shards[shard])

    def fault(self, shard: int, reason: str, path: str | None = None) -> Item:
        """The note of a shard as a whole; `path`, if it was read: a bad copy in the cache is named, to be removed."""
        where = shown(self.shards[shard])
        copy = copy_note(self.shards[shard], path) if path else ""
        return Item(where + copy, self.names[shard], reason=reason)

    def items(self, shard: int, sample: Sample) -> Iterator[Item]:
        """The pairs that one sample makes, and what is wrong with the others; at least one of either."""
        where = shown(self.shards[shard])
        note = annotate(sample, self.names[shard], self.form)
        image = sample.image
        reason = note.fault(image is not None, labelled=bool(self.templates))
        if image is None or (reason and reason != "empty_caption"):
            yield Item(where, note.key, reason=reason)
            return
        image_id = salted(stable_hash(note.key), self.part)
        item = partial(Item, where, note.key, image, image_id)
        if self.templates:
            prompts = tuple(fill(template, note.class_name or "") for template in self.templates)
            group = stable_hash(note.group or note.class_name)
            if note.group not in (None, note.class_name):  # a class is the same group in every part of a mixture
                group = salted(group, self.part)
            yield item(prompts, (0,) * len(prompts), group)
            return
        written = [(number, caption) for number, caption in enumerate(note.captions) if caption]
        group = salted(stable_hash(note.group or note.key), self.part)
        if self.one_caption and written:
            numbers, texts = zip(*written, strict=True)
            yield item(texts, numbers, group)
            return
        for number, caption in enumerate(note.captions[:1] if self.one_caption else note.captions):
            empty = Item(where, note.key, reason="empty_caption")
            yield item((caption,), (number,), group) if caption else empty

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
            texts += islice(self._texts(notes(shard, name, self.form, self.fetcher)), limit - len(texts))
        return texts

    def _texts(self, found: Iterator[Annotation]) -> Iterator[str]:
        for note in found:
            if not self.templates:
                yield from (caption for caption in note.captions if caption)
            elif note.class_name:
                yield from (fill(template, note.class_name) for template in self.templates)


def shard_source(shards: ShardSet, captions: Captions, templates: tuple[str, ...], fetcher: Fetcher) -> ShardSource:
    """The shards to train on, with captions, or with class prompts where `text_form` finds no captions."""
    split = next((split for split in ("train", "all") if split in shards.splits), None)
    if split is None:
        raise InputError(f"--data {shards.where} has no shards of split train, only {', '.join(shards.splits)}")
    paths = shards.splits[split]
    form, prompted = text_form(shards, split, "--data", fetcher, captions == "lines")
    classes = form.classes
    source = ShardSource(
        where=shards.where,
        description="",
        size=None,
        classes=classes if prompted else None,
        templates=templates if prompted else None,
        distinct_texts=len(classes) * len(templates) if prompted and classes else None,
        shards=paths,
        names=shard_names(paths),
        form=form,
        one_caption=captions == "one",
        fetcher=fetcher,
    )
    if shards.index:
        entries = [shards.index.shards[os.path.basename(shown(path))] for path in paths]
        samples = tuple(entry.samples for entry in entries)
        pairs = sum(entry.pairs for entry in entries) if captions != "one" and not prompted else sum(samples)
        source = replace(source, samples=samples, size=pairs)
    elif not any(map(is_away, paths)) and _bytes(paths) < COUNTED_AT_ONCE:
        count = _count(source)
        source = replace(source, samples=count.samples, size=count.pairs, unusable=count.unusable)
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
    return _count(source).pairs


class _Count(NamedTuple):
    samples: tuple[int, ...]
    """of each shard"""
    pairs: int
    unusable: tuple[tuple[str, str], ...]


def _count(source: ShardSource) -> _Count:
    """Samples of each shard, pairs of all, and what reading will skip; images are not looked at."""
    samples, pairs, unusable = [], 0, []
    labelled = bool(source.templates)
    quiet = os.environ.get("RANK", "0") != "0"
    for path, name in zip(
        tqdm(source.shards, desc="counting", unit="shard", delay=2, disable=quiet), source.names, strict=True
    ):
        samples.append(0)
        for sample in index_shard(path, source.fetcher):
            if isinstance(sample, Damage):
                unusable.append((name, sample.reason))
                continue
            samples[-1] += 1
            note = annotate(sample, name, source.form)
            has_image = sample.image_suffix is not None
            unusable += note.skipped(has_image, labelled, per_caption=not source.one_caption)
            if note.fault(has_image, labelled) is None:
                pairs += 1 if labelled or source.one_caption else sum(map(bool, note.captions))
    return _Count(tuple(samples), pairs, tuple(unusable))


def _bytes(paths: tuple[str, ...]) -> int:
    places = (path.removeprefix("file://") for path in paths)
    return sum(os.path.getsize(place) for place in places if os.path.isfile(place))  # reading says what the others are
