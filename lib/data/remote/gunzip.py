"""Owns the unpacking of gzip: as much of a damaged file as can be had."""

import zlib
from pathlib import Path
from typing import BinaryIO

_MAGIC = b"\x1f\x8b"
_PIECE = 1 << 18


def is_gzip(path: Path) -> bool:
    """Whether the file begins as gzip does; its name does not matter."""
    with open(path, "rb") as file:
        return file.read(2) == _MAGIC


def gunzip(packed: BinaryIO, unpacked: BinaryIO) -> bool:
    """Unpack all members of a gzip file; True where it was whole, False where its rest could not be unpacked."""
    member = zlib.decompressobj(wbits=31)
    begun = False
    while piece := packed.read(_PIECE):
        while piece:
            if member.eof:
                member, begun = zlib.decompressobj(wbits=31), False
            if not begun and not (piece := piece.lstrip(b"\0")):  # zeros after a member are padding
                break
            begun = True
            before = member.copy()
            try:
                unpacked.write(member.decompress(piece))
            except zlib.error:
                _salvage(before, piece, unpacked)
                return False
            piece = member.unused_data
    return member.eof or not begun


def _salvage(member: "zlib._Decompress", piece: bytes, unpacked: BinaryIO) -> None:
    """Unpack byte by byte up to the damage: fed at once, a piece with damage in it yields nothing."""
    for place in range(len(piece)):
        try:
            unpacked.write(member.decompress(piece[place : place + 1]))
        except zlib.error:
            return
