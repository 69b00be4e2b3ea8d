"""Owns what the text members of a shard's samples say: captions, class, group and key."""

import json
import os
from typing import NamedTuple

from lib.data.fields import is_utf8
from lib.data.remote.fetch import Fetcher
from lib.data.remote.transfer import PIPE, is_away, is_url


class Annotation(NamedTuple):
    """What the text members of a sample say."""

    key: str
    captions: tuple[str, ...] = ()
    """as written, empty ones included"""
    class_name: str | None = None
    group: str | None = None
    reason: str | None = None
    """not_utf8 where the text cannot be read"""


def shard_names(shards: tuple[str, ...]) -> tuple[str, ...]:
    """What tells the shards apart: their paths below the folder that holds them all, without what follows a "?"."""
    places = [_place(shard) for shard in shards]
    if len(set(places)) < len(shards):  # addresses that differ only there
        places = list(shards)
    split = [place.split("/") for place in places]
    common = os.path.commonprefix([parts[:-1] for parts in split])
    return tuple("/".join(parts[len(common) :]) for parts in split)


def annotate(key: str, members: dict, shard: str, classes: tuple[str, ...] | None) -> Annotation:
    """Read what the text members (bytes by suffix) of the sample `key` of the shard so named say.

    Captions in .json go before .txt. `classes` names the class numbers of .cls members or of "class" in .json.
    """
    # Keys begin again in every shard, so the shard belongs to them.
    own_key = f"{shard}/{key}"
    try:
        record = _record(members.get("json", b"{}"))
        own_key = str(record.get("key", own_key))
        label = _text(members["cls"]) if "cls" in members else record.get("class")
        captions = record.get("captions", record.get("caption"))
        if captions in (None, [], "") and "txt" in members:
            captions = _text(members["txt"])
    except UnicodeDecodeError:
        return Annotation(own_key, reason="not_utf8")
    captions = [captions] if isinstance(captions, str) else captions
    captions = captions if isinstance(captions, list) else []
    texts = tuple("" if caption is None else str(caption).strip() for caption in captions)
    group = str(record["group"]) if "group" in record else None
    # JSON can spell half a character, which no tokenizer takes.
    if not is_utf8("".join((own_key, group or "", str(label or ""), *texts))):
        return Annotation(ascii(own_key), reason="not_utf8")
    return Annotation(own_key, texts, _class_name(label, classes), group)


def listed_classes(shards: tuple[str, ...], fetcher: Fetcher) -> tuple[str, ...] | None:
    """Class names by number from classes.txt beside the first shard, if it is there."""
    listing = fetcher.read_text(beside(shards[0], "classes.txt"))
    if listing is None:
        return None
    return tuple(name.strip().replace("_", " ") for name in listing.split("\n") if name.strip())


def shown(shard: str) -> str:
    """The shard as it may be told: an address without what follows a "?", where keys of access stand."""
    return shard.partition("?")[0] if is_url(shard) else shard


def beside(shard: str, name: str) -> str:
    """The path or URL of another file in the shard's folder; a command's output has none, and stays itself."""
    return shard if shard.startswith(PIPE) else os.path.join(os.path.dirname(shown(shard)), name)


def _place(shard: str) -> str:
    return shown(shard) if is_away(shard) else os.path.abspath(shard.removeprefix("file://"))


def _class_name(label: object, classes: tuple[str, ...] | None) -> str | None:
    name = str(label).strip() if label is not None else ""
    if classes is not None and name.isdecimal():
        return classes[int(name)] if int(name) < len(classes) else None
    return name.replace("_", " ") or None


def _record(content: bytes) -> dict:
    try:
        record = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _text(content: bytes) -> str:
    return content.decode("utf-8").strip()
