"""Image files on disk: their extensions, the walk over a folder of images, and the search for files by name."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from lib.data.fields import shown
from lib.errors import InputError

READABLE = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".jpf", ".jpx"),
}
"""File extensions of the Pillow formats that are read, the usual one first."""

# Pillow cannot read these. They are listed all the same, to be counted as unreadable instead of overlooked.
_UNREADABLE = (".heic", ".heif", ".hif", ".jxl", ".psd", ".svg", ".dng", ".cr2", ".nef", ".arw")

IMAGE_EXTENSIONS = (*(extension for extensions in READABLE.values() for extension in extensions), *_UNREADABLE)
"""Every image extension, for folders, tables and tars alike; compare in lower case."""

OUTPUTS = (
    {"config.yaml", "checkpoints"},
    {"config.yaml", "metrics.jsonl"},
    {"metrics.json", "report.html"},
    {"data_info.json", "data_info.png"},
)
"""Names that mark a folder as an output: of training, of evaluate.py and of --data-info."""

_LINKS_TO_DEPTH = 2


def is_image_name(name: str) -> bool:
    """True for the name of an image file, readable or not, that is not hidden."""
    return name.lower().endswith(IMAGE_EXTENSIONS) and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """True where the file name begins with a dot, as .DS_Store and ._photo.jpg of macOS: such files are no data."""
    return name.rpartition("/")[2].startswith(".")


class FolderImages(NamedTuple):
    """Sorted names of the image files in one folder."""

    folder: str
    """relative to the root, joined by "/"; "" for the root"""
    names: list[str]
    skipped: list[tuple[str, str]]
    """(printable path relative to the root, reason): missing, not_a_file, unreadable, unreadable_folder or a_run"""

    @property
    def prefix(self) -> str:
        """The folder as the beginning of its images' paths: "" or "folder/"."""
        return f"{self.folder}/" if self.folder else ""


def walk_images(root: str | os.PathLike) -> Iterator[FolderImages]:
    """List every folder below the root that is not hidden, parents first, each once; raises OSError for the root.

    Links to folders are followed down to the second level, where class folders may be links, unless they lead to a
    folder above themselves: that walk would never end. An output folder of ours is one skip, whatever it contains:
    its plots are no training images.
    """
    waiting = [("", False)]
    while waiting:
        folder, is_link = waiting.pop()
        path = os.path.join(root, folder)
        if is_link and _lies_in(os.path.dirname(path), path):
            continue
        try:
            with os.scandir(path) as entries:
                listed = [entry for entry in entries if entry.name[0] != "."]
        except OSError:
            if not folder:
                raise
            yield FolderImages(folder, [], [(shown(folder), "unreadable_folder")])
            continue
        names = {entry.name for entry in listed}
        if folder and any(marks <= names for marks in OUTPUTS):
            yield FolderImages(folder, [], [(shown(folder), "a_run")])
            continue
        depth = folder.count("/") + 1 if folder else 0
        found, inner = _listed_folder(folder, listed, depth < _LINKS_TO_DEPTH)
        yield found
        waiting += sorted(inner, reverse=True)


def _listed_folder(folder: str, listed: list[os.DirEntry], follow: bool) -> tuple[FolderImages, list[tuple[str, bool]]]:
    """Return the images of a folder, and (path, is a link) of its subfolders."""
    found = FolderImages(folder, [], [])
    inner: list[tuple[str, bool]] = []
    for entry in listed:
        kind = _kind(entry)
        if kind == "file":
            if is_image_name(entry.name):
                found.names.append(entry.name)
            continue
        path = found.prefix + entry.name
        if kind == "folder" and (follow or not entry.is_symlink()):
            inner.append((path, entry.is_symlink()))
        if is_image_name(entry.name):
            found.skipped.append((shown(path), "not_a_file" if kind == "folder" else kind))
    found.names.sort()
    found.skipped.sort()
    return found, inner


def _kind(entry: os.DirEntry) -> str:
    """Return file, folder, or the fault of an entry: missing (a broken or circular link), not_a_file, unreadable."""
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "folder"
        return "missing" if entry.is_symlink() and not os.path.exists(entry.path) else "not_a_file"
    except OSError as error:
        return "unreadable" if isinstance(error, PermissionError) else "missing"


def _lies_in(folder: str, other: str) -> bool:
    """True where the folder is the other one or lies in it, links resolved."""
    folder, other = os.path.realpath(folder), os.path.realpath(other)
    return folder == other or folder.startswith(other.rstrip("/") + "/")


class ImageFinder:
    """Search for named image files in `image_root`, or else in `folder`, and in subfolders called `names`.

    next_to: also look in folders of these names next to `folder`.
    """

    def __init__(self, folder: Path, names: Sequence[str], image_root: str | None, next_to: bool = False):
        if image_root is not None and not os.path.isdir(image_root):
            raise InputError(f"--image-root {image_root} is not a folder; give the one that holds the images")
        base = folder if image_root is None else Path(image_root)
        places = [base, *(base / name for name in names)]
        self.where = f"{base} and its folders {', '.join(names)}"
        if next_to and image_root is None:
            above = folder.absolute().parent
            places += [above / name for name in names]
            self.where += f", and in such folders of {above}"
        self._places = [str(place) for place in places if place.is_dir()]
        self._listings: dict[str, frozenset[str]] = {}

    def find(self, *names: str) -> str | None:
        """Return the path of the image with one of these names, or None."""
        for place in self._places:
            for name in names:
                folder, file = place, name
                if "/" in name:
                    folder, file = os.path.split(os.path.join(place, name))  # an absolute name stays as it is
                if file in self._listing(folder):
                    return os.path.join(folder, file)
        return None

    def _listing(self, folder: str) -> frozenset[str]:
        # One listing per folder, because a look-up per file is slow on network disks.
        if folder not in self._listings:
            self._listings[folder] = frozenset()
            with suppress(OSError, ValueError):  # or a name that no folder can have: too long, with a NUL
                self._listings[folder] = frozenset(os.listdir(folder))
        return self._listings[folder]
