"""The benchmarks run at toy size as gpu.sh calls them, and the page has their figures; no time is asserted."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder that `bash benchmarks/gpu.sh --toy FOLDER` leaves."""
    pytest.importorskip("open_clip")
    pytest.importorskip("sentence_transformers")
    folder = tmp_path_factory.mktemp("results")
    command = ["bash", "benchmarks/gpu.sh", "--toy", str(folder)]
    environment = os.environ | {"PYTHON": sys.executable}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return folder


def test_every_script_leaves_raw_figures_of_all_ways(results):
    step = json.loads((results / "step_narrow.json").read_text())["rows"][0]["ways"]
    assert set(step) == {"plain", "ours", "ours_kept", "sentence_transformers", "open_clip"}
    assert all(way["seconds"] > 0 and way["peak_bytes"] > 0 for way in step.values())
    assert step["ours"]["peak_bytes"] < step["ours_kept"]["peak_bytes"]
    losses = json.loads((results / "loss.json").read_text())["rows"]
    assert {row["loss"] for row in losses} == {"infonce", "sigmoid"}
    shares = json.loads((results / "profile_narrow.json").read_text())["shares"]
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 0
    assert "floor" in json.loads((results / "savings.json").read_text())["ways"]


def test_memory_is_measured_in_processes_of_their_own_and_drawn(tmp_path):
    where = [f"--output={tmp_path / 'memory.json'}", f"--picture={tmp_path / 'memory.png'}"]
    command = [sys.executable, "benchmarks/memory.py", "--sizes", "32", "--chunk-size=16", *where]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    (row,) = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert row["effective_batch"] == 32 and row["cached"]["seconds"] > 0 and row["plain"]["seconds"] > 0
    assert (tmp_path / "memory.png").stat().st_size > 5000


def test_memory_is_measured_and_drawn(tmp_path, monkeypatch):
    """In this process, where the script takes one for each figure."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import memory

    monkeypatch.setattr(memory, "in_a_process", memory.measure)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    where = {"output": tmp_path / "memory.json", "picture": tmp_path / "memory.png"}
    memory.main(memory.Settings(sizes=(32, 64), largest_plain=32, chunk_size=16, **where))
    smaller, larger = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert smaller["cached"]["seconds"] > 0 and smaller["plain"]["seconds"] > 0
    assert larger["effective_batch"] == 64 and "plain" not in larger
    assert (tmp_path / "memory.png").stat().st_size > 5000


def test_the_page_has_what_was_measured_and_says_what_was_not(results):
    page = (results / "README.md").read_text()
    for words in ("`narrow`", "| infonce | 64 | 16 |", "all graphs kept", "| loss | ", "On a GPU\n\nNot measured"):
        assert words in page, words
    assert page.count("Not measured.") == 2  # memory.py and loader.py are not part of gpu.sh
