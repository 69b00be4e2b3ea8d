"""Class folders: images sorted into one folder for each class, in split folders or directly."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lib.data.captions.listing import SPLITS
from lib.data.fields import is_utf8, readable_class, shown
from lib.data.image_names import is_image_name
from lib.data.images import ImageFiles
from lib.data.remote import TARS
from lib.data.skipped import Skips, by_split
from lib.data.walk import FolderImages, walk_images
from lib.errors import InputError

_TABLES = (".csv", ".tsv", ".jsonl", ".json")


@dataclass(frozen=True)
class ClassFolders:
    """Image files by class for each split; split "all": class folders without split folders above them."""

    root: Path
    splits: dict[str, dict[str, list[str]]]
    """split -> folder relative to root -> file names, sorted"""
    left_out: Mapping[str, Skips] = field(default_factory=dict)
    """split -> (path relative to root, reason) of the images that belong to no class, or cannot be one's"""
    notes: tuple[str, ...] = ()
    """what is to be said of them"""
    bank = "simple"

    @property
    def kind(self) -> str:
        return "class folders" + (f" ({'; '.join(self.notes)})" if self.notes else "")

    @property
    def name(self) -> str:
        return self.root.resolve().name

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names over all splits, so that a class has one number in all of them; folders of one name are one."""
        return tuple(_by_class(self.splits))

    def where(self, split: str) -> str:
        """The folder of a split; the root where the split has none of its own."""
        own = self.root / "train"
        return str(own) if split == "train" and own.is_dir() else str(self.root)

    def images(self, split: str) -> tuple[ImageFiles, np.ndarray, tuple[str, ...]]:
        """Images of a split, their labels (n,) int64, and the class names with underscores read as spaces."""
        number = {name: index for index, name in enumerate(self.classes)}
        keys, labels = [], []
        for folder, names in self.splits[split].items():
            keys += [f"{folder}/{name}" for name in names]
            labels += [number[readable_class(os.path.basename(folder))]] * len(names)
        paths = [os.path.join(self.root, key) for key in keys]
        return ImageFiles(keys, paths), np.array(labels, dtype=np.int64), self.classes


def find_class_folders(root: Path, flag: str) -> ClassFolders:
    """List the class folders under `root`; InputError, naming `flag`, where there are none."""
    walked = list(walk_images(root))
    parts = _Parts(walked)
    if not parts.splits:
        raise InputError(f"{flag} {root} has no class folders{_remedy(root, walked)}")
    by_class = _by_class(parts.splits)
    if set(parts.splits) == {"all"} and all(folder.lower() in SPLITS for folder in parts.splits["all"]):
        found = " and ".join(f"{folder}/" for folder in parts.splits["all"])
        wanted = "; class folders in them are needed (train/<class>/), or metadata.csv with file_name and text"
        raise InputError(f"{flag} {root} has images in {found} and no classes{_advice(root) or wanted}")
    if len(by_class) == 1 and (advice := _advice(root)):
        raise InputError(f"{flag} {root} has one folder of images and no classes{advice}")
    notes = [f"{' and '.join(sorted(names))} are one class" for names in by_class.values() if len(names) > 1]
    unread = [name for name in sorted(os.listdir(root)) if name.lower().endswith(_TABLES) and is_utf8(name)]
    notes += [f"{', '.join(unread[:3])}{', …' * (len(unread) > 3)} not read"] if unread else []
    return ClassFolders(root, parts.splits, by_split(parts.left_out, parts.splits), tuple(notes))


class _Parts:
    """Images by split and class folder, and what is left out; without images in a class folder no split."""

    def __init__(self, walked: Sequence[FolderImages]):
        of_classes = {found.folder: found for found in walked if found.names and is_utf8(found.folder)}
        split_of = {
            top: SPLITS[top.lower()]
            for top, slash, rest in (folder.partition("/") for folder in of_classes)
            if slash and "/" not in rest and top.lower() in SPLITS
        }
        self.splits: dict[str, dict[str, list[str]]] = {}
        self.left_out: dict[str | None, list[tuple[str, str]]] = {}
        for found in walked:
            split, reason = _place(found.folder, split_of)
            self._add(found, split, reason)
        self.splits = {
            split: dict(sorted(self.splits[split].items()))
            for split in ("train", "val", "test", "all")
            if split in self.splits
        }
        classes = {folder for folders in self.splits.values() for folder in folders if is_image_name(folder)}
        if classes:  # called photo.jpg, and no image that is not a file
            for skips in self.left_out.values():
                skips[:] = [skip for skip in skips if skip[0] not in classes]

    def _add(self, found: FolderImages, split: str | None, reason: str | None) -> None:
        skips = self.left_out.setdefault(split, [])
        skips += found.skipped
        prefix = f"{found.folder}/" if found.folder else ""
        if reason is not None or not is_utf8(found.folder):
            skips += [(shown(prefix + name), reason or "not_utf8") for name in found.names]
            return
        names = [name for name in found.names if name.isascii() or is_utf8(name)]
        if len(names) < len(found.names):
            skips += [(shown(prefix + name), "not_utf8") for name in found.names if not is_utf8(name)]
        if names:
            self.splits.setdefault(split or "all", {})[found.folder] = names


def _place(folder: str, split_of: Mapping[str, str]) -> tuple[str | None, str | None]:
    """(split, None) of a class folder, or (split or None, the reason why images in this folder have no class)."""
    top, *deeper = folder.split("/")
    if not split_of:
        return None, "no_class" if not folder else "in_subfolder" if deeper else None
    if top not in split_of:
        return None, "no_class" if not folder else "no_split"
    return split_of[top], "no_class" if not deeper else "in_subfolder" if len(deeper) > 1 else None


def _by_class(splits: Mapping[str, Mapping[str, list[str]]]) -> dict[str, list[str]]:
    """The class folders' own names by the name of the class, in the order of the folders' names."""
    by_class: dict[str, list[str]] = {}
    for name in sorted({os.path.basename(folder) for folders in splits.values() for folder in folders}):
        by_class.setdefault(readable_class(name), []).append(name)
    return by_class


def check_no_captions(root: Path, flag: str) -> None:
    """Refuse images that have texts of their own beside them: class folders would pass over these in silence."""
    for folder, _, names in os.walk(root):
        stems = {os.path.splitext(name)[0] for name in names if is_image_name(name)}
        if stems:  # the first folder with images speaks for all
            texts = sorted(name for name in names if name.endswith(".txt") and name.removesuffix(".txt") in stems)
            if 2 * len(texts) >= len(stems):
                first = shown(os.path.join(folder, texts[0]))
                raise InputError(
                    f"{flag} {root}: images have texts beside them ({first}), which class "
                    f"folders do not read; list them in a .csv with the columns filename and caption, or write "
                    f"folders:{root} to train on the folders' names"
                )
            return


def image_names(folder: Path) -> list[str]:
    """The image files in a folder, sorted."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if is_image_name(entry.name))


def _remedy(root: Path, walked: Sequence[FolderImages]) -> str:
    """Advice for a folder without class folders."""
    deeper = next((found.folder for found in walked if found.names and "/" in found.folder), None)
    if deeper is None:
        return _advice(root) or ": it must hold train/<class>/ or <class>/ folders with images in them"
    above = os.path.dirname(deeper)
    if os.path.basename(above).lower() in SPLITS:
        above = os.path.dirname(above)
    return f": its images lie deeper, as in {shown(deeper)}; give {shown(os.path.join(root, above))}{_advice(root)}"


def _advice(root: Path) -> str:
    """Advice on other data in a folder, judged by its files; "" for none."""
    for name in sorted(os.listdir(root)):
        if name.lower().endswith(_TABLES):
            return f"; if its captions are what you want, give {shown(str(root / name))}"
        if name.endswith(TARS):
            return f"; for its tar shards give '{root}/*{name[name.index('.t') :]}'"
    return ""
