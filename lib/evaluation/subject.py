"""The subject of a task: a model, one part of the data, and how to run the one over the other."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lib.backends import Precision, auto_workers, choose_precision
from lib.data.durable import fingerprint
from lib.data.evaluation_set import EvaluationSet
from lib.data.fetcher import default_fetcher
from lib.data.fields import Columns
from lib.data.pipeline import ImagePipeline
from lib.data.recognize import Output
from lib.data.sources import EvaluationData
from lib.distributed import rank_and_world_size
from lib.errors import InputError, on_rank_0
from lib.evaluation.embed import Embedded, embed_images, embed_texts
from lib.evaluation.options import Common
from lib.evaluation.origin import trained_on
from lib.evaluation.outcome import data_facts
from lib.evaluation.stored import StoredEmbeddings, of_texts
from lib.evaluation.subset import limited
from lib.runs.checkpoint import BEST, newest_whole
from lib.towers import TwoTowers
from lib.towers.model_files import CONFIG, OPEN_CLIP_CONFIG, check_local, find_model, reading
from lib.towers.processing import Processing, read_settings

_FORMAT = 1
"""Of the stored embeddings: another number where the same model and inputs would give others."""

Needs = Literal["classes", "captions", "images"]


@dataclass(frozen=True)
class Model:
    """A pair of towers on a device, and what they want of their inputs."""

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
        """From an image to the pixels that the model takes, without augmentation."""
        return ImagePipeline(self.processing.image_size, self.processing.resize, "none")

    @cached_property
    def identity(self) -> str:
        """Changes when the weights do, the structure, the precision, or what is done to images and texts."""
        form = self.processing.image_mean, self.processing.image_std, self.pipeline
        towers, precision = self.towers, self.precision.identity()
        texts = self.processing.text_identity()
        return fingerprint(_FORMAT, *precision, towers.description, repr(towers), towers, form, texts)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and one part of the data; embeddings come from the cache where they were computed before."""

    model: Model
    data: EvaluationSet
    part: str
    """which part `data` is: "train", "val", "test", or "all" where there are none"""
    every_part: EvaluationData
    options: Common
    stored: StoredEmbeddings

    @classmethod
    def open(
        cls, model: str, options: Common, device: torch.device, *, needs: Needs, prompts: str | None = None
    ) -> "Subject":
        """Open the data, then load the model; InputError for what cannot be used or is of the wrong kind.

        needs: what the data must have besides images. prompts: bank or file of templates, None for the data's own.
        """
        fetcher = default_fetcher()
        fetcher = replace(fetcher, cache=options.run.cache_dir or fetcher.cache, allow_pipe=options.data.allow_pipe)
        every_part = EvaluationData.find(
            options.data.data,
            prompts,
            image_root=options.data.image_root,
            columns=Columns(options.data.image_column, options.data.caption_column),
            held_out_fraction=options.data.hold_out,
            captions=options.data.captions,
            fetcher=fetcher,
            output=Output("--output-dir", options.output_dir),
        )
        part = every_part.part_for(options.data.split)
        data = _limited(every_part.of_split(part), options.data.limit)
        _check_kind(data, needs)
        stored = StoredEmbeddings(fetcher.cache / "embeddings")
        loaded = Model.load(model, choose_precision(options.run.precision, device))
        subject = cls(model=loaded, data=data, part=part, every_part=every_part, options=options, stored=stored)
        if on_rank_0() and (warning := subject.warning):
            print(f"warning: {warning}", file=sys.stderr)
        return subject

    def of(self, part: str) -> "Subject | None":
        """The same model on another part, "train", "val" or "test"; None where the data has no such part."""
        if part == self.part:
            return self
        data = self.every_part.of(part)
        return None if data is None else replace(self, data=_limited(data, self.options.data.limit), part=part)

    @property
    def warning(self) -> str | None:
        """What the figures do not tell of this model on this part."""
        return trained_on(self.model.name, self.options.data, self.part)

    @property
    def measures(self) -> bool:
        """Whether this process is the one that measures; the others have done their share once all is embedded."""
        return rank_and_world_size()[0] == 0

    def facts(self, embedded: Embedded) -> dict[str, str]:
        """What was measured, for people."""
        facts = {"model": self.model.name, "precision": self.model.precision.name} | data_facts(self.data, embedded)
        return facts | ({"warning": warning} if (warning := self.warning) else {})

    @property
    def _workers(self) -> int:
        asked = self.options.run.workers
        if asked != "auto":
            return asked
        return 0 if self.options.data.data == "digits" else auto_workers()

    def embed_images(self) -> Embedded:
        """All images of the part, with a progress bar on rank 0; all ranks together."""
        keys, contents = self.data.image_keys, self.data.images.identity(np.arange(len(self.data)))
        name = f"image-{fingerprint(self.model.identity, keys, contents)}"
        found = self.stored.find(name)
        if found is None:
            with self.model.precision.autocast():
                found = embed_images(
                    self.model.towers,
                    self.data,
                    self.model.pipeline,
                    device=self.model.precision.device,
                    batch_size=self.options.run.batch_size,
                    workers=self._workers,
                    progress=True,
                )
            self.stored.keep(name, found)
        return found

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts (m) -> (m, D), each distinct one encoded once, with a progress bar on rank 0; all ranks together."""
        distinct = sorted(set(texts))
        name = f"text-{fingerprint(self.model.identity, distinct)}"
        found = self.stored.find(name)
        if found is None:
            with self.model.precision.autocast():
                embeds = embed_texts(
                    self.model.towers,
                    distinct,
                    self.model.processing.tokenize,
                    device=self.model.precision.device,
                    batch_size=self.options.run.batch_size,
                    progress=True,
                )
            found = of_texts(embeds)
            self.stored.keep(name, found)
        row_of = {text: row for row, text in enumerate(distinct)}
        return found.embeds[[row_of[text] for text in texts]]


def model_folder(model: str) -> str:
    """Where the weights are: of a run its export, else its best checkpoint; a hub id stays as it is."""
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
    """Raise InputError for a model of which not even config.json can be read, in a moment."""
    files = find_model(flag, model_folder(model), weights=False)
    with reading(flag, files.name):
        read_settings(files)


def _limited(data: EvaluationSet, limit: int | None) -> EvaluationSet:
    return data if limit is None else limited(data, limit)


def _check_kind(data: EvaluationSet, needs: Needs) -> None:
    if needs == "classes" and data.classes is None:
        raise InputError(f"{data.name} has captions and no classes: run `evaluate.py retrieval` on it instead")
    if needs == "captions" and data.captions is None:
        raise InputError(f"{data.name} has classes and no captions: run `evaluate.py zeroshot` on it instead")
