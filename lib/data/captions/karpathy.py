"""Karpathy's split files: JSON that lists images of COCO or Flickr with their sentences and splits."""

from pathlib import Path

from lib.data.captions.flickr import FOLDERS
from lib.data.captions.listing import (
    SPLITS,
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

_PLACES = ("images", *FOLDERS, "train2014", "val2014", "images/train2014", "images/val2014")


def read_karpathy(path: Path, flag: str, image_root: str | None = None) -> CaptionedImages:
    """Read a split file, such as dataset_coco.json; its restval images are for training."""
    content = load_json(path, flag)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not any(isinstance(image, dict) and "sentences" in image for image in images):
        raise InputError(
            f"{flag} {path} is no Karpathy split file: it must hold a list of images with sentences; this one has "
            f"{shape_of(content)}"
        )
    finder = ImageFinder(path.parent, _PLACES, image_root, beside=True)
    listing = Listing(path, "Karpathy split", flag)
    unknown: InputError | None = None
    for number, image in enumerate(images):
        with counted_fault(listing, f"{path.name}: image {number}"):
            name, folder = image_name(image["filename"]), image.get("filepath")
            split = SPLITS.get(str(name_of(image.get("split"))))
            if split is None:
                listing.skip(shown(name), "unknown_split")
                words = f"split {image.get('split')!r} is none of {', '.join(SPLITS)}"
                unknown = unknown or InputError(f"{flag} {path}, image {shown(name)}: {words}")
                continue
            names = (f"{folder}/{name}", name) if isinstance(folder, str) and folder else (name,)
            listing.add(finder, name, split, _sentences(image), names=names)
    if unknown and listing.empty:
        raise unknown
    return listing.finish(finder)


def karpathy_files(folder: Path) -> list[Path]:
    """Files in a folder that are called as Karpathy's are."""
    return sorted(folder.glob("dataset_*.json"))


def _sentences(image: dict) -> list[str]:
    """The sentences as written; one without a text counts as empty."""
    sentences = image.get("sentences") or []
    if not isinstance(sentences, list):
        raise NotText("sentences are no list")
    return [_raw(sentence) for sentence in sentences]


def _raw(sentence: object) -> str:
    try:
        return (text_of(sentence.get("raw")) if isinstance(sentence, dict) else None) or ""
    except NotText:
        return ""
