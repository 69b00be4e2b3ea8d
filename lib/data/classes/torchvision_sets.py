"""Data sets that torchvision knows by name: CIFAR-10, CIFAR-100 and Imagenette."""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from filelock import FileLock
from PIL import Image

from lib.data.classes.folders import image_names
from lib.data.images import Extent, ImageFiles
from lib.data.pairs import Images
from lib.data.skipped import Skips
from lib.errors import InputError, raised_as

if TYPE_CHECKING:
    from torchvision.datasets import VisionDataset

_ARCHIVES = {
    "cifar10": "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    "cifar100": "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    "imagenette": "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz",
}
NAMES = tuple(_ARCHIVES)
"""Imagenette is the copy with 320 pixels on the shorter side."""
IMAGENETTE = {"train": 9_469, "val": 3_925}
"""Images of each split."""
_FOLDER = "imagenette2-320"


@dataclass(frozen=True)
class ArrayImages:
    """Images held in memory as one array, (n, H, W, 3) uint8."""

    keys: list[str]
    pixels: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def open(self, index: int, extent: Extent | None = None) -> Image.Image:
        """Image `index`, RGB."""
        return Image.fromarray(self.pixels[index])

    def identity(self, rows: np.ndarray) -> str:
        """Changes when one of these images does."""
        return hashlib.sha256(self.pixels[rows].tobytes()).hexdigest()


@dataclass(frozen=True)
class TorchvisionSet:
    """One of the sets in a folder of torchvision's, downloaded into it when it is first read."""

    name: str
    root: Path
    flag: str
    kind = "torchvision"
    bank = "objects"
    left_out: ClassVar[Mapping[str, Skips]] = {}

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", "val") if self.name == "imagenette" else ("train", "test")

    def where(self, split: str) -> str:
        """The set's name."""
        return self.name

    def images(self, split: str) -> tuple[Images, np.ndarray, tuple[str, ...]]:
        """Images of a split, their labels (n,) int64, and the classes' names.

        Raises InputError, saying which file to put where, if they are neither there nor can be downloaded.
        """
        data = self._found(split)
        images, labels = self._files(split, data.wnids) if self.name == "imagenette" else self._arrays(split, data)
        # Imagenette's classes have several names each.
        classes = [each if isinstance(each, str) else each[0] for each in data.classes]
        return images, np.array(labels, dtype=np.int64), tuple(name.replace("_", " ") for name in classes)

    def _arrays(self, split: str, data: "VisionDataset") -> tuple[ArrayImages, list[int]]:
        keys = [f"{self.name}/{split}/{number:05d}" for number in range(len(data.data))]
        return ArrayImages(keys, data.data), data.targets

    def _files(self, split: str, wnids: list[str]) -> tuple[ImageFiles, list[int]]:
        folder = self.root / _FOLDER / split
        found = [(label, f"{wnid}/{name}") for label, wnid in enumerate(wnids) for name in image_names(folder / wnid)]
        labels, names = (list(column) for column in zip(*found, strict=True))
        keys = [f"imagenette/{split}/{name}" for name in names]
        return ImageFiles(keys, [str(folder / name) for name in names]), labels

    def _found(self, split: str) -> "VisionDataset":
        with suppress(Exception):  # whatever torchvision raises where it is not there, or not whole
            return self._load(split, download=False)
        # What a network, a proxy, an archive or a folder may raise.
        with raised_as(self._not_downloaded, Exception):
            self.root.mkdir(parents=True, exist_ok=True)
            # Every rank of a machine comes here: one downloads, the others then find it.
            with FileLock(self.root / f".{self.name}.lock"):
                return self._load(split, download=True)

    def _load(self, split: str, download: bool) -> "VisionDataset":
        # Imported here: it takes a second that other data need not wait. The CIFAR files are pickles;
        # torchvision loads them only where their checksums are those of the official ones.
        from torchvision.datasets import CIFAR10, CIFAR100, Imagenette

        if self.name == "imagenette":
            data = Imagenette(self.root, split, "320px", download=download)
            if len(data) != IMAGENETTE[split]:  # torchvision looks for the folder alone, which may be half unpacked
                raise RuntimeError(
                    f"{len(data):,} of {IMAGENETTE[split]:,} images: remove {_FOLDER} to unpack it again"
                )
            return data
        cifar = CIFAR10 if self.name == "cifar10" else CIFAR100
        return cifar(self.root, train=split == "train", download=download)

    def _not_downloaded(self, error: Exception) -> InputError:
        url, reason = _ARCHIVES[self.name], " ".join(str(error).split()) or type(error).__name__
        return InputError(
            f"{self.flag} {self.name} is not whole in {self.root} and cannot be downloaded ({reason}); "
            f"put {url.rpartition('/')[2]} from {url} there, or name another folder with --image-root"
        )
