"""Recognition of --data: the kind of data that a path, a name or a prefix stands for, and opening it."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lib.data.caption_table import CaptionTable
from lib.data.class_folders import check_no_captions, read_class_folders
from lib.data.coco import coco_fits, read_coco
from lib.data.fetcher import Fetcher
from lib.data.fields import FOUND_COLUMNS, Columns
from lib.data.flickr import flickr_fits, read_flickr
from lib.data.hub_columns import read_rows
from lib.data.karpathy import karpathy_fits, read_karpathy
from lib.data.labelled_table import LabelledTable
from lib.data.load_datasets import PARQUET, has_card, holds_parquet, is_saved, load_hub, load_parquet, load_saved
from lib.data.named_sets import NAMES, digits, torchvision_set
from lib.data.remote import PIPE, TARS
from lib.data.shards import ShardSet, find_shards
from lib.data.table_files import (
    METADATA_PARQUET,
    SUFFIXES,
    is_metadata,
    metadata_files,
    names_images_below,
    read_imagefolder,
    read_table,
)
from lib.errors import InputError, readable

OpenedData = ShardSet | CaptionTable | LabelledTable
"""Data whose splits are known; only shards are not listed yet."""


class CaptionFormat(NamedTuple):
    """A format of captions, which its prefix forces: "coco:FILE"."""

    words: str
    """for messages"""
    fits: Callable[[Path], int]
    """2 where an existing file or folder is of this format, 1 where it may be, 0 where it is not"""
    read: Callable[[Path, str, str | None], CaptionTable]
    """called with the path, the flag that named it, and --image-root"""


_CAPTION_FORMATS = {
    "coco": CaptionFormat("COCO's captions file or its folder", coco_fits, read_coco),
    "flickr": CaptionFormat("a captions file of Flickr8k or Flickr30k, or its folder", flickr_fits, read_flickr),
    "karpathy": CaptionFormat("Karpathy's split file (dataset_coco.json)", karpathy_fits, read_karpathy),
}

_KINDS = {
    "folders": "a folder of class folders",
    "imagefolder": "images with metadata.csv or metadata.jsonl (the imagefolder layout)",
    "table": f"a table of captions ({', '.join(SUFFIXES)})",
    **{prefix: each.words for prefix, each in _CAPTION_FORMATS.items()},
    "shards": "tar shards ('shards/*.tar')",
    "hub": "a data set of the Hugging Face Hub (hub:OWNER/NAME)",
    "parquet": "parquet files or their folder",
    "arrow": "a folder of save_to_disk",
    "torchvision": f"one of {', '.join(NAMES)}",
}
"""The kinds of data by prefix, in words."""

_SHARDS = re.compile(r".*\.(tar|tar\.gz|tgz)\}*")


class Output(NamedTuple):
    """Where results are written."""

    flag: str
    folder: Path


def open_data(
    data: str,
    flag: str,
    image_root: str | None,
    fetcher: Fetcher,
    columns: Columns = FOUND_COLUMNS,
    output: Output | None = None,
) -> OpenedData:
    """Recognize the data by its prefix or by what is there, and list its contents.

    columns: those to read of data that has columns, see `has_columns`. output: a folder whose plots must not become
    data.
    Raises InputError, naming `flag`, for what cannot be used.
    """
    if data == "digits":
        return digits()
    if not data:  # as of a variable of the shell that is not set: Path("") would be the working folder
        raise InputError(f"{flag} '' is empty; give digits, {', '.join(_KINDS.values())}")
    with readable(f"{flag} {data}"):
        kind, name = _meant(data, flag)
        path = Path(name)
        if kind in ("folders", "imagefolder") and output is not None:
            _check_output(path, flag, output)
        if kind == "folders":
            return read_class_folders(path, flag)
        if kind == "imagefolder":
            return read_imagefolder(path, flag, image_root, columns)
        if kind == "table":
            return read_table(path, flag, image_root, columns)
        if kind in _CAPTION_FORMATS:
            return _CAPTION_FORMATS[kind].read(path, flag, image_root)
    # Outside of `readable`: other kinds may be on the network, and have their own words for its faults.
    if kind == "hub":
        return read_rows(load_hub(name, flag), Path(f"hub:{name}"), "hub data", flag, image_root, columns)
    if kind == "parquet":
        rows = load_parquet(name, flag, fetcher.cache / "datasets")
        return read_rows(rows, path, kind, flag, image_root, columns)
    if kind == "arrow":
        return read_rows(load_saved(path, flag), path, kind, flag, image_root, columns)
    if kind == "torchvision":
        return torchvision_set(name, Path(image_root) if image_root else fetcher.cache / "torchvision", flag)
    return find_shards(name, flag, fetcher)


def has_columns(opened: OpenedData) -> bool:
    """True for data with columns that can be chosen by name."""
    return not isinstance(opened, ShardSet) and opened.has_columns


def _meant(data: str, flag: str) -> tuple[str, str]:
    """Return the kind of data, and its path or name; InputError for no known kind, or another than the prefix says."""
    prefix, _, rest = data.partition(":")
    if prefix in _KINDS and rest and not os.path.exists(data):
        _check_prefix(prefix, rest, _kinds(rest), flag)
        return prefix, rest
    kinds = _kinds(data)
    if not kinds:
        what = "is of no kind that is read here" if os.path.exists(data) else "is not there"
        raise InputError(f"{flag} {data} {what}; give digits, {', '.join(_KINDS.values())}")
    if kinds[0] == "folders":
        check_no_captions(Path(data), flag)
        _check_no_table(Path(data), flag)
    return kinds[0], data


def _check_prefix(prefix: str, name: str, kinds: list[str], flag: str) -> None:
    """Refuse data recognized as something else; where nothing is recognized, the reader of the prefix decides."""
    if prefix in ("shards", "hub", *kinds) or (not kinds and os.path.exists(name) and prefix != "torchvision"):
        return
    if not kinds:
        found = f"{name} is not there" if prefix != "torchvision" else f"{name} is none of them"
    elif kinds[0] == "folders":
        found = f"{name} is a folder of another kind; leave {prefix}: out"
    else:
        found = f"{name} looks like {_KINDS[kinds[0]]}; leave {prefix}: out"
    raise InputError(f"{flag} {prefix}:{name}: {prefix}: stands for {_KINDS[prefix]}, but {found}")


def _check_no_table(folder: Path, flag: str) -> None:
    """Refuse class folders next to a table with captions of their images: either may be meant."""
    tables = (file for file in sorted(folder.iterdir()) if file.suffix.lower() in SUFFIXES and file.is_file())
    if file := next(filter(names_images_below, tables), None):
        raise InputError(
            f"{flag} {folder} holds images and a table of their captions; give {file}, or folders:{folder} to train on "
            "the folders' names"
        )


def _check_output(folder: Path, flag: str, output: Output) -> None:
    if output.folder.resolve().is_relative_to(folder.resolve()):
        raise InputError(
            f"{output.flag} {output.folder} lies in {flag} {folder}, where its pictures would become data; name a "
            "folder elsewhere"
        )


def _kinds(name: str) -> list[str]:
    """Return the kinds that the name may stand for, the likeliest first; none where there is nothing of that name."""
    path = Path(name)
    kinds = []
    # Commands, addresses and patterns may be longer than any path: that is a fault of paths only.
    may_be_long = name.startswith(PIPE) or any(mark in name for mark in ("://", *"{*?["))
    if os.path.isdir(name) if may_be_long else path.is_dir():
        kinds = _kinds_of_folder(path)
    elif name.lower().endswith(PARQUET):
        kinds = ["parquet"]
    elif name.startswith(PIPE) or "://" in name or _SHARDS.fullmatch(name.lower()):
        kinds = ["shards"]
    elif path.is_file():
        kinds = _fitting(path, {"table": 1 if path.suffix.lower() in SUFFIXES else 0})
    return kinds + ["torchvision"] * (name in NAMES)


def _kinds_of_folder(folder: Path) -> list[str]:
    if (folder / "index.json").is_file() and any(name.endswith(TARS) for name in os.listdir(folder)):
        return ["shards"]
    if is_saved(folder):
        return ["arrow"]
    metadata = metadata_files(folder)
    is_imagefolder = any(map(is_metadata, metadata))
    if metadata_files(folder, (METADATA_PARQUET,)) and not has_card(folder):
        is_imagefolder = True  # it is refused there: its paths need --image-root
    # Parquet before Karpathy's: the hub's own dataset_infos.json has the form of his files' names. Captions before
    # class folders: the folder of images next to a captions file would pass for a class.
    found = {"imagefolder": 4 * is_imagefolder, "parquet": 3 * holds_parquet(folder)}
    kinds = [*_fitting(folder, found), "folders"]
    return kinds + ["imagefolder"] * bool(metadata and not is_imagefolder)


def _fitting(path: Path, others: dict[str, int]) -> list[str]:
    """Return the formats of captions, and of `others`, that fit, the best first."""
    fits = others | {prefix: each.fits(path) for prefix, each in _CAPTION_FORMATS.items()}
    return sorted((kind for kind, fit in fits.items() if fit), key=lambda kind: -fits[kind])
