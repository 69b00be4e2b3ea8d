"""Files that are checked when they are read: tensors with a digest, folders with a manifest of hashes."""

import hashlib
import json
import os
from collections.abc import Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lib.errors import InputError, raised_as
from lib.files import write_text

FORMAT = 1
"""Version of the manifests; older folders have none, and sizes instead of hashes."""
_DIGEST = "blake2b"


class Damaged(Exception):
    """A file that is cut short or holds other bytes than were written."""


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, with the permissions that the umask gives."""
    file.touch()  # safetensors replaces it by a file that only its owner can read
    mode = file.stat().st_mode & 0o777
    with raised_as(lambda fault: OSError(f"{file}: {fault}"), SafetensorError):
        save_file(dict(tensors), file, dict(metadata or {}))
    file.chmod(mode)


def save_checked(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file that `load_checked` can verify, whole or not at all."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.unfinished")
    try:
        save_tensors(tensors, unfinished, {**(metadata or {}), _DIGEST: digest_of(tensors)})
        # Flushed before the rename, which is atomic: under its final name the file is whole, even after a power cut.
        flush(unfinished)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def load_checked(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Load the tensors (memory-mapped) and the metadata that `save_checked` wrote; raises Damaged."""
    with (
        raised_as(lambda fault: Damaged(f"{file}: {fault}"), OSError, SafetensorError),
        safe_open(file, framework="pt") as stored,
    ):
        metadata = stored.metadata() or {}
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no dictionary
    if metadata.pop(_DIGEST, None) != digest_of(tensors):
        raise Damaged(f"{file}: holds other bytes than were written")
    return tensors, metadata


def seal(folder: Path, manifest: str, values: Mapping[str, object]) -> None:
    """Flush every file of the folder to the disk, then write the manifest of their hashes, with these values."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    with ThreadPoolExecutor(4) as pool:  # hashing and flushing release Python's lock
        entries = list(pool.map(_sealed, files))
    names = [str(file.relative_to(folder)) for file in files]
    content = {"version": FORMAT, **values, "files": dict(zip(names, entries, strict=True))}
    write_text(folder / manifest, json.dumps(content, indent=1))


def read_manifest(folder: Path, manifest: str) -> dict | None:
    """The manifest that `seal` wrote, None if a file is missing or has another size; InputError for newer versions."""
    try:
        content = json.loads((folder / manifest).read_bytes())
        version, files = content.get("version", 0), content["files"]
        whole = all((folder / name).stat().st_size == _size(entry) for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(version, int) or version > FORMAT:
        raise InputError(
            f"{folder / manifest} has format version {version}, and this program reads up to {FORMAT}: update it"
        )
    return content if whole else None


def find_damage(folder: Path, manifest: str, names: Container[str] | None = None) -> str | None:
    """Name of a file (one of `names`, if given) that has changed since it was sealed, or of the manifest; or None."""
    content = read_manifest(folder, manifest)
    if content is None:
        return manifest
    hashes = {
        name: entry[_DIGEST]
        for name, entry in content["files"].items()
        if isinstance(entry, dict) and (names is None or name in names)
    }
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda name: _hash(folder / name), hashes)
        return next((name for name, is_now in zip(hashes, found, strict=True) if is_now != hashes[name]), None)


def check_model(folder: Path) -> None:
    """Raise InputError for a checkpoint or export whose model is not as it was written."""
    for manifest in ("checkpoint.json", "export.json"):
        damaged = find_damage(folder, manifest, ("config.json", "model.safetensors"))
        if damaged not in (None, manifest):
            raise InputError(f"{folder} is damaged: its {damaged} is not what was written; name another checkpoint")


def flush(path: Path) -> None:
    """Force a file's content or a folder's entries to the disk, which a power cut could otherwise take back."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sealed(file: Path) -> dict[str, int | str]:
    flush(file)
    return {"bytes": file.stat().st_size, _DIGEST: _hash(file)}


def _size(entry: int | dict) -> int:
    return entry["bytes"] if isinstance(entry, dict) else entry


def _hash(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, lambda: blake2b(digest_size=16)).hexdigest()


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """A hash of contiguous tensors on the CPU with their names, dtypes and shapes."""
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(*parts: object) -> str:
    """A hash of the parts: modules by their weights, arrays by their bytes, other objects by their repr."""
    digest = blake2b(digest_size=12)
    for part in parts:
        if isinstance(part, torch.nn.Module):
            for name, tensor in sorted(part.state_dict().items()):
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy() if tensor.ndim else b"")
                digest.update(repr(tensor.item()).encode() if not tensor.ndim else b"")
        elif isinstance(part, np.ndarray):
            digest.update(np.ascontiguousarray(part).tobytes())
        else:
            digest.update(repr(part).encode())
        digest.update(b"\x1f")
    return digest.hexdigest()
