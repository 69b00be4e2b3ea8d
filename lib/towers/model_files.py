"""Files of pretrained models: one local folder for a path or hub id, read without running code from it."""

import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, StrictDataclassError
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from transformers.utils import logging

from lib.errors import InputError, raised_as

NO_CODE = {"trust_remote_code": False, "local_files_only": True}
"""Arguments of every from_pretrained: without them transformers asks on stdin, and runs the folder's code on "y"."""

SECONDS_FOR_THE_HUB = 10
MODEL_TYPES = ("clip", "chinese_clip", "altclip", "siglip", "siglip2", "two_towers")
"""Types of models with both towers, as config.json names them."""
CONFIG, OPEN_CLIP_CONFIG = "config.json", "open_clip_config.json"
DESCRIPTIONS = (
    *(CONFIG, OPEN_CLIP_CONFIG, "preprocessor_config.json", "processor_config.json", "1_Pooling/config.json"),
    *("model.safetensors.index.json", "pytorch_model.bin.index.json"),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab*", "merges.txt", "dict.txt", "bpe.codes", "*.model", "*.tiktoken"),
)
"""Small files that describe a model and its tokenizer, by name or pattern."""
WEIGHTS = (
    ("model.safetensors", "model-*-of-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model-*-of-*.bin"),
)
OPEN_CLIP_WEIGHTS = (("open_clip_model.safetensors",), ("open_clip_pytorch_model.bin",))
"""Files of weights, the preferred form first; a repository often has several forms, and only one is downloaded."""

_READ_FAULTS = (
    *(OSError, ValueError, TypeError, KeyError, RuntimeError, EOFError, ImportError),
    *(pickle.UnpicklingError, SafetensorError, StrictDataclassError),
)


class ModelFolder(NamedTuple):
    """A folder with a model's files, and the flag and value that named it."""

    flag: str
    name: str
    path: Path

    def fault(self, message: str) -> InputError:
        """The error that names flag and value before the message."""
        return InputError(f"{self.flag} {self.name}: {message}")


def find_model(flag: str, name: "str | Path | ModelFolder", *, weights: bool = True) -> ModelFolder:
    """The folder itself, or the snapshot of a hub id in the cache, after downloading the files that it lacks.

    weights: without them only small files are fetched. InputError for an id that is in neither the cache nor the hub.
    """
    if isinstance(name, ModelFolder):
        return name
    if Path(name).is_dir():
        return ModelFolder(flag, str(name), Path(name))
    check_local(flag, str(name))
    with reading(flag, name):
        return ModelFolder(flag, str(name), _snapshot(str(name), weights))


def check_local(flag: str, name: str) -> None:
    """Raise InputError for a name that can only be a missing folder: to search the hub for it takes half a minute."""
    first = name.split("/")[0]
    if os.path.exists(name) or ":" in first:  # timm:NAME
        return
    if name.startswith((".", "~")) or name.count("/") > 1 or ("/" in name and os.path.isdir(first or "/")):
        here = f" ({first}/ is a folder here, and {name} no name for the hub)" if first and os.path.isdir(first) else ""
        raise InputError(f"{flag} {name}: there is no such folder{here}; give one that a run left, or that of a model")


def is_open_clip(folder: Path) -> bool:
    """The folder is in open_clip's format: it has no config.json of a model type that is read here."""
    if not (folder / OPEN_CLIP_CONFIG).is_file():
        return False
    settings = json.loads((folder / CONFIG).read_text()) if (folder / CONFIG).is_file() else {}
    return settings.get("model_type") not in MODEL_TYPES


def _snapshot(repo_id: str, weights: bool) -> Path:
    """The snapshot folder with the files that are read; where the hub cannot be reached, as the cache has it."""
    try:
        HfApi().model_info(repo_id, timeout=SECONDS_FOR_THE_HUB)  # snapshot_download alone would wait without limit
    except (HTTPError, OSError) as error:
        unknown = isinstance(error, RepositoryNotFoundError)
        reason = "no such model on the hub, or none that you may read" if unknown else f"no word from the hub: {error}"
        with raised_as(lambda _: OSError(reason), LocalEntryNotFoundError):
            return Path(snapshot_download(repo_id, allow_patterns=[], local_files_only=True))
    folder = Path(snapshot_download(repo_id, allow_patterns=list(DESCRIPTIONS)))
    for form in (OPEN_CLIP_WEIGHTS if is_open_clip(folder) else WEIGHTS) if weights else ():
        snapshot_download(repo_id, revision=folder.name, allow_patterns=list(form))
        if any(any(folder.glob(name)) for name in form):
            break
    return folder


@contextmanager
def quiet() -> Iterator[None]:
    """Hide transformers' progress bars and notes: they are about parts that we leave out on purpose."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    of_hub = hub_logging.get_verbosity()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(of_hub)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def reading(flag: str, value: str | Path) -> Iterator[None]:
    """Load a model's files quietly and without running code from them; faults raise InputError for the flag."""
    with raised_as(lambda fault: _unreadable(flag, value, fault), *_READ_FAULTS), quiet(), _tensors_alone():
        yield


@contextmanager
def _tensors_alone() -> Iterator[None]:
    """Make every torch.load refuse a pickle that needs more than tensors, those of torchvision and timm included."""
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def reason_of(fault: Exception) -> str:
    """A fault of a library that reads weights, in one line."""
    if isinstance(fault, pickle.UnpicklingError):
        return "a pickle with more than tensors in it, which could run code when read"
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()] or [type(fault).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _unreadable(flag: str, value: str | Path, fault: Exception) -> InputError:
    reason = reason_of(fault)
    if isinstance(fault, ImportError):
        return InputError(f"{flag} {value}: needs a package that is not installed ({reason.split('. ')[0]})")
    if isinstance(fault, pickle.UnpicklingError):
        return InputError(
            f"{flag} {value}: its weights are {reason}; use a safetensors version, or, if you trust the file, convert "
            "it: safetensors.torch.save_file(torch.load(FILE, weights_only=False), 'model.safetensors')"
        )
    if "trust_remote_code" in str(fault):
        return InputError(
            f"{flag} {value}: the model needs Python code from its own folder (auto_map in its json files), which is "
            "never run; use a model that transformers itself knows"
        )
    return InputError(
        f"{flag} {value}: cannot be loaded ({reason}). Give a local folder with config.json and model.safetensors, or "
        "an id of the Hugging Face hub; without a network an id works if the model is in the cache already (HF_HOME "
        "is its folder)"
    )
