"""Preparation of pairs: an image that can be opened and a text become inputs of the towers, or their stored outputs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from lib.data.batch import Chunk, Tokenize
from lib.data.images import BadImage
from lib.data.order import stable_hash
from lib.data.pipeline import ImagePipeline, OpenImage
from lib.errors import InputError, raised_as

MANIFEST = "outputs.json"
"""Written last, so that a folder with it is complete."""


class StoredOutputs:
    """The stored rows (H,) of a frozen trunk by key, an int64; memory-mapped, so only rows in use are in memory.

    The folder holds blocks of {"keys": (n,) int64, "pooled": (n, H) float32} and a manifest with the names of the
    blocks and the keys that have no row, with the reason. The object travels to worker processes.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        manifest = json.loads((folder / MANIFEST).read_text())
        self.width: int = manifest["width"]
        """H"""
        self.unreadable: dict[int, str] = {int(key): reason for key, reason in manifest["unreadable"].items()}
        """reason of each key without a row"""
        self._names: list[str] = manifest["blocks"]
        keys = [load_file(folder / name)["keys"].numpy() for name in self._names]
        self._starts = np.cumsum([0, *map(len, keys)])
        self._order = np.argsort(np.concatenate(keys))
        self._sorted = np.concatenate(keys)[self._order]
        self._blocks: list[Tensor] | None = None  # mapped at first use, in each process

    def __len__(self) -> int:
        return len(self._sorted)

    def row(self, key: int) -> Tensor:
        """Row of the key: (H,) float32. BadImage if its image could not be read; KeyError if unknown."""
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


class Pair(NamedTuple):
    """One image and one text, ready to be stacked into a chunk."""

    image: Tensor
    """(3, H, W) uint8, or (H,) the stored output of the image trunk"""
    text: str
    group: int
    sample_id: int


@dataclass(frozen=True)
class Prepare:
    """Preparation of every pair, the same for all sources; it travels to the workers."""

    images: ImagePipeline
    tokenize: Tokenize
    image_outputs: StoredOutputs | None = None
    """of a frozen image trunk, by the hash of the image's key: then no image is opened"""
    text_outputs: StoredOutputs | None = None
    """of a frozen text trunk, by the hash of the text: then no text is tokenized"""

    @property
    def blank(self) -> Tensor:
        """An image as it travels in a chunk: zeros (3, H, W) uint8, or (H,) float32 where outputs are stored."""
        if self.image_outputs is None:
            return torch.zeros(3, self.images.size, self.images.size, dtype=torch.uint8)
        return torch.zeros(self.image_outputs.width)

    @property
    def image_bytes(self) -> int:
        """Bytes of one image as it travels in a chunk."""
        return self.blank.nbytes

    def pair(self, open_image: OpenImage, image_id: int, text: str, group: int, sample_id: int, seed: int) -> Pair:
        """Prepare one pair; raises BadImage.

        image_id: hash of the image's key. seed: 0 to 2**63 - 1, decides the augmentation.
        """
        if self.image_outputs is None:
            image = self.images.read(open_image, seed)
        else:
            image = _stored(self.image_outputs, [image_id])[0]
        return Pair(image, text, group, sample_id)

    def stack(self, pairs: list[Pair]) -> Chunk:
        """Stack pairs into a chunk and tokenize their texts."""
        images = torch.stack([pair.image for pair in pairs])
        stored = self.image_outputs is not None
        text_id, inputs = self._texts([pair.text for pair in pairs])
        return Chunk(
            pixel_values=None if stored else images,
            image_pooled=images if stored else None,
            **inputs,
            text_id=text_id,
            group=torch.tensor([pair.group for pair in pairs], dtype=torch.int64),
            sample_id=torch.tensor([pair.sample_id for pair in pairs], dtype=torch.int64),
        )

    def texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Inputs of the towers' forward for texts without images, by name."""
        return {name: tensor for name, tensor in self._texts(texts)[1].items() if tensor is not None}

    def _texts(self, texts: list[str]) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Hashes of the texts (C,), and the inputs of the text tower."""
        # Prompts repeat: tokenizing only the distinct texts gives the same rows, as the longest text is the same.
        row_of_text = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        rows = torch.tensor([row_of_text[text] for text in texts])
        keys = [text_key(text) for text in row_of_text]
        text_id = torch.tensor(keys)[rows]
        if self.text_outputs is not None:
            pooled = _stored(self.text_outputs, keys)
            return text_id, {"input_ids": None, "attention_mask": None, "text_pooled": pooled[rows]}
        input_ids, attention_mask = self.tokenize(list(row_of_text))
        return text_id, {"input_ids": input_ids[rows], "attention_mask": attention_mask[rows]}


def text_key(text: str) -> int:
    """The key under which a text's output is stored."""
    return stable_hash(text)


def _stored(outputs: StoredOutputs, keys: list[int]) -> Tensor:
    message = "--store-outputs: the data has changed since its outputs were stored; start the run again"
    with raised_as(lambda _: InputError(message), KeyError):
        return outputs.rows(keys)
