"""The retrieval benchmark runs as documented and writes its results."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_it_prints_a_ratio_and_writes_raw_figures(tmp_path):
    output = tmp_path / "results" / "retrieval.json"
    flags = ["--pairs=300", "--dimensions=16", "--signal=0.5", "--repeats=1", f"--output={output}"]
    command = [sys.executable, "benchmarks/retrieval.py", *flags]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "of the bare products" in finished.stdout
    written = json.loads(output.read_text())
    (products,), (ranks,) = written["turns"]["products"], written["turns"]["ranks"]
    assert written["ratio"] == pytest.approx(ranks["seconds"] / products["seconds"], abs=1e-3)
    assert written["peak_bytes"] == ranks["peak_bytes"] > 2**20
    assert 0 < ranks["text_to_image"]["R@1"] < 1 and ranks["cpu_seconds"] > 0
    assert str(tmp_path) not in output.read_text()
