"""COCO's captions: one JSON file of images and annotations, or the folder with those of 2014 or 2017."""

import re
from collections.abc import Iterator
from pathlib import Path

from lib.data.caption_table import CaptionRow, CaptionTable
from lib.data.fields import NotText, image_name, name_of, shown, text_of
from lib.data.find_images import ImageFinder
from lib.data.records import parsed, read_json, shape_of
from lib.errors import InputError

_FOLDERS = ("val2017", "train2017", "val2014", "train2014")
_FILE = re.compile(r"captions_(train|val)(20\d\d)\.json")


def coco_fits(path: Path) -> int:
    """2 for a folder with captions files, 1 for JSON, which may be of another format, 0 for the rest."""
    if path.is_dir():
        return 2 if _files_of(path) else 0
    return 1 if path.suffix.lower() == ".json" else 0


def read_coco(path: Path, flag: str, image_root: str | None = None) -> CaptionTable:
    """Read one file as split "all", or the files of a folder's year as splits train and val."""
    files = {"all": path}
    if path.is_dir():
        found = _files_of(path)
        if not found:
            raise InputError(
                f"{flag} {path} holds no captions_train2017.json, captions_val2017.json or annotations.json"
            )
        files = {match[1]: file for file in found if (match := _FILE.fullmatch(file.name))}
        if len(found) == 1:
            files, path = {"all": found[0]}, found[0]
        elif len(files) < len(found):
            names = ", ".join(file.name for file in found)
            raise InputError(f"{flag} {path} holds the captions of several years ({names}); give one of the files")
    table = CaptionTable(path, "COCO captions", flag)
    for split, file in sorted(files.items()):
        # captions_val2017.json speaks of val2017: two folders may have different images of one name.
        folders = [folder for folder in _FOLDERS if folder in file.name] or [*_FOLDERS]
        places = ("images", *folders, *(f"images/{folder}" for folder in folders))
        finder = ImageFinder(file.parent, places, image_root, next_to=True)
        table.fill(coco_rows(file, flag, split), finder, file)
    return table.checked(finder)


def coco_rows(path: Path, flag: str, split: str) -> Iterator[CaptionRow]:
    """Yield a row for each image; InputError for a file without captions."""
    images, annotations = _lists(read_json(path, flag), path, flag)
    captions: dict[str, list[str]] = {}
    seen: set[str] = set()

    def note_caption(annotation: dict) -> None:
        image_id, caption = _id(annotation["image_id"]), text_of(annotation["caption"])
        if caption is None:
            raise NotText("no caption")
        captions.setdefault(image_id, []).append(caption)

    def image_row(image: dict) -> CaptionRow:
        image_id, name = _id(image["id"]), image_name(image["file_name"])
        if image_id in seen:
            raise NotText("an id that another image has")
        seen.add(image_id)
        return CaptionRow(name, captions.pop(image_id, []), split)

    yield from parsed(note_caption, annotations, f"{path.name}: annotation", split)
    yield from parsed(image_row, images, f"{path.name}: image", split)
    for image_id in captions:
        yield CaptionRow(f"{path.name}: image_id {shown(image_id)}", split=split, reason="unknown_image")


def _files_of(folder: Path) -> list[Path]:
    """List the captions files of a COCO folder, in annotations/ or directly in it."""
    for place in (folder / "annotations", folder):
        if files := [file for file in sorted(place.glob("captions_*.json")) if _FILE.fullmatch(file.name)]:
            return files
    # Boxes without captions are read too, for the error message: such a folder would pass for one of classes.
    others = [folder / "annotations.json", *sorted(folder.glob("annotations/instances_*.json"))]
    return [file for file in others if file.is_file()][:1]


def _id(value: object) -> str:
    """Return an id as text; raises NotText where it is missing."""
    if (name := name_of(value)) is None:
        raise NotText("no id")
    return name


def _lists(content: object, path: Path, flag: str) -> tuple[list, list]:
    """Return the lists of images and of annotations, which must be captions."""
    lists = content if isinstance(content, dict) else {}
    images, annotations = lists.get("images"), lists.get("annotations")
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
