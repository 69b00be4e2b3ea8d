"""Decoding of image files into upright RGB images; a file that cannot be decoded has one named reason."""

import io
import os
import re
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lib.data.find_images import READABLE
from lib.errors import raised_as
from lib.files import NotAFile, open_file

MAX_PIXELS = 80_000_000
"""Larger images (240 MB as RGB) are refused by their header, before any pixel is decoded."""

# Only these, because Pillow would also run an outside program on PostScript files.
Image.init()
_FORMATS = [name for name in READABLE if name in Image.OPEN]
_FIRST_BYTES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"RIFF", b"II*\x00", b"MM\x00*")
# The beginnings of JPEG XL and, in ISO's media container, of HEIC: images that Pillow cannot read.
_UNKNOWN = re.compile(rb"\xff\x0a|\0\0\0\x0cJXL |.{4}ftyp(hei|hev|mif1|msf1)", re.DOTALL)
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_PNG_ORIENTATION = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # texts that may say which side is up
_ORIENTATION = 0x0112

# Pillow warns at 89 million pixels; the limit above is lower and refuses instead.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Extent(NamedTuple):
    """Size at which an image may be decoded if it is made smaller anyway."""

    side: int
    """Pixels that suffice."""
    of: Literal["shorter", "longer"]
    """The side of the image that has these pixels."""


class BadImage(Exception):
    """An image that cannot be used.

    `reason` is one of missing, not_a_file, empty, truncated, not_an_image, unknown_format, oversized, unreadable.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def decode_image(file: bytes | str | Path, extent: Extent | None = None) -> Image.Image:
    """Decode a file's bytes, or the file at a path, into an upright RGB image.

    A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, in half the time, if that is still `extent` or larger. The
    first frame of an animation is used, transparency becomes white, 16-bit gray is scaled to 8 bits. Raises BadImage
    with its reason.
    """
    content = file if isinstance(file, bytes) else read_image_file(file)
    if not content:
        raise BadImage("empty")
    image = open_header(content)
    with raised_as(_undecoded, Exception):  # Pillow's decoders raise OSError, SyntaxError, struct.error and others
        if extent:
            _reduce(image, extent)
        image.load()
        return _to_rgb(_upright(image))


def read_image_file(path: str | Path) -> bytes:
    """The bytes of the file at a path; raises BadImage."""
    with raised_as(_unread, OSError), open_file(path) as file:
        return file.read()


def open_header(content: bytes) -> Image.Image:
    """Read an image's header and refuse too large images, before a pixel is decoded. Raises BadImage."""
    with raised_as(lambda fault: _unopened(fault, content), Exception):
        image = Image.open(io.BytesIO(_without_png_texts(content)), formats=_FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise BadImage("oversized")
    return image


def _without_png_texts(content: bytes) -> bytes:
    """Remove the texts of a PNG, which Pillow unpacks and refuses above 1 MiB although the pixels are fine.

    Texts that may hold the orientation are kept; other files stay as they are.
    """
    if not content.startswith(_PNG):
        return content
    kept, place = [_PNG], len(_PNG)
    while place + 12 <= len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")  # length, kind, data, checksum
        is_text = content[place + 4 : place + 8] in _PNG_TEXTS
        if not is_text or content.startswith(_PNG_ORIENTATION, place + 8):
            kept.append(content[place:end])
        place = end
    return b"".join(kept) if sum(map(len, kept)) < place else content


def _reduce(image: Image.Image, extent: Extent) -> None:
    """Let the decoder of a JPEG produce a smaller image; other formats are not changed.

    The whole file is read nonetheless, so that one cut short is noticed.
    """
    side = min(image.size) if extent.of == "shorter" else max(image.size)
    scale = next((scale for scale in (8, 4, 2) if -(-side // scale) >= extent.side), 1)
    if scale > 1:
        image.draft(None, (max(1, image.width // scale), max(1, image.height // scale)))


def _unread(error: Exception) -> BadImage:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return BadImage("missing")
    return BadImage("not_a_file" if isinstance(error, NotAFile) else "unreadable")


def _unopened(error: Exception, content: bytes) -> BadImage:
    if isinstance(error, Image.DecompressionBombError):
        return BadImage("oversized")
    if not isinstance(error, UnidentifiedImageError):
        return _undecoded(error)
    if _UNKNOWN.match(content):
        return BadImage("unknown_format")
    # The right first bytes and no readable header: the beginning of an image.
    return BadImage("truncated" if content.startswith(_FIRST_BYTES) else "not_an_image")


def _undecoded(error: Exception) -> BadImage:
    cut_short = isinstance(error, EOFError) or "truncated" in str(error).lower()
    return BadImage("truncated" if cut_short else "unreadable")


def _upright(image: Image.Image) -> Image.Image:
    turned = False
    with suppress(Exception):  # damaged EXIF with good pixels counts as none
        turned = image.getexif().get(_ORIENTATION, 1) != 1
    return ImageOps.exif_transpose(image) if turned else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _scaled_to_8_bits(image).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white.convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _scaled_to_8_bits(image: Image.Image) -> Image.Image:
    """Divide 16-bit values by 257; read floats as 0..1, or as 0..255 where they exceed 1; NaN becomes black."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        finite = values[np.isfinite(values)]
        if not len(finite):
            raise ValueError("no finite pixel")
        values = np.nan_to_num(values, nan=0, posinf=finite.max(), neginf=finite.min())
        values = values * 255 if finite.max() <= 1 else values
    elif image.mode.startswith("I;16") or values.max() > 255:
        values = values / 257
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


@dataclass(frozen=True)
class ImageFiles:
    """Images that are files, by number: `keys[i]` and `paths[i]` belong to image i."""

    keys: list[str]
    paths: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    def open(self, index: int, extent: Extent | None = None) -> Image.Image:
        """Image `index`, RGB and upright, in full or at `extent` or larger; raises BadImage."""
        return decode_image(self.paths[index], extent)

    def identity(self, rows: np.ndarray) -> str:
        """A text that changes when one of these images does: sizes and times of the files, in nanoseconds."""
        return repr([file_stamp(self.paths[row]) for row in rows])

    def chosen(self, rows: Sequence[int]) -> "ImageFiles":
        """The images of these rows, numbered from 0."""
        return ImageFiles([self.keys[row] for row in rows], [self.paths[row] for row in rows])


def file_stamp(path: str) -> tuple[int, int] | None:
    """(size, time of change in nanoseconds) of a file; None where there is none."""
    with suppress(OSError):
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    return None
