"""Decoding of image files: the content becomes an upright RGB image, or has one named reason why it cannot."""

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
"""Larger images are refused from the header, before any pixel is decoded (240 MB as RGB)."""

# Named, because Pillow would also hand PostScript to an outside program.
Image.init()
_FORMATS = [name for name in READABLE if name in Image.OPEN]
_FIRST_BYTES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"RIFF", b"II*\x00", b"MM\x00*")
# The beginnings of JPEG XL and, in ISO's media container, of HEIC: images that Pillow cannot read.
_UNKNOWN = re.compile(rb"\xff\x0a|\0\0\0\x0cJXL |.{4}ftyp(hei|hev|mif1|msf1)", re.DOTALL)
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_PNG_ORIENTATION = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # texts that may say which side is up
_ORIENTATION = 0x0112

# Pillow warns at 89 million pixels; the cap above is lower and not a matter of warnings.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Extent(NamedTuple):
    """How small an image may be decoded, for one that is made smaller anyway."""

    side: int
    """Pixels that are enough."""
    of: Literal["shorter", "longer"]
    """The side of the image that they measure."""


class BadImage(Exception):
    """An image that cannot be used.

    `reason` is one of missing, not_a_file, empty, truncated, not_an_image, unknown_format, oversized, unreadable.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def decode_image(file: bytes | str | Path, extent: Extent | None = None) -> Image.Image:
    """Decode a file's bytes, or the file at a path, into an upright RGB image.

    A JPEG may come out at 1/2, 1/4 or 1/8 of its size, which takes half the time, where that is still the extent
    or larger. The first frame of an animation is taken, transparency is laid over white, 16-bit gray is scaled
    to 8 bits. Raises BadImage with its reason.
    """
    content = file if isinstance(file, bytes) else read_image_file(file)
    if not content:
        raise BadImage("empty")
    image = open_header(content)
    with raised_as(_undecoded, Exception):  # Pillow's decoders raise OSError, SyntaxError, struct.error, what they like
        if extent:
            _reduce(image, extent)
        image.load()
        return _to_rgb(_upright(image))


def read_image_file(path: str | Path) -> bytes:
    """The bytes of the file at a path; raises BadImage."""
    with raised_as(_unread, OSError), open_file(path) as file:
        return file.read()


def open_header(content: bytes) -> Image.Image:
    """Read an image's header and refuse what is too large; no pixel is decoded yet. Raises BadImage."""
    with raised_as(lambda fault: _unopened(fault, content), Exception):
        image = Image.open(io.BytesIO(_without_png_texts(content)), formats=_FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise BadImage("oversized")
    return image


def _without_png_texts(content: bytes) -> bytes:
    """A PNG without its texts, which Pillow unpacks and refuses above 1 MiB although the pixels are fine.

    Texts with metadata of the image are kept, and other files stay as they are.
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
    """Have the decoder leave out what would only be made smaller again; formats other than JPEG are not changed.

    All of the file is read nonetheless, so that one cut short is found.
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
    with suppress(Exception):  # damaged EXIF beside good pixels: as if there were none
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
    """16-bit values are divided by 257; floats are taken as 0..1, or as 0..255 where they exceed 1; NaN is black."""
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
    """Images that are files, by number: `keys[i]` names image i, `paths[i]` is where it lies."""

    keys: list[str]
    paths: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    def open(self, index: int, extent: Extent | None = None) -> Image.Image:
        """Image `index`, RGB and upright, in full or at `extent` or larger; raises BadImage."""
        return decode_image(self.paths[index], extent)

    def identity(self, rows: np.ndarray) -> str:
        """Changes when one of these images does: sizes and times of the files, in nanoseconds."""
        return repr([file_stamp(self.paths[row]) for row in rows])

    def chosen(self, rows: Sequence[int]) -> "ImageFiles":
        """These of the images, numbered anew."""
        return ImageFiles([self.keys[row] for row in rows], [self.paths[row] for row in rows])


def file_stamp(path: str) -> tuple[int, int] | None:
    """Size and time of change in nanoseconds; None where there is no such file."""
    with suppress(OSError):
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    return None
