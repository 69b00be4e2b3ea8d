"""Owns Karpathy's split files: JSON that lists images of COCO or Flickr with their sentences and splits."""

from pathlib import Path

from lib.data.captions.flickr import FOLDERS
from lib.data.captions.listing import SPLITS, CaptionedImages, ImageFinder, Listing, load_json, shape_of
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
    for number, image in enumerate(images):
        name = image.get("filename") if isinstance(image, dict) else None
        if not isinstance(name, str) or not name:
            listing.malformed.append((f"{path.name}: image {number}", "malformed_row"))
            continue
        split = SPLITS.get(image.get("split"))
        if split is None:
            known = ", ".join(SPLITS)
            raise InputError(f"{flag} {path}, image {name}: split {image.get('split')!r} is none of {known}")
        folder = image.get("filepath")
        names = (f"{folder}/{name}", name) if isinstance(folder, str) and folder else (name,)
        listing.add(finder, name, split, _sentences(image), names=names)
    return listing.finish(finder)


def karpathy_files(folder: Path) -> list[Path]:
    """Files in a folder that are called as Karpathy's are."""
    return sorted(folder.glob("dataset_*.json"))


def _sentences(image: dict) -> list[str]:
    """The sentences as written; one that is not there counts as empty."""
    sentences = image.get("sentences")
    sentences = sentences if isinstance(sentences, list) else []
    raw = [sentence.get("raw") if isinstance(sentence, dict) else None for sentence in sentences]
    return [text if isinstance(text, str) else "" for text in raw]
