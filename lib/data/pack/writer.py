"""Files of a pack: members of samples, shards that are whole or absent, and the record of the finished ones."""

import fcntl
import io
import json
import os
import tarfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from lib.data.durable import flush
from lib.data.images import BadImage, Extent, decode_image, open_header
from lib.data.order import stable_hash
from lib.data.pack.entries import Entry
from lib.data.shards import ShardEntry
from lib.errors import InputError, raised_as
from lib.files import fault_of, json_without_secrets, without_secrets

RECORD = "packing.jsonl"

_AHEAD = 64
_VERSION = 1

Skips = list[tuple[str, str]]
"""(key, reason)"""

ImageOrReason = tuple[bytes, str] | str
"""An image's bytes and suffix, or the reason why it is left out."""


def read_image(entry: Entry, max_side: int | None, quality: int, verify: bool) -> ImageOrReason:
    """The image as the shard gets it, or the reason why it is left out; `verify` decodes every image."""
    if entry.image is None:
        return entry.faults[0][1]
    try:
        content, suffix = entry.image()
        if max_side is not None and max(open_header(content).size) > max_side:
            # Decoded at twice the size: the decoder's reduced scale is worse than a good filter.
            return _smaller(decode_image(content, Extent(2 * max_side, "longer")), max_side, quality), "jpg"
        if verify:
            decode_image(content)
    except BadImage as bad:
        return bad.reason
    return content, suffix


def _smaller(image: Image.Image, max_side: int, quality: int) -> bytes:
    scale = max_side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    file = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=quality)
    return file.getvalue()


def members_of(
    number: int, entry: Entry, content: bytes, suffix: str, classes: tuple[str, ...] | None
) -> dict[str, bytes]:
    """The files of sample `number` by name."""
    members = {f"{number:09d}.{suffix}": content}
    key = without_secrets(entry.key)
    if key != entry.key:  # keys of shards whose addresses differ only in their secrets stay distinct
        key += f"#{stable_hash(entry.key)}"
    record: dict[str, object] = {"key": key, "split": entry.split}
    if entry.group is not None:
        record["group"] = entry.group
    if entry.class_name is None:
        members[f"{number:09d}.txt"] = next(filter(None, entry.captions)).encode()
        record["captions"] = entry.captions
    else:
        # A name of digits would be read as the number of a class.
        numeric = entry.class_name.isdecimal()
        record["class"] = (classes or ()).index(entry.class_name) if numeric else entry.class_name
    members[f"{number:09d}.json"] = json.dumps(record).encode()
    return members


def read_ahead(
    read: Callable[[Entry], ImageOrReason], entries: Sequence[Entry]
) -> Iterator[tuple[Entry, ImageOrReason]]:
    """Each entry with the result of `read`, in order; threads read a few entries ahead."""
    pool = ThreadPoolExecutor()  # a few more threads than cores: some wait for the disk
    try:
        waiting: deque[tuple[Entry, Future[ImageOrReason]]] = deque()
        for entry in entries:
            waiting.append((entry, pool.submit(read, entry)))
            if len(waiting) > _AHEAD:
                entry, image = waiting.popleft()
                yield entry, image.result()
        for entry, image in waiting:
            yield entry, image.result()
    finally:
        pool.shutdown(cancel_futures=True)


class ShardWriter:
    """Writes one shard; the same members give the same bytes."""

    def __init__(self, folder: Path, split: str, number: int):
        self.split, self.samples, self.pairs = split, 0, 0
        self.path = folder / f"{split}-{number:06d}.tar"
        self._unfinished = folder / f".{self.path.name}.unfinished"
        self._file = open(self._unfinished, "wb")  # noqa: SIM115 - closed by finish or close
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def size_with(self, members: dict[str, bytes]) -> int:
        """Size in bytes of the finished shard if it ended with these members."""
        sizes = (tarfile.BLOCKSIZE + _padded(len(content), tarfile.BLOCKSIZE) for content in members.values())
        return _padded(self._tar.offset + sum(sizes) + 2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE)

    def add(self, members: dict[str, bytes], pairs: int) -> None:
        """Add a sample: its members by name, and how many pairs it makes."""
        for name, content in members.items():
            member = tarfile.TarInfo(name)  # dated 1970, of nobody
            member.size = len(content)
            self._tar.addfile(member, io.BytesIO(content))
        self.samples += 1
        self.pairs += pairs

    def finish(self) -> ShardEntry:
        """Give the shard its name, once all of it is on the disk."""
        # The rename is atomic, and comes after fsync: a shard with its final name is whole, even after a power cut.
        self._tar.close()
        _sync(self._file)
        self._file.close()
        size = self._unfinished.stat().st_size
        os.replace(self._unfinished, self.path)
        flush(self.path.parent)  # the record must not list a name that a power cut takes back
        return ShardEntry(self.split, self.samples, self.pairs, size)

    def close(self) -> None:
        """Leave the shard unfinished; without effect on a finished one."""
        self._unfinished.unlink(missing_ok=True)
        with suppress(OSError):  # the rest of the file does not matter any more
            self._file.close()


class Record:
    """The record of a folder: a line with the settings, one for each finished shard, and one at the end."""

    def __init__(self, folder: Path, settings: dict[str, object]):
        """Resume in the folder, or begin it; InputError where it holds something else or is being packed into."""
        self.shards: dict[str, ShardEntry] = {}
        self.skips: Skips = []
        self.consumed: dict[str, int] = {}
        """samples of each split that were read, packed or not"""
        self.done = False
        self._folder = folder
        self._file = _open_record(folder)
        lines = self._whole_lines()
        if lines:
            self._check(lines[0], settings)
            for line in lines[1:]:
                self._read(line)
        else:
            self._write({"version": _VERSION} | settings)

    def add(self, name: str | None, entry: ShardEntry | None, split: str, consumed: int, skips: Skips) -> None:
        """Record a finished shard, how far the split was read for it and the samples left out on the way."""
        line = {"split": split, "consumed": consumed, "skipped": skips}
        if entry is not None:
            line |= {"shard": name, "samples": entry.samples, "pairs": entry.pairs, "bytes": entry.bytes}
        self._write(line)
        self._read(line)

    def finish(self) -> None:
        """Record that the pack is complete."""
        self._write({"done": True})
        self.done = True

    def give_up(self) -> None:
        """Leave the folder as if nothing had been begun."""
        (self._folder / RECORD).unlink()

    def close(self) -> None:
        """Release the folder for other processes."""
        with suppress(OSError):  # a line that could not be written: `_write` has raised it
            self._file.close()

    def _whole_lines(self) -> list[dict]:
        """Recorded lines; a last line that was cut off is removed."""
        self._file.seek(0)
        content = self._file.read()
        content = content[: content.rfind(b"\n") + 1]
        self._file.truncate(len(content))
        damaged = InputError(f"--out {self._folder}: {RECORD} is damaged; empty the folder or name another")
        with raised_as(lambda _: damaged, ValueError):
            return [json.loads(line) for line in content.splitlines()]

    def _check(self, found: dict, settings: dict[str, object]) -> None:
        # The secrets of addresses are not recorded, and may be different next time.
        wanted, found = json_without_secrets({"version": _VERSION} | settings), json_without_secrets(found)
        other = [name for name in wanted if found.get(name) != wanted[name]]
        if other == ["listing"]:
            raise InputError(f"--out {self._folder}: the data has changed since this was begun; name another folder")
        if other:
            differences = ", ".join(f"{name} {found.get(name)} and not {wanted[name]}" for name in other[:3])
            raise InputError(f"--out {self._folder} was packed with {differences}; name another folder")

    def _read(self, line: dict) -> None:
        if line.get("done"):
            self.done = True
            return
        self.consumed[line["split"]] = line["consumed"]
        self.skips += [(key, reason) for key, reason in line["skipped"]]
        if "shard" in line:
            path = self._folder / line["shard"]
            if not path.is_file() or path.stat().st_size != line["bytes"]:
                raise InputError(f"--out {self._folder}: {path.name} is gone or changed; empty the folder, pack again")
            self.shards[path.name] = ShardEntry(line["split"], line["samples"], line["pairs"], line["bytes"])

    def _write(self, line: dict) -> None:
        self._file.write(json.dumps(json_without_secrets(line)).encode() + b"\n")
        _sync(self._file)


def _open_record(folder: Path) -> BinaryIO:
    """Open and lock the record of a folder that is new, empty or has one."""
    wrong = f"--out {folder} cannot be written"
    with raised_as(lambda fault: InputError(f"{wrong}: {fault_of(fault)}; choose another folder"), OSError):
        folder.mkdir(parents=True, exist_ok=True)
        others = sorted(os.listdir(folder))
        if others and RECORD not in others:
            raise InputError(f"--out {folder} holds {others[0]} and no packed shards; name an empty or new folder")
        file = open(folder / RECORD, "ab+")  # noqa: SIM115 - stays open, and locked
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(f"--out {folder}: another process is packing into it; wait for it, or stop it") from None
    return file


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _padded(size: int, block: int) -> int:
    return -(-size // block) * block
