"""The benchmarks run at toy size, gpu.sh as on a GPU, and the page has their results; no time is asserted."""

import json
import os
import runpy
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

STAGES = (
    "smoke checks", "matrix rate", "step narrow", "step narrow compiled", "profile narrow", "floor narrow",
    "kept graphs narrow", "peers narrow", "losses alone", "loader", "24 GB budget narrow",
)  # fmt: skip


@pytest.mark.slow
def test_gpu_sh_runs_all_stages_in_their_order_and_the_page_has_their_figures(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path)}
    command = ["bash", "benchmarks/gpu.sh", "--toy"]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    figures = json.loads((tmp_path / "gpu_toy.json").read_text())
    stages = figures["stages"]
    assert tuple(stages) == STAGES and figures["toy"]
    assert not [name for name, found in stages.items() if {"error", "out_of_memory"} & found.keys()]
    assert stages["smoke checks"]["exit_code"] == 0
    for name in STAGES[2:4]:
        assert stages[name]["seconds"] > 0 and stages[name]["chunk_size"] == 16 and stages[name]["remembered"] == 64
        assert stages[name]["pairs_per_second"] == pytest.approx(64 / stages[name]["seconds"])
        assert stages[name]["share_with_pass_1"] == pytest.approx(4 / 3 * stages[name]["share_of_matrix_rate"])
    kept = stages["kept graphs narrow"]["ways"]
    assert kept["floor"]["peak_bytes"] <= kept["none"]["peak_bytes"] < kept["kept"]["peak_bytes"]
    peers = stages["peers narrow"]
    assert {"ours", "floor", "open_clip", "sentence_transformers"} == {*peers["ways"], *peers["not_run"]}
    assert set(stages["losses alone"]["ways"]) == {"infonce", "infonce, TF32", "sigmoid", "sigmoid, TF32"}
    loader = stages["loader"]
    assert loader["images_per_second"] > 0 and 0 <= loader["ready_after_them"] <= 1
    assert "On a GPU\n\nNot measured" in made_page(tmp_path), "toy figures are no figures"
    stages |= {"floor narrow": {"out_of_memory": "CUDA out of memory. Tried to allocate 3 GiB."}}
    content = figures | {"machine": "NVIDIA H100, torch 2", "toy": False, "stages": stages}
    (tmp_path / "gpu.json").write_text(json.dumps(content))
    page = made_page(tmp_path)
    assert "## On a GPU\n\nNVIDIA H100, torch 2" in page and "| narrow compiled | 64 |" in page
    assert "floor narrow: CUDA out of memory. Tried to allocate 3 GiB." in page


def test_a_stage_that_fails_is_its_own_result_and_the_next_one_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    bench, file = gpu.Bench(torch.device("cpu"), gpu.TOY, tmp_path / "gpu.json"), tmp_path / "gpu.json"

    def fails(error: Exception):
        def run() -> dict:
            raise error

        return run

    bench.stage("too large", fails(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 87.00 GiB.\nMore")))
    assert json.loads(file.read_text())["stages"]["too large"]["out_of_memory"].endswith("87.00 GiB.")
    bench.stage("broken", fails(ValueError("no such thing")))
    bench.stage("fine", lambda: {"figure": 1})
    stages = json.loads(file.read_text())["stages"]
    assert stages["broken"]["error"] == "no such thing" and stages["fine"]["figure"] == 1


def test_a_way_that_runs_out_of_memory_leaves_the_others_their_turns(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import measured

    calls = []

    def too_large() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 174.00 GiB. GPU 0 has a total capacity")

    results = measured.take_turns({"large": too_large, "small": lambda: calls.append(1)}, 3, torch.device("cpu"))
    assert results["large"] == {"out_of_memory": "CUDA out of memory. Tried to allocate 174.00 GiB."}
    assert len(results["small"]["all_seconds"]) == 3 and len(calls) == 5 and results["small"]["peak_bytes"] == 0


@pytest.mark.slow
def test_every_script_leaves_raw_figures_of_all_ways_and_the_page_has_them(tmp_path, monkeypatch):
    pytest.importorskip("open_clip")
    pytest.importorskip("sentence_transformers")
    small = ["--subject", "narrow", "--chunk-size", "16"]
    for script, flags in (
        ("step", ["--subject", "narrow", "--sizes", "32", "--chunk-sizes", "16", "--repeats", "1"]),
        ("savings", [*small, "--size", "32", "--repeats", "1"]),
        ("loss", ["--sizes", "64", "--dimensions", "16", "--repeats", "1"]),
        ("profile_step", [*small, "--size", "32"]),
    ):
        file = tmp_path / f"{ {'step': 'step_narrow', 'profile_step': 'profile_narrow'}.get(script, script) }.json"
        run_script(monkeypatch, script, *flags, "--output", str(file))
    step = json.loads((tmp_path / "step_narrow.json").read_text())["rows"][0]["ways"]
    assert set(step) == {"plain", "ours", "ours_kept", "sentence_transformers", "open_clip"}
    assert all(way["seconds"] > 0 and way["peak_bytes"] > 0 for way in step.values())
    assert step["ours"]["peak_bytes"] < step["ours_kept"]["peak_bytes"]
    losses = json.loads((tmp_path / "loss.json").read_text())["rows"]
    assert {row["loss"] for row in losses} == {"infonce", "sigmoid"}
    shares = json.loads((tmp_path / "profile_narrow.json").read_text())["shares"]
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 0
    page = made_page(tmp_path)
    for words in ("`narrow`", "| infonce | 64 | 16 |", "all graphs kept", "| loss | ", "On a GPU\n\nNot measured"):
        assert words in page, words
    assert page.count("Not measured.") == 2  # memory.py and loader.py were not run


def run_script(monkeypatch, script: str, *flags: str) -> None:
    """Run a benchmark as a script, in this process: open_clip and sentence-transformers take long to import."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(sys, "argv", [f"benchmarks/{script}.py", *flags])
    runpy.run_path(str(ROOT / "benchmarks" / f"{script}.py"), run_name="__main__")


def made_page(folder) -> str:
    command = [sys.executable, "benchmarks/tables.py", "--results", str(folder), "--output", str(folder / "README.md")]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return (folder / "README.md").read_text()


def test_predicted_chunks_fit_and_activations_are_those_of_real_tensors(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import predict

    config = predict.clip(16, (64, 2, 2), (64, 2, 2), 16)
    monkeypatch.setattr(predict, "MODELS", {"a small CLIP": (predict.CLIPModel, config)})
    settings = predict.Settings(cards=(2, 3, 80), batch=4096, output=tmp_path / "predicted.json")
    predict.main(settings)
    row = json.loads(settings.output.read_text())["rows"][0]
    torch.manual_seed(0)
    towers = predict.TwoTowers(predict.dual_parts(predict.CLIPModel(config), predict.DEFAULT_FORMS["clip"], None))
    input_ids = torch.full((4, 77), 49407)
    pixels = torch.zeros(4, 3, 224, 224, dtype=torch.uint8)
    inputs = {"pixel_values": pixels, "input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    with torch.autocast("cpu", torch.bfloat16):
        assert predict.measure_activations(towers.train(), inputs) == row["activations"]
    assert [cell["chunk"] for cell in row["cards"]] == sorted(cell["chunk"] for cell in row["cards"])
    assert all(cell["device"] < cell["card"] * 2**30 for cell in row["cards"]) and row["cards"][0]["chunk"] > 0
    assert f"| a small CLIP | {row['activations'] / 2**20:.0f} MiB |" in capsys.readouterr().out


def test_tf32_costs_gradients_more_than_float32(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import tf32

    tf32.main(tf32.Settings(size=256, dimension=32, noise=(0.0, 3.0)))
    rows = [line.split("|")[3:5] for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == 4 and all(10 * float(exact) < 1e-4 < float(rounded) for exact, rounded in rows)


def test_memory_is_measured_in_processes_of_their_own_and_drawn(tmp_path):
    where = [f"--output={tmp_path / 'memory.json'}", f"--picture={tmp_path / 'memory.png'}"]
    command = [sys.executable, "benchmarks/memory.py", "--sizes", "32", "--chunk-size=16", *where]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    (row,) = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert row["effective_batch"] == 32 and row["cached"]["seconds"] > 0 and row["plain"]["seconds"] > 0
    assert (tmp_path / "memory.png").stat().st_size > 5000


def test_memory_is_measured_and_drawn(tmp_path, monkeypatch):
    """In this process; the script starts a process per measurement."""
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
