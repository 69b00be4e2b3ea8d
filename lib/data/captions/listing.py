"""Lists of captioned images, which every reader of captions makes, and the search for their files."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lib.data.fields import NotText, is_utf8
from lib.data.hub.row_images import RowImages
from lib.data.skipped import Skips, by_split
from lib.errors import InputError, raised_as, readable
from lib.files import open_text

SPLITS = {
    "train": "train",
    "restval": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
"""The split that a file's own word stands for; data without splits has the one split "all"."""


def image_name(value: object) -> str:
    """The name of an image's file, as a file of captions writes it; raises NotText for what cannot be one."""
    if not isinstance(value, str) or not (name := value.strip()) or "\0" in name:
        raise NotText(f"{value!r} is no name of a file")
    return name


class Caption(NamedTuple):
    """One caption and its number within its image."""

    number: int
    text: str

    @property
    def fault(self) -> str | None:
        """Why it cannot be used: empty_caption, not_utf8 or None."""
        if not self.text:
            return "empty_caption"
        return None if is_utf8(self.text) else "not_utf8"


@dataclass
class Captioned:
    """An image with what was said of it."""

    key: str
    """as its file names it"""
    path: str | None
    """None where the file is missing, or the image is no file"""
    split: str
    group: str | None
    captions: list[Caption]
    row: int | None = None
    """its number in `CaptionedImages.stored`, where it is no file"""

    @property
    def is_there(self) -> bool:
        """Whether there is an image to open."""
        return self.path is not None or self.row is not None


@dataclass(frozen=True)
class CaptionedImages:
    """Captioned images of all splits, in the order in which they were named."""

    path: Path
    """the file or folder that the user gave"""
    kind: str
    """for descriptions: "COCO captions" """
    images: list[Captioned]
    left_out: Mapping[str, Skips]
    """split -> (line or name, reason) of the entries that name no image or are not readable"""
    stored: RowImages | None = None
    """where the images are, if they are no files"""
    has_columns: bool = False
    """whether --image-column and --caption-column choose what is read"""

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(sorted({image.split for image in self.images}))


class ImageFinder:
    """Finds the files that captions name, listing each folder once: a look per file is slow on network disks.

    Looks in `image_root`, where it is given, else in `folder`, and in the subfolders of either that are
    called `names`; with `beside`, in such folders beside `folder` too.
    """

    def __init__(self, folder: Path, names: Sequence[str], image_root: str | None, beside: bool = False):
        if image_root is not None and not os.path.isdir(image_root):
            raise InputError(f"--image-root {image_root} is not a folder; give the one that holds the images")
        base = folder if image_root is None else Path(image_root)
        places = [base, *(base / name for name in names)]
        self.where = f"{base} and its folders {', '.join(names)}"
        if beside and image_root is None:
            above = folder.absolute().parent
            places += [above / name for name in names]
            self.where += f", and in such folders of {above}"
        self._places = [str(place) for place in places if place.is_dir()]
        self._listings: dict[str, frozenset[str]] = {}

    def find(self, *names: str) -> str | None:
        """The path of the image that has one of these names, or None."""
        for place in self._places:
            for name in names:
                folder, file = place, name
                if "/" in name:
                    folder, file = os.path.split(os.path.join(place, name))  # an absolute name stays as it is
                if file in self._listing(folder):
                    return os.path.join(folder, file)
        return None

    def _listing(self, folder: str) -> frozenset[str]:
        if folder not in self._listings:
            self._listings[folder] = frozenset()
            with suppress(OSError, ValueError):  # or a name that no folder can have: too long, with a NUL
                self._listings[folder] = frozenset(os.listdir(folder))
        return self._listings[folder]


@dataclass
class Listing:
    """Captioned images while a file is read; captions of one image may come in any order."""

    path: Path
    kind: str
    flag: str
    left_out: dict[str | None, list[tuple[str, str]]] = field(default_factory=dict)
    named: set[str] = field(default_factory=set)
    """images that entries name which cannot be used"""
    _images: dict[tuple[str, str], Captioned] = field(default_factory=dict)

    def add(
        self,
        finder: ImageFinder,
        key: str,
        split: str,
        texts: Iterable[str],
        group: str | None = None,
        names: Sequence[str] = (),
    ) -> None:
        """Note captions of an image; `names` are those of its file, where the key is not."""
        if not is_utf8(f"{key}{group or ''}"):
            self.named.add(key)
            self.skip(ascii(key), "not_utf8", split)
            return
        image = self._images.get((key, split))
        if image is None:
            image = Captioned(key, finder.find(*(names or (key,))), split, group, [])
            self._images[key, split] = image
        for text in texts:
            image.captions.append(Caption(len(image.captions), text.strip()))

    def skip(self, key: str, reason: str, split: str | None = None) -> None:
        """Note an entry that cannot be used; `split` where it is known."""
        self.left_out.setdefault(split, []).append((key, reason))

    @property
    def empty(self) -> bool:
        """Whether no image was noted yet."""
        return not self._images

    def divide(self) -> None:
        """Leave out images of split "all" where others have one: they would be in no split, and not be counted."""
        if any(split != "all" for _, split in self._images):
            for key, split in [each for each in self._images if each[1] == "all"]:
                self.skip(key, "no_split")
                self.named.add(key)
                del self._images[key, split]

    @property
    def keys(self) -> set[str]:
        """Every image that an entry names."""
        return self.named | {key for key, _ in self._images}

    def finish(self, finder: ImageFinder) -> CaptionedImages:
        """All that was noted; InputError where not one image was named, or not one of them is there."""
        images = list(self._images.values())
        if not images:
            counts = Counter(reason for skips in self.left_out.values() for _, reason in skips)
            found = "".join(f", {reason} {count:,}" for reason, count in counts.most_common())
            raise InputError(
                f"{self.flag} {self.path} names no image{found}; it needs a line for each image and caption"
            )
        if not any(image.path for image in images):
            raise InputError(
                f"{self.flag} {self.path}: of the {len(images):,} images it names not one is there (the first: "
                f"{images[0].key!r}); they are looked for in {finder.where}; --image-root says where they are"
            )
        return CaptionedImages(self.path, self.kind, images, by_split(self.left_out, {each.split for each in images}))


@contextmanager
def counted_fault(listing: Listing, key: str, split: str | None = None) -> Iterator[None]:
    """Count an entry as malformed_row whatever reading it raises: a missing field, a list as an id, a NUL in a name."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        listing.skip(key, "malformed_row", split)


def load_json(path: Path, flag: str) -> object:
    """The content of a JSON file, bad bytes as surrogates; InputError where it is not JSON."""
    asked = f"{flag} {path}"
    not_json = raised_as(
        lambda fault: InputError(f"{asked} is not JSON, or was cut short: {fault}"), ValueError, RecursionError
    )
    with readable(asked), not_json, open_text(path) as file:
        return json.load(file)


def shape_of(content: object) -> str:
    """The shape of a JSON file in words, for a message that something else was expected."""
    return f"keys {', '.join(content)[:80]}" if isinstance(content, dict) and content else f"a {type(content).__name__}"
