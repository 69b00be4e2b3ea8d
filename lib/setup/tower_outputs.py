"""Outputs of frozen trunks, computed once and stored (--store-outputs): every later step reads them instead.

The name of a folder is a hash of everything that the outputs depend on: the trunk's weights and structure, the
tokenizer or the form of the images, and the texts or image files themselves. A change makes another folder.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from lib.backends.precision import Precision
from lib.data import IndexedSource, Prepare, Source
from lib.data.durable import Damaged, fingerprint, load_checked, save_checked
from lib.data.order import stable_hash
from lib.data.pairs import Images, parts_of
from lib.data.prepare import MANIFEST, StoredOutputs, text_key
from lib.data.shard_images import shard_images
from lib.data.shard_source import ShardSource
from lib.distributed import gather_objects, rank_and_world_size
from lib.errors import InputError, raised_as
from lib.evaluation.embed import counted, evaluating, image_loader
from lib.files import write_text
from lib.towers import TwoTowers
from lib.towers.processing import Processing
from lib.towers.tower import ImageTower, TextTower

BLOCK = 4096
"""Rows of a file: an interruption loses at most so many on each rank."""

_FORMAT = 2

Batches = Callable[[range], Iterator[tuple[dict[str, Tensor], Sequence[str]]]]
"""Rows to batches of what the towers take, with a reason for each row that could not be read, empty for the others."""


@dataclass(frozen=True)
class FrozenTrunks:
    """Computes and stores the outputs of those trunks that are frozen."""

    towers: TwoTowers
    processing: Processing
    cache: Path
    """--cache-dir, in which each set of outputs has its own folder."""
    precision: Precision
    """The towers' device and precision; outputs are stored in float32."""
    workers: int
    """Processes that decode images."""
    batch_size: int = 256

    def store(
        self, prepare: Prepare, source: Source, more_texts: Sequence[str] = (), also_training: bool = False
    ) -> Prepare:
        """The same Prepare with stored outputs of every frozen trunk whose inputs are not random.

        Augmented images are random. In a mixture of sources one name may belong to different images, so none of their
        outputs are stored. more_texts: texts that are encoded besides the source's. also_training: the present outputs
        of trunks that will train, too.
        """
        frozen = also_training or self.towers.image_trunk_frozen
        if frozen and prepare.images.augment == "none" and len(parts_of(source)) == 1:
            prepare = replace(prepare, image_outputs=self._images(source, prepare))
        if also_training or self.towers.text_trunk_frozen:
            prepare = replace(prepare, text_outputs=self._texts({*source.sample_texts(sys.maxsize), *more_texts}))
        return prepare

    def _texts(self, distinct: set[str]) -> StoredOutputs:
        """Outputs of the text trunk for these texts."""
        # Texts of like length share a batch, so little of it is padding.
        texts = sorted(distinct, key=lambda text: (len(text), text))
        keys = np.array([text_key(text) for text in texts], dtype=np.int64)

        def batches(rows: range) -> Iterator[tuple[dict[str, Tensor], Sequence[str]]]:
            for start in range(rows.start, rows.stop, self.batch_size):
                batch = texts[start : min(start + self.batch_size, rows.stop)]
                input_ids, attention_mask = self.processing.tokenize(batch)
                yield {"input_ids": input_ids, "attention_mask": attention_mask}, [""] * len(batch)

        tower = self.towers.text
        name = self._name("text", _structure(tower), tower.trunk, self.processing.text_identity(), keys)
        return self._stored(f"text-{name}", keys, batches, "text")

    def _images(self, source: Source, prepare: Prepare) -> StoredOutputs:
        """Outputs of the image trunk for every image of the source; those that cannot be read are noted."""
        images, used, keys = _by_number(source)

        def batches(rows: range) -> Iterator[tuple[dict[str, Tensor], Sequence[str]]]:
            loader = image_loader(
                images.open,
                prepare.images,
                used[rows.start : rows.stop].tolist(),
                device=self.precision.device,
                batch_size=self.batch_size,
                workers=self.workers,
            )
            for pixel_values, reasons in loader:
                yield {"pixel_values": pixel_values}, reasons

        form = (self.processing.image_mean, self.processing.image_std, prepare.images)
        contents = images.identity(used)
        tower = self.towers.image
        name = self._name("image", _structure(tower), tower.trunk, form, keys, contents)
        return self._stored(f"image-{name}", keys, batches, "image")

    def _name(self, *parts: object) -> str:
        return fingerprint(_FORMAT, *self.precision.identity(), *parts)

    def _stored(self, name: str, keys: np.ndarray, batches: Batches, tower: str) -> StoredOutputs:
        """The outputs in the folder of that name, computed where they are missing; each rank computes whole blocks."""
        folder = self.cache / "outputs" / name
        _make(folder, tower)
        with _alone(folder):
            self._fill(folder, keys, batches, tower)
        stored = StoredOutputs(folder)
        if not len(stored):
            reasons = counted(stored.unreadable.values())
            raise InputError(f"--data: none of the images can be read ({reasons})")
        return stored

    def _fill(self, folder: Path, keys: np.ndarray, batches: Batches, tower: str) -> None:
        """Compute the blocks that are missing or damaged."""
        rank, world_size = rank_and_world_size()
        blocks = [range(start, min(start + BLOCK, len(keys))) for start in range(0, len(keys), BLOCK)]
        unreadable: dict[int, str] = {}
        # Every rank has the same blocks and takes its own; no collective until all are done.
        with evaluating(self.towers), self.precision.autocast(), _bar(tower, len(keys), rank) as bar:
            for number, rows in list(enumerate(blocks))[rank::world_size]:
                unreadable |= self._block(folder / _block_name(number), keys, rows, batches, tower, bar)
        found = gather_objects(unreadable)
        if rank == 0:
            names = [_block_name(number) for number in range(len(blocks))]
            _list_blocks(folder, names, {str(key): why for of_rank in found for key, why in of_rank.items()})
        gather_objects(None)  # a barrier: no rank reads before rank 0 has written

    def _block(
        self, file: Path, keys: np.ndarray, rows: range, batches: Batches, tower: str, bar: tqdm
    ) -> dict[int, str]:
        """Compute and write a block, unless it is there whole; returns {key: reason} of unreadable images."""
        if file.is_file():
            with suppress(Damaged):
                stored, metadata = load_checked(file)
                unreadable = {int(key): reason for key, reason in json.loads(metadata["unreadable"]).items()}
                own = keys[rows.start : rows.stop]
                if np.array_equal(stored["keys"].numpy(), own[~np.isin(own, list(unreadable))]):
                    bar.update(len(rows))
                    return unreadable
            bar.write(f"{file} is damaged: its outputs are computed again")
        pooled: list[Tensor] = []
        reasons: list[str] = []
        device = self.precision.device
        for inputs, reasons_of_batch in batches(rows):
            output = self.towers(**{name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()})
            pooled.append((output.image_pooled if tower == "image" else output.text_pooled).float().cpu())
            reasons += reasons_of_batch
            bar.update(len(reasons_of_batch))
        good = torch.tensor([not reason for reason in reasons])
        own_keys = torch.from_numpy(keys[rows.start : rows.stop])
        unreadable = {int(key): reason for key, reason in zip(own_keys, reasons, strict=True) if reason}
        computed = {"keys": own_keys[good].contiguous(), "pooled": torch.cat(pooled)[good].contiguous()}
        save_checked(computed, file, {"unreadable": json.dumps(unreadable)})
        return unreadable


def _by_number(source: Source) -> tuple[Images, np.ndarray, np.ndarray]:
    """The images of a source, the rows of those in use, and the keys that pairs look them up by."""
    if isinstance(source, IndexedSource):
        used = np.unique(source.image)
        return source.images, used, source.image_id[used]
    assert isinstance(source, ShardSource)
    images = shard_images(source)
    keys = np.array([stable_hash(key) for key in images.keys], dtype=np.int64)
    return images, np.arange(len(images)), keys


def _structure(tower: ImageTower | TextTower) -> object:
    """Properties of a trunk, besides its weights, that its output depends on."""
    heads = getattr(getattr(tower.trunk, "config", None), "num_attention_heads", None)
    how = tower.interpolate if isinstance(tower, ImageTower) else tower.masked
    return type(tower.trunk).__name__, repr(tower.trunk), heads, tower.pooling, how


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One run at a time: rank 0 holds a lock, and the other ranks wait until it does."""
    lock = FileLock(folder / ".lock") if rank_and_world_size()[0] == 0 else nullcontext()
    with lock:
        gather_objects(None)
        yield


def _make(folder: Path, tower: str) -> None:
    words = f"the outputs of the frozen {tower} trunk cannot be stored in {folder}"
    remedy = "name another folder with --cache-dir, or use --store-outputs off"
    with raised_as(lambda fault: InputError(f"{words} ({fault}); {remedy}"), OSError):
        folder.mkdir(parents=True, exist_ok=True)


def _list_blocks(folder: Path, blocks: list[str], unreadable: dict[str, str]) -> None:
    """Write the manifest, whole or not at all."""
    with safe_open(folder / blocks[0], framework="pt") as block:
        width = block.get_slice("pooled").get_shape()[1]
    write_text(folder / MANIFEST, json.dumps({"width": width, "blocks": blocks, "unreadable": unreadable}))


def _block_name(number: int) -> str:
    return f"block_{number:05d}.safetensors"


def _bar(tower: str, total: int, rank: int) -> tqdm:
    return tqdm(total=total, desc=f"{tower} tower, once", disable=rank > 0, leave=False)
