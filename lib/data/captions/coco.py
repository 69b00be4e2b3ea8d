"""COCO's captions: one JSON file of images and annotations, or the folder that holds those of 2014 or 2017."""

import re
from pathlib import Path

from lib.data.captions.listing import (
    CaptionedImages,
    ImageFinder,
    Listing,
    counted_fault,
    image_name,
    load_json,
    shape_of,
)
from lib.data.fields import NotText, name_of, shown, text_of
from lib.errors import InputError

_PARTS = ("val2017", "train2017", "val2014", "train2014")
_FILE = re.compile(r"captions_(train|val)(20\d\d)\.json")
KIND = "COCO captions"


def read_coco(path: Path, flag: str, image_root: str | None = None) -> CaptionedImages:
    """Read one file; its images are of split "all". InputError, naming `flag`, for what holds no captions."""
    listing = Listing(path, KIND, flag)
    finder = _finder(path, image_root)
    _read(path, "all", finder, listing)
    return listing.finish(finder)


def read_coco_folder(folder: Path, flag: str, image_root: str | None = None) -> CaptionedImages:
    """Read the captions files of a folder: one alone as it is, those of a year as splits train and val."""
    files = coco_files(folder)
    if not files:
        raise InputError(f"{flag} {folder} holds no captions_train2017.json, captions_val2017.json or annotations.json")
    if len(files) == 1:
        return read_coco(files[0], flag, image_root)
    splits = {match[1]: file for file in files if (match := _FILE.fullmatch(file.name))}
    if len(splits) < len(files):
        names = ", ".join(file.name for file in files)
        raise InputError(f"{flag} {folder} holds the captions of several years ({names}); give one of the files")
    listing = Listing(folder, KIND, flag)
    for split, file in sorted(splits.items()):
        finder = _finder(file, image_root)
        _read(file, split, finder, listing)
    return listing.finish(finder)


def coco_files(folder: Path) -> list[Path]:
    """The captions files of a COCO folder, in annotations/ or directly in it."""
    for place in (folder / "annotations", folder):
        if files := [file for file in sorted(place.glob("captions_*.json")) if _FILE.fullmatch(file.name)]:
            return files
    # Boxes without captions are read too, to say so: such a folder would pass for one of classes.
    others = [folder / "annotations.json", *sorted(folder.glob("annotations/instances_*.json"))]
    return [file for file in others if file.is_file()][:1]


def _finder(path: Path, image_root: str | None) -> ImageFinder:
    """Look in the folders of the file's own part first: captions_val2017.json speaks of val2017."""
    parts = [part for part in _PARTS if part in path.name] or _PARTS
    names = ["images", *parts, *(f"images/{part}" for part in parts)]
    return ImageFinder(path.parent, names, image_root, beside=True)


def _read(path: Path, split: str, finder: ImageFinder, listing: Listing) -> None:
    content = load_json(path, listing.flag)
    images, annotations = _parts(content, path, listing.flag)
    captions: dict[str, list[str]] = {}
    for number, annotation in enumerate(annotations):
        with counted_fault(listing, f"{path.name}: annotation {number}", split):
            image_id, caption = _present(annotation["image_id"]), text_of(annotation["caption"])
            if caption is None:
                raise NotText("no caption")
            captions.setdefault(image_id, []).append(caption)
    read: set[str] = set()
    for number, image in enumerate(images):
        with counted_fault(listing, f"{path.name}: image {number}", split):
            image_id, name = _present(image["id"]), image_name(image["file_name"])
            if image_id in read:
                raise NotText("an id that another image has")
            read.add(image_id)
            listing.add(finder, name, split, captions.pop(image_id, []))
    for image_id in captions:
        listing.skip(f"{path.name}: image_id {shown(image_id)}", "unknown_image", split)


def _present(value: object) -> str:
    """An id as text; raises NotText where it is missing."""
    if (name := name_of(value)) is None:
        raise NotText("no id")
    return name


def _parts(content: object, path: Path, flag: str) -> tuple[list, list]:
    """The lists of images and of annotations, which must be captions."""
    parts = content if isinstance(content, dict) else {}
    images, annotations = parts.get("images"), parts.get("annotations")
    if not (isinstance(images, list) and images and isinstance(annotations, list) and annotations):
        raise InputError(
            f"{flag} {path} is no captions file: COCO's holds lists of images and of annotations, Karpathy's "
            f"images with sentences; this one has {shape_of(content)}"
        )
    if not any(isinstance(each, dict) and "caption" in each for each in annotations):
        has = ", ".join(annotations[0]) if isinstance(annotations[0], dict) else "no fields"
        raise InputError(
            f"{flag} {path} holds COCO annotations without captions (the first has {has}); "
            "give the captions file of the same images, as captions_val2017.json"
        )
    return images, annotations
