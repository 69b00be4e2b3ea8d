"""A killed run goes on as if it had never stopped: bit-identical weights, data position and memory included."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image
from ranks import on_ranks

import train_clip
import train_siglip
from lib.checkpoint import is_whole, newest_whole
from lib.data import open_sources
from lib.errors import InputError
from lib.processing import Processing
from lib.report import read_metrics
from lib.towers import build_preset, presets

STEPS = 12
FLAGS = [
    "--effective-batch=48", "--chunk-size=20", "--xbm-size=60", "--xbm-start=2", f"--steps={STEPS}",
    "--augment=strong", "--dropout=0.2", "--save-every=4", "--eval-every=6", "--warmup-steps=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    """Three shards of 40 digits with captions, one of the images broken."""
    folder = tmp_path_factory.mktemp("shards")
    source, _ = open_sources("digits", None, None)
    for number in range(3):
        with tarfile.open(folder / f"digits-{number}.tar", "w") as tar:
            for index in range(40 * number, 40 * number + 40):
                image = io.BytesIO()
                source.images.open(index).save(image, "PNG")
                content = b"not an image" if index == 50 else image.getvalue()
                caption = source.texts[source.first_text[index]].encode()
                for ending, data in ((".png", content), (".txt", caption)):
                    member = tarfile.TarInfo(f"{index:05d}{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return str(folder / "digits-{0..2}.tar")


def arguments(folder: Path, flags: list[str]) -> list[str]:
    return [*FLAGS, f"--output-dir={folder}", "--resume=auto", *flags]


def finish(folder: Path, flags: list[str], ranks: int = 1) -> None:
    """The same command, from where it stands to its end."""
    on_ranks(ranks, train_clip.main, arguments(folder, flags))


def start(folder: Path, flags: list[str], ranks: int = 1) -> subprocess.Popen:
    """Start training as a user does, in a process group of its own."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
        ]
    command = [*launcher, "train_clip.py", *arguments(folder, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)


def wait_for_step(folder: Path, process: subprocess.Popen, step: int) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be interrupted"
        if (folder / "metrics.jsonl").exists() and any(s["step"] >= step for s in read_metrics(folder)):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def outcome(folder: Path) -> tuple[bytes, list[dict]]:
    """The last checkpoint's weights, and what the metrics say that does not depend on time."""
    weights = (folder / "checkpoints" / f"step_{STEPS:06d}" / "model.safetensors").read_bytes()
    timed = ("pairs_per_second", "step_seconds", "data_seconds", "peak_memory_bytes")
    metrics = [{k: v for k, v in line.items() if k not in timed} for line in read_metrics(folder)]
    return weights, metrics


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ranks"), [("shards", 1), ("indexed", 2)])
def test_killed_in_mid_step_and_resumed_equals_unbroken(kind, ranks, shards, tmp_path):
    flags = ["--workers=2"] + ([f"--data={shards}"] if kind == "shards" else [])
    finish(tmp_path / "unbroken", flags, ranks)
    killed = start(tmp_path / "killed", flags, ranks)
    wait_for_step(tmp_path / "killed", killed, 6)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert newest_whole(tmp_path / "killed" / "checkpoints").name == "step_000004"
    finish(tmp_path / "killed", flags, ranks)
    expected, found = outcome(tmp_path / "unbroken"), outcome(tmp_path / "killed")
    assert found[0] == expected[0]
    assert found[1] == expected[1]
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("unbroken", "killed")]
    assert summaries[0]["data"] == summaries[1]["data"]
    if kind == "shards":
        assert summaries[0]["data"]["skipped"] == {"not_an_image": 1}


@pytest.mark.slow
def test_sigterm_saves_and_exits_75_and_the_run_goes_on(tmp_path):
    process = start(tmp_path / "run", ["--save-every=0", "--eval-every=0", "--workers=2"])
    wait_for_step(tmp_path / "run", process, 3)
    os.killpg(process.pid, signal.SIGTERM)  # the whole group, data workers included, as a cluster does
    assert process.wait(timeout=240) == 75
    saved = newest_whole(tmp_path / "run" / "checkpoints")
    assert 3 <= int(saved.name.removeprefix("step_")) < STEPS
    finish(tmp_path / "run", ["--save-every=0", "--eval-every=0", "--workers=2"])
    steps = [line["step"] for line in read_metrics(tmp_path / "run")]
    assert steps == list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    train_clip.main([*FLAGS, f"--output-dir={folder}", "--steps=4", "--save-every=2", "--eval-every=0"])
    return folder


def test_a_run_killed_between_its_last_checkpoint_and_its_export_is_finished(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "export")
    flags = [*FLAGS, f"--output-dir={run}", "--steps=4", "--save-every=2", "--eval-every=0", "--resume=auto"]
    train_clip.main(flags)
    assert json.loads((run / "summary.json").read_text())["steps"] == 4
    assert (run / "export" / "model.safetensors").exists()


def test_a_tiny_siglip_with_the_fewer_positions_of_older_versions_goes_on(tmp_path, monkeypatch):
    """Checkpoints say how many positions their model has; the preset's number is for new ones."""
    flags = ["--effective-batch=8", "--chunk-size=8", "--xbm-size=0", "--save-every=2", "--eval-every=0", "--workers=0"]
    command = [*flags, f"--output-dir={tmp_path / 'run'}"]
    with monkeypatch.context() as older:
        older.setattr(presets, "SIGLIP_TEXT_LENGTH", 32)
        train_siglip.main([*command, "--steps=2"])
    train_siglip.main([*command, "--steps=4", "--resume=auto"])
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]
    settings = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    assert settings["text_config"]["max_position_embeddings"] == 32
    assert Processing.from_pretrained(tmp_path / "run" / "export").max_length == 32
    _, new = build_preset("tiny-siglip", ["a text"])
    assert new.max_length == 64  # negative control: a new one has more


def test_a_resumed_run_tells_which_settings_changed(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    flags = [*FLAGS, f"--output-dir={run}", "--save-every=2", "--eval-every=0", "--resume=auto"]
    train_clip.main([*flags, "--steps=5", "--lr=1e-6", "--augment=none"])
    (told,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("changed"))
    assert "--lr 1.0e-06 (was 0.001)" in told and "--augment none (was strong)" in told
    assert "--steps 5 (was 4)" in told and told.count("(was") == 3  # neither the folder nor --resume
    train_clip.main([*flags, "--steps=6", "--lr=1e-6", "--augment=none"])
    assert "changed    --steps 6 (was 5)\n" in capsys.readouterr().out


def test_a_lowered_learning_rate_holds_after_a_resume(finished, tmp_path):
    resume = f"--resume={finished / 'checkpoints' / 'step_000002'}"
    flags = [*FLAGS, "--steps=4", "--eval-every=0", "--schedule=constant", "--lr=1e-6", resume]
    train_clip.main([*flags, f"--output-dir={tmp_path / 'lower'}"])
    assert [line["lr"] for line in read_metrics(tmp_path / "lower")] == [1e-6, 1e-6]


def test_a_cut_checkpoint_is_passed_over(finished, tmp_path):
    newest = finished / "checkpoints" / "step_000004"
    assert newest_whole(finished / "checkpoints") == newest
    weights = newest / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    assert not is_whole(newest)
    assert newest_whole(finished / "checkpoints").name == "step_000002"
    weights.write_bytes(content)


def test_a_finished_run_stays_as_it_is(finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    flags = [*FLAGS, f"--output-dir={finished}", "--steps=4", "--save-every=2", "--eval-every=0"]
    train_clip.main([*flags, "--resume=auto"])
    assert (finished / "metrics.jsonl").read_bytes() == before
    assert "nothing is left to do" in capsys.readouterr().out


def test_more_steps_go_on_from_the_last(finished, tmp_path):
    flags = [*FLAGS, "--steps=6", "--eval-every=0", f"--resume={finished / 'checkpoints' / 'step_000004'}"]
    train_clip.main([*flags, f"--output-dir={tmp_path / 'more'}"])
    assert [line["step"] for line in read_metrics(tmp_path / "more")] == [5, 6]


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_goes_on_on_one_with_the_same_pairs(tmp_path):
    """The same curve as an unbroken run on one rank, and counts that no rank loses or doubles."""
    flags = [
        "--effective-batch=48",
        "--xbm-size=60",
        "--xbm-start=2",
        "--save-every=3",
        "--eval-every=0",
        "--workers=0",
    ]
    train_clip.main([*flags, "--steps=6", f"--output-dir={tmp_path / 'one'}"])
    on_ranks(2, train_clip.main, [*flags, "--steps=6", f"--output-dir={tmp_path / 'two'}"])
    resume = f"--resume={tmp_path / 'two' / 'checkpoints' / 'step_000003'}"
    train_clip.main([*flags, "--steps=6", resume, f"--output-dir={tmp_path / 'went_on'}"])
    curves = {name: [line["loss"] for line in read_metrics(tmp_path / name)] for name in ("one", "went_on")}
    assert curves["went_on"] == pytest.approx(curves["one"][3:], rel=1e-4)
    counts = {
        json.dumps(json.loads((tmp_path / n / "summary.json").read_text())["data"]) for n in ("one", "two", "went_on")
    }
    assert counts == {json.dumps({"read": 288, "used": 288, "skipped": {}, "images": 1442})}


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--effective-batch=50", "--effective-batch 50 is not that of the checkpoint"),
        ("--xbm-size=30", "--xbm-size 30 is not that of the checkpoint"),
        ("--optimizer=sgd", "--optimizer sgd is not that of the checkpoint"),
        ("--freeze=text", "--freeze .* is not that of the checkpoint"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(finished, tmp_path, flag, message):
    flags = [
        *FLAGS,
        f"--resume={finished / 'checkpoints' / 'step_000004'}",
        f"--output-dir={tmp_path / 'run'}",
    ]
    with pytest.raises(InputError, match=message):
        train_clip.main([*flags, flag])


def test_every_broken_file_gets_through_a_run(shared, tmp_path):
    """Decodable ones are used, others counted by reason; a small --max-bad stops with the list."""
    broken = sorted((shared / "data" / "broken").iterdir())
    for name in ("first", "second"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), "red").save(tmp_path / "data" / name / "good.png")
    for number, file in enumerate(broken):
        (tmp_path / "data" / ("first", "second")[number % 2] / file.name).symlink_to(file)
    pairs = len(broken) + 2
    flags = ["--effective-batch=8", "--xbm-size=8", f"--steps={-(-pairs // 8)}", "--eval-every=0"]
    flags += [f"--data={tmp_path / 'data'}", "--workers=1"]
    train_clip.main([*flags, f"--output-dir={tmp_path / 'run'}"])
    data = json.loads((tmp_path / "run" / "summary.json").read_text())["data"]
    assert data["read"] == pairs == data["used"] + sum(data["skipped"].values())
    assert data["skipped"] == {"truncated": 2, "oversized": 1, "not_an_image": 1, "empty": 1}
    skipped = [json.loads(line)["key"] for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert {Path(key).name for key in skipped} == {
        "bomb_196_megapixels.png", "header_only.jpg", "text_renamed.jpg", "truncated.jpg", "zero_bytes.jpg"
    }  # fmt: skip
    with pytest.raises(RuntimeError, match="more than --max-bad 0.1.*skipped.jsonl"):
        train_clip.main([*flags, f"--output-dir={tmp_path / 'strict'}", "--max-bad=0.1"])
