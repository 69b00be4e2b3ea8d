"""Division of data without parts: a fraction of the images is kept from training, to evaluate on."""

import os
from collections.abc import Mapping
from dataclasses import replace

from lib.data.captions.listing import Captioned, CaptionedImages
from lib.data.classes.folders import ClassFolders
from lib.data.classes.labelled_rows import LabelledRows
from lib.data.order import stable_hash
from lib.data.recognize import OpenedData
from lib.data.skipped import Skips, of_all_splits
from lib.errors import InputError


def hold_out(opened: OpenedData, fraction: float | None, data: str) -> OpenedData:
    """Data without parts, or with a train part alone, in a train and a test part; as it is without a fraction.

    fraction: of the images of each class, or of all captioned images; at least one of each class that has two. Which
    ones is a function of their names alone, so that training and evaluation agree.
    Raises InputError, naming --hold-out, for data that has parts already or cannot be divided.
    """
    if fraction is None:
        return opened
    if not 0 < fraction < 1:
        raise InputError(f"--hold-out {fraction:g} must be between 0 and 1; 0.1 keeps a tenth of the images")
    if not isinstance(opened, ClassFolders | CaptionedImages | LabelledRows):
        raise InputError(
            f"--hold-out {fraction:g} divides class folders, captions, parquet and hub data, and --data {data} is none"
        )
    if len(opened.splits) != 1 or not set(opened.splits) & {"all", "train"}:
        parts = ", ".join(opened.splits)
        raise InputError(f"--hold-out {fraction:g}: --data {data} has its parts already ({parts}); leave it out")
    if isinstance(opened, ClassFolders):
        return _divided_folders(opened, fraction)
    if isinstance(opened, LabelledRows):
        return _divided_rows(opened, fraction)
    kept = _chosen(sorted({_unit(image) for image in opened.images}), fraction)
    images = [replace(image, split="test" if _unit(image) in kept else "train") for image in opened.images]
    return replace(opened, images=images, left_out=_of_training(opened.left_out))


def _of_training(left_out: Mapping[str, Skips]) -> dict[str, Skips]:
    """Entries without a usable image are counted with the part that is trained on."""
    return {"train": of_all_splits(left_out)}


def _unit(image: Captioned) -> str:
    """The name under which images that share captions stay together, where the data says so."""
    return image.group or image.key


def _divided_folders(folders: ClassFolders, fraction: float) -> ClassFolders:
    train, test = {}, {}
    (every_folder,) = folders.splits.values()
    for folder, names in every_folder.items():
        name_of = {f"{os.path.basename(folder)}/{name}": name for name in names}
        kept = _chosen(list(name_of), fraction)
        test[folder] = [name for key, name in name_of.items() if key in kept]
        train[folder] = [name for key, name in name_of.items() if key not in kept]
    splits = {"train": train, "test": {folder: names for folder, names in test.items() if names}}
    return replace(folders, splits=splits, left_out=_of_training(folders.left_out))


def _divided_rows(rows: LabelledRows, fraction: float) -> LabelledRows:
    (every_row,) = rows.rows.values()
    keys = rows.every_image.keys
    of_class: dict[int, list[str]] = {}
    for row in every_row:
        of_class.setdefault(int(rows.labels[row]), []).append(keys[row])
    kept = set().union(*(_chosen(names, fraction) for names in of_class.values()))
    parts = {
        "train": [row for row in every_row if keys[row] not in kept],
        "test": [row for row in every_row if keys[row] in kept],
    }
    left_out = _of_training(rows.left_out)
    return replace(rows, rows={part: chosen for part, chosen in parts.items() if chosen}, left_out=left_out)


def _chosen(keys: list[str], fraction: float) -> set[str]:
    """The fraction with the least hashes: one of two or more at least, and never all."""
    count = min(max(1, round(fraction * len(keys))), len(keys) - 1)
    return set(sorted(keys, key=stable_hash)[:count])
