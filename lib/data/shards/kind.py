"""The kind of text that the samples of shards have: captions, or classes and their names."""

import os
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from lib.data.fields import is_utf8
from lib.data.remote.fetch import Fetcher, Unreachable, copy_note
from lib.data.shards.annotations import Annotation, TextForm, annotate, listed_classes, shard_names, shown
from lib.data.shards.shard_set import ShardSet
from lib.data.shards.tars import Damage, Sample, index_samples, index_shard
from lib.errors import InputError

_LOOKED_AT = 1000
_MOST_UNREACHABLE = 3


def notes(shard: str, name: str, form: TextForm, fetcher: Fetcher) -> Iterator[Annotation]:
    """The annotations of all samples of a shard that have an image and no fault, without reading the images."""
    for sample in index_shard(shard, fetcher):
        if isinstance(sample, Sample) and sample.image_suffix and sample.fault is None:
            yield annotate(sample, name, form)


def text_form(shards: ShardSet, split: str, flag: str, fetcher: Fetcher, lines: bool = False) -> tuple[TextForm, bool]:
    """How the shards' texts are read, and whether they hold classes and no captions.

    The index tells, or the first thousand samples: captions if any of them has one, else classes, if any of them has
    one. InputError where none has either.
    """
    if shards.index:
        form = TextForm(shards.index.classes, own_keys=True, lines=lines)
        return form, shards.index.classes is not None
    paths = shards.splits[split]
    try:
        form, fault = TextForm(listed_classes(paths, fetcher), lines=lines), None
    except InputError as error:  # no matter where the shards hold captions
        form, fault = TextForm(lines=lines), error
    seen = _Seen.of(_first_samples(shards, paths, flag, fetcher), form)
    if seen.captions:
        return form, False
    if seen.class_name is None:
        raise InputError(f"{flag} {shown(paths[0])}{_nothing(paths[0], seen.apart, fetcher)}")
    if fault:
        raise fault
    if form.classes is None and seen.class_name.isdecimal():
        raise InputError(
            f"{flag} {shown(paths[0])}: classes are numbers and have no names; put classes.txt, one name a line, "
            "beside the shards"
        )
    return form, True


class _Seen(NamedTuple):
    """Texts among the first samples."""

    captions: bool
    """whether there are any; also if all are empty and there is no class: the counts tell then"""
    class_name: str | None
    """the first"""
    apart: bool
    """whether images and texts of a name are not neighbours"""

    @classmethod
    def of(cls, samples: Iterator[tuple[Sample, str]], form: TextForm) -> "_Seen":
        """Look at samples until a caption comes, or at the first shard with texts: others may have to be fetched."""
        apart, empty, class_name, first_shard = False, False, None, None
        for sample, shard in islice(samples, _LOOKED_AT):
            if shard != first_shard and (class_name or empty):
                break
            first_shard = shard
            note = annotate(sample, shard, form)
            apart |= sample.fault == "apart"
            if note.reason or sample.image_suffix is None:
                continue
            if any(note.captions):
                return cls(True, class_name, apart)
            empty |= bool(note.captions)
            class_name = class_name or note.class_name
        return cls(empty and class_name is None, class_name, apart)


def _nothing(path: str, apart: bool, fetcher: Fetcher) -> str:
    """Why nothing of the shards can be used, and what to do."""
    damage, local = _damage(path, fetcher)
    if damage:
        copy = copy_note(path, local) if local else ""
        return f" is no tar that can be read ({damage}){copy}; check the file, or pack anew"
    if not is_utf8(os.path.basename(path)):
        return ": the file's name is not UTF-8, and it is part of each sample's key; rename the file"
    if apart:
        return (
            ": the image and the text of a sample are not next to each other in the tar; sort its members by name, as "
            "tar --sort=name does, or pack anew"
        )
    return ": no sample with an image (.jpg, .png, .webp) and a text (.txt, .json or .cls) of the same name was found"


def _damage(path: str, fetcher: Fetcher) -> tuple[str | None, str | None]:
    """Why nothing of a shard can be read, None where it begins with a sample; and the local file, if there is one."""
    local = fetcher.reached(path)
    if isinstance(local, Unreachable):
        return local.reason, None
    first = next(index_samples(local), None)
    return first.reason if isinstance(first, Damage) else None, local


def _first_samples(
    shards: ShardSet, paths: tuple[str, ...], flag: str, fetcher: Fetcher
) -> Iterator[tuple[Sample, str]]:
    """Samples with their shards' names; InputError where the first shards cannot be had."""
    unreachable = 0
    for path, name in zip(paths, shard_names(paths), strict=True):
        local = fetcher.reached(path)
        if isinstance(local, Unreachable):
            unreachable += 1
            if unreachable == min(_MOST_UNREACHABLE, len(paths)):
                raise InputError(
                    f"{flag} {shards.where}: {shown(path)} cannot be reached or read ({local}); check the address, "
                    "the network and the file"
                )
            continue
        for sample in index_samples(local):
            if isinstance(sample, Sample):
                yield sample, name
