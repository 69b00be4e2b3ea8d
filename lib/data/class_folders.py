"""Class folders: images sorted into one folder for each class, in split folders or directly."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lib.data.fields import SPLITS, by_split, is_utf8, readable_class, shown
from lib.data.find_images import FolderImages, is_image_name, walk_images
from lib.data.images import ImageFiles
from lib.data.labelled_table import Labelled, LabelledTable
from lib.data.remote import TARS
from lib.errors import InputError

_TABLES = (".csv", ".tsv", ".jsonl", ".json")


def read_class_folders(root: Path, flag: str) -> LabelledTable:
    """List the class folders under `root`; InputError, naming `flag`, where there are none."""
    walked = list(walk_images(root))
    splits, skips = _by_split(walked)
    if not splits:
        raise InputError(f"{flag} {root} has no class folders{_remedy(root, walked)}")
    # Over all splits, so that a class has one number in all of them. Folders that read alike, a_b and "a b", are one.
    folders_of: dict[str, list[str]] = {}
    for name in sorted({os.path.basename(folder) for folders in splits.values() for folder in folders}):
        folders_of.setdefault(readable_class(name), []).append(name)
    if set(splits) == {"all"} and all(folder.lower() in SPLITS for folder in splits["all"]):
        found = " and ".join(f"{folder}/" for folder in splits["all"])
        wanted = "; class folders in them are needed (train/<class>/), or metadata.csv with file_name and text"
        raise InputError(f"{flag} {root} has images in {found} and no classes{_advice(root) or wanted}")
    if len(folders_of) == 1 and (advice := _advice(root)):
        raise InputError(f"{flag} {root} has one folder of images and no classes{advice}")
    notes = [f"{' and '.join(names)} are one class" for names in folders_of.values() if len(names) > 1]
    unread = [name for name in sorted(os.listdir(root)) if name.lower().endswith(_TABLES) and is_utf8(name)]
    notes += [f"{', '.join(unread[:3])}{', …' * (len(unread) > 3)} not read"] if unread else []
    labelled = {split: _labelled(root, folders, tuple(folders_of)) for split, folders in splits.items()}
    train = root / "train"
    return LabelledTable(
        name=root.resolve().name,
        kind="class folders" + (f" ({'; '.join(notes)})" if notes else ""),
        where=str(root),
        where_train=str(train) if train.is_dir() else None,
        splits=tuple(labelled),
        images=labelled.__getitem__,
        left_out=by_split(skips, splits),
        divisible="by_folder",
    )


def _labelled(root: Path, folders: Mapping[str, list[str]], classes: tuple[str, ...]) -> Labelled:
    number = {name: index for index, name in enumerate(classes)}
    keys: list[str] = []
    labels: list[int] = []
    for folder, names in folders.items():
        keys += [f"{folder}/{name}" for name in names]
        labels += [number[readable_class(os.path.basename(folder))]] * len(names)
    images = ImageFiles(keys, [os.path.join(root, key) for key in keys])
    return Labelled(images, np.array(labels, dtype=np.int64), classes)


def _by_split(
    walked: Sequence[FolderImages],
) -> tuple[dict[str, dict[str, list[str]]], dict[str | None, list[tuple[str, str]]]]:
    """Return ({split: {folder: file names}}, skips by split); without images in class folders no split."""
    of_classes = [found.folder for found in walked if found.names and is_utf8(found.folder)]
    split_of = {
        top: SPLITS[top.lower()]
        for top, slash, rest in (folder.partition("/") for folder in of_classes)
        if slash and "/" not in rest and top.lower() in SPLITS
    }
    splits: dict[str, dict[str, list[str]]] = {}
    skips: dict[str | None, list[tuple[str, str]]] = {}
    for found in walked:
        split, reason = _place(found.folder, split_of)
        of_split = skips.setdefault(split, [])
        of_split += found.skipped
        if not is_utf8(found.folder):
            reason = reason or "not_utf8"
        if reason is not None:
            of_split += [(shown(found.prefix + name), reason) for name in found.names]
            continue
        of_split += [(shown(found.prefix + name), "not_utf8") for name in found.names if not is_utf8(name)]
        if names := [name for name in found.names if is_utf8(name)]:
            splits.setdefault(split or "all", {})[found.folder] = names
    # The order of the folders is that of the training pairs, before they are shuffled: it must not depend on the disk.
    splits = {name: dict(sorted(splits[name].items())) for name in ("train", "val", "test", "all") if name in splits}
    classes = {folder for folders in splits.values() for folder in folders if is_image_name(folder)}
    if classes:  # a class folder called photo.jpg is no image that is not a file
        skips = {split: [skip for skip in some if skip[0] not in classes] for split, some in skips.items()}
    return splits, skips


def _place(folder: str, split_of: Mapping[str, str]) -> tuple[str | None, str | None]:
    """Return (split, None) of a class folder, or (split or None, the reason why its images have no class)."""
    top, *deeper = folder.split("/")
    if not split_of:
        return None, "no_class" if not folder else "in_subfolder" if deeper else None
    if top not in split_of:
        return None, "no_class" if not folder else "no_split"
    return split_of[top], "no_class" if not deeper else "in_subfolder" if len(deeper) > 1 else None


def check_no_captions(root: Path, flag: str) -> None:
    """Refuse images with texts of their own next to them: class folders would ignore these without a word."""
    for folder, _, names in os.walk(root):
        stems = {os.path.splitext(name)[0] for name in names if is_image_name(name)}
        if stems:  # one look is enough: the first folder with images stands for all
            texts = sorted(name for name in names if name.endswith(".txt") and name.removesuffix(".txt") in stems)
            if 2 * len(texts) >= len(stems):
                first = shown(os.path.join(folder, texts[0]))
                raise InputError(
                    f"{flag} {root}: images have texts next to them ({first}), which class "
                    f"folders do not read; list them in a .csv with the columns filename and caption, or write "
                    f"folders:{root} to train on the folders' names"
                )
            return


def _remedy(root: Path, walked: Sequence[FolderImages]) -> str:
    """Return advice for a folder without class folders."""
    deeper = next((found.folder for found in walked if found.names and "/" in found.folder), None)
    if deeper is None:
        return _advice(root) or ": it must hold train/<class>/ or <class>/ folders with images in them"
    above = os.path.dirname(deeper)
    if os.path.basename(above).lower() in SPLITS:
        above = os.path.dirname(above)
    return f": its images lie deeper, as in {shown(deeper)}; give {shown(os.path.join(root, above))}{_advice(root)}"


def _advice(root: Path) -> str:
    """Return advice on other data in a folder, judged by its files; "" for none."""
    for name in sorted(os.listdir(root)):
        if name.lower().endswith(_TABLES):
            return f"; if its captions are what you want, give {shown(str(root / name))}"
        if name.endswith(TARS):
            return f"; for its tar shards give '{root}/*{name[name.index('.t') :]}'"
    return ""
