"""Owns what kind of text the samples of shards go with: captions, or classes and their names."""

from collections.abc import Iterator
from itertools import islice

from lib.data.remote.fetch import Fetcher, Unreachable
from lib.data.shards.annotations import Annotation, annotate, listed_classes, shard_names, shown
from lib.data.shards.shard_set import ShardSet
from lib.data.shards.tars import Damage, Sample, index_samples
from lib.errors import InputError

_MOST_UNREACHABLE = 3


def notes(path: str, name: str, classes: tuple[str, ...] | None) -> Iterator[Annotation]:
    """The annotations of all samples of a local tar that have an image, without reading the images."""
    for sample in index_samples(path):
        if isinstance(sample, Sample) and sample.image is not None:
            yield annotate(sample.key, sample.members, name, classes)


def classes_of(shards: ShardSet, split: str, flag: str, fetcher: Fetcher) -> tuple[tuple[str, ...] | None, bool]:
    """Class names by number, if they are listed, and whether the shards hold classes and no captions.

    Told from the index or the first of a thousand samples that has an image and text; InputError where none has.
    """
    if shards.index:
        return shards.index.classes, shards.index.classes is not None
    paths = shards.splits[split]
    classes = listed_classes(paths, fetcher)
    for note in islice(_first_notes(shards, paths, classes, flag, fetcher), 1000):
        if note.captions:
            return classes, False
        if note.class_name is not None:
            if classes is None and note.class_name.isdecimal():
                raise InputError(
                    f"{flag} {shown(paths[0])}: classes are numbers and have no names; put classes.txt, one name a "
                    "line, beside the shards"
                )
            return classes, True
    damage = _damage(paths[0], fetcher)
    if damage:
        raise InputError(
            f"{flag} {shown(paths[0])} is no tar that can be read ({damage}); check the file, or pack anew"
        )
    raise InputError(
        f"{flag} {shown(paths[0])}: no sample with an image (.jpg, .png, .webp) and a text (.txt, .json or .cls) of "
        "the same name was found"
    )


def _damage(path: str, fetcher: Fetcher) -> str | None:
    """Why nothing of a shard can be read, None where it begins with a sample."""
    try:
        first = next(index_samples(fetcher.local(path)), None)
    except Unreachable as error:
        return error.reason
    return first.reason if isinstance(first, Damage) else None


def _first_notes(
    shards: ShardSet, paths: tuple[str, ...], classes: tuple[str, ...] | None, flag: str, fetcher: Fetcher
) -> Iterator[Annotation]:
    unreachable = 0
    for path, name in zip(paths, shard_names(paths), strict=True):
        try:
            local = fetcher.local(path)
        except Unreachable as error:
            unreachable += 1
            if unreachable == min(_MOST_UNREACHABLE, len(paths)):
                raise InputError(
                    f"{flag} {shards.where}: {shown(path)} cannot be reached or read ({error}); check the address, "
                    "the network and the file"
                ) from None
            continue
        yield from notes(local, name, classes)
