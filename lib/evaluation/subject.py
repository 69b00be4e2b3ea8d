"""The subject of a task: a model, one split of the data, and the embeddings stored for both."""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lib.backends import Precision, auto_workers, choose_precision
from lib.data.durable import Damaged, fingerprint, load_checked, save_checked
from lib.data.evaluation_set import EvaluationSet, limited
from lib.data.fetcher import default_fetcher
from lib.data.fields import Columns
from lib.data.pipeline import ImagePipeline
from lib.data.recognize import Output
from lib.data.sources import EvaluationData
from lib.distributed import gather_objects, rank_and_world_size
from lib.errors import InputError, on_rank_0
from lib.evaluation.embed import Embedded, embed_images, embed_texts
from lib.evaluation.origin import seen_before
from lib.evaluation.report import data_facts
from lib.evaluation.tasks import CommonFlags
from lib.files import without_secrets
from lib.runs.checkpoint import BEST, newest_whole
from lib.towers import TwoTowers
from lib.towers.model_files import CONFIG, OPEN_CLIP_CONFIG, check_local, find_model, reading
from lib.towers.processing import Processing, read_settings

_FORMAT = 1
"""Version of the stored embeddings: raise it when the same model and inputs give other embeddings."""

Needs = Literal["classes", "captions", "either"]


@dataclass(frozen=True)
class Model:
    """A pair of towers on a device, and the processing of their inputs."""

    name: str
    """the folder of the weights, or the hub id"""
    towers: TwoTowers
    processing: Processing
    precision: Precision

    @classmethod
    def load(cls, name: str, precision: Precision) -> "Model":
        """Load a run, checkpoint or export folder, or a CLIP or SigLIP model by hub id or folder, on a device."""
        folder = model_folder(name)
        files = find_model("--model", folder)
        towers, processing = TwoTowers.from_pretrained(files), Processing.from_pretrained(files)
        return cls(folder, towers.to(precision.device), processing, precision)

    @property
    def pipeline(self) -> ImagePipeline:
        """Image to pixels of the model, without augmentation."""
        return ImagePipeline(self.processing.image_size, self.processing.resize, "none")

    @cached_property
    def identity(self) -> str:
        """Hash of the weights, the structure, the precision and the processing of images and texts."""
        form = self.processing.image_mean, self.processing.image_std, self.pipeline
        towers, precision = self.towers, self.precision.identity()
        texts = self.processing.text_identity()
        return fingerprint(_FORMAT, *precision, towers.description, repr(towers), towers, form, texts)


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


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and one split of the data; embeddings that were computed before come from the cache."""

    model: Model
    data: EvaluationSet
    split: str
    """name of the split: "train", "val", "test", or "all" for data without splits"""
    every_split: EvaluationData
    options: CommonFlags
    stored: StoredEmbeddings

    @classmethod
    def open(
        cls, model: str | Model, options: CommonFlags, device: torch.device, *, needs: Needs, prompts: str | None = None
    ) -> "Subject":
        """Open the data, then load the model; InputError if either cannot be used or the data is of the wrong kind.

        model: its name, or one that is loaded already. needs: what the data must have besides images; either: classes
        or captions. prompts: bank or file of templates, None for the data's own.
        """
        fetcher = default_fetcher()
        fetcher = replace(fetcher, cache=options.run.cache_dir or fetcher.cache, allow_pipe=options.data.allow_pipe)
        every_split = EvaluationData.find(
            options.data.data,
            prompts,
            image_root=options.data.image_root,
            columns=Columns(options.data.image_column, options.data.caption_column),
            held_out_fraction=options.data.hold_out,
            captions=options.data.captions,
            fetcher=fetcher,
            output=Output("--output-dir", options.output_dir),
        )
        split = every_split.part_for(options.data.split)
        data = limited(every_split.of_split(split), options.data.limit)
        if needs == "classes" and data.classes is None:
            raise InputError(f"{data.name} has captions and no classes: run `evaluate.py retrieval` on it instead")
        if needs == "captions" and data.captions is None:
            raise InputError(f"{data.name} has classes and no captions: run `evaluate.py zeroshot` on it instead")
        stored = StoredEmbeddings(fetcher.cache / "embeddings")
        loaded = Model.load(model, choose_precision(options.run.precision, device)) if isinstance(model, str) else model
        subject = cls(model=loaded, data=data, split=split, every_split=every_split, options=options, stored=stored)
        if on_rank_0() and (warning := subject.warning):
            print(f"warning: {warning}", file=sys.stderr)
        return subject

    def of(self, split: str) -> "Subject | None":
        """The same model on another split, "train", "val" or "test"; None if the data does not have it."""
        if split == self.split:
            return self
        data = self.every_split.of(split)
        return None if data is None else replace(self, data=limited(data, self.options.data.limit), split=split)

    @property
    def warning(self) -> str | None:
        """A sentence if the model was trained on these images or chosen by them, else None."""
        return self.warning_about(self.model.name)

    def warning_about(self, model: str) -> str | None:
        """The same for another model."""
        return seen_before(model, self.options.data, self.split, self.every_split.opened.splits)

    @property
    def measures(self) -> bool:
        """True on rank 0, which measures alone once all ranks have embedded."""
        return rank_and_world_size()[0] == 0

    def facts(self, embedded: Embedded) -> dict[str, str]:
        """Model, precision and data, for people."""
        facts = {"model": self.model.name, "precision": self.model.precision.name} | data_facts(self.data, embedded)
        return facts | ({"warning": warning} if (warning := self.warning) else {})

    @property
    def _workers(self) -> int:
        asked = self.options.run.workers
        if asked != "auto":
            return asked
        return 0 if self.options.data.data == "digits" else auto_workers()

    def embed_images(self) -> Embedded:
        """Embeddings of all images of the split, with a progress bar on rank 0; all ranks call this together."""
        keys, contents = self.data.image_keys, self.data.images.identity(np.arange(len(self.data)))
        return self._stored_or(
            f"image-{fingerprint(self.model.identity, keys, contents)}",
            lambda: embed_images(
                self.model.towers,
                self.data,
                self.model.pipeline,
                device=self.model.precision.device,
                batch_size=self.options.run.batch_size,
                workers=self._workers,
                progress=True,
            ),
        )

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts (m) -> (m, D), each distinct one encoded once, with a progress bar; all ranks call this together."""
        distinct = sorted(set(texts))

        def embed() -> Embedded:
            towers, tokenize, run = self.model.towers, self.model.processing.tokenize, self.options.run
            device = self.model.precision.device
            embeds = embed_texts(towers, distinct, tokenize, device=device, batch_size=run.batch_size, progress=True)
            return Embedded(embeds, torch.ones(len(embeds), dtype=torch.bool), [])

        found = self._stored_or(f"text-{fingerprint(self.model.identity, distinct)}", embed)
        row_of = {text: row for row, text in enumerate(distinct)}
        return found.embeds[[row_of[text] for text in texts]]

    def _stored_or(self, name: str, embed: Callable[[], Embedded]) -> Embedded:
        found = self.stored.find(name)
        if found is None:
            with self.model.precision.autocast():
                found = embed()
            self.stored.keep(name, found)
        return found


def model_folder(model: str) -> str:
    """Folder of the weights: a run's export, else its best or newest checkpoint; a hub id stays as it is."""
    root = Path(model)
    if not root.is_dir():
        check_local("--model", model)
        return model
    for folder in (root, root / "export", root / "checkpoints" / BEST, newest_whole(root / "checkpoints")):
        if folder and ((folder / CONFIG).is_file() or (folder / OPEN_CLIP_CONFIG).is_file()):
            return str(folder)
    raise InputError(
        f"--model {model} holds no model: no config.json in it or in its export/, and no checkpoint; name a run, a "
        "checkpoint or an export"
    )


def check_there(model: str, flag: str) -> None:
    """Raise InputError if the model's config.json cannot be read; loads no weights."""
    files = find_model(flag, model_folder(model), weights=False)
    with reading(flag, files.name):
        read_settings(files)
