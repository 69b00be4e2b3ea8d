"""Contents of a shard as it arrived: gzip is unpacked as far as it goes within a limit, other files are refused."""

import tarfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from lib.data.remote.transfer import Unreachable, unreachable
from lib.errors import raised_as
from lib.files import open_file

GZIP = b"\x1f\x8b"
"""The first bytes of gzip."""

_PIECE = 1 << 18
_UNPACKED_AT_ONCE = 1 << 24  # a piece of a gzip bomb would be 256 MiB
_SHOWN = 24


def is_gzip(path: Path) -> bool:
    """Whether the file begins as gzip does; its name does not matter."""
    with open_file(path) as file:
        return file.read(2) == GZIP


def is_web_page(content: bytes) -> bool:
    """Whether the content begins as HTML does: a login page, say, in place of the file."""
    return content.lstrip(b"\xef\xbb\xbf \t\r\n")[:14].lower().startswith((b"<!doctype html", b"<html"))


def check_tar(path: Path) -> None:
    """Raise Unreachable, reason not_a_tar, for a file that does not begin as a tar does; an empty tar is one."""
    with open_file(path) as file:
        head = file.read(tarfile.BLOCKSIZE)
    if head == bytes(tarfile.BLOCKSIZE):  # the end of an archive
        return
    with suppress(tarfile.HeaderError):
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")  # checks the header's sum
        return
    if len(head) < tarfile.BLOCKSIZE or head[257:262] != b"ustar":
        raise Unreachable("not_a_tar", _begins(head))


def _begins(head: bytes) -> str:
    if not head:
        return "an empty file"
    return "an HTML page: is a login needed?" if is_web_page(head) else f"it begins with {head[:_SHOWN]!r}"


def gunzip(packed: BinaryIO, unpacked: BinaryIO, most_bytes: float) -> bool:
    """Unpack all members of a gzip file; True where it was whole, False where its rest could not be unpacked.

    Raises Unreachable: too_large where more than `most_bytes` come out, unreachable where the packed file cannot be
    read.
    """
    member = zlib.decompressobj(wbits=31)
    begun = False
    while piece := _read(packed):
        more = False
        while piece or more:
            if member.eof:
                member, begun = zlib.decompressobj(wbits=31), False
            if not begun and not (piece := piece.lstrip(b"\0")):  # zeros after a member are padding
                break
            begun = True
            before = member.copy()
            try:
                content = member.decompress(piece, _UNPACKED_AT_ONCE)
            except zlib.error:
                _salvage(before, piece, unpacked, most_bytes)
                return False
            _write(content, unpacked, most_bytes)
            # Where the room was filled, more may come without further input.
            more = len(content) == _UNPACKED_AT_ONCE and not member.eof
            piece = member.unused_data if member.eof else member.unconsumed_tail
    return member.eof or not begun


def _salvage(member: "zlib._Decompress", piece: bytes, unpacked: BinaryIO, most_bytes: float) -> None:
    """Unpack byte by byte up to the damage: fed at once, a piece with damage in it yields nothing."""
    with suppress(zlib.error):
        for place in range(len(piece)):
            _write(member.decompress(piece[place : place + 1]), unpacked, most_bytes)


def _read(packed: BinaryIO) -> bytes:
    with raised_as(unreachable, OSError):  # of a failing disk; errors of writing are the cache's
        return packed.read(_PIECE)


def _write(content: bytes, unpacked: BinaryIO, most_bytes: float) -> None:
    unpacked.write(content)
    if unpacked.tell() > most_bytes:
        raise Unreachable("too_large", f"unpacked it has more than {most_bytes:,.0f} bytes")
