"""Owns class folders: images sorted into one folder per class, in split folders or directly."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.data.evaluation_set import EvaluationSet
from lib.data.images import EXTENSIONS, ImageFiles
from lib.data.pairs import IndexedSource, class_groups, prompted_source
from lib.errors import InputError

SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


@dataclass(frozen=True)
class ClassFolders:
    """Image files by class for each split; split "all": class folders without split folders above them."""

    root: Path
    splits: dict[str, dict[str, list[str]]]
    """split -> folder relative to root -> file names, sorted"""

    @property
    def folder_names(self) -> list[str]:
        """The class folders' names over all splits, so that a class has one number in all of them."""
        return sorted({os.path.basename(folder) for split in self.splits.values() for folder in split})

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
    splits = {}
    for split, names in SPLIT_FOLDERS.items():
        for name in names:
            found = _list_classes(root, name)
            if found:
                splits.setdefault(split, found)
    if not splits:
        found = _list_classes(root, "")
        if not found:
            raise InputError(f"{flag} {root} {_advice(root)}")
        splits["all"] = found
    return ClassFolders(root, splits)


def folder_source(folders: ClassFolders, templates: tuple[str, ...]) -> IndexedSource:
    """The training images with class prompts."""
    split = "train" if "train" in folders.splits else "all"
    if split not in folders.splits:
        raise InputError(f"--data {folders.root} has no train folder, only {', '.join(folders.splits)}")
    images, labels, classes = folders.images(split)
    where = str(folders.root / "train") if split == "train" else str(folders.root)
    return prompted_source(images, labels, classes, templates, where, "class folders")


def folder_evaluation(folders: ClassFolders, split: str, templates: tuple[str, ...]) -> EvaluationSet:
    """The images of one split with labels."""
    images, labels, classes = folders.images(split)
    return EvaluationSet(
        name=f"{folders.root.resolve().name} ({split})",
        images=images,
        group=class_groups(classes)[labels],
        labels=labels,
        classes=classes,
        templates=templates,
    )


def _list_classes(root: Path, split_folder: str) -> dict[str, list[str]]:
    """Image names by class folder, both sorted; folders without an image are no classes."""
    parent = root / split_folder
    if not parent.is_dir():
        return {}
    with os.scandir(parent) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    listing = {f"{split_folder}/{name}".lstrip("/"): _image_names(parent / name) for name in names}
    return {folder: images for folder, images in listing.items() if images}


def _image_names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.lower().endswith(EXTENSIONS)]
    return sorted(name for name in names if not name.startswith("."))


def _advice(root: Path) -> str:
    names = sorted(os.listdir(root))
    for name in names:
        if name.endswith((".csv", ".tsv", ".jsonl")):
            return f"has no class folders; if its captions are what you want, give {root / name}"
        if name.endswith(".tar"):
            return f"has no class folders; for its tar shards give '{root}/*.tar'"
    return "has no class folders: it must hold train/<class>/ or <class>/ folders with images in them"
