"""Data sets known by name: scikit-learn's digits, and CIFAR-10, CIFAR-100 and Imagenette of torchvision."""

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock
from PIL import Image

from lib.data.find_images import is_image_name
from lib.data.images import Extent, ImageFiles
from lib.data.labelled_table import Labelled, LabelledTable
from lib.errors import InputError, raised_as

if TYPE_CHECKING:
    from torchvision.datasets import VisionDataset

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZE = 32
"""Pixels on a side of a digit, as the tiny models want them; 8 in the original."""

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
    """Images in memory: pixels (n, H, W, 3) uint8."""

    keys: list[str]
    pixels: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def open(self, index: int, extent: Extent | None = None) -> Image.Image:
        """Return image `index`, RGB."""
        return Image.fromarray(self.pixels[index])

    def identity(self, rows: np.ndarray) -> str:
        """Return a text that changes when one of these images does."""
        return hashlib.sha256(self.pixels[rows].tobytes()).hexdigest()


def digits() -> LabelledTable:
    """Return scikit-learn's 1,797 handwritten digits, which need no file and no network."""
    return LabelledTable(
        name="digits", kind="embedded", where="digits", splits=("train", "test"), images=_digits, bank="digits"
    )


def _digits(split: str) -> Labelled:
    """Return "train" (about 80%) or "test" (every fifth image of each class)."""
    from sklearn.datasets import load_digits  # here, because it takes a second that other data need not wait for

    found = load_digits()
    labels = found.target.astype(np.int64)
    number_in_class = np.empty_like(labels)
    for label in range(len(CLASSES)):
        members = labels == label
        number_in_class[members] = np.arange(members.sum())
    chosen = np.flatnonzero((number_in_class % 5 == 4) == (split == "test"))
    gray = np.rint(found.images[chosen] * (255 / 16)).astype(np.uint8)
    enlarged = [Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for image in gray]
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in enlarged])
    return Labelled(ArrayImages([f"digit_{index:04d}" for index in chosen], pixels), labels[chosen], CLASSES)


def torchvision_set(name: str, root: Path, flag: str) -> LabelledTable:
    """Return a set in a folder of torchvision's; it is downloaded there when a split is first read.

    Reading raises InputError, saying which file to put where, if the set is neither there nor can be downloaded.
    """
    return LabelledTable(
        name=name,
        kind="torchvision",
        where=name,
        splits=("train", "val") if name == "imagenette" else ("train", "test"),
        images=partial(_torchvision, name, root, flag),
        bank="objects",
    )


def _torchvision(name: str, root: Path, flag: str, split: str) -> Labelled:
    data = _found(name, root, flag, split)
    images: ImageFiles | ArrayImages
    if name == "imagenette":
        images, labels = _files(root / _FOLDER / split, split, data.wnids)
    else:
        images = ArrayImages([f"{name}/{split}/{number:05d}" for number in range(len(data.data))], data.data)
        labels = data.targets
    # Imagenette's classes have several names each.
    classes = [each if isinstance(each, str) else each[0] for each in data.classes]
    return Labelled(images, np.array(labels, dtype=np.int64), tuple(each.replace("_", " ") for each in classes))


def _files(folder: Path, split: str, wnids: list[str]) -> tuple[ImageFiles, list[int]]:
    names, labels = [], []
    for label, wnid in enumerate(wnids):
        of_class = sorted(name for name in os.listdir(folder / wnid) if is_image_name(name))
        names += [f"{wnid}/{name}" for name in of_class]
        labels += [label] * len(of_class)
    return ImageFiles([f"imagenette/{split}/{name}" for name in names], [str(folder / name) for name in names]), labels


def _found(name: str, root: Path, flag: str, split: str) -> "VisionDataset":
    with suppress(Exception):  # whatever torchvision raises where the set is missing or incomplete
        return _load(name, root, split, download=False)

    def not_downloaded(error: Exception) -> InputError:
        url, reason = _ARCHIVES[name], " ".join(str(error).split()) or type(error).__name__
        return InputError(
            f"{flag} {name} is incomplete in {root} and cannot be downloaded ({reason}); "
            f"put {url.rpartition('/')[2]} from {url} there, or name another folder with --image-root"
        )

    # A network, a proxy, an archive and a folder raise errors of many types.
    with raised_as(not_downloaded, Exception):
        root.mkdir(parents=True, exist_ok=True)
        # Every rank of a machine comes here: one downloads, and the others then find the set.
        with FileLock(root / f".{name}.lock"):
            return _load(name, root, split, download=True)


def _load(name: str, root: Path, split: str, download: bool) -> "VisionDataset":
    # Imported here: it takes a second that other data need not wait for. The CIFAR files are pickles, which can run
    # code; torchvision loads them only where their checksums are those of the official ones.
    from torchvision.datasets import CIFAR10, CIFAR100, Imagenette

    if name == "imagenette":
        data = Imagenette(root, split, "320px", download=download)
        if len(data) != IMAGENETTE[split]:  # torchvision only looks for the folder, which may be half unpacked
            raise RuntimeError(f"{len(data):,} of {IMAGENETTE[split]:,} images: remove {_FOLDER} to unpack it again")
        return data
    return (CIFAR10 if name == "cifar10" else CIFAR100)(root, train=split == "train", download=download)
