"""A step holds the same pairs at any number of ranks and workers and any chunk size, and counts add up."""

import multiprocessing
import os
import signal
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from made_shards import characters, first_step, rows
from PIL import Image

from lib.data import BadImage, ImagePipeline, Prepare, TrainingData, open_sources
from lib.data.pairs import IndexedSource, prompted_source
from lib.errors import InputError

EFFECTIVE_BATCH = 24
PIPELINE = ImagePipeline(8, augment="strong")


@dataclass(frozen=True)
class Noise:
    """Images of random pixels; those whose number is in `bad` cannot be read."""

    keys: list[str]
    bad: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.keys)

    def open(self, index: int, extent=None) -> Image.Image:
        if index in self.bad:
            raise BadImage("truncated" if index % 2 else "empty")
        return Image.fromarray(np.random.default_rng(index).integers(0, 256, (9, 7, 3), dtype=np.uint8))


def source(size: int = 37, bad: frozenset[int] = frozenset()) -> IndexedSource:
    images = Noise([f"image {index}" for index in range(size)], bad)
    templates = ("a {}", "the {}", "one {}", "some {}", "{}")
    return prompted_source(images, np.arange(size) % 3, ("ant", "bee", "cow"), templates, "noise", "test")


def training_data(
    pairs: IndexedSource,
    rank=0,
    world_size=1,
    workers=0,
    chunk_size=7,
    part_size=5,
    seed=3,
    batch=EFFECTIVE_BATCH,
    ahead=1,
    tokenize=characters,
):
    return TrainingData(
        pairs,
        Prepare(PIPELINE, tokenize),
        effective_batch=batch,
        chunk_size=chunk_size,
        part_size=part_size,
        chunks_ahead=ahead,
        rank=rank,
        world_size=world_size,
        workers=workers,
        seed=seed,
    )


def steps(first=0, last=4, world_size=1, pairs=None, **settings) -> list[list[tuple]]:
    """Pairs of each step, concatenated in rank order."""
    pairs = pairs or source()
    per_rank = [
        [rows(step) for step in training_data(pairs, rank, world_size, **settings).steps(first, last)]
        for rank in range(world_size)
    ]
    return [[row for part in parts for row in part] for parts in zip(*per_rank, strict=True)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    "chunk_size, part_size, workers",
    [(1, 5, 0), (5, 5, 0), (6, 4, 0), (100, 64, 0), (4, 7, 0), (5, 3, 1), (5, 64, 2), (7, 2, 2)],
)
def test_a_step_holds_the_same_pairs_however_it_is_made(world_size, chunk_size, part_size, workers):
    pairs = source(bad=frozenset({3, 8}))
    naive = steps(pairs=pairs, chunk_size=EFFECTIVE_BATCH, part_size=EFFECTIVE_BATCH)
    made = steps(pairs=pairs, world_size=world_size, chunk_size=chunk_size, part_size=part_size, workers=workers)
    assert made == naive
    assert all(len(step) == EFFECTIVE_BATCH for step in naive)


def test_another_seed_gives_another_order():
    assert steps(seed=3) == steps(seed=3)
    assert steps(seed=3) != steps(seed=4)


def test_every_pass_holds_every_pair_once_in_an_order_of_its_own():
    ids = [row[0] for step in steps(last=37) for row in step]  # 24 passes of 37
    passes = [ids[start : start + 37] for start in range(0, len(ids), 37)]
    assert all(sorted(each) == sorted(passes[0]) and len(set(each)) == 37 for each in passes)
    assert len(set(map(tuple, passes))) == len(passes)


def test_the_chunks_of_a_step_are_as_equal_as_can_be():
    for world_size, chunk_size, sizes in ((1, 7, [6] * 4), (1, 10, [8] * 3), (1, 5, [4, 5, 5, 5, 5]), (4, 7, [6])):
        step = first_step(training_data(source(), 0, world_size, chunk_size=chunk_size))
        assert [len(chunk) for chunk in step] == sizes
        assert step[0].pixel_values.dtype == torch.uint8
        assert {step[0].input_ids.dtype, step[0].group.dtype, step[0].sample_id.dtype} == {torch.int64}


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_in_the_middle_gives_the_tail_of_the_unbroken_run(workers):
    whole = steps(0, 6, workers=workers)
    assert steps(4, 6, workers=workers) == whole[4:]
    assert steps(4, 6, workers=workers) != whole[:2]


def test_a_batch_may_be_larger_than_the_source():
    ids = [row[0] for row in steps(0, 1, pairs=source(5), batch=32, chunk_size=9)[0]]
    counts = [ids.count(each) for each in set(ids)]
    assert len(counts) == 5 and max(counts) - min(counts) <= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_the_generator_that_dropout_draws_from_is_left_alone(workers):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    steps(0, 2, workers=workers)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("world_size, workers", [(1, 0), (2, 0), (2, 2)])
def test_counts_are_of_distinct_pairs_and_add_up(world_size, workers):
    bad = frozenset({1, 3, 8, 20})
    parts = [training_data(source(bad=bad), rank, world_size, workers) for rank in range(world_size)]
    for part in parts:
        assert len(list(part.steps(0, 6))) == 6  # nearly four passes
    read, used = sum(part.counts.read for part in parts), sum(part.counts.used for part in parts)
    skipped = {reason: sum(part.counts.skipped.get(reason, 0) for part in parts) for reason in ("truncated", "empty")}
    assert (read, used, skipped) == (37, 33, {"truncated": 2, "empty": 2})
    reported = [skip for part in parts for skip in part.new_skips()]
    assert sorted(skip.key for skip in reported) == sorted(f"image {index}" for index in bad)
    assert all(part.new_skips() == [] for part in parts)


def test_only_what_was_handed_out_is_counted():
    data = training_data(source(), workers=2)
    walk = data.steps(0, 3)
    list(next(walk))
    assert data.counts.read == EFFECTIVE_BATCH and data.state_dict()["step"] == 1
    walk.close()


def test_workers_outlive_the_signals_that_end_a_job():
    data = training_data(source(), workers=2)
    walk = data.steps(0, 6)
    taken = [rows(next(walk))]
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    taken += [rows(step) for step in walk]
    assert taken == steps(0, 6)


def refuse(texts: list[str]):
    raise RuntimeError("no tokenizer")


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_workers_arrive_and_nothing_is_left_running(workers):
    children = len(multiprocessing.active_children())
    data = training_data(source(), workers=workers, batch=4, chunk_size=2, tokenize=refuse)
    with pytest.raises(RuntimeError, match="no tokenizer"):
        first_step(data)
    walk = training_data(source(), workers=workers).steps(0, 100)
    next(walk)
    assert workers == len([thread for thread in threading.enumerate() if thread.name == "read ahead"])
    walk.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "read ahead"]
    for child in multiprocessing.active_children()[children:]:
        child.join(10)  # it was killed, which a busy machine may need a moment for
    assert len(multiprocessing.active_children()) == children


def test_bad_images_have_substitutes_of_their_own_group_and_text():
    bad = frozenset(range(0, 37, 2))
    for step in steps(pairs=source(bad=bad)):
        assert len(step) == EFFECTIVE_BATCH
    ids = {row[0] for step in steps(pairs=source(bad=bad), last=8) for row in step}
    good = {row[0] for step in steps(pairs=source(), last=2) for row in step}
    assert ids < good and len(ids) == 18


def test_resumed_counts_go_on_where_they_stopped():
    bad = frozenset({1, 20})
    unbroken = training_data(source(bad=bad))
    list(unbroken.steps(0, 3))
    first = training_data(source(bad=bad))
    list(first.steps(0, 1))
    second = training_data(source(bad=bad))
    second.load_state_dict(first.state_dict())
    list(second.steps(1, 3))
    assert second.counts == unbroken.counts and second.counts.skipped


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_without_a_readable_image_is_an_error_and_no_endless_loop(workers):
    with pytest.raises(InputError, match="cannot be read") as error:
        list(training_data(source(bad=frozenset(range(37))), workers=workers).steps(0, 1))
    assert "Traceback" not in str(error.value)


def test_one_good_image_is_found_among_bad_ones():
    alone = steps(0, 1, pairs=source(bad=frozenset(range(36))))
    assert len({row[0] for row in alone[0]}) == 1


def test_the_folder_made_to_break_readers_is_counted_to_the_file(shared, tmp_path):
    names = sorted(path.name for path in (shared / "data" / "broken").iterdir())
    lines = ["filename,caption"] + [f"{name},a picture called {name}" for name in names] + ["gone.jpg,not there"]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    (tmp_path / "images").symlink_to(shared / "data" / "broken")
    pairs, _ = open_sources(str(tmp_path / "table.csv"), None, None)
    data = training_data(pairs, batch=10)
    list(data.steps(0, 2))
    assert data.counts.read == len(names) + 1 == 15 and data.counts.used == 9
    assert data.counts.skipped == {
        "missing": 1,
        "empty": 1,
        "truncated": 2,
        "not_an_image": 1,
        "oversized": 1,
    }
    assert len(data.new_skips()) == 6
    for rank, read in ((0, 1), (1, 0)):
        assert training_data(pairs, rank, 2, batch=10).counts.read == read  # left out by the table: rank 0 counts


def test_digits_are_prepared_at_the_size_asked_for():
    pairs, held_out = open_sources("digits", None, None)
    data = TrainingData(
        pairs,
        Prepare(ImagePipeline(28), characters),
        effective_batch=64,
        chunk_size=64,
        rank=0,
        world_size=1,
        workers=0,
        seed=0,
    )
    (chunk,) = first_step(data)
    assert chunk.pixel_values.shape == (64, 3, 28, 28)
    assert pairs.size + len(held_out) == 1797 and not set(pairs.images.keys) & set(held_out.image_keys)


def test_a_batch_that_does_not_divide_over_the_ranks_is_refused():
    with pytest.raises(ValueError, match="24 does not divide over 5 ranks"):
        training_data(source(), 0, 5)
