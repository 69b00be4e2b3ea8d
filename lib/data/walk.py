"""Walk over folders of images: every file that is named like an image is listed, or has a reason why not."""

import os
from collections.abc import Iterator
from typing import NamedTuple

from lib.data.fields import shown
from lib.data.image_names import is_image_name

OUTPUTS = (
    {"config.yaml", "checkpoints"},
    {"config.yaml", "metrics.jsonl"},
    {"metrics.json", "report.html"},
    {"data_info.json", "data_info.png"},
)
"""Names by which a folder is known as an output: of training, of evaluate.py and of --data-info."""

_LINKS_TO_DEPTH = 2


class FolderImages(NamedTuple):
    """The files of one folder that are named like images, by their names; sorted."""

    folder: str
    """relative to the root, parts joined by "/"; "" for the root"""
    names: list[str]
    skipped: list[tuple[str, str]]
    """(path relative to the root as it may be printed, reason) of others: missing, not_a_file, unreadable,
    unreadable_folder or a_run"""


def walk_images(root: str | os.PathLike) -> Iterator[FolderImages]:
    """List every folder below the root that is not hidden, parents first, each once; raises OSError for the root.

    Links to folders are followed in the root and in the folders in it, where classes may be links, unless to a folder
    that they lie in. An output of ours counts as one thing that is skipped, whatever it holds.
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
        found, inner = _sorted_out(folder, listed, depth < _LINKS_TO_DEPTH)
        yield found
        waiting += sorted(inner, reverse=True)


def _sorted_out(folder: str, listed: list[os.DirEntry], follow: bool) -> tuple[FolderImages, list[tuple[str, bool]]]:
    """The images of a folder, and its subfolders, each with whether it is a link."""
    found = FolderImages(folder, [], [])
    inner: list[tuple[str, bool]] = []
    for entry in listed:
        kind = _kind(entry)
        if kind == "file":
            if is_image_name(entry.name):
                found.names.append(entry.name)
            continue
        path = f"{folder}/{entry.name}" if folder else entry.name
        if kind == "folder" and (follow or not entry.is_symlink()):
            inner.append((path, entry.is_symlink()))
        if is_image_name(entry.name):
            found.skipped.append((shown(path), "not_a_file" if kind == "folder" else kind))
    found.names.sort()
    found.skipped.sort()
    return found, inner


def _kind(entry: os.DirEntry) -> str:
    """file, folder, or the fault of an entry: missing (a link to nothing or in a circle), not_a_file, unreadable."""
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "folder"
        return "missing" if entry.is_symlink() and not os.path.exists(entry.path) else "not_a_file"
    except OSError as error:
        return "unreadable" if isinstance(error, PermissionError) else "missing"


def _lies_in(folder: str, other: str) -> bool:
    """Whether the folder is the other one or lies in it, links resolved."""
    folder, other = os.path.realpath(folder), os.path.realpath(other)
    return folder == other or folder.startswith(other.rstrip("/") + "/")
