"""The imagefolder layout: images with metadata.csv or metadata.jsonl beside them, in split folders or directly."""

import os
from dataclasses import replace
from pathlib import Path

from lib.data.captions.listing import SPLITS, CaptionedImages, ImageFinder, Listing
from lib.data.captions.tables import Table, add_rows
from lib.data.classes.labelled_rows import LabelledRows, labelled_by_captions
from lib.data.fields import Columns, is_utf8, shown
from lib.data.walk import walk_images
from lib.errors import InputError

METADATA = ("metadata.csv", "metadata.jsonl")
PARQUET = "metadata.parquet"


def metadata_files(folder: Path, names: tuple[str, ...] = METADATA) -> list[Path]:
    """The files of metadata in the folder and the split folders in it."""
    inner = sorted(name for name in os.listdir(folder) if name.lower() in SPLITS)
    places = [folder, *(folder / name for name in inner)]
    return [place / name for place in places for name in names if (place / name).is_file()]


def read_imagefolder(root: Path, flag: str, image_root: str | None, columns: Columns) -> CaptionedImages | LabelledRows:
    """Read the metadata, and count the images that no row names as no_row; InputError, naming `flag`, as for tables.

    A row without a split of its own has that of the folder in the root that its image lies in.
    """
    files = _checked(root, flag, image_root)
    finder = ImageFinder(root, (), None)
    listing = Listing(root, "imagefolder", flag)
    tables = [Table(file, flag, columns, ImageFinder(file.parent, (), None)) for file in files]
    for file, table in zip(files, tables, strict=True):
        place = "" if file.parent == root else f"{file.parent.name}/"
        add_rows(listing, table, finder, place, _split_of)
    of_classes = {table.labelled for table in tables if table.is_understood}
    if len(of_classes) > 1:
        raise InputError(f"{flag} {root}: one file of metadata has captions and another classes; give them one column")
    listing.divide()
    _count_unnamed(root, listing)
    listed = replace(listing.finish(finder), has_columns=True, kind=tables[0].kind("imagefolder"))
    return labelled_by_captions(listed, flag) if True in of_classes else listed


def _checked(root: Path, flag: str, image_root: str | None) -> list[Path]:
    """The files of metadata, one in each folder."""
    if image_root is not None:
        raise InputError(
            f"--image-root {image_root}: the metadata of {flag} {root} name images beside them; leave it out"
        )
    files = metadata_files(root)
    if not files and (parquet := metadata_files(root, (PARQUET,))):
        raise InputError(
            f"{flag} {root}: {parquet[0]} is not read as metadata of a folder; give "
            f"parquet:{parquet[0]} --image-root {parquet[0].parent}"
        )
    if not files:
        raise InputError(f"{flag} {root} holds neither {' nor '.join(METADATA)}, in it or in split folders")
    for file in files:
        if sum(file.parent == other.parent for other in files) > 1:
            raise InputError(f"{flag} {root}: {file.parent} holds {' and '.join(METADATA)}; remove one")
    return files


def _split_of(key: str) -> str | None:
    """The split of the folder in the root that an image lies in."""
    top, slash, _ = os.path.normpath(key).partition("/")
    return SPLITS.get(top.lower()) if slash else None


def _count_unnamed(root: Path, listing: Listing) -> None:
    """Note images that no row names, and what else in the folder is named like an image and is none."""
    named = {os.path.normpath(key) for key in listing.keys}
    for found in walk_images(root):
        prefix = f"{found.folder}/" if found.folder else ""
        split = _split_of(f"{prefix}image")
        for name in found.names:
            if (key := prefix + name) not in named:
                listing.skip(shown(key), "no_row" if is_utf8(key) else "not_utf8", split)
        for key, reason in found.skipped:
            if key not in named:
                listing.skip(key, reason, split)
