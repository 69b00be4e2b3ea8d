"""Owns tar shards as a training source: which files they are and the pairs that their samples make."""

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

from braceexpand import UnbalancedBracesError, braceexpand

from lib.data.annotations import Annotation, annotate, first_annotation, listed_classes, notes, shard_names
from lib.data.order import stable_hash
from lib.data.pairs import Source, fill
from lib.data.tars import Damage, stream_samples
from lib.errors import InputError


class Item(NamedTuple):
    """An undecoded sample: an image file's bytes and the texts to choose from, or why there are none."""

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

    paths: tuple[str, ...]
    names: tuple[str, ...]
    """of the shards, as they appear in the samples' keys"""
    captions: Literal["one", "all"]

    def items(self, shard: int) -> Iterator[Item]:
        """The undecoded samples of one shard, in the order of the tar."""
        path, name = self.paths[shard], self.names[shard]
        for sample in stream_samples(path):
            if isinstance(sample, Damage):
                yield Item(path, name, reason=sample.reason)
                continue
            note = annotate(sample.key, sample.members, name, self.classes)
            image = sample.image
            if image is None:
                yield Item(path, note.key, reason="no_image")
            elif self.templates:
                yield self._prompted(path, note, image)
            else:
                yield from self._captioned(path, note, image)

    def sample_texts(self, limit: int = 100_000) -> list[str]:
        if self.templates and self.classes:
            return [fill(template, name) for name in self.classes for template in self.templates][:limit]
        return list(islice(self._texts(), limit))

    def _texts(self) -> Iterator[str]:
        for note in notes(self.paths, self.classes):
            if not self.templates:
                yield from (caption for caption in note.captions if caption)
            elif note.class_name:
                yield from (fill(template, note.class_name) for template in self.templates)

    def _prompted(self, path: str, note: Annotation, image: bytes) -> Item:
        if note.class_name is None:
            return Item(path, note.key, reason="no_text")
        prompts = tuple(fill(template, note.class_name) for template in self.templates)
        group = stable_hash(note.group or note.class_name)
        return Item(path, note.key, image, prompts, (0,) * len(prompts), group)

    def _captioned(self, path: str, note: Annotation, image: bytes) -> Iterator[Item]:
        written = [(number, caption) for number, caption in enumerate(note.captions) if caption]
        group = stable_hash(note.group or note.key)
        if not note.captions:
            yield Item(path, note.key, reason="no_text")
        elif self.captions == "one" and written:
            numbers, texts = zip(*written, strict=True)
            yield Item(path, note.key, image, texts, numbers, group)
        elif self.captions == "one":
            yield Item(path, note.key, reason="empty_caption")
        else:
            for number, caption in enumerate(note.captions):
                if caption:
                    yield Item(path, note.key, image, (caption,), (number,), group)
                else:
                    yield Item(path, note.key, reason="empty_caption")


def find_shards(data: str, flag: str) -> tuple[str, ...]:
    """The local tar files a path, glob or brace pattern stands for, in sorted order."""
    if data.startswith("pipe:"):
        raise InputError(f"{flag} {data}: commands are not run; give local .tar files, as in 'shards/*.tar'")
    if "://" in data:
        raise InputError(f"{flag} {data}: only local files are read; copy the shards to this machine")
    try:
        patterns = [data] if os.path.isfile(data) else list(braceexpand(data))
    except UnbalancedBracesError:
        raise InputError(f"{flag} {data}: a brace is not closed; write it as in 'a-{{0..9}}.tar'") from None
    paths = []
    for pattern in patterns:
        found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern)
        if not found:
            raise InputError(f"{flag} {data}: there is no file {pattern}; check the folder and the pattern")
        paths += found
    return tuple(sorted(set(paths)))


def shard_source(data: str, captions: Literal["one", "all"], templates: tuple[str, ...]) -> ShardSource:
    """Tar shards as a training source; captions where the first sample has some, else class prompts."""
    paths = find_shards(data, "--data")
    classes = listed_classes(paths)
    prompted = not first_annotation(paths, classes, "--data").captions
    texts = "class prompts" if prompted else f"captions ({captions})"
    return ShardSource(
        where=data,
        description=f"shards {data}: {len(paths)} tar files, {texts}",
        size=None,
        classes=classes if prompted else None,
        templates=templates if prompted else None,
        distinct_texts=len(classes) * len(templates) if prompted and classes else None,
        paths=paths,
        names=shard_names(paths),
        captions=captions,
    )
