"""Tar shards as a training source: their files, and the pairs that their samples make."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import NamedTuple

from tqdm import tqdm

from lib.data.fetcher import Fetcher, Unreachable, copy_note
from lib.data.order import salted, stable_hash
from lib.data.pairs import Captions, Source, fill, parts_of
from lib.data.remote import ZIPPED, is_away
from lib.data.shard_texts import Annotation, TextForm, annotate, annotated, text_form
from lib.data.shards import ShardSet, shard_names, shown
from lib.data.tars import ALL, Damage, Sample, read_samples
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
        be, so that exactly one stream counts it. A shard that cannot be reached has it at 0.
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
        """True for a shard that has to be downloaded or unpacked before it is read."""
        return is_away(self.shards[shard]) or self.shards[shard].lower().endswith(ZIPPED)

    def fetch(self, shard: int) -> None:
        """Download the shard in advance; a failure is reported when the shard is read."""
        with suppress(Unreachable, InputError):
            self.fetcher.local(self.shards[shard])

    def fault(self, shard: int, reason: str, path: str | None = None) -> Item:
        """The skip of a whole shard; `path`, if it was read: a bad copy in the cache is named, to be removed."""
        where = shown(self.shards[shard])
        copy = copy_note(self.shards[shard], path) if path else ""
        return Item(where + copy, self.names[shard], reason=reason)

    def items(self, shard: int, sample: Sample) -> Iterator[Item]:
        """The pairs of one sample, and the reasons of those that cannot be used; at least one of either."""
        where = shown(self.shards[shard])
        note = annotate(sample, self.names[shard], self.form)
        image, reason = sample.image, note.fault(labelled=bool(self.templates))
        if image is None or reason not in (None, "empty_caption"):
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

        Remote shards are not all downloaded for this: the first with texts suffices, unless more are asked for.
        """
        if self.templates and self.classes:
            return [fill(template, name) for name in self.classes for template in self.templates][:limit]
        texts: list[str] = []
        for shard, name in zip(self.shards, self.names, strict=True):
            if len(texts) >= limit or (texts and limit <= _SAMPLE_TEXTS and is_away(shard)):
                break
            notes = (note for note, _ in annotated(shard, name, self.form, self.fetcher))
            texts += islice(chain.from_iterable(map(self._texts, notes)), limit - len(texts))
        return texts

    def _texts(self, note: Annotation) -> list[str]:
        if note.fault(labelled=bool(self.templates)):
            return []
        if self.templates:
            return [fill(template, note.class_name or "") for template in self.templates]
        return [caption for caption in note.captions if caption]


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
        samples, pairs, unusable = _count(source)
        source = replace(source, samples=samples, size=pairs, unusable=unusable)
    if source.size == 0:
        raise InputError(f"--data {shards.where}: not one sample has an image and a text that is not empty")
    texts = "class prompts" if prompted else f"captions ({captions})"
    known = "" if source.samples is None else f", {sum(source.samples):,} samples"
    return replace(source, description=f"shards {shards.where}: {len(paths)} tar files{known}, {texts}")


def count_pairs(source: Source) -> int:
    """Pairs in one pass: known, or counted from the headers and texts of local shards, with a progress bar.

    Raises InputError where remote shards would have to be downloaded for that.
    """
    pairs = 0
    for part in parts_of(source):
        if part.size is not None:
            pairs += part.size
            continue
        assert isinstance(part, ShardSource)
        if any(map(is_away, part.shards)):
            raise InputError(f"--epochs: nobody has counted the pairs of {part.where}; give --steps instead")
        pairs += _count(part)[1]
    return pairs


def _count(source: ShardSource) -> tuple[tuple[int, ...], int, tuple[tuple[str, str], ...]]:
    """(samples of each shard, pairs of all, (key, reason) of unusable samples); images are not opened."""
    samples, pairs, unusable = [], 0, []
    labelled = bool(source.templates)
    shards = tqdm(source.shards, desc="counting", unit="shard", delay=2, disable=os.environ.get("RANK", "0") != "0")
    for path, name in zip(shards, source.names, strict=True):
        samples.append(0)
        for note, sample in annotated(path, name, source.form, source.fetcher):
            samples[-1] += sample is not None
            unusable += note.skipped(labelled, per_caption=not source.one_caption)
            if note.fault(labelled) is None:
                pairs += 1 if labelled or source.one_caption else sum(map(bool, note.captions))
    return tuple(samples), pairs, tuple(unusable)


def _bytes(paths: tuple[str, ...]) -> int:
    places = (path.removeprefix("file://") for path in paths)
    return sum(os.path.getsize(place) for place in places if os.path.isfile(place))  # reading reports the others
