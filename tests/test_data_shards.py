"""Tar shards: every sample once a pass, exact resume, exact counts, damage survived, nothing executed."""

import io
import json
import pickle
import warnings
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from made_shards import (
    Remote,
    all_ranks,
    captioned,
    first_step,
    make_shards,
    make_tar,
    plain,
    png,
    rows,
    through_a_file,
    totals,
    training_data,
)
from PIL import Image

from lib.data import BadImage, open_evaluation, open_sources, shard_stream, step_parts
from lib.data.dealing import Dealing, Part, ShardPosition
from lib.data.order import stable_hash
from lib.data.shard_source import count_pairs
from lib.data.shard_stream import ShardStream
from lib.data.shards import ShardEntry, ShardIndex, shard_names, write_index
from lib.data.tars import ALL, Damage, index_samples, read_samples
from lib.errors import InputError


def uncounted(source):
    """The source as if it were too large to be counted when it is opened."""
    return replace(source, samples=None, size=None)


def items(source, shard: int, wanted=ALL) -> list:
    return [item for _, found in source.read(shard, wanted) for item in found]


def everything(source) -> list[str]:
    return sorted(item.key for shard in range(len(source.shards)) for item in items(source, shard))


def one_pass(source, dealing: Dealing, stream: int, epoch: int = 0) -> list[str]:
    """Keys that a stream yields in a pass."""
    reader, keys = ShardStream(source, dealing, stream, 4, ShardPosition(epoch)), []
    while (found := reader.next())[0] == epoch:
        keys.append(found[1].key)
    return keys


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("number", [1, 2, 5, 6, 31])
def test_the_streams_hold_every_sample_once_a_pass(tmp_path, number, counted):
    source, _ = open_sources(make_shards(tmp_path, 5), None, None)
    dealing = Dealing(5, source.samples if counted else None, 0, number, {2: frozenset({1, 4})})

    def dealt(epoch: int) -> list[list[Part]]:
        return [dealing.parts(epoch, stream) for stream in range(number)]

    def keys(epoch: int) -> list[str]:
        return [item.key for part in chain(*dealt(epoch)) for item in items(source, part.shard, part.samples)]

    assert sorted(keys(0)) == sorted(keys(1)) == everything(source) and len(keys(0)) == 60
    assert keys(0) == keys(0) != keys(1)
    assert sorted(keys(2)) == [key for key in everything(source) if key[5] in "023"]
    if counted:  # the 65 places are shared out evenly, and a stream opens only the shards of its own
        places = [sum(len(set(range(13)) & set(part.samples[:13])) for part in parts) for parts in dealt(0)]
        assert sum(places) == 65 and max(places) - min(places) <= 1
        assert max(map(len, dealt(0))) <= -(-5 // number) + 1


def test_a_stream_shuffles_what_it_reads(tmp_path):
    source, _ = open_sources(make_shards(tmp_path, 2), None, None)
    dealing = Dealing(2, source.samples, 0, 1, {})
    first = one_pass(source, dealing, 0)
    assert sorted(first) == everything(source) and first != [item.key for n in (0, 1) for item in items(source, n)]
    assert first != one_pass(source, dealing, 0, epoch=1)
    together = ShardStream(source, dealing, 0, 100, ShardPosition())
    assert {together.next()[1].key[5] for _ in range(8)} == {"0", "1"}  # a large buffer mixes the shards


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_good_sample_is_used_once_a_pass_and_no_rank_waits(tmp_path, world_size, workers, counted):
    """Five shards on up to twelve streams."""
    source, _ = open_sources(make_shards(tmp_path, 5), None, None)
    source = source if counted else uncounted(source)
    parts = all_ranks(source, world_size, workers=workers, augment="none")
    for part in parts:
        steps = [list(step) for step in part.steps(0, 12)]
        assert [sum(map(len, step)) for step in steps] == [12 // world_size] * 12
        assert max(len(chunk) for step in steps for chunk in step) <= 5
    good = [stable_hash(f"part-{shard}.tar/{n:04d}") for shard in range(5) for n in range(12) if n not in (1, 2, 3)]
    assert sorted(id for part in parts for id in part.first_pass) == sorted(good)
    assert totals(parts) == (60, 45, {"truncated": 5, "no_text": 5, "empty_caption": 5})


# Places in the first pass, at its end and in later ones.
@pytest.mark.parametrize("world_size, workers, counted", [(1, 0, True), (1, 3, False), (2, 1, True), (4, 3, True)])
def test_a_killed_and_resumed_run_gives_exactly_the_pairs_of_the_unbroken_one(tmp_path, world_size, workers, counted):
    source, _ = open_sources(make_shards(tmp_path, 4), None, None)
    source = source if counted else uncounted(source)
    rank = world_size - 1
    unbroken = training_data(source, rank, world_size, workers)
    whole, states = [], [through_a_file(unbroken.state_dict())]
    for step in unbroken.steps(0, 12):
        whole.append(rows(step))
        states.append(through_a_file(unbroken.state_dict()))  # while workers are further ahead
    for place in (1, 3, 4, 8) if not workers else (2, 7):
        resumed = training_data(source, rank, world_size, workers)
        resumed.load_state_dict(states[place])
        assert [rows(step) for step in resumed.steps(place, 12)] == whole[place:]
        assert resumed.counts == unbroken.counts and sum(resumed.counts.skipped.values()) > 0
        assert plain(resumed.state_dict()) == plain(unbroken.state_dict())
    forgetful = training_data(source, rank, world_size, workers)
    forgetful.load_state_dict(states[place] | {"positions": states[0]["positions"]})
    assert [rows(step) for step in forgetful.steps(place, 12)] != whole[place:]


def test_a_resumed_stream_opens_and_decodes_nothing_that_was_finished(tmp_path, monkeypatch):
    source, _ = open_sources(make_shards(tmp_path, 6), None, None)
    remote = Remote(tmp_path, 0, log=tmp_path / "log")
    source = replace(source, fetcher=remote)
    data = training_data(source)
    walk = data.steps(0, 4)
    before = [row for _ in range(3) for row in rows(next(walk))]
    state = data.state_dict()
    walk.close()
    opened = remote.opened()
    assert 4 <= len(opened) < 6  # 36 pairs of 9 a shard
    decoded = []
    original = shard_stream.decode_image
    monkeypatch.setattr(shard_stream, "decode_image", lambda *given: decoded.append(1) or original(*given))
    resumed = training_data(source)
    resumed.load_state_dict(state)
    after = rows(first_step(resumed, 3))
    assert not {row[0] for row in before} & {row[0] for row in after}
    assert len(opened & remote.opened()) <= 2  # that of the cursor, and another that waits in the buffer
    assert len(decoded) <= 12 + 2  # the pairs of the step, and broken images among them


def test_steps_may_be_taken_in_parts(tmp_path):
    source, _ = open_sources(make_shards(tmp_path, 4), None, None)
    whole = [rows(step) for step in training_data(source, workers=2).steps(0, 4)]
    data = training_data(source, workers=2)
    walk = data.steps(0, 4)
    parts = [rows(next(walk))]
    walk.close()
    parts += [rows(step) for step in data.steps(1, 4)]
    assert parts == whole
    with pytest.raises(ValueError, match="streams stand at step 4, not 2"):
        next(data.steps(2, 4))


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("before, after", [((1, 0), (1, 2)), ((2, 2), (1, 0)), ((2, 0), (4, 0))])
def test_another_layout_goes_on_without_the_finished_shards(tmp_path, before, after, counted):
    source, _ = open_sources(make_shards(tmp_path, 8), None, None)
    source = source if counted else uncounted(source)
    first = all_ranks(source, before[0], workers=before[1])
    for part in first:
        list(part.steps(0, 4))
    states = [through_a_file(part.state_dict()) for part in first]
    second = all_ranks(source, after[0], workers=after[1], augment="none")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for part in second:
            part.load_state_dict(states[0] | {"counts": asdict(part.counts)}, lambda: states)
    (said,) = [str(each.message) for each in told]
    for part in second:
        list(part.steps(4, 20))
    ids = [{stable_hash(f"part-{shard}.tar/{n:04d}") for n in (0, *range(4, 12))} for shard in range(8)]
    used_before = [id for part in first for id in part.first_pass]
    used_after = [id for part in second for id in part.first_pass]
    left = [shard for shard in ids if shard & set(used_after)]
    finished = [shard for shard in ids if shard not in left]
    assert finished and all(shard <= set(used_before) for shard in finished)
    assert sorted(used_after) == sorted(chain(*left))  # all of what was not finished, and nothing else
    assert f"without the {len(finished)} shards that were finished" in said


def test_parts_of_another_size_are_told_as_they_hold_other_pairs(tmp_path):
    source, _ = open_sources(make_shards(tmp_path, 8), None, None)
    first = training_data(source, workers=2)
    list(first.steps(0, 2))
    state = through_a_file(first.state_dict())
    for chunk_size, told in ((5, 0), (3, 1)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            training_data(source, workers=2, chunk_size=chunk_size).load_state_dict(state)
        assert len(said) == told


def test_finished_shards_are_those_of_which_nothing_is_left(tmp_path):
    """Compared with a count of the yielded samples, at random places, with fast streams ahead, and twice in a row."""
    source, _ = open_sources(make_shards(tmp_path, 6, samples=5), None, None)
    random = np.random.default_rng(0)
    for trial in range(30):
        counts = source.samples if trial % 2 else None
        excluded: dict[int, frozenset[int]] = {}
        start = 0
        for number in (2, 3):
            dealing = Dealing(6, counts, trial, number, excluded)
            readers = [ShardStream(source, dealing, n, 4, ShardPosition(start)) for n in range(number)]
            given: dict[int, list[str]] = {}
            for reader in readers:
                for _ in range(int(random.integers(0, 30))):
                    epoch, item = reader.next()
                    given.setdefault(epoch, []).append(item.key)
            found = dealing.finished([reader.position for reader in readers])
            assert set(found) >= set(excluded) - set(range(min(found)))  # what was known of later passes stays known
            for epoch, shards in found.items():
                keys = given.get(epoch, [])
                assert len(keys) == len(set(keys))
                naive = {n for n in range(6) if sum(key.startswith(f"part-{n}.") for key in keys) == 5}
                assert shards == naive | excluded.get(epoch, frozenset())
            excluded, start = found, min(found)


def test_wherever_a_tar_is_cut_the_rest_is_one_event(tmp_path):
    make_shards(tmp_path, 1, samples=5)
    content = (tmp_path / "part-0.tar").read_bytes()
    whole = list(index_samples(str(tmp_path / "part-0.tar")))
    assert len(whole) == 5
    path = tmp_path / "cut.tar"
    for length in range(0, len(content), 256):
        path.write_bytes(content[:length])
        read = list(read_samples(str(path), ALL))
        assert [number for number, _ in read] == list(range(len(read)))
        for found in ([sample for _, sample in read], list(index_samples(str(path)))):
            samples = [item for item in found if not isinstance(item, Damage)]
            assert [sample.key for sample in samples] == [sample.key for sample in whole[: len(samples)]]
            assert not any(isinstance(item, Damage) for item in found[:-1])
            damaged = isinstance(found[-1], Damage)
            assert damaged or (len(samples) == 5 and not any(content[length:]))  # padding alone was cut
        # However its numbers are dealt, each sample and the damage is in exactly one part.
        for slices in ([range(0, 2), range(2, 4), range(4, 9)], [range(n, 9, 3) for n in range(3)]):
            parts = [found for wanted in slices for found in read_samples(str(path), wanted)]
            assert sorted(parts, key=lambda found: found[0]) == read
    path.write_bytes(content[:700])
    assert list(index_samples(str(path))) == [Damage("unreadable_tar")]
    assert list(read_samples(str(tmp_path / "gone.tar"), ALL)) == [(0, Damage("unreadable_tar"))]


def test_a_damaged_header_in_the_middle_is_not_taken_for_the_end(tmp_path):
    make_tar(tmp_path / "a.tar", captioned(range(5)))
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[content.index(b"0003.png")] ^= 255
    (tmp_path / "a.tar").write_bytes(content)
    found = list(index_samples(str(tmp_path / "a.tar")))
    assert [type(each).__name__ for each in found] == ["Sample"] * 3 + ["Damage"]
    assert found[-1] == Damage("truncated_tar")


def test_a_shard_with_more_samples_than_its_index_says_loses_none(tmp_path):
    source, _ = open_sources(make_shards(tmp_path, 3), None, None)
    source = replace(source, samples=(7, 20, 12))
    dealing = Dealing(3, source.samples, 0, 4, {})
    assert sorted(key for stream in range(4) for key in one_pass(source, dealing, stream)) == everything(source)


def test_shards_without_a_usable_pair_are_an_error_and_no_endless_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(step_parts, "_MOST_BAD_IN_A_ROW", 300)
    members = {f"{number}.{suffix}": b"nothing" for number in range(9) for suffix in ("jpg", "txt")}
    make_tar(tmp_path / "bad.tar", members)
    source, _ = open_sources(str(tmp_path / "bad.tar"), None, None)
    for workers in (0, 2):
        with pytest.raises(InputError, match="no pair that can be used") as error:
            list(training_data(source, workers=workers).steps(0, 1))
        assert "Traceback" not in str(error.value)


class Bomb:
    """Writes a file when unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_member_is_never_loaded(tmp_path):
    trap = tmp_path / "executed"
    payload = pickle.dumps(Bomb(trap))
    suffixes = ("pyd", "pickle", "pkl", "pth", "pt", "npy")
    members = {"0.png": png(0), "0.txt": b"a"} | {f"0.{suffix}": payload for suffix in suffixes}
    make_tar(tmp_path / "a.tar", members | {"1.png": png(1), "1.json": payload, "2.png": payload, "2.txt": b"b"})
    source, _ = open_sources(str(tmp_path / "a.tar"), None, None)
    list(training_data(source).steps(0, 2))
    evaluation_set = open_evaluation(str(tmp_path / "a.tar"), "auto", None)
    with pytest.raises(BadImage):
        evaluation_set.open_image(1)
    assert source.sample_texts() == ["a", "b"] and not trap.exists()
    pickle.loads(payload)
    assert trap.exists()


def test_commands_and_missing_files_are_refused(tmp_path):
    trap = tmp_path / "executed"
    for data, message in (
        (f"pipe:touch {trap}", "commands are not run unless --allow-pipe"),
        (f"pipe:touch {trap}.tar", "commands are not run unless --allow-pipe"),
        (str(tmp_path / "none-{0..3}.tar"), "there is no file .*none-0.tar"),
        (str(tmp_path / "none-*.tar"), "there is no file"),
        (str(tmp_path / "a{0,1.tar"), "brace is not closed"),
    ):
        with pytest.raises(InputError, match=message):
            open_sources(data, None, None)
        with pytest.raises(InputError, match=message):
            open_evaluation(data, "auto", None)
    assert not list(tmp_path.iterdir())


def test_patterns_find_the_same_files(tmp_path):
    by_glob, _ = open_sources(make_shards(tmp_path, 3), None, None)
    by_brace, _ = open_sources(str(tmp_path / "part-{0..2}.tar"), None, None)
    one, _ = open_sources(str(tmp_path / "part-1.tar"), None, None)
    assert by_glob.names == by_brace.names == ("part-0.tar", "part-1.tar", "part-2.tar")
    assert one.names == ("part-1.tar",)


def test_shards_of_one_name_in_two_folders_are_told_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        make_shards(tmp_path / folder, 1)
    source, _ = open_sources(str(tmp_path / "{a,b}" / "part-0.tar"), None, None)
    keys = everything(source)
    assert len(set(keys)) == len(keys) == 24 and keys[0] == "a/part-0.tar/0000"
    assert len(set(open_evaluation(str(tmp_path / "*" / "part-*.tar"), "auto", None).image_keys)) == 20
    odd = tmp_path / "a" / "[1]{2}.tar"
    (tmp_path / "a" / "part-0.tar").rename(odd)
    assert open_sources(str(odd), None, None)[0].names == ("[1]{2}.tar",)


def test_addresses_are_told_apart_without_their_keys_of_access():
    assert shard_names(("s3://b/x/0.tar?key=1", "s3://b/x/y/0.tar?key=1")) == ("0.tar", "y/0.tar")
    assert len(set(shard_names(("https://h/get?id=1", "https://h/get?id=2")))) == 2
    assert shard_names(("pipe:cat /a/b/0.tar", "pipe:cat /a/b/1.tar")) == ("0.tar", "1.tar")


def test_json_captions_groups_and_keys(tmp_path):
    records = [
        {"captions": ["a", "", "b"], "group": 5, "key": "k0"},
        {"caption": "c", "group": 5.0},
        {"caption": "d"},
        {"caption": "e", "key": "k0"},
    ]
    members = {}
    for number, record in enumerate(records):
        members |= {f"{number}.PNG": png(number), f"{number}.json": json.dumps(record).encode()}
        members[f"{number}.txt"] = b"the captions of .json go before this"
    make_tar(tmp_path / "a.tar", members)
    every, _ = open_sources(str(tmp_path / "a.tar"), None, None, captions="all")
    found = items(every, 0)
    assert [(item.texts, item.numbers) for item in found[:3]] == [(("a",), (0,)), ((), ()), (("b",), (2,))]
    assert found[0].group == found[3].group != found[4].group
    assert [item.key for item in found[2:]] == [f"a.tar/{number}" for number in range(4)]  # "key" is not unique
    assert len({item.group for item in found}) == 4  # with the 0 of the empty caption
    one, _ = open_sources(str(tmp_path / "a.tar"), None, None, captions="one")
    assert [item.texts for item in items(one, 0)] == [("a", "b"), ("c",), ("d",), ("e",)]
    evaluation_set = open_evaluation(str(tmp_path / "a.tar"), "auto", None)
    assert evaluation_set.captions == ["a", "b", "c", "d", "e"]
    assert evaluation_set.caption_image.tolist() == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("numbers", [True, False])
def test_class_shards_give_prompts_and_labels(tmp_path, numbers):
    names = ["ant", "big_bee"]
    members = {}
    for number in range(4):
        label = str(number % 2) if numbers else names[number % 2]
        members |= {f"{number}.png": png(number), f"{number}.cls": label.encode()}
    make_tar(tmp_path / "a.tar", members)
    if numbers:
        with pytest.raises(InputError, match="put classes.txt, one name a line"):
            open_sources(str(tmp_path / "a.tar"), None, None)
        (tmp_path / "classes.txt").write_text("\n".join(names) + "\n")
    source, _ = open_sources(str(tmp_path / "a.tar"), None, None)
    found = items(source, 0)
    assert [item.texts for item in found] == [("a photo of ant",), ("a photo of big bee",)] * 2
    assert found[0].group == found[2].group != found[1].group
    evaluation_set = open_evaluation(str(tmp_path / "a.tar"), "auto", "objects")
    assert evaluation_set.classes == ("ant", "big bee") and evaluation_set.labels.tolist() == [0, 1, 0, 1]


def test_an_evaluation_set_reads_images_where_they_lie(tmp_path):
    evaluation_set = pickle.loads(pickle.dumps(open_evaluation(make_shards(tmp_path, 2), "auto", None)))
    assert len(evaluation_set) == 20 and evaluation_set.image_keys[0] == "part-0.tar/0000"
    assert len(evaluation_set.skipped) == 4 and evaluation_set.captions[-1] == "1 11"
    for index in (0, 19):
        shard, number = evaluation_set.captions[evaluation_set.caption_image.tolist().index(index)].split()
        expected = Image.open(io.BytesIO(png(int(shard) * 12 + int(number))))
        assert np.array_equal(np.asarray(evaluation_set.open_image(index)), np.asarray(expected))
    with pytest.raises(BadImage, match="truncated"):
        evaluation_set.open_image(1)
    validation = open_sources("digits", str(tmp_path / "part-0.tar"), None)[1]
    assert len(validation) == 10


def test_a_packed_folder_has_splits_counts_and_classes(tmp_path):
    for name, numbers in (("train-0.tar", range(4)), ("train-1.tar", range(4, 7)), ("val-0.tar", range(7, 9))):
        members = {}
        for number in numbers:
            record = {"key": f"k{number}", "group": f"k{number}", "captions": [f"one {number}", f"two {number}"]}
            members |= {f"{number:09d}.png": png(number), f"{number:09d}.json": json.dumps(record).encode()}
        make_tar(tmp_path / name, members)
    entries = {"train-0.tar": ("train", 4, 8), "train-1.tar": ("train", 3, 6), "val-0.tar": ("val", 2, 4)}
    write_index(tmp_path, ShardIndex({name: ShardEntry(*entry, 1) for name, entry in entries.items()}))
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["index.json", *entries]
    for data in (str(tmp_path), str(tmp_path / "*.tar")):
        source, validation = open_sources(data, None, None)
        assert source.names == ("train-0.tar", "train-1.tar")
        assert (source.samples, source.size, count_pairs(source)) == ((4, 3), 14, 14)
        assert validation.image_keys == ["k7", "k8"] and len(validation.captions) == 4
    assert open_sources(str(tmp_path), None, None, captions="one")[0].size == 7
    assert len(open_evaluation(str(tmp_path), "train", None)) == 7
    with pytest.raises(InputError, match="--split test: .* has only"):
        open_evaluation(str(tmp_path), "test", None)
    (tmp_path / "train-1.tar").unlink()
    with pytest.raises(InputError, match="index.json names .*train-1.tar, which is not there"):
        open_sources(str(tmp_path), None, None)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(InputError, match="index.json is damaged"):
        open_sources(str(tmp_path), None, None)


def test_an_index_of_classes_names_them(tmp_path):
    members = {}
    for number in range(4):
        record = {"key": f"k{number}", "class": ("ant", "big bee")[number % 2]}
        members |= {f"{number}.png": png(number), f"{number}.json": json.dumps(record).encode()}
    make_tar(tmp_path / "a.tar", members)
    write_index(tmp_path, ShardIndex({"a.tar": ShardEntry("train", 4, 4, 1)}, ("ant", "big bee")))
    source, _ = open_sources(str(tmp_path), None, None)
    assert source.classes == ("ant", "big bee") and source.size == 4
    assert sorted(source.sample_texts()) == ["a photo of ant", "a photo of big bee"]


def test_pairs_are_counted_where_that_needs_no_network(tmp_path):
    source, _ = open_sources(make_shards(tmp_path, 3), None, None)
    assert source.samples == (12, 12, 12) and source.size == 3 * 10  # a broken image is found by decoding only
    assert count_pairs(uncounted(source)) == 30
    far = replace(uncounted(source), shards=tuple(f"far://{path}" for path in source.shards))
    with pytest.raises(InputError, match="give --steps instead"):
        count_pairs(far)


def test_the_texts_of_remote_shards_are_sampled_from_the_first(tmp_path):
    source, _ = open_sources(make_shards(tmp_path, 3), None, None)
    remote = Remote(tmp_path, 0, log=tmp_path / "log", down=("part-0",))
    far = replace(source, shards=tuple(f"far://{path}" for path in source.shards), fetcher=remote)
    assert len(far.sample_texts()) == 10 and remote.opened() == {"part-0.tar", "part-1.tar"}
    assert len(far.sample_texts(2**62)) == 20 and len(source.sample_texts()) == 30
