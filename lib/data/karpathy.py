"""Karpathy's split files: JSON with images of COCO or Flickr, their sentences and splits."""

import re
from collections.abc import Iterator
from pathlib import Path

from lib.data.caption_table import CaptionRow, CaptionTable
from lib.data.fields import NotText, image_name, name_of, text_of
from lib.data.find_images import ImageFinder
from lib.data.flickr import FOLDERS
from lib.data.records import parsed, read_json, shape_of
from lib.errors import InputError
from lib.files import open_file

_FOLDERS = ("images", *FOLDERS, "train2014", "val2014", "images/train2014", "images/val2014")


def karpathy_fits(path: Path) -> int:
    """2 for a folder with dataset_*.json and for JSON with sentences, 1 for other JSON, 0 for the rest."""
    if path.is_dir():
        return 2 if any(path.glob("dataset_*.json")) else 0
    return 0 if path.suffix.lower() != ".json" else 2 if _has_sentences(path) else 1


def _has_sentences(path: Path) -> bool:
    """True for Karpathy's JSON. COCO's holds images too, and both are large: the beginning tells them apart."""
    with open_file(path) as file:
        return re.search(rb'"sentences"\s*:', file.read(2**20)) is not None


def read_karpathy(path: Path, flag: str, image_root: str | None = None) -> CaptionTable:
    """Read a split file, such as dataset_coco.json, or the only one of a folder; restval images are for training."""
    if len(found := sorted(path.glob("dataset_*.json"))) > 1:
        names = ", ".join(file.name for file in found)
        raise InputError(f"{flag} {path} holds several captions files ({names}); give one of them")
    path = found[0] if found else path
    rows = karpathy_rows(path, flag)
    finder = ImageFinder(path.parent, _FOLDERS, image_root, next_to=True)
    table = CaptionTable(path, "Karpathy split", flag)
    table.fill(rows, finder)
    return table.checked(finder)


def karpathy_rows(path: Path, flag: str) -> Iterator[CaptionRow]:
    """Yield a row for each image; InputError for a file without sentences."""
    content = read_json(path, flag)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not any(isinstance(image, dict) and "sentences" in image for image in images):
        raise InputError(
            f"{flag} {path} is no Karpathy split file: it must hold a list of images with sentences; this one has "
            f"{shape_of(content)}"
        )
    return parsed(_row, images, f"{path.name}: image")


def _row(image: dict) -> CaptionRow:
    name, folder = image_name(image["filename"]), image.get("filepath")
    names = (f"{folder}/{name}", name) if isinstance(folder, str) and folder else (name,)
    sentences = image.get("sentences") or []
    if not isinstance(sentences, list):
        raise NotText("sentences are no list")
    return CaptionRow(
        name, [_raw(each) for each in sentences], split_word=name_of(image.get("split")), file_names=names
    )


def _raw(sentence: object) -> str:
    """Return the sentence as written; "" where it has no text, so that it is counted as an empty caption."""
    try:
        return (text_of(sentence.get("raw")) if isinstance(sentence, dict) else None) or ""
    except NotText:
        return ""
