"""The loader benchmark runs as documented and writes its results."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image


def test_it_prints_ratios_and_writes_raw_figures(tmp_path):
    pytest.importorskip("open_clip")
    images = tmp_path / "images"
    images.mkdir()
    for number in range(2):
        small = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((320, 240), Image.Resampling.BICUBIC).save(images / f"{number}.jpg")
    output = tmp_path / "results" / "loader.json"
    command = [sys.executable, "benchmarks/loader.py", f"--images={images}", "--repeats=2", "--enlarged=640"]
    finished = subprocess.run(
        [*command, f"--output={output}"],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("original") and "light x" in finished.stdout
    written = json.loads(output.read_text())
    assert str(tmp_path) not in output.read_text()
    for result in (written["results"]["original"], written["results"]["enlarged_640"]):
        rates = result["images_per_second"]
        assert set(rates) == {"open_clip", "light", "light_host", "none"} and result["images"] == 2
        for way, ratio in result["ratio"].items():
            assert ratio == pytest.approx(rates[way] / rates["open_clip"], abs=0.01)
