"""Rows loaded with the `datasets` library: from the hub, parquet files or a folder of `save_to_disk`; their images."""

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lib.data.fields import SPLITS
from lib.data.find_images import is_hidden
from lib.data.images import Extent, decode_image, file_stamp
from lib.errors import InputError, raised_as
from lib.files import open_file, without_secrets

PARQUET = ".parquet"

_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w.-]+))?")
_SPLIT_IN_PATH = re.compile(rf"(?:^|[-_./])({'|'.join(SPLITS)})(?=[-_./\d])", re.IGNORECASE)
_LONGEST_REASON = 300
_UNDIVIDED = "rows"  # of data without splits; the library keeps the word "all" for itself


class Rows(NamedTuple):
    """The rows of a data set, memory-mapped, one split after the other."""

    table: Any
    """a `datasets.Dataset`"""
    keys: list[str]
    """"validation/7": the split as the data calls it, and the row in it"""
    splits: list[str]
    """train, val, test or all, of each row"""
    unread: tuple[str, ...]
    """names of splits that are neither for training nor for evaluation: "extra" """
    version: str
    """the library's fingerprints: they change when the rows do, and are the same in every process"""


@dataclass(frozen=True)
class RowImages:
    """Images of rows: `keys[i]` names image i, `places[i]` is its row, or its path where no bytes are stored."""

    keys: list[str]
    places: list[int | str | None]
    """None: there is no image; never opened"""
    column: Any
    """a `datasets.Dataset` with one column, whose images are not decoded; memory-mapped, and pickled as paths"""
    version: str
    """changes when the data set or the column does"""

    def __len__(self) -> int:
        return len(self.keys)

    def content(self, index: int) -> bytes | str:
        """Return the bytes of the file as stored, or its path."""
        place = self.places[index]
        assert place is not None, "rows without an image are left out"
        if isinstance(place, str):
            return place
        (value,) = self.column[place].values()
        return value["bytes"] if isinstance(value, dict) else value

    def open(self, index: int, extent: Extent | None = None) -> Image.Image:
        """Return image `index`, RGB and upright, in full or at `extent` or larger; raises BadImage."""
        return decode_image(self.content(index), extent)

    def identity(self, rows: np.ndarray) -> str:
        """Return a text that changes when one of these images does, by fingerprint, or size and time of its file."""
        places = [self.places[row] for row in rows]
        return repr((self.version, [file_stamp(each) if isinstance(each, str) else each for each in places]))

    def chosen(self, rows: Iterable[int]) -> "RowImages":
        """Return these of the images, numbered anew."""
        rows = list(rows)
        keys, places = [self.keys[row] for row in rows], [self.places[row] for row in rows]
        return RowImages(keys, places, self.column, self.version)


def load_hub(name: str, flag: str) -> Rows:
    """Load OWNER/NAME[/CONFIG][:SPLIT] through Hugging Face's own cache; InputError where that fails."""
    asked = f"{flag} hub:{name}"
    match = _NAME.fullmatch(name)
    if match is None:
        raise InputError(f"{asked}: write hub:OWNER/NAME, hub:OWNER/NAME:SPLIT or hub:OWNER/NAME/CONFIG")
    repository = match["repository"]
    if os.path.isdir(repository):  # the library would read it instead
        raise InputError(f"{asked}: {repository} is a folder here as well; leave hub: out to read that one")
    datasets = _library(asked)
    # The library, the network and the repository raise errors of many types.
    with raised_as(lambda fault: InputError(f"{asked} {_fault_of_hub(fault, repository)}"), Exception), _calm(datasets):
        found = datasets.load_dataset(repository, match["config"])
    return _rows(found, asked, match["split"], f"name one, as hub:{repository}:SPLIT")


def load_parquet(name: str, flag: str, cache: Path) -> Rows:
    """Load a parquet file or a glob of them (split "all"), or a folder; `cache` gets a copy that can be memory-mapped.

    A folder's splits are those of its README.md, if it came from the hub, else those in the names of its files.
    """
    asked, folder = f"{flag} {name}", Path(name) if os.path.isdir(name) else None
    named = [name] if os.path.exists(name) else sorted(glob.glob(name))  # a name may look like a glob
    files = [file for file in (_files_below(folder) if folder else map(Path, named)) if file.is_file()]
    if not files:
        raise InputError(f"{asked}: there is no such {PARQUET} file; give a file, a glob or a folder of this machine")
    datasets = _library(asked)
    with raised_as(lambda fault: _fault_of_parquet(fault, asked, files), Exception), _calm(datasets):
        if folder and has_card(folder):
            found = datasets.load_dataset(name, cache_dir=str(cache))
        else:
            by_split = _by_split(folder, files) if folder else {_UNDIVIDED: files}
            patterns = {each: [glob.escape(os.path.abspath(f)) for f in some] for each, some in by_split.items()}
            found = datasets.load_dataset("parquet", data_files=patterns, cache_dir=str(cache))
    return _rows(found, asked, None, "give a glob of the files of one")


def load_saved(folder: Path, flag: str) -> Rows:
    """Load what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote; InputError where it is incomplete."""
    asked = f"{flag} {folder}"
    datasets = _library(asked)
    wrong = f"{asked} cannot be read as a folder of save_to_disk"
    with raised_as(lambda fault: InputError(f"{wrong}: {_reason(fault)}"), Exception), _calm(datasets):
        found = datasets.load_from_disk(str(folder))
    return _rows(found, asked, None, f"give one, as {folder}/SPLIT")


def is_saved(folder: Path) -> bool:
    """True for a folder of `save_to_disk`."""
    names = ("dataset_info.json", "state.json")
    return (folder / "dataset_dict.json").is_file() or all((folder / name).is_file() for name in names)


def holds_parquet(folder: Path) -> bool:
    """True where parquet files lie in the folder or its data/, or deeper in a download from the hub."""
    patterns = [f"*{PARQUET}", f"data/*{PARQUET}"]
    if has_card(folder):  # other folders may have thousands of subfolders, one for each class
        patterns += [f"*/*{PARQUET}", f"*/*/*{PARQUET}"]
    return any(not is_hidden(path.name) for pattern in patterns for path in folder.glob(pattern))


def has_card(folder: Path) -> bool:
    """True where README.md begins with the YAML of the hub: configurations, splits, class names."""
    with suppress(OSError), open_file(folder / "README.md") as file:
        return file.readline(100).strip() == b"---"
    return False


def _files_below(folder: Path) -> list[Path]:
    found = sorted(folder.rglob(f"*{PARQUET}"))
    return [file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def _by_split(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Group the files by the split in their path; a single group where no path has any."""
    by_split: dict[str, list[Path]] = {}
    for file in files:
        match = _SPLIT_IN_PATH.search(file.relative_to(folder).as_posix())
        by_split.setdefault(match[1].lower() if match else "other", []).append(file)
    return {_UNDIVIDED: files} if set(by_split) == {"other"} else by_split


def _rows(found: Any, asked: str, wanted: str | None, one_split: str) -> Rows:
    """Return the splits for training and evaluation, or the wanted one; InputError where there is none.

    one_split: advice on how to name a single one.
    """
    import datasets

    own = {_UNDIVIDED: found} if isinstance(found, datasets.Dataset) else dict(found)
    if wanted is not None and wanted not in own:
        raise InputError(f"{asked} has no split {wanted}, only {', '.join(own)}")
    split_of = {name: SPLITS[name.lower()] for name in own if name.lower() in SPLITS}
    if wanted is not None or (len(own) == 1 and not split_of):
        split_of = dict.fromkeys([wanted] if wanted is not None else own, "all")
    if not split_of:
        raise InputError(f"{asked} has the splits {', '.join(own)}, and none of them is called train; {one_split}")
    tables = [own[name].with_format(None) for name in split_of]
    if not sum(map(len, tables)):
        raise InputError(f"{asked} has no rows")
    wrong = f"{asked}: its splits have different columns"
    with raised_as(lambda fault: InputError(f"{wrong} ({_reason(fault)}); {one_split}"), Exception):
        table = datasets.concatenate_datasets(tables) if len(tables) > 1 else tables[0]
    keys = [f"{name}/{row}" for name in split_of for row in range(len(own[name]))]
    splits = [split for name, split in split_of.items() for _ in range(len(own[name]))]
    unread = () if wanted is not None else tuple(name for name in own if name not in split_of)
    return Rows(table, keys, splits, unread, " ".join(each._fingerprint for each in tables))


def _library(asked: str) -> Any:
    wrong = f"{asked} needs a package that is not installed"
    with raised_as(lambda fault: InputError(f"{wrong} ({fault}): pip install datasets"), ImportError):
        import datasets  # here, because it takes a second and a half, and is installed only where it is wanted
    return datasets


@contextmanager
def _calm(datasets: Any) -> Iterator[None]:
    """Silence the library's progress bars and log lines, which every rank would print."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging

    log, bars, hub_bars = datasets.utils.logging, datasets.is_progress_bar_enabled(), not are_progress_bars_disabled()
    levels = log.get_verbosity(), hub_logging.get_verbosity()
    log.set_verbosity(log.CRITICAL)
    hub_logging.set_verbosity(log.CRITICAL)
    datasets.disable_progress_bars()
    disable_progress_bars()
    try:
        yield
    finally:
        log.set_verbosity(levels[0])
        hub_logging.set_verbosity(levels[1])
        if bars:
            datasets.enable_progress_bars()
        if hub_bars:
            enable_progress_bars()


def _fault_of_hub(error: Exception, repository: str) -> str:
    """Return the fault and its remedy, as the end of a sentence that begins with the name of the data."""
    message = _reason(error)
    if "Config name is missing" in message or "BuilderConfig" in message:
        names = re.search(r"\[(.*?)\]", message)
        known = f" ({names[1]})" if names else ""
        return f"has several configurations{known}; name one of them: hub:{repository}/CONFIG"
    if type(error).__name__ == "DatasetNotFoundError":
        return f"is not on the hub, or not for everyone ({message}); check the name, or log in with `hf auth login`"
    if "scripts are no longer supported" in message:
        return f"needs code of its own to be read, which is never run ({message}); look for a copy in parquet"
    if isinstance(error, ValueError | NotImplementedError) or type(error).__name__.startswith("DatasetGeneration"):
        return f"cannot be read ({message}); look for a copy in parquet"
    return (
        f"cannot be fetched ({message}): download it where there is a network with `hf download {repository} "
        "--repo-type dataset --local-dir DIR`, then give --data DIR"
    )


def _fault_of_parquet(error: Exception, asked: str, files: Sequence[Path]) -> InputError:
    reason = _broken(files) or _reason(error)
    found = "its files have different columns: " if "Couldn't cast" in reason else ""
    return InputError(f"{asked} cannot be read: {found}{reason}")


def _broken(files: Sequence[Path]) -> str | None:
    """Return the first file that is no complete parquet file, and why; None where all are complete."""
    from pyarrow.parquet import read_metadata

    for file in files:
        try:
            read_metadata(file)
        except Exception as error:
            return f"{file} is no complete {PARQUET} file ({_reason(error)})"
    return None


def _reason(error: BaseException) -> str:
    """Return the first cause in one line of limited length."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (" ".join(without_secrets(str(error)).split()) or type(error).__name__)[:_LONGEST_REASON]
