"""Sizes, formats and modes of a sample of images, from their headers: no pixel is decoded."""

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from PIL import Image

from lib.data.hub.row_images import RowImages
from lib.data.images import BadImage, ImageFiles, read_image_file
from lib.data.pairs import Images
from lib.data.shards.evaluation import TarImages

SAMPLED = 200


class _Header(NamedTuple):
    width: int
    height: int
    format: str
    mode: str


def image_headers(images: Images, seed: int) -> dict:
    """Widths and heights as stored, formats and modes of 200 random images."""
    rows = np.random.default_rng(seed).permutation(len(images))[:SAMPLED].tolist()
    return _summary([_header_of(images, row) for row in rows])


def shard_headers(contents: Sequence[bytes]) -> dict:
    """The same of image files given as bytes, evenly spaced among them."""
    step = max(1, len(contents) // SAMPLED)
    return _summary([_read(content) for content in contents[::step][:SAMPLED]])


def _header_of(images: Images, row: int) -> _Header | None:
    with suppress(BadImage, OSError):
        if isinstance(images, ImageFiles):
            return _read(read_image_file(images.paths[row]))
        if isinstance(images, RowImages):
            stored = images.content(row)
            return _read(stored if isinstance(stored, bytes) else read_image_file(stored))
        if isinstance(images, TarImages):
            return _read(images.content(row))
        image = images.open(row)
        return _Header(image.width, image.height, "in memory", image.mode)
    return None


def _read(content: bytes) -> _Header | None:
    with suppress(Exception), Image.open(io.BytesIO(content)) as image:  # Pillow's readers raise what they like
        return _Header(image.width, image.height, image.format or "unknown", image.mode)
    return None


def _summary(headers: Iterable[_Header | None]) -> dict:
    headers = list(headers)
    good = [header for header in headers if header is not None]
    sides = {}
    for side in ("width", "height") if good else ():
        values = [getattr(header, side) for header in good]
        sides[side] = {"min": min(values), "median": float(np.median(values)), "max": max(values)}
    return {
        "sampled": len(headers),
        **sides,
        "formats": dict(Counter(header.format for header in good).most_common()),
        "modes": dict(Counter(header.mode for header in good).most_common()),
        "unreadable": len(headers) - len(good),
    }
