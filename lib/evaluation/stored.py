"""Embeddings kept on disk: computed once for a model and its inputs, found again by the hash of both."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lib.data.durable import Damaged, load_checked, save_checked
from lib.distributed import gather_objects, rank_and_world_size
from lib.evaluation.embed import Embedded
from lib.files import without_secrets


@dataclass(frozen=True)
class StoredEmbeddings:
    """A folder of embeddings, a file each; all ranks call each method together."""

    folder: Path

    def find(self, name: str) -> Embedded | None:
        """What was stored under the name, on every rank; None unless every rank can read it."""
        file = self._file(name)
        found = _read(file)
        if not all(gather_objects(found is not None)):
            return None
        _tell(f"{name.partition('-')[0]} embeddings from an earlier evaluation: {file}")
        return found

    def keep(self, name: str, embedded: Embedded) -> None:
        """Store for later, whole or not at all; a folder that cannot be written is told and no fault."""
        # What a network withheld today may be there tomorrow.
        if rank_and_world_size()[0] > 0 or any(reason == "unreachable" for _, reason in embedded.skipped):
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tensors = {"embeds": embedded.embeds.contiguous(), "valid": embedded.valid}
            save_checked(tensors, self._file(name), {"skipped": without_secrets(json.dumps(embedded.skipped))})
        except OSError as fault:
            _tell(f"embeddings are not kept for a next time: {fault}; name another place with --cache-dir")

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _read(file: Path) -> Embedded | None:
    if not file.is_file():
        return None
    with suppress(Damaged):
        tensors, metadata = load_checked(file)
        skipped = [(key, reason) for key, reason in json.loads(metadata["skipped"])]
        return Embedded(tensors["embeds"], tensors["valid"], skipped)
    _tell(f"{file} is damaged: its embeddings are computed again")
    return None


def of_texts(embeds: Tensor) -> Embedded:
    """Embeddings of texts in the form that is stored: a text can always be read."""
    return Embedded(embeds, torch.ones(len(embeds), dtype=torch.bool), [])


def _tell(line: str) -> None:
    if rank_and_world_size()[0] == 0:
        print(line, flush=True)
