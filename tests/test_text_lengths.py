"""Plan and summary count the texts that exceed the model's context, without downloading a shard for it."""

import gzip
import json
from dataclasses import replace

import pytest
from accelerate.state import AcceleratorState
from made_data import make_images, make_table
from made_server import Server
from made_shards import captioned, make_tar, tar_bytes
from small_runs import train

from lib.data import open_sources
from lib.data.fetcher import Fetcher
from lib.setup import data as data_setup
from lib.setup.data import TextLengths
from lib.towers import build_preset
from lib.towers.processing import Processing

LONG = "word " * 40


@pytest.fixture(scope="module")
def processing() -> Processing:
    return build_preset("tiny-clip", ["a word", "red"])[1]


def table(folder, long: int, short: int) -> str:
    """Captions of one image, the long ones last."""
    make_images(folder, "a.png")
    rows = [["a.png", "red"]] * short + [["a.png", LONG]] * long
    return make_table(folder / "captions.csv", [["image", "caption"], *rows])


def test_all_captions_are_looked_at_or_as_many_evenly_spaced(tmp_path, processing, monkeypatch):
    source, _ = open_sources(table(tmp_path, long=30, short=60), None, None)
    assert TextLengths.of(source, processing) == TextLengths(looked_at=90, cut=30, token_limit=32)
    monkeypatch.setattr(data_setup, "LOOKED_AT", 10)
    found = TextLengths.of(source, processing)
    assert found.looked_at == 10 and 3 <= found.cut <= 4
    mixed, _ = open_sources([str(tmp_path / "captions.csv"), "digits"], None, None)
    assert TextLengths.of(mixed, processing) == TextLengths(looked_at=10, cut=1, token_limit=32)


def test_class_prompts_are_texts_too(tmp_path, processing):
    for name in ("red", LONG.strip()):
        make_images(tmp_path / name, "a.png")
    source, _ = open_sources(str(tmp_path), None, "simple")
    assert TextLengths.of(source, processing) == TextLengths(looked_at=2, cut=1, token_limit=32)


def members(first: int) -> dict[str, bytes]:
    return captioned(range(first, first + 6)) | {f"{first:04d}.txt": LONG.encode()}


def test_no_shard_is_fetched_or_unpacked_to_look_at_its_texts(tmp_path, processing, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    try:
        server.files = {f"/{number}.tar": tar_bytes(members(number)) for number in range(3)}
        fetcher = Fetcher(tmp_path / "cache", 0)
        source, _ = open_sources(f"{server.url}/{{0..2}}.tar", None, None, fetcher=fetcher)
        before = server.requests.copy()
        assert before["/0.tar"] == 1 and not before["/1.tar"]  # to see what it holds
        assert TextLengths.of(source, processing) == TextLengths(looked_at=6, cut=1, token_limit=32)
        elsewhere = replace(source, fetcher=Fetcher(tmp_path / "empty", 0))
        assert TextLengths.of(elsewhere, processing) == TextLengths(looked_at=0, cut=0, token_limit=32)
        assert server.requests == before and not (tmp_path / "empty").exists()
    finally:
        server.close()
    make_tar(tmp_path / "a.tar", members(0))
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(tar_bytes(members(1))))
    source, _ = open_sources(str(tmp_path / "{a.tar,b.tar.gz}"), None, None, fetcher=fetcher)
    assert TextLengths.of(source, processing).looked_at == 12  # both were counted, so both are unpacked
    assert TextLengths.of(replace(source, fetcher=Fetcher(tmp_path / "empty", 0)), processing).looked_at == 6
    monkeypatch.setattr(data_setup, "LOOKED_AT_IN_SHARDS", 8)
    assert TextLengths.of(source, processing) == TextLengths(looked_at=8, cut=2, token_limit=32)


@pytest.mark.parametrize("long", [0, 7])
def test_a_run_tells_of_captions_that_are_cut(tmp_path, capsys, long):
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = train(tmp_path / "run", "--data", table(tmp_path, long, short=25), "--steps=1", "--save-every=0")
    warning = "warning: 7 of 32 captions are longer than the model's 32 tokens and are cut there"
    assert capsys.readouterr().out.splitlines().count(warning) == (long > 0)
    found = json.loads((folder / "summary.json").read_text())["texts"]
    assert found.items() >= {"looked_at": 25 + long, "cut": long, "token_limit": 32}.items()
