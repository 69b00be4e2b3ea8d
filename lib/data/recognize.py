"""Recognition of --data: the kind of data that a path, a name or a prefix stands for, and opening it."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from lib.data.captions.coco import coco_files, read_coco, read_coco_folder
from lib.data.captions.flickr import flickr_file, flickr_form, read_flickr
from lib.data.captions.imagefolder import PARQUET, metadata_files, read_imagefolder
from lib.data.captions.karpathy import karpathy_files, read_karpathy
from lib.data.captions.listing import CaptionedImages
from lib.data.captions.tables import SUFFIXES, is_metadata, names_images_below, read_table
from lib.data.classes.digits import Digits
from lib.data.classes.folders import check_no_captions, find_class_folders
from lib.data.classes.labelled import LabelledImages
from lib.data.classes.labelled_rows import LabelledRows
from lib.data.classes.torchvision_sets import NAMES, TorchvisionSet
from lib.data.fetcher import Fetcher
from lib.data.fields import FOUND_COLUMNS, Columns
from lib.data.hub.library import PARQUET as PARQUET_SUFFIX
from lib.data.hub.library import has_card, holds_parquet, is_saved, load_hub, load_parquet, load_saved
from lib.data.hub.row_samples import read_rows
from lib.data.remote import PIPE, TARS
from lib.data.shards import ShardSet, find_shards
from lib.errors import InputError, readable
from lib.files import open_file

OpenedData = ShardSet | CaptionedImages | LabelledImages
"""Data whose splits are known; only shards are not listed yet."""

_KINDS = {
    "folders": "a folder of class folders",
    "imagefolder": "images with metadata.csv or metadata.jsonl (the imagefolder layout)",
    "table": f"a table of captions ({', '.join(SUFFIXES)})",
    "coco": "COCO's captions file or its folder",
    "flickr": "a captions file of Flickr8k or Flickr30k, or its folder",
    "karpathy": "Karpathy's split file (dataset_coco.json)",
    "shards": "tar shards ('shards/*.tar')",
    "hub": "a data set of the Hugging Face Hub (hub:OWNER/NAME)",
    "parquet": "parquet files or their folder",
    "arrow": "a folder of save_to_disk",
    "torchvision": f"one of {', '.join(NAMES)}",
}
"""The kinds of data by their prefixes, in words."""

_LISTED_HERE = ("folders", "imagefolder", "table", "coco", "flickr", "karpathy")
"""Kinds of which every file is on this machine and is listed at once."""

_SHARDS = re.compile(r".*\.(tar|tar\.gz|tgz)\}*")


class Output(NamedTuple):
    """Where results go."""

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
    """Find out what kind of data is meant, by its prefix or by what is there, and list what it holds.

    columns: those to read of data that has columns, see `has_columns`. output: a folder whose pictures must not become
    data.
    Raises InputError, naming `flag`, for what cannot be used.
    """
    if data == "digits":
        return Digits()
    if not data:  # as of a variable of the shell that is not set: Path("") would be the working folder
        raise InputError(f"{flag} '' is empty; give digits, {', '.join(_KINDS.values())}")
    with readable(f"{flag} {data}"):
        kind, name = _meant(data, flag)
        if kind in ("folders", "imagefolder") and output is not None:
            _check_output(name, flag, output)
        if kind in _LISTED_HERE:
            return _open(kind, name, flag, image_root, fetcher, columns)
    return _open(kind, name, flag, image_root, fetcher, columns)


def _meant(data: str, flag: str) -> tuple[str, str]:
    """The kind of data, and its path or name; InputError for what is of no kind, or of another than its prefix says."""
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


def _check_no_table(folder: Path, flag: str) -> None:
    """Refuse class folders with a table of captions of their images beside them: either may be meant."""
    tables = (file for file in sorted(folder.iterdir()) if file.suffix.lower() in SUFFIXES and file.is_file())
    if file := next(filter(names_images_below, tables), None):
        raise InputError(
            f"{flag} {folder} holds images and a table of their captions; give {file}, or folders:{folder} to train on "
            "the folders' names"
        )


def _check_output(folder: str, flag: str, output: Output) -> None:
    if output.folder.resolve().is_relative_to(Path(folder).resolve()):
        raise InputError(
            f"{output.flag} {output.folder} lies in {flag} {folder}, where its pictures would become data; name a "
            "folder elsewhere"
        )


def has_columns(opened: OpenedData) -> bool:
    """Whether the data is a table, whose columns can be chosen by name."""
    return isinstance(opened, LabelledRows) or (isinstance(opened, CaptionedImages) and opened.has_columns)


def _check_prefix(prefix: str, name: str, kinds: list[str], flag: str) -> None:
    """Refuse what is plainly something else; where nothing is recognized, the reader that was asked for decides."""
    if prefix in ("shards", "hub", *kinds) or (not kinds and os.path.exists(name) and prefix != "torchvision"):
        return
    if not kinds:
        found = f"{name} is not there" if prefix != "torchvision" else f"{name} is none of them"
    elif kinds[0] == "folders":
        found = f"{name} is a folder of another kind; leave {prefix}: out"
    else:
        found = f"{name} looks like {_KINDS[kinds[0]]}; leave {prefix}: out"
    raise InputError(f"{flag} {prefix}:{name}: {prefix}: stands for {_KINDS[prefix]}, but {found}")


def _open(kind: str, name: str, flag: str, image_root: str | None, fetcher: Fetcher, columns: Columns) -> OpenedData:
    path = Path(name)
    if kind == "hub":
        return read_rows(load_hub(name, flag), Path(f"hub:{name}"), "hub data", flag, image_root, columns)
    if kind in ("parquet", "arrow"):
        cache = fetcher.cache / "datasets"
        rows = load_parquet(name, flag, cache) if kind == "parquet" else load_saved(path, flag)
        return read_rows(rows, path, kind, flag, image_root, columns)
    if kind == "torchvision":
        return TorchvisionSet(name, Path(image_root) if image_root else fetcher.cache / "torchvision", flag)
    if kind == "shards":
        return find_shards(name, flag, fetcher)
    if kind == "folders":
        return find_class_folders(path, flag)
    if kind == "imagefolder":
        return read_imagefolder(path, flag, image_root, columns)
    if kind == "table":
        return read_table(path, flag, image_root, columns)
    if kind == "coco":
        return (read_coco_folder if path.is_dir() else read_coco)(path, flag, image_root)
    if kind == "karpathy":
        return read_karpathy(_only(path, karpathy_files(path), flag), flag, image_root)
    return read_flickr(flickr_file(path) or path, flag, image_root)


def _kinds(name: str) -> list[str]:
    """The kinds that the name may stand for, the likeliest first; none where there is nothing of that name."""
    path = Path(name)
    kinds = []
    # Commands, addresses and patterns may be longer than any path: only of a path is that a fault.
    may_be_long = name.startswith(PIPE) or any(mark in name for mark in ("://", *"{*?["))
    if os.path.isdir(name) if may_be_long else path.is_dir():
        kinds = _kinds_of_folder(path)
    elif name.lower().endswith(PARQUET_SUFFIX):
        kinds = ["parquet"]
    elif name.startswith(PIPE) or "://" in name or _SHARDS.fullmatch(name.lower()):
        kinds = ["shards"]
    elif path.is_file():
        kinds = _kinds_of_file(path)
    return kinds + ["torchvision"] * (name in NAMES)


def _kinds_of_file(path: Path) -> list[str]:
    if path.suffix.lower() == ".json":
        # Both are lists of images, and large: the beginning tells them apart.
        with open_file(path) as file:
            has_sentences = re.search(rb'"sentences"\s*:', file.read(2**20))
        return ["karpathy", "coco"] if has_sentences else ["coco", "karpathy"]
    table = ["table"] * (path.suffix.lower() in SUFFIXES)
    form = flickr_form(path)
    if form is None:
        return table
    return ["flickr", *table] if form in ("token", "|") else [*table, "flickr"]


def _kinds_of_folder(folder: Path) -> list[str]:
    # A folder of images beside a captions file would pass for a class: the captions go first.
    if (folder / "index.json").is_file() and any(name.endswith(TARS) for name in os.listdir(folder)):
        return ["shards"]
    if is_saved(folder):
        return ["arrow"]
    metadata = metadata_files(folder)
    imagefolder = ["imagefolder"] * any(map(is_metadata, metadata))
    # Before Karpathy's: the hub's own dataset_infos.json is called as his files are.
    parquet = ["parquet"] * holds_parquet(folder)
    if metadata_files(folder, (PARQUET,)) and not has_card(folder):  # refused there: its paths need --image-root
        imagefolder = ["imagefolder"]
    captions = [("coco", coco_files), ("karpathy", karpathy_files), ("flickr", flickr_file)]
    kinds = imagefolder + parquet + [kind for kind, find in captions if find(folder)] + ["folders"]
    return kinds + ["imagefolder"] * bool(metadata and not imagefolder)


def _only(path: Path, found: list[Path], flag: str) -> Path:
    """The file itself, or the only one of a folder."""
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise InputError(f"{flag} {path} holds several captions files ({names}); give one of them")
    return found[0] if found else path
