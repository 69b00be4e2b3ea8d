"""index.json next to shards is checked before use: damage gives one line, and paths outside are refused."""

import json
import os

import pytest
from made_shards import captioned, make_tar

from lib.data import open_sources
from lib.data.fetcher import Fetcher
from lib.data.shards import ShardEntry, ShardIndex, read_index, write_index
from lib.errors import InputError

ENTRY = {"split": "train", "samples": 4, "pairs": 4, "bytes": 10240}


def index(shards: object = None, **changes: object) -> str:
    return json.dumps(
        {"version": 1, "classes": None, "shards": {"a.tar": ENTRY} if shards is None else shards} | changes
    )


def named(name: str) -> str:
    return index({name: ENTRY})


def counted(**counts: object) -> str:
    return index({"a.tar": ENTRY | counts})


DAMAGED = {
    "infinite": (counted(samples=float("inf")), "samples inf"),
    "nan": (counted(pairs=float("nan")), "pairs nan"),
    "fraction": (counted(samples=4.0), "samples 4.0"),
    "negative": (counted(samples=-1), "samples -1"),
    "boolean": (counted(samples=True), "samples True"),
    "text": (counted(samples="4"), "samples '4'"),
    "huge": (counted(bytes=10**30), "bytes 1000"),
    "digits": (counted().replace("10240", "1" * 5000), "Exceeds the limit"),
    "missing": (index({"a.tar": {"split": "train", "samples": 4, "pairs": 4}}), "'bytes' is missing"),
    "split": (counted(split="training"), "split 'training'"),
    "split list": (counted(split=["train"]), "split \\['train'\\]"),
    "long": (counted(split="x" * 10_000), "split 'x{190,}"),
    "entry": (index({"a.tar": [4]}), "\\[4\\] in place of a shard's entry"),
    "list": (index(["a.tar"]), "shards must be an object"),
    "none": (index({}), "shards must be an object"),
    "up": (named("../a.tar"), "no name of a file beside the index: '../a.tar'"),
    "dots": (named(".."), "no name of a file beside the index"),
    "dot": (named("."), "no name of a file beside the index"),
    "below": (named("b/a.tar"), "no name of a file beside the index"),
    "absolute": (named("/a.tar"), "no name of a file beside the index"),
    "backslash": (named("..\\a.tar"), "no name of a file beside the index"),
    "nul": (named("a\0.tar"), "no name of a file beside the index"),
    "query": (named("a.tar?x"), "no name of a file beside the index"),
    "empty": (named(""), "no name of a file beside the index"),
    "endless": (named("x" * 256), "no name of a file beside the index"),
    "surrogate": (named("\ud800.tar"), "no name of a file beside the index"),
    "brackets": ("[" * 100_000, "nested too deeply"),
    "version": (index(version=True), "version True"),
    "class text": (index(classes="ant"), "classes must be a list"),
    "class object": (index(classes={"ant": 1}), "classes must be a list"),
    "no class": (index(classes=[]), "classes must be a list"),
    "class twice": (index(classes=["ant", "bee", " ant"]), "classes must be distinct names"),
    "class null": (index(classes=["ant", None]), "classes must be distinct names"),
    "class empty": (index(classes=["ant", " "]), "classes must be distinct names"),
    "class list": (index(classes=[["ant"]]), "a list instead of a text"),
    "class half": (index(classes=["\ud800"]), "classes must be distinct names"),
}  # fmt: skip


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_damaged_index_is_one_line(tmp_path, fault):
    folder = tmp_path / "shards"
    for place in (tmp_path, folder):
        place.mkdir(exist_ok=True)
        make_tar(place / "a.tar", captioned(range(4)))
    content, message = DAMAGED[fault]
    (folder / "index.json").write_text(content)
    for data in (str(folder), str(folder / "*.tar")):
        with pytest.raises(
            InputError, match=f"index.json is damaged \\({message}.*; pack the shards again, or"
        ) as error:
            open_sources(data, None, None)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_sound_index_is_read_as_it_was_written(tmp_path):
    sound = ShardIndex(
        {"é 1..tar": ShardEntry("train", 0, 0, 10240), "...": ShardEntry("val", 2**40, 7, 1)}, ("ant", "7", "big bee")
    )
    write_index(tmp_path, sound)
    assert read_index(str(tmp_path), Fetcher(tmp_path, 0)) == sound
    (tmp_path / "index.json").write_text(counted().replace('"classes": null', '"classes": ["ant", 7, " bee "]'))
    assert read_index(str(tmp_path), Fetcher(tmp_path, 0)).classes == ("ant", "7", "bee")
    for of_another_program in ("[1]", "7", '{"shards": []}', '{"wids_version": 1}'):
        (tmp_path / "index.json").write_text(of_another_program)
        assert read_index(str(tmp_path), Fetcher(tmp_path, 0)) is None


def test_an_index_that_is_no_file_is_not_waited_for(tmp_path):
    make_tar(tmp_path / "a.tar", captioned(range(4)))
    os.mkfifo(tmp_path / "index.json")
    with pytest.raises(InputError, match="^--data: .*index.json cannot be read .*; check the file"):
        open_sources(str(tmp_path / "*.tar"), None, None)
