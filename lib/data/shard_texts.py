"""Texts of a shard's samples: captions or class, group and key, read from their .txt, .json and .cls members."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from lib.data.fetcher import Fetcher, Unreachable, copy_note
from lib.data.fields import is_utf8, name_of, readable_class, texts_of
from lib.data.fields import shown as shown_name
from lib.data.remote import is_away
from lib.data.shards import ShardSet, beside, shard_names, shown
from lib.data.tars import Damage, Sample, index_samples, index_shard
from lib.errors import InputError
from lib.files import decode

_LOOKED_AT = 1000
_MOST_UNREACHABLE = 3
_LONGEST_NUMBER = 9  # digits of a class number
_LINE_END = re.compile(r"\r\n?|\n")  # splitlines would end a line at other characters too


@dataclass(frozen=True)
class TextForm:
    """How the text members of shards are read."""

    classes: tuple[str, ...] | None = None
    """names of the class numbers of .cls members and of "class" in .json"""
    own_keys: bool = False
    """"key" in .json is unique over all shards, as the packer makes it; if not, the shard and the member's name are the
    key, since every download numbers its samples from 0"""
    lines: bool = False
    """each line of .txt is a caption"""


class Annotation(NamedTuple):
    """The texts of one sample, or the damage of a shard, which has a reason and nothing else."""

    key: str
    """identity of the sample, the same in every run"""
    captions: tuple[str, ...] = ()
    """as written, empty ones included"""
    class_name: str | None = None
    group: str | None = None
    reason: str | None = None
    """why the sample cannot be used: repeated_name, apart, not_utf8, malformed_json, unknown_class or shard damage"""
    has_image: bool = False

    def fault(self, labelled: bool) -> str | None:
        """Why the sample makes no pair at all: its own reason, no_image, no_text or empty_caption; None if it does."""
        if self.reason or not self.has_image:
            return self.reason or "no_image"
        if labelled:
            return "no_text" if self.class_name is None else None
        return None if any(self.captions) else "empty_caption" if self.captions else "no_text"

    def skipped(self, labelled: bool, per_caption: bool = True) -> list[tuple[str, str]]:
        """(key, reason) of the unusable sample, or of its empty captions where every caption is a pair."""
        reason = self.fault(labelled)
        if reason not in (None, "empty_caption") or labelled or not per_caption:
            return [(self.key, reason)] if reason else []
        return [(f"{self.key}#{number}", "empty_caption") for number, text in enumerate(self.captions) if not text]


def annotated(shard: str, name: str, form: TextForm, fetcher: Fetcher) -> Iterator[tuple[Annotation, Sample | None]]:
    """Every sample of a shard with its annotation, images unread; damage of the shard has no sample."""
    for sample in index_shard(shard, fetcher):
        if isinstance(sample, Damage):
            yield Annotation(name, reason=sample.reason), None
        else:
            yield annotate(sample, name, form), sample


def annotate(sample: Sample, shard: str, form: TextForm) -> Annotation:
    """Read the text members of a sample of the shard with this name; any fault in them becomes the reason.

    Captions in .json go before .txt. null and NaN are missing fields, see lib.data.fields.
    """
    own_key = f"{shard}/{sample.key}"
    printable = shown_name(own_key)
    try:
        note = _read(sample, own_key, form)
        # JSON can spell half a surrogate pair, which no tokenizer accepts.
        if not is_utf8("".join((note.key, note.group or "", note.class_name or "", *note.captions))):
            note = Annotation(printable, reason="not_utf8")
    except Exception as error:  # no JSON, nested too deeply for its reader, numbers too long for it, a list as a key
        reason = "not_utf8" if isinstance(error, UnicodeDecodeError) else "malformed_json"
        note = Annotation(printable, reason=reason)
    return note._replace(reason=sample.fault or note.reason, has_image=sample.image_suffix is not None)


def _read(sample: Sample, own_key: str, form: TextForm) -> Annotation:
    members = sample.members
    record = json.loads(decode(members.get("json") or b"{}"))
    given_key, group = name_of(record.get("key")), name_of(record.get("group"))
    label = record.get("class")
    if "cls" in members:
        label = decode(members["cls"])
    elif isinstance(label, list | dict | bool):  # a field of another meaning, which is no fault of a captioned image
        label = None
    captions = texts_of(record.get("captions"))
    if not any(captions):
        captions = texts_of(record.get("caption")) or captions
    if not any(captions) and "txt" in members:
        text = decode(members["txt"])
        captions = [line for line in texts_of(_LINE_END.split(text)) if line] if form.lines else texts_of(text)
    known, class_name = _class_name(name_of(label), form.classes)
    return Annotation(
        given_key or own_key if form.own_keys else own_key,
        tuple(captions),
        class_name,
        group,
        None if known or any(captions) else "unknown_class",
    )


def _class_name(label: str | None, classes: tuple[str, ...] | None) -> tuple[bool, str | None]:
    """(True if the label is missing or has a name, that name with underscores read as spaces)."""
    if label is None or (label.startswith("-") and label[1:].isdecimal()):  # -1 marks unlabelled test data
        return True, None
    if classes is None or not label.isdecimal():
        return True, readable_class(label)
    number = int(label) if len(label) <= _LONGEST_NUMBER else len(classes)
    return (True, classes[number]) if number < len(classes) else (False, None)


def listed_classes(shards: tuple[str, ...], fetcher: Fetcher) -> tuple[str, ...] | None:
    """Class names by number from classes.txt beside the first shard, if it is there.

    Raises InputError for a list with an empty line, which would shift all names that follow, or a name twice, and for
    local folders of shards with different lists.
    """
    path = beside(shards[0], "classes.txt")
    others = {beside(shard, "classes.txt") for shard in shards if not is_away(shard)} - {path}
    listing = fetcher.read_text(path)
    if listing is None or not listing.strip():
        return None
    names = [readable_class(name.strip()) for name in listing.rstrip().split("\n")]
    for name, count in Counter(names).items():
        if count > 1 or not name:
            line = len(names) - names[::-1].index(name)
            raise InputError(f"{path}: line {line} is {f'{name!r} again' if name else 'empty'}; name every class once")
    if different := next((other for other in sorted(others) if fetcher.read_text(other) not in (None, listing)), None):
        raise InputError(f"{path} and {different} are different lists; give each folder as a --data of its own")
    return tuple(names)


def text_form(shards: ShardSet, split: str, flag: str, fetcher: Fetcher, lines: bool = False) -> tuple[TextForm, bool]:
    """How the shards' texts are read, and True where they hold classes and no captions.

    The index decides, or the first thousand samples: captions if any of them has one, else classes, if any of them
    has one. InputError where none has either.
    """
    if shards.index:
        form = TextForm(shards.index.classes, own_keys=True, lines=lines)
        return form, shards.index.classes is not None
    paths = shards.splits[split]
    try:
        form, fault = TextForm(listed_classes(paths, fetcher), lines=lines), None
    except InputError as error:  # irrelevant where the shards hold captions
        form, fault = TextForm(lines=lines), error
    captions, class_name, apart = _first_texts(_first_notes(shards, paths, flag, form, fetcher))
    if captions:
        return form, False
    if class_name is None:
        raise InputError(f"{flag} {shown(paths[0])}{_nothing(paths[0], apart, fetcher)}")
    if fault:
        raise fault
    if form.classes is None and class_name.isdecimal():
        raise InputError(
            f"{flag} {shown(paths[0])}: classes are numbers and have no names; put classes.txt, one name a line, "
            "beside the shards"
        )
    return form, True


def _first_notes(
    shards: ShardSet, paths: tuple[str, ...], flag: str, form: TextForm, fetcher: Fetcher
) -> Iterator[tuple[Annotation, str]]:
    """Annotations with their shards' names; InputError where the first shards cannot be reached."""
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
                yield annotate(sample, name, form), name


def _first_texts(notes: Iterator[tuple[Annotation, str]]) -> tuple[bool, str | None, bool]:
    """(there are captions, the first class name, images and texts of a name are apart) in the first samples.

    Ends at the first caption, or after the first shard with texts: others may have to be downloaded. Where all
    captions are empty and there is no class, there are captions: their number is reported later.
    """
    apart, empty, class_name, first_shard = False, False, None, None
    for note, shard in islice(notes, _LOOKED_AT):
        if shard != first_shard and (class_name or empty):
            break
        first_shard = shard
        apart |= note.reason == "apart"
        if note.reason or not note.has_image:
            continue
        if any(note.captions):
            return True, class_name, apart
        empty |= bool(note.captions)
        class_name = class_name or note.class_name
    return empty and class_name is None, class_name, apart


def _nothing(path: str, apart: bool, fetcher: Fetcher) -> str:
    """Why no sample of the shards can be used, and what to do."""
    local = fetcher.reached(path)
    first = Damage(local.reason) if isinstance(local, Unreachable) else next(index_samples(local), None)
    if isinstance(first, Damage):
        copy = copy_note(path, local) if isinstance(local, str) else ""
        return f" is no tar that can be read ({first.reason}){copy}; check the file, or pack anew"
    if not is_utf8(os.path.basename(path)):
        return ": the file's name is not UTF-8, and it is part of each sample's key; rename the file"
    if apart:
        return (
            ": the image and the text of a sample are not next to each other in the tar; sort its members by name, as "
            "tar --sort=name does, or pack anew"
        )
    return ": no sample with an image (.jpg, .png, .webp) and a text (.txt, .json or .cls) of the same name was found"
