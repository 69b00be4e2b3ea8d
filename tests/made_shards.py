"""Small tar shards for tests, a remote that can be down, and training data that records the yielded pairs."""

import io
import tarfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lib.data import ImagePipeline, Prepare, TrainingData
from lib.data.fetcher import Fetcher, Unreachable

EFFECTIVE_BATCH = 12


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def tar_bytes(members: dict[str, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def make_tar(path: Path, members: dict[str, bytes]) -> None:
    path.write_bytes(tar_bytes(members))


def captioned(numbers: range) -> dict[str, bytes]:
    """Members of good samples."""
    return {
        f"{number:04d}.{suffix}": content
        for number in numbers
        for suffix, content in (("png", png(number)), ("txt", f"caption {number}".encode()))
    }


def make_shards(folder: Path, shards: int, samples: int = 12) -> str:
    """Captioned shards; in each, sample 1 has a broken image, 2 no text and 3 an empty caption."""
    for shard in range(shards):
        members = {}
        for number in range(samples):
            image = png(shard * samples + number)
            members[f"{number:04d}.png"] = image[:40] if number == 1 else image
            if number != 2:
                members[f"{number:04d}.txt"] = b" \n" if number == 3 else f"{shard} {number}".encode()
        make_tar(folder / f"part-{shard}.tar", members)
    return str(folder / "part-*.tar")


@dataclass(frozen=True)
class Remote(Fetcher):
    """Writes requested shards to a file; those with a word of `down` in their name are unreachable."""

    log: Path = field(kw_only=True)
    down: tuple[str, ...] = ()

    def local(self, shard: str) -> str:
        with open(self.log, "a") as log:
            log.write(f"{shard}\n")
        if any(word in shard for word in self.down):
            raise Unreachable("unreachable")
        return shard.removeprefix("far://")

    def opened(self) -> set[str]:
        """The names of the shards asked for since the last call."""
        asked = self.log.read_text().split() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return {Path(shard).name for shard in asked}


def characters(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """A tokenizer of fixed length, so that chunks of any texts compare."""
    input_ids = torch.tensor([[ord(letter) for letter in text.ljust(12)[:12]] for text in texts])
    return input_ids, torch.ones_like(input_ids)


class Watched(TrainingData):
    """Keeps the ids of the pairs of the first pass."""

    first_pass: list[int]

    def _handed_out(self, filled):
        return super()._handed_out(map(self._noted, filled))

    def _noted(self, filled):
        # A stream's pairs of a pass come before those of the next; here a chunk is what one worker sent.
        (progress,) = filled.progress
        self.first_pass += filled.chunk.sample_id[: progress.tally.used].tolist()
        return filled


def training_data(
    source, rank=0, world_size=1, workers=0, seed=3, shuffle_buffer=4, chunk_size=5, augment="light"
) -> Watched:
    """By default with a buffer smaller than a shard, so that it is both filled and drained."""
    data = Watched(
        source,
        Prepare(ImagePipeline(8, augment=augment), characters),
        effective_batch=EFFECTIVE_BATCH,
        chunk_size=chunk_size,
        part_size=chunk_size,
        rank=rank,
        world_size=world_size,
        workers=workers,
        seed=seed,
        shuffle_buffer=shuffle_buffer,
    )
    data.first_pass = []
    return data


def all_ranks(source, world_size: int, **settings) -> list[Watched]:
    return [training_data(source, rank, world_size, **settings) for rank in range(world_size)]


def first_step(data: TrainingData, first: int = 0) -> list:
    """The chunks of one step; their images are of no use after it."""
    walk = data.steps(first, first + 1)
    return [replace(chunk, pixel_values=chunk.pixel_values.clone()) for chunk in next(walk)]


def rows(step) -> list[tuple]:
    """A step's pairs, each with every bit that a tower sees."""
    return [
        (
            int(chunk.sample_id[row]),
            int(chunk.group[row]),
            chunk.input_ids[row].tolist(),
            chunk.pixel_values[row].tolist(),
        )
        for chunk in step
        for row in range(len(chunk))
    ]


def through_a_file(state: dict) -> dict:
    """The state as loaded from a checkpoint, without unpickling."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def plain(value: object) -> object:
    """Tensors as lists, so that states compare."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def totals(parts: list[TrainingData]) -> tuple[int, int, dict[str, int]]:
    """(read, used, skipped by reason) of all ranks."""
    skipped: dict[str, int] = {}
    for part in parts:
        for reason, count in part.counts.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
    return sum(part.counts.read for part in parts), sum(part.counts.used for part in parts), skipped
