"""Tar shards: every sample once a pass, exact resume, exact counts, damage survived, nothing executed."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lib.data import BadImage, ImagePipeline, Prepare, TrainingData, open_evaluation, open_sources, streams
from lib.data.tars import Damage, index_samples, stream_samples
from lib.errors import InputError

EFFECTIVE_BATCH = 12


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def make_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


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


def characters(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    input_ids = torch.tensor([[ord(letter) for letter in text.ljust(12)[:12]] for text in texts])
    return input_ids, torch.ones_like(input_ids)


def training_data(source, rank=0, world_size=1, workers=0, seed=3) -> TrainingData:
    return TrainingData(
        source,
        Prepare(ImagePipeline(8, augment="strong"), characters),
        effective_batch=EFFECTIVE_BATCH,
        chunk_size=5,
        rank=rank,
        world_size=world_size,
        workers=workers,
        seed=seed,
    )


def rows(step: list) -> list[tuple]:
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


@pytest.fixture
def small_buffer(monkeypatch):
    """A shuffle buffer smaller than a shard, so that it is both filled and drained."""
    monkeypatch.setattr(streams, "SHUFFLE_BUFFER", 4)


@pytest.mark.parametrize("number_of_streams", [1, 2, 5, 6, 31])
def test_the_streams_hold_every_sample_once_a_pass(tmp_path, number_of_streams):
    source, _ = open_sources(make_shards(tmp_path, 5), None, None)
    everything = sorted(item.key for shard in range(5) for item in source.items(shard))
    assert len(everything) == 60

    def dealt(epoch: int) -> list[str]:
        parts = [streams.undecoded(source, 0, epoch, each, number_of_streams) for each in range(number_of_streams)]
        return [item.key for part in parts for item in part]

    assert sorted(dealt(0)) == sorted(dealt(1)) == everything
    assert dealt(0) == dealt(0) != dealt(1)
    assert dealt(0) != everything


@pytest.mark.parametrize("world_size, workers", [(1, 0), (1, 1), (1, 3), (2, 0), (2, 1), (2, 3)])
def test_a_resumed_run_gives_exactly_the_pairs_of_the_unbroken_one(tmp_path, small_buffer, world_size, workers):
    source, _ = open_sources(make_shards(tmp_path, 4), None, None)
    for rank in range(world_size):
        unbroken = training_data(source, rank, world_size, workers)
        walk = unbroken.steps(0, 7)
        whole = [rows(step) for step in walk]
        broken = training_data(source, rank, world_size, workers)
        walk = broken.steps(0, 7)
        assert [rows(next(walk)) for _ in range(3)] == whole[:3]
        state = broken.state_dict()  # taken while workers are further ahead
        next(walk)
        walk.close()
        resumed = training_data(source, rank, world_size, workers)
        resumed.load_state_dict(state)
        assert [rows(step) for step in resumed.steps(3, 7)] == whole[3:]
        assert resumed.counts == unbroken.counts and sum(resumed.counts.skipped.values()) > 0
        assert resumed.state_dict() == unbroken.state_dict()
        forgetful = training_data(source, rank, world_size, workers)
        forgetful.load_state_dict(state | {"positions": [(0, 0)] * max(1, workers)})
        assert [rows(step) for step in forgetful.steps(3, 7)] != whole[3:]


def test_steps_may_be_taken_in_parts(tmp_path, small_buffer):
    source, _ = open_sources(make_shards(tmp_path, 4), None, None)
    whole = [rows(step) for step in training_data(source, workers=2).steps(0, 4)]
    data = training_data(source, workers=2)
    walk = data.steps(0, 4)
    parts = [rows(next(walk))]
    walk.close()
    parts += [rows(step) for step in data.steps(1, 4)]
    assert parts == whole
    with pytest.raises(ValueError, match="shards stand at step 4, not 2"):
        next(data.steps(2, 4))


def test_fewer_shards_than_streams_do_not_hang(tmp_path):
    source, _ = open_sources(make_shards(tmp_path, 5), None, None)
    for rank in range(2):
        steps = list(training_data(source, rank, 2, workers=3).steps(0, 12))
        assert [[len(chunk) for chunk in step] for step in steps] == [[5, 1]] * 12


@pytest.mark.parametrize("world_size, workers", [(1, 0), (2, 0), (2, 3), (1, 2)])
def test_counts_are_exact_after_the_first_pass(tmp_path, world_size, workers):
    data = make_shards(tmp_path, 5)
    whole = (tmp_path / "part-0.tar").read_bytes()
    (tmp_path / "part-5.tar").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "part-6.tar").write_bytes(b"no tar at all")
    source, _ = open_sources(data, None, None)
    parts = [training_data(source, rank, world_size, workers) for rank in range(world_size)]
    for part in parts:
        list(part.steps(0, 40))
    items = [item for shard in range(7) for item in source.items(shard)]
    cut = sum(item.where.endswith("part-5.tar") and item.reason is None for item in items)
    assert 0 < cut < 12  # good and broken images among them
    used, read = sum(part.counts.used for part in parts), sum(part.counts.read for part in parts)
    skipped: dict[str, int] = {}
    for part in parts:
        for reason, count in part.counts.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
    assert read == used + sum(skipped.values()) == len(items)
    assert used == 5 * 9 + cut - 1
    assert skipped == {
        "truncated": 6,
        "no_text": 6,
        "empty_caption": 6,
        "truncated_tar": 1,
        "unreadable_tar": 1,
    }
    reported = [skip for part in parts for skip in part.new_skips()]
    assert len(reported) == sum(skipped.values())
    assert ("truncated", "part-3.tar/0001") in {(skip.reason, skip.key) for skip in reported}


def test_wherever_a_tar_is_cut_the_rest_is_one_event(tmp_path):
    make_shards(tmp_path, 1, samples=5)
    content = (tmp_path / "part-0.tar").read_bytes()
    whole = list(stream_samples(str(tmp_path / "part-0.tar")))
    assert len(whole) == 5 and list(map(str, index_samples(str(tmp_path / "part-0.tar"))))
    path = tmp_path / "cut.tar"
    for length in range(0, len(content), 256):
        path.write_bytes(content[:length])
        for found in (list(stream_samples(str(path))), list(index_samples(str(path)))):
            samples = [item for item in found if not isinstance(item, Damage)]
            assert [sample.key for sample in samples] == [sample.key for sample in whole[: len(samples)]]
            assert not any(isinstance(item, Damage) for item in found[:-1])
            damaged = isinstance(found[-1], Damage)
            assert damaged or (len(samples) == 5 and not any(content[length:]))  # padding alone was cut
    path.write_bytes(content[:700])
    assert list(stream_samples(str(path))) == [Damage("unreadable_tar")]
    assert list(stream_samples(str(tmp_path / "gone.tar"))) == [Damage("unreadable_tar")]


def test_shards_without_a_usable_pair_are_an_error_and_no_endless_loop(tmp_path):
    members = {f"{number}.{suffix}": b"nothing" for number in range(9) for suffix in ("jpg", "txt")}
    make_tar(tmp_path / "bad.tar", members)
    source, _ = open_sources(str(tmp_path / "bad.tar"), None, None)
    for workers in (0, 2):
        with pytest.raises(InputError, match="no pair that can be used") as error:
            list(training_data(source, workers=workers).steps(0, 1))
        assert "Traceback" not in str(error.value)


def test_other_ranks_or_workers_go_on_with_a_new_pass_and_say_so(tmp_path):
    source, _ = open_sources(make_shards(tmp_path, 4), None, None)
    first = training_data(source, workers=0)
    list(first.steps(0, 2))
    for settings in ({"workers": 2}, {"world_size": 2}):
        second = training_data(source, **settings)
        with pytest.warns(UserWarning, match="goes on with a new pass"):
            second.load_state_dict(first.state_dict())
        list(second.steps(2, 4))
        assert second.counts == first.counts  # the first pass is over
        assert min(epoch for epoch, _ in second.state_dict()["positions"]) >= 1


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


def test_commands_and_other_machines_are_refused(tmp_path):
    trap = tmp_path / "executed"
    for data, message in (
        (f"pipe:touch {trap}", "commands are not run"),
        (f"pipe:touch {trap}.tar", "commands are not run"),
        ("s3://bucket/a.tar", "only local files"),
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
    assert one.names == ("part-1.tar",) and one.size is None


def test_shards_of_one_name_in_two_folders_are_told_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        make_shards(tmp_path / folder, 1)
    source, _ = open_sources(str(tmp_path / "{a,b}" / "part-0.tar"), None, None)
    keys = [item.key for shard in range(2) for item in source.items(shard)]
    assert len(set(keys)) == len(keys) == 24 and keys[0] == "a/part-0.tar/0000"
    assert len(set(open_evaluation(str(tmp_path / "*" / "part-*.tar"), "auto", None).image_keys)) == 20
    odd = tmp_path / "a" / "[1]{2}.tar"
    (tmp_path / "a" / "part-0.tar").rename(odd)
    assert open_sources(str(odd), None, None)[0].names == ("[1]{2}.tar",)


def test_json_captions_groups_and_keys(tmp_path):
    records = [
        {"captions": ["a", "", "b"], "group": 5, "key": "k0"},
        {"caption": "c", "group": 5},
        {"caption": "d"},
        {"caption": "e", "key": "k0"},
    ]
    members = {}
    for number, record in enumerate(records):
        members |= {f"{number}.PNG": png(number), f"{number}.json": json.dumps(record).encode()}
    make_tar(tmp_path / "a.tar", members)
    every, _ = open_sources(str(tmp_path / "a.tar"), None, None, captions="all")
    items = list(every.items(0))
    assert [(item.texts, item.numbers) for item in items[:3]] == [(("a",), (0,)), ((), ()), (("b",), (2,))]
    assert items[0].group == items[3].group != items[4].group
    assert [item.key for item in items[2:]] == ["k0", "a.tar/1", "a.tar/2", "k0"]
    one, _ = open_sources(str(tmp_path / "a.tar"), None, None, captions="one")
    assert [item.texts for item in one.items(0)] == [("a", "b"), ("c",), ("d",), ("e",)]
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
    items = list(source.items(0))
    assert [item.texts for item in items] == [("a photo of ant",), ("a photo of big bee",)] * 2
    assert items[0].group == items[2].group != items[1].group
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
