"""Images of the rows of a data set that the `datasets` library reads, as bytes in a column or as paths."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from lib.data.images import Extent, decode_image, file_stamp


@dataclass(frozen=True)
class RowImages:
    """Images by number: `keys[i]` names image i, `places[i]` is its row, or its path where no bytes are stored."""

    keys: list[str]
    places: list[int | str | None]
    """None: there is no image; never opened"""
    column: Any
    """a `datasets.Dataset` with one column, whose images are not decoded; memory-mapped, and pickled as paths"""
    version: str
    """changes when the data set or the column does"""

    def __len__(self) -> int:
        return len(self.keys)

    def content(self, index: int) -> bytes | str:
        """The bytes of the file as stored, or its path."""
        place = self.places[index]
        assert place is not None, "rows without an image are left out"
        if isinstance(place, str):
            return place
        (value,) = self.column[place].values()
        return value["bytes"] if isinstance(value, dict) else value

    def open(self, index: int, extent: Extent | None = None) -> Image.Image:
        """Image `index`, RGB and upright, in full or at `extent` or larger; raises BadImage."""
        return decode_image(self.content(index), extent)

    def identity(self, rows: np.ndarray) -> str:
        """Changes when one of these images does: the data set's fingerprint and the rows, sizes and times of files."""
        places = [self.places[row] for row in rows]
        return repr((self.version, [file_stamp(each) if isinstance(each, str) else each for each in places]))

    def chosen(self, rows: Iterable[int]) -> "RowImages":
        """These of the images, numbered anew."""
        rows = list(rows)
        keys, places = [self.keys[row] for row in rows], [self.places[row] for row in rows]
        return RowImages(keys, places, self.column, self.version)
