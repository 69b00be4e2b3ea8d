"""Positions of streams: they travel with every chunk, and the form in which they are saved."""

from typing import NamedTuple

import numpy as np
import torch

_EMPTY = np.empty((0, 3), dtype=np.int64)


class ShardPosition(NamedTuple):
    """Where one stream stands in shards."""

    epoch: int = 0
    part: int = 0
    """of its parts in this pass, the one to read next"""
    sample: int = -1
    """the next sample of that part; -1: the part is not begun"""
    taken: int = 0
    """pairs of that sample that went into the buffer already"""
    handed: int = 0
    """pairs given out in this pass"""
    buffer: np.ndarray = _EMPTY
    """(n, 3) int64: part, sample and pair of what waits in the buffer, in the buffer's order"""


class IndexedPosition(NamedTuple):
    """Where one stream stands in pairs by number."""

    epoch: int = 0
    place: int = 0
    """in the stream's share of the pass"""


class StreamPosition(NamedTuple):
    """Where one stream stands in all parts of its source."""

    draws: int
    """pairs for which a part was drawn"""
    parts: tuple[ShardPosition | IndexedPosition, ...]


def saved(position: StreamPosition) -> dict:
    """The position as numbers, lists and tensors."""
    parts = []
    for part in position.parts:
        if isinstance(part, ShardPosition):
            parts.append({"cursor": list(part[:-1]), "buffer": torch.from_numpy(part.buffer)})
        else:
            parts.append({"cursor": list(part)})
    return {"draws": position.draws, "parts": parts}


def loaded(state: dict) -> StreamPosition:
    """The position that was saved."""
    parts: list[ShardPosition | IndexedPosition] = []
    for part in state["parts"]:
        if "buffer" in part:
            parts.append(ShardPosition._make([*part["cursor"], part["buffer"].numpy()]))
        else:
            parts.append(IndexedPosition(*part["cursor"]))
    return StreamPosition(state["draws"], tuple(parts))
