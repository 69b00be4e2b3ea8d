"""Samples on their way into a shard: an image is read, checked or made smaller, and its members are made."""

import io
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from PIL import Image

from lib.data.images import BadImage, Extent, decode_image, open_header
from lib.data.order import stable_hash
from lib.data.pack.listing import Entry
from lib.files import without_secrets

_AHEAD = 64

ImageOrReason = tuple[bytes, str] | str
"""An image's bytes and suffix, or the reason why it is left out."""


def read_image(entry: Entry, max_side: int | None, quality: int, verify: bool) -> ImageOrReason:
    """The image as it goes into the shard, or why it does not; `verify` decodes what is not made smaller too."""
    if entry.image is None:
        return entry.faults[0][1]
    try:
        content, suffix = entry.image.read()
        if max_side is not None and max(open_header(content).size) > max_side:
            # At twice the size, as a decoder's reduced scale is no match for a good filter.
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
    if key != entry.key:  # of shards whose addresses differ in their secrets alone
        key += f"#{stable_hash(entry.key)}"
    record: dict[str, object] = {"key": key, "split": entry.split}
    if entry.group is not None:
        record["group"] = entry.group
    if entry.class_name is None:
        members[f"{number:09d}.txt"] = next(filter(None, entry.captions)).encode()
        record["captions"] = entry.captions
    else:
        # A name that is a number would be taken for a class's number.
        numeric = entry.class_name.isdecimal()
        record["class"] = (classes or ()).index(entry.class_name) if numeric else entry.class_name
    members[f"{number:09d}.json"] = json.dumps(record).encode()
    return members


def read_ahead(
    read: Callable[[Entry], ImageOrReason], entries: Sequence[Entry]
) -> Iterator[tuple[Entry, ImageOrReason]]:
    """Each entry with what `read` makes of it, in order; threads are a little ahead."""
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
