"""Embeddings stored on disk under a hash of the model and its inputs, so that each is computed once."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lib.data.durable import Damaged, load_checked, save_checked
from lib.distributed import gather_objects, rank_and_world_size
from lib.evaluation.embed import Embedded
from lib.files import without_secrets


@dataclass(frozen=True)
class StoredEmbeddings:
    """A folder of embeddings, one file per name; all ranks call each method together."""

    folder: Path

    def find(self, name: str) -> Embedded | None:
        """Embeddings stored under the name, on every rank; None unless every rank can read them."""
        file = self._file(name)
        found = _read(file)
        # Ranks on other machines may not see the file, and all must take the same branch: embedding is collective.
        if not all(gather_objects(found is not None)):
            return None
        _print_once(f"{name.partition('-')[0]} embeddings from an earlier evaluation: {file}")
        return found

    def keep(self, name: str, embedded: Embedded) -> None:
        """Store embeddings for later evaluations; prints a line if the folder cannot be written."""
        # An image that the network did not deliver today may be there tomorrow.
        if rank_and_world_size()[0] > 0 or any(reason == "unreachable" for _, reason in embedded.skipped):
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tensors = {"embeds": embedded.embeds.contiguous(), "valid": embedded.valid}
            save_checked(tensors, self._file(name), {"skipped": without_secrets(json.dumps(embedded.skipped))})
        except OSError as fault:
            _print_once(f"embeddings are not stored for later evaluations: {fault}; name another --cache-dir")

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _read(file: Path) -> Embedded | None:
    if not file.is_file():
        return None
    with suppress(Damaged):
        tensors, metadata = load_checked(file)
        skipped = [(key, reason) for key, reason in json.loads(metadata["skipped"])]
        return Embedded(tensors["embeds"], tensors["valid"], skipped)
    _print_once(f"{file} is damaged: its embeddings are computed again")
    return None


def _print_once(line: str) -> None:
    """Print on rank 0."""
    if rank_and_world_size()[0] == 0:
        print(line, flush=True)
