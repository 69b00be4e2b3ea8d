"""Mixtures: sources are drawn by weight, each is read pass after pass, and a killed run resumes with the same pairs."""

import warnings
from dataclasses import asdict, dataclass
from itertools import chain

import numpy as np
import pytest
from made_shards import all_ranks, captioned, first_step, make_tar, plain, rows, through_a_file, totals, training_data
from PIL import Image

from lib.data import BadImage, open_sources, step_parts
from lib.data.order import salted, stable_hash
from lib.data.pairs import IndexedSource, MixedSource, Source, prompted_source
from lib.data.shard_source import count_pairs


@dataclass(frozen=True)
class Noise:
    """Images of random pixels; those whose number is in `bad` cannot be read."""

    keys: list[str]
    bad: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.keys)

    def open(self, index: int, extent=None) -> Image.Image:
        if index in self.bad:
            raise BadImage("truncated")
        return Image.fromarray(np.random.default_rng(index).integers(0, 256, (9, 7, 3), dtype=np.uint8))


def indexed(size: int = 11, bad: frozenset[int] = frozenset()) -> IndexedSource:
    images = Noise([f"image {index}" for index in range(size)], bad)
    return prompted_source(images, np.arange(size) % 3, ("ant", "bee", "cow"), ("a {}", "the {}"), "noise", "test")


def mixed(*parts: Source, weights: tuple[float, ...]) -> MixedSource:
    sizes = [part.size for part in parts]
    size = None if None in sizes else sum(sizes)
    return MixedSource(where="all", description="all", size=size, parts=parts, weights=weights)


@pytest.fixture
def three(tmp_path) -> MixedSource:
    """Five shards of captions, eleven prompted images of which two are bad, and a shard of its own."""
    for number in range(5):
        make_tar(tmp_path / f"a-{number}.tar", captioned(range(6 * number, 6 * number + 6)))
    make_tar(tmp_path / "b.tar", captioned(range(7)))
    shards, one = (open_sources(str(tmp_path / pattern), None, None)[0] for pattern in ("a-*.tar", "b.tar"))
    return mixed(shards, indexed(bad=frozenset({2, 5})), one, weights=(0.5, 0.3, 0.2))


@pytest.fixture
def first_passes(tmp_path, monkeypatch):
    """Reads the ids that streams and workers yielded in the first pass of any source since the last call."""
    log, original = tmp_path / "first_passes", step_parts._Stream.pair

    def pair(stream, tally):
        before = tally.used
        found = original(stream, tally)
        if tally.used > before:
            with open(log, "a") as file:
                file.write(f"{found.sample_id}\n")
        return found

    def read() -> list[int]:
        ids = [int(line) for line in log.read_text().split()]
        log.unlink()
        return ids

    monkeypatch.setattr(step_parts._Stream, "pair", pair)
    return read


def ids_of_parts(source: MixedSource) -> list[list[int]]:
    """Ids of the good pairs of each source."""
    first = [stable_hash(f"a-{n // 6}.tar/{n:04d}") for n in range(30)]
    second = [stable_hash(f"image {n}") for n in range(11) if n not in (2, 5)]
    third = [stable_hash(f"b.tar/{n:04d}") for n in range(7)]
    return [[salted(id, part) for id in ids] for part, ids in enumerate((first, second, third))]


def test_parts_are_drawn_by_weight(three):
    ids = ids_of_parts(three)
    counts = np.zeros(3)
    for data in all_ranks(three, 2, augment="none"):
        given = [id for step in data.steps(0, 150) for chunk in step for id in chunk.sample_id.tolist()]
        counts += [sum(id in part for id in given) for part in map(set, ids)]
    assert counts.sum() == 1800 and np.abs(counts / 1800 - three.weights).max() < 0.035  # three deviations


@pytest.mark.parametrize("world_size, workers", [(1, 0), (2, 3), (4, 1)])
def test_every_part_gives_each_good_pair_once_a_pass(three, first_passes, world_size, workers):
    parts = all_ranks(three, world_size, workers=workers, augment="none")
    for data in parts:
        assert [sum(map(len, step)) for step in data.steps(0, 16)] == [12 // world_size] * 16
    assert sorted(first_passes()) == sorted(chain(*ids_of_parts(three)))
    assert totals(parts) == (30 + 11 + 7, 30 + 9 + 7, {"truncated": 2})
    skips = [tuple(skip) for data in parts for skip in data.new_skips()]
    assert sorted(skips) == [("noise", "image 2", "truncated"), ("noise", "image 5", "truncated")]


@pytest.mark.parametrize("world_size, workers", [(1, 0), (2, 3)])
def test_a_killed_and_resumed_mixture_gives_exactly_the_pairs_of_the_unbroken_one(three, world_size, workers):
    rank = world_size - 1
    unbroken = training_data(three, rank, world_size, workers)
    whole, states = [], [through_a_file(unbroken.state_dict())]
    for step in unbroken.steps(0, 12):
        whole.append(rows(step))
        states.append(through_a_file(unbroken.state_dict()))
    for place in (2, 9):
        resumed = training_data(three, rank, world_size, workers)
        resumed.load_state_dict(states[place])
        assert [rows(step) for step in resumed.steps(place, 12)] == whole[place:]
        assert plain(resumed.state_dict()) == plain(unbroken.state_dict())
    for name in ("draws", "parts"):  # without either the pairs are others
        positions = [
            position | {name: first[name]}
            for position, first in zip(states[9]["positions"], states[0]["positions"], strict=True)
        ]
        forgetful = training_data(three, rank, world_size, workers)
        forgetful.load_state_dict(states[9] | {"positions": positions})
        assert [rows(step) for step in forgetful.steps(9, 12)] != whole[9:]


def test_another_layout_leaves_finished_shards_out_of_each_part(three, first_passes):
    first = training_data(three, augment="none")
    list(first.steps(0, 4))
    used_before = set(first_passes())
    state = through_a_file(first.state_dict())
    second = all_ranks(three, 2, workers=2, augment="none")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for data in second:
            data.load_state_dict(state | {"counts": asdict(data.counts)}, lambda: [state])
    (said,) = [str(each.message) for each in told]
    for data in second:
        list(data.steps(4, 20))
    used_after = first_passes()
    shards, _, one = ids_of_parts(three)
    by_shard = [set(shards[6 * n : 6 * n + 6]) for n in range(5)] + [set(one)]
    finished = [shard for shard in by_shard if not shard & set(used_after)]
    assert finished and all(shard <= used_before for shard in finished)
    assert sorted(used_after) == sorted(set().union(*by_shard) - set().union(*finished))  # none of the pairs by number
    assert "shards that were finished in it" in said and "begin a new pass" in said


def test_equal_keys_of_two_parts_are_different_samples_and_equal_classes_the_same_group(tmp_path):
    make_tar(tmp_path / "a.tar", captioned(range(6)))
    shards, _ = open_sources(str(tmp_path / "a.tar"), None, None)
    for part, classes in ((shards, False), (indexed(6), True)):
        source = mixed(part, part, weights=(0.5, 0.5))
        steps = [list(step) for step in training_data(source, augment="none").steps(0, 6)]
        ids = {int(chunk.sample_id[row]) for step in steps for chunk in step for row in range(len(chunk))}
        groups = {int(chunk.group[row]) for step in steps for chunk in step for row in range(len(chunk))}
        assert len(ids) == 12 and len(groups) == (3 if classes else 12)


def test_a_mixture_is_described_by_its_parts(three):
    shards, prompted, one = three.parts
    assert three.size == count_pairs(three) == 30 + 11 + 7
    assert three.classes is None and three.templates is None and three.distinct_texts is None
    assert set(three.sample_texts()) == {text for part in three.parts for text in part.sample_texts()}
    assert len(three.sample_texts(10)) == 10 and "a ant" in three.sample_texts(10)
    both = mixed(prompted, indexed(), weights=(0.5, 0.5))
    assert both.classes == ("ant", "bee", "cow") and both.templates == ("a {}", "the {}")
    assert mixed(shards, one, weights=(0.5, 0.5)).skipped == ()


def test_sources_are_mixed_by_the_weights_that_are_given(tmp_path):
    make_tar(tmp_path / "a.tar", captioned(range(6)))
    source, validation = open_sources([f"{tmp_path / 'a.tar'}::3", "digits::1"], None, None)
    assert source.weights == (0.75, 0.25) and validation.classes[0] == "zero"
    (chunk,) = first_step(training_data(source, chunk_size=12))
    assert len(chunk) == 12
