"""Faults that must not go unnoticed: half characters, foreign indexes, changed data, two runs with one cache."""

import json
import multiprocessing
import warnings
from pathlib import Path

import pytest
from made_shards import make_tar, png
from test_tower_outputs import captions_table, fill

from lib.data import ImagePipeline, Prepare, TrainingData, open_sources
from lib.errors import InputError
from lib.setup import tower_outputs


def test_half_a_character_in_json_is_a_counted_fault(tmp_path):
    members = {"0.png": png(0), "0.json": b'{"caption": "hi \\ud83d"}', "1.png": png(1), "1.txt": b"good"}
    make_tar(tmp_path / "a.tar", members | {"2.png": png(2), "2.json": b'{"caption": ""}', "2.txt": b"in the txt"})
    source, _ = open_sources(str(tmp_path / "a.tar"), None, None)
    items = [item for _, found in source.read(0) for item in found]
    assert [(item.reason, item.texts) for item in items] == [
        ("not_utf8", ()), (None, ("good",)), (None, ("in the txt",))
    ]  # fmt: skip
    assert source.sample_texts() == ["good", "in the txt"]


def test_an_index_of_another_program_is_passed_over(tmp_path):
    make_tar(tmp_path / "a.tar", {"0.png": png(0), "0.txt": b"a"})
    (tmp_path / "index.json").write_text(json.dumps({"wids_version": 1, "shardlist": []}))
    assert open_sources(str(tmp_path / "a.tar"), None, None)[0].size == 1


def test_shards_without_any_text_are_told_before_training(tmp_path):
    make_tar(tmp_path / "a.tar", {"0.png": png(0), "0.json": b'{"caption": ""}'})
    with pytest.raises(InputError, match="not one sample has an image and a text"):
        open_sources(str(tmp_path / "a.tar"), None, None)


def data_of(table: str) -> TrainingData:
    source, _ = open_sources(table, None, None)
    prepare = Prepare(ImagePipeline(8), lambda texts: None)
    return TrainingData(
        source, prepare, effective_batch=4, chunk_size=4, rank=0, world_size=1, workers=0, seed=0
    )  # fmt: skip


def test_resuming_on_changed_data_is_said(tmp_path):
    table = captions_table(tmp_path / "data")
    state = data_of(table).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data_of(table).load_state_dict(state)
    with open(table, "a") as file:
        file.write("6.png,one more caption\n")
    with pytest.warns(UserWarning, match="--data is not what it was at the checkpoint"):
        data_of(table).load_state_dict(state)


def fill_here(cache: Path, table: str) -> None:
    tower_outputs.BLOCK = 2
    fill(cache, table)


def test_runs_that_share_a_cache_wait_for_one_another(tmp_path):
    table = captions_table(tmp_path / "data")
    runs = [
        multiprocessing.get_context("fork").Process(target=fill_here, args=(tmp_path / "cache", table)) for _ in "ab"
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0]
    assert len(fill(tmp_path / "cache", table)[0].image_outputs) == 9
