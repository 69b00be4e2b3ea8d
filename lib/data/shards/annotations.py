"""Annotations of a shard's samples: captions, class, group and key, as their text members say them."""

import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from lib.data.fields import is_utf8, name_of, readable_class, texts_of
from lib.data.fields import shown as shown_name
from lib.data.remote.fetch import Fetcher
from lib.data.remote.transfer import PIPE, is_away, is_url
from lib.data.shards.tars import Sample
from lib.errors import InputError
from lib.files import decode

_LONGEST_NUMBER = 9  # digits of a class number
_LINE_END = re.compile(r"\r\n?|\n")  # splitlines would end a line at other marks too


@dataclass(frozen=True)
class TextForm:
    """How the text members of shards are read."""

    classes: tuple[str, ...] | None = None
    """names of the class numbers of .cls members and of "class" in .json"""
    own_keys: bool = False
    """whether "key" in .json is unique over all shards, as the packer makes it; if not, the shard and the member's name
    are the key, since every download numbers its samples from 0"""
    lines: bool = False
    """whether each line of .txt is a caption"""


class Annotation(NamedTuple):
    """The texts of one sample."""

    key: str
    """the sample's identity, the same in every run"""
    captions: tuple[str, ...] = ()
    """as written, empty ones included"""
    class_name: str | None = None
    group: str | None = None
    reason: str | None = None
    """why the sample cannot be used: repeated_name, apart, not_utf8, malformed_json or unknown_class"""

    def fault(self, has_image: bool, labelled: bool) -> str | None:
        """Why the sample makes no pair at all: its own reason, no_image, no_text or empty_caption; None if it does."""
        if self.reason or not has_image:
            return self.reason or "no_image"
        if labelled:
            return "no_text" if self.class_name is None else None
        return None if any(self.captions) else "empty_caption" if self.captions else "no_text"

    def skipped(self, has_image: bool, labelled: bool, per_caption: bool = True) -> list[tuple[str, str]]:
        """(key, reason) of what the sample has no use for: itself, or where captions are pairs each without text."""
        reason = self.fault(has_image, labelled)
        if reason not in (None, "empty_caption") or labelled or not per_caption:
            return [(self.key, reason)] if reason else []
        return [(f"{self.key}#{number}", "empty_caption") for number, text in enumerate(self.captions) if not text]


def shard_names(shards: tuple[str, ...]) -> tuple[str, ...]:
    """Names that tell the shards apart: paths below the folder that holds them all, without what follows a "?"."""
    places = [_place(shard) for shard in shards]
    if len(set(places)) < len(shards):  # addresses that differ only there
        places = list(shards)
    split = [place.split("/") for place in places]
    common = os.path.commonprefix([parts[:-1] for parts in split])
    return tuple("/".join(parts[len(common) :]) for parts in split)


def annotate(sample: Sample, shard: str, form: TextForm) -> Annotation:
    """Read the text members of a sample of the shard so named; whatever is wrong with them is the reason it has.

    Captions in .json go before .txt. null and NaN are missing fields, see lib.data.fields.
    """
    own_key = f"{shard}/{sample.key}"
    printable = shown_name(own_key)
    try:
        note = _read(sample, own_key, form)
        # JSON can spell half a character, which no tokenizer takes.
        if not is_utf8("".join((note.key, note.group or "", note.class_name or "", *note.captions))):
            note = Annotation(printable, reason="not_utf8")
    except Exception as error:  # no JSON, nested too deeply for its reader, numbers too long for it, a list as a key
        reason = "not_utf8" if isinstance(error, UnicodeDecodeError) else "malformed_json"
        note = Annotation(printable, reason=reason)
    return note._replace(reason=sample.fault or note.reason)


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


def listed_classes(shards: tuple[str, ...], fetcher: Fetcher) -> tuple[str, ...] | None:
    """Class names by number from classes.txt beside the first shard, if it is there.

    Raises InputError for a list with an empty line, which would move all names that follow, or a name twice, and for
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


def shown(shard: str) -> str:
    """The shard as it may be told: an address without what follows a "?", where keys of access stand."""
    return shard.partition("?")[0] if is_url(shard) else shard


def beside(shard: str, name: str) -> str:
    """The path or URL of another file in the shard's folder; a command's output has none, and stays itself."""
    return shard if shard.startswith(PIPE) else os.path.join(os.path.dirname(shown(shard)), name)


def _place(shard: str) -> str:
    return shown(shard) if is_away(shard) else os.path.abspath(shard.removeprefix("file://"))


def _class_name(label: str | None, classes: tuple[str, ...] | None) -> tuple[bool, str | None]:
    """Whether the label is missing or has a name, and the name, underscores read as spaces."""
    if label is None:
        return True, None
    if label.startswith("-") and label[1:].isdecimal():  # -1 marks what has no class, as in unlabelled test data
        return True, None
    if classes is None or not label.isdecimal():
        return True, readable_class(label)
    number = int(label) if len(label) <= _LONGEST_NUMBER else len(classes)
    return (True, classes[number]) if number < len(classes) else (False, None)
