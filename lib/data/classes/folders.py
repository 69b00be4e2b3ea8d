"""Owns class folders: images sorted into one folder per class, in split folders or directly."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.data.files import is_image_name
from lib.data.images import ImageFiles
from lib.data.remote.transfer import TARS
from lib.errors import InputError

SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


@dataclass(frozen=True)
class ClassFolders:
    """Image files by class for each split; split "all": class folders without split folders above them."""

    root: Path
    splits: dict[str, dict[str, list[str]]]
    """split -> folder relative to root -> file names, sorted"""
    kind = "class folders"
    bank = "simple"

    @property
    def name(self) -> str:
        return self.root.resolve().name

    @property
    def folder_names(self) -> list[str]:
        """The class folders' names over all splits, so that a class has one number in all of them."""
        return sorted({os.path.basename(folder) for split in self.splits.values() for folder in split})

    def where(self, split: str) -> str:
        """The folder of a split; the root where the split has none of its own."""
        own = self.root / "train"
        return str(own) if split == "train" and own.is_dir() else str(self.root)

    def images(self, split: str) -> tuple[ImageFiles, np.ndarray, tuple[str, ...]]:
        """Images of a split, their labels (n,) int64, and the class names with underscores read as spaces."""
        number = {name: index for index, name in enumerate(self.folder_names)}
        keys, labels = [], []
        for folder, names in self.splits[split].items():
            keys += [f"{folder}/{name}" for name in names]
            labels += [number[os.path.basename(folder)]] * len(names)
        classes = tuple(name.replace("_", " ") for name in number)
        paths = [os.path.join(self.root, key) for key in keys]
        return ImageFiles(keys, paths), np.array(labels, dtype=np.int64), classes


def find_class_folders(root: Path, flag: str) -> ClassFolders:
    """List the class folders under `root`; InputError, naming `flag`, where there are none."""
    splits: dict[str, dict[str, list[str]]] = {}
    for split, names in SPLIT_FOLDERS.items():
        for name in names:
            found = _list_classes(root, name)
            if found:
                splits.setdefault(split, found)
    if not splits:
        found = _list_classes(root, "")
        if not found:
            wanted = ": it must hold train/<class>/ or <class>/ folders with images in them"
            raise InputError(f"{flag} {root} has no class folders{_advice(root) or wanted}")
        splits["all"] = found
    folders = ClassFolders(root, splits)
    advice = _advice(root)
    if len(folders.folder_names) == 1 and advice:
        raise InputError(f"{flag} {root} has one folder of images and no classes{advice}")
    return folders


def check_no_captions(root: Path, flag: str) -> None:
    """Refuse images that have texts of their own beside them: class folders would pass over these in silence."""
    for folder, _, names in os.walk(root):
        stems = {os.path.splitext(name)[0] for name in names if is_image_name(name)}
        if stems:  # the first folder with images speaks for all
            texts = sorted(name for name in names if name.endswith(".txt") and name.removesuffix(".txt") in stems)
            if 2 * len(texts) >= len(stems):
                raise InputError(
                    f"{flag} {root}: images have texts beside them ({os.path.join(folder, texts[0])}), which class "
                    f"folders do not read; list them in a .csv with the columns filename and caption, or write "
                    f"folders:{root} to train on the folders' names"
                )
            return


def _list_classes(root: Path, split_folder: str) -> dict[str, list[str]]:
    """Image names by class folder, both sorted; folders without an image are no classes."""
    parent = root / split_folder
    if not parent.is_dir():
        return {}
    with os.scandir(parent) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    listing = {f"{split_folder}/{name}".lstrip("/"): image_names(parent / name) for name in names}
    return {folder: images for folder, images in listing.items() if images}


def image_names(folder: Path) -> list[str]:
    """The image files in a folder, sorted."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if is_image_name(entry.name))


def _advice(root: Path) -> str | None:
    """What else may be meant by a folder, judged by what lies in it."""
    for name in sorted(os.listdir(root)):
        if name.endswith((".csv", ".tsv", ".jsonl", ".json")):
            return f"; if its captions are what you want, give {root / name}"
        if name.endswith(TARS):
            return f"; for its tar shards give '{root}/*{name[name.index('.t') :]}'"
    return None
