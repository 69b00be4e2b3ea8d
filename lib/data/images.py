"""Owns the decoding of image files: what a file holds becomes an upright RGB image or one named reason."""

import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lib.data.files import READABLE, NotAFile, open_file

MAX_PIXELS = 80_000_000
"""Larger images are refused from the header, before any pixel is decoded (240 MB as RGB)."""

# Named, because Pillow would also hand PostScript to an outside program.
Image.init()
_FORMATS = [name for name in READABLE if name in Image.OPEN]
_FIRST_BYTES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"RIFF", b"II*\x00", b"MM\x00*")
_ORIENTATION = 0x0112

# Pillow warns at 89 million pixels; the cap above is lower and not a matter of warnings.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Extent(NamedTuple):
    """How small an image may be decoded, for one that is made smaller anyway."""

    side: int
    """Pixels that are enough."""
    of: Literal["shorter", "longer"]
    """Which side of the image they are."""


class BadImage(Exception):
    """An image that cannot be used.

    `reason` is one of missing, empty, truncated, not_an_image, oversized, unreadable.
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
    content = file if isinstance(file, bytes) else _read(file)
    if not content:
        raise BadImage("empty")
    image = open_header(content)
    try:
        if extent:
            _reduce(image, extent)
        image.load()
        return _to_rgb(_upright(image))
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, what they like
        raise BadImage(_reason(error)) from error


def _read(path: str | Path) -> bytes:
    try:
        with open_file(path) as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise BadImage("missing") from None
    except NotAFile:
        raise BadImage("not_a_file") from None
    except OSError as error:
        raise BadImage("unreadable") from error


def open_header(content: bytes) -> Image.Image:
    """Read an image's header and refuse what is too large; no pixel is decoded yet. Raises BadImage."""
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
    except Image.DecompressionBombError:
        raise BadImage("oversized") from None
    except UnidentifiedImageError:
        # The right first bytes and no readable header: the beginning of an image.
        raise BadImage("truncated" if content.startswith(_FIRST_BYTES) else "not_an_image") from None
    except Exception as error:
        raise BadImage(_reason(error)) from error
    if image.width * image.height > MAX_PIXELS:
        raise BadImage("oversized")
    return image


def _reduce(image: Image.Image, extent: Extent) -> None:
    """Have the decoder leave out what would only be made smaller again; formats other than JPEG are not changed.

    All of the file is read nonetheless, so that one cut short is found.
    """
    side = min(image.size) if extent.of == "shorter" else max(image.size)
    scale = next((scale for scale in (8, 4, 2) if -(-side // scale) >= extent.side), 1)
    if scale > 1:
        image.draft(None, (max(1, image.width // scale), max(1, image.height // scale)))


def _reason(error: Exception) -> str:
    cut_short = isinstance(error, EOFError) or "truncated" in str(error).lower()
    return "truncated" if cut_short else "unreadable"


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
    except Exception:  # damaged EXIF beside good pixels: as if there were none
        return image
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
    """16-bit values are divided by 257; floats are taken as 0..1, or as 0..255 where they exceed 1."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        values = values * 255 if values.max() <= 1 else values
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


def file_stamp(path: str) -> tuple[int, int] | None:
    """Size and time of change in nanoseconds; None where there is no such file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
