"""evaluate.py as a user runs it: the promised files, the same on one process or two, errors of one line."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
from lib.data.named_sets import CLASSES
from lib.towers import build_preset

ROOT = Path(__file__).resolve().parents[1]
COLOURS = ("red", "green", "blue", "white", "black", "grey")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """Files of a run that evaluate.py needs: small untrained towers in RUN/export."""
    run = tmp_path_factory.mktemp("run")
    texts = [f"a {colour} square on a {ground} ground" for colour in COLOURS for ground in COLOURS]
    towers, processing = build_preset("tiny-siglip", texts, use_bias=True)
    towers.save_pretrained(run / "export")
    processing.save_pretrained(run / "export")
    return run


@pytest.fixture(scope="module")
def captions(tmp_path_factory) -> Path:
    """A table of 9 images with 2 captions each; one image file is cut short."""
    folder = tmp_path_factory.mktemp("captions")
    rng = np.random.default_rng(0)
    with open(folder / "captions.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["filename", "caption"])
        for i in range(9):
            pixels = rng.integers(0, 255, (20 + i, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            table.writerow([f"{i}.png", f"a {COLOURS[i % 6]} square"])
            table.writerow([f"{i}.png", f"something on a {COLOURS[i % 5]} ground, number {i}"])
    broken = folder / "4.png"
    broken.write_bytes(broken.read_bytes()[:200])
    return folder / "captions.csv"


def run_script(*arguments: str | Path, ranks: int = 1) -> subprocess.CompletedProcess:
    launcher = [sys.executable]
    if ranks > 1:
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
        ]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*launcher, "evaluate.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def read_metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_zeroshot_leaves_what_the_design_promises(run_folder, tmp_path):
    out = tmp_path / "new" / "folder"
    flags = ["--limit", 80, "--workers", 1, "--cache-dir", tmp_path / "cache"]
    found = run_script("zeroshot", "--model", run_folder, "--data", "digits", "--output-dir", out, *flags)
    assert found.returncode == 0, found.stderr
    metrics = read_metrics(out)
    promised = ["accuracy", "top5", "macro_precision", "macro_recall", "macro_f1", "per_class", "confusion"]
    assert list(metrics)[: len(promised)] == promised
    assert list(metrics["per_class"]) == list(CLASSES)
    assert all(set(figures) == {"precision", "recall", "f1", "support"} for figures in metrics["per_class"].values())
    confusion = np.array(metrics["confusion"])
    assert confusion.shape == (10, 10) and confusion.sum() == 80
    assert np.trace(confusion) / 80 == pytest.approx(metrics["accuracy"])
    assert f"report: {out / 'report.html'}" in found.stdout
    for name in ("confusion.png", "class_f1.png", "examples.png"):
        assert str(out / name) in found.stdout and (out / name).is_file()
    assert f"zero-shot    {metrics['accuracy']:.4f}  {metrics['top5']:.4f}" in found.stdout
    assert (out / "report.html").read_text().count("data:image/png;base64,") == len(list(out.glob("*.png")))
    assert "Traceback" not in found.stderr


@pytest.mark.slow
def test_retrieval_on_two_ranks_equals_one_process(run_folder, captions, tmp_path, capsys):
    def flags(out: str) -> list[str]:
        own = ["--cache-dir", str(tmp_path / out / "cache"), "--output-dir", str(tmp_path / out)]
        return ["retrieval", "--model", str(run_folder), "--data", str(captions), "--workers", "0", *own]

    found = run_script(*flags("two"), "--batch-size", 3, ranks=2)
    assert found.returncode == 0, found.stderr
    assert evaluate.main([*flags("one"), "--batch-size", "3"]) == 0
    alone = capsys.readouterr().out
    metrics = read_metrics(tmp_path / "one")
    assert metrics == read_metrics(tmp_path / "two")
    assert list(metrics) == ["image_to_text", "text_to_image"]
    assert all(list(figures) == ["R@1", "R@5", "R@10", "MRR", "median_rank"] for figures in metrics.values())
    for printed in (alone, found.stdout):
        assert printed.count("text to image") == 1, "rank 0 alone prints"
        assert "images: 8\nskipped: 1 (truncated 1)\ncaptions: 16" in printed
    assert "on 2 x cpu" in found.stdout
    for out in ("one", "two"):
        drawn = len(list((tmp_path / out).glob("*.png")))
        assert (tmp_path / out / "report.html").read_text().count("data:image/png;base64,") == drawn >= 6
    again = run_script(*flags("two"), ranks=2)
    assert again.returncode == 0 and "image embeddings from an earlier evaluation" in again.stdout
    assert read_metrics(tmp_path / "two") == metrics, "stored embeddings serve all ranks"


def test_the_wrong_task_names_the_right_one(run_folder, captions, tmp_path, capsys):
    for wrong, data, right in (("retrieval", "digits", "zeroshot"), ("zeroshot", captions, "retrieval")):
        arguments = [wrong, "--model", run_folder, "--data", data, "--output-dir", tmp_path]
        assert evaluate.main(list(map(str, arguments))) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert f"run `evaluate.py {right}`" in error and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--batch-size", "0", "--limit", "-3"],
            ["--limit -3 must be at least 1; --batch-size 0 must be at least 1"],
        ),
        (["--model", "EMPTY"], ["--model", "holds no model", "export"]),
        (["--data", "no/such/thing"], ["no/such/thing"]),
        (["--output-dir", "FILE/out"], ["--output-dir", "choose another folder"]),
        (["--prompts", "no-such-bank"], ["--prompts no-such-bank"]),
    ],
)
def test_a_fault_of_the_users_is_one_line(run_folder, tmp_path, capsys, flags, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("not a folder")
    flags = [flag.replace("EMPTY", str(tmp_path / "empty")).replace("FILE", str(tmp_path / "file")) for flag in flags]
    defaults = {"--model": str(run_folder), "--output-dir": str(tmp_path / "out"), "--data": "digits"}
    given = defaults | dict(zip(flags[::2], flags[1::2], strict=True))
    assert evaluate.main(["zeroshot", *(word for flag in given.items() for word in flag)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words)


def test_an_unknown_flag_or_task_is_a_usage_error(capsys):
    for arguments in (["zeroshot", "--modell", "x"], ["retreival"], []):
        with pytest.raises(SystemExit) as stopped:
            evaluate.main(arguments)
        assert stopped.value.code == 2
