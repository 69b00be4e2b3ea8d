"""Stored outputs of a frozen tower's trunk: rows on disk, looked up by the hash of what they were made from."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from lib.data.images import BadImage

MANIFEST = "outputs.json"
"""Written last: a folder that has it is whole."""


class StoredOutputs:
    """The rows (H,) of one folder by key, an int64; memory-mapped, so that only rows in use are in memory.

    The folder holds blocks of {"keys": (n,) int64, "pooled": (n, H) float32} and a manifest with the names of the
    blocks and the keys that have no row, with the reason. It travels to worker processes.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        manifest = json.loads((folder / MANIFEST).read_text())
        self.width: int = manifest["width"]
        """H"""
        self.unreadable: dict[int, str] = {int(key): reason for key, reason in manifest["unreadable"].items()}
        """why a key has no row"""
        self._names: list[str] = manifest["blocks"]
        keys = [load_file(folder / name)["keys"].numpy() for name in self._names]
        self._starts = np.cumsum([0, *map(len, keys)])
        self._order = np.argsort(np.concatenate(keys))
        self._sorted = np.concatenate(keys)[self._order]
        self._blocks: list[Tensor] | None = None  # mapped at first use, in each process

    def __len__(self) -> int:
        return len(self._sorted)

    def row(self, key: int) -> Tensor:
        """Row of the key: (H,) float32. BadImage if it could not be read then; KeyError if unknown."""
        if key in self.unreadable:
            raise BadImage(self.unreadable[key])
        place = int(np.searchsorted(self._sorted, key))
        if place == len(self) or self._sorted[place] != key:
            raise KeyError(key)
        number = int(self._order[place])
        block = int(np.searchsorted(self._starts, number, side="right")) - 1
        if self._blocks is None:
            self._blocks = [load_file(self.folder / name)["pooled"] for name in self._names]
        return self._blocks[block][number - int(self._starts[block])]

    def rows(self, keys: Sequence[int]) -> Tensor:
        """(n, H) float32, a row for each key."""
        return torch.stack([self.row(key) for key in keys])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_blocks": None}
