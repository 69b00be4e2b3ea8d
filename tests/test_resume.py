"""A killed run resumes as if never stopped: bit-identical weights, data position and memory bank."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image
from ranks import on_ranks
from safetensors.torch import load_file

import evaluate
import lib.export.__main__ as export
import train_clip
import train_siglip
from lib.data import open_sources
from lib.errors import InputError
from lib.runs.checkpoint import is_whole, newest_whole
from lib.runs.reporter import read_metrics
from lib.towers import TwoTowers, build_preset, load
from lib.towers.processing import Processing

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
    """Resume with the same command until the end."""
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
    """Weights of the last checkpoint, and the metrics that do not depend on time."""
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
        older.setattr(load, "SIGLIP_TEXT_LENGTH", 32)
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
    assert "--steps 5 (was 4)" in told and "--head-lr 1.0e-06 (was 0.001)" in told  # it follows --lr
    assert told.count("(was") == 4  # neither the folder nor --resume
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


def copied(run: Path, folder: Path) -> tuple[Path, list[str]]:
    """The steady run in another folder, and the flags that add two steps to it."""
    shutil.copytree(run, folder, symlinks=True)
    flags = ["--schedule=constant", "--workers=0", "--steps=6", "--save-every=2", "--eval-every=0", "--resume=auto"]
    return folder, [*FLAGS, f"--output-dir={folder}", *flags]


@pytest.fixture(scope="module")
def steady(tmp_path_factory) -> Path:
    """A finished run of four steps at one learning rate: with more steps, its first ones are the same."""
    folder = tmp_path_factory.mktemp("steady") / "run"
    flags = ["--schedule=constant", "--workers=0", "--steps=4", "--save-every=2", "--eval-every=0"]
    train_clip.main([*FLAGS, f"--output-dir={folder}", *flags])
    return folder


@pytest.fixture(scope="module")
def longer(steady, tmp_path_factory) -> dict:
    """The weights of the run with two more steps."""
    run, flags = copied(steady, tmp_path_factory.mktemp("longer") / "run")
    train_clip.main(flags)
    return load_file(run / "checkpoints" / "step_000006" / "model.safetensors")


def same(run: Path, weights: dict) -> bool:
    found = load_file(run / "checkpoints" / "step_000006" / "model.safetensors")
    return found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in found)


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) * 6 // 10] ^= 0x40
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("model.safetensors", "one flipped bit"),
        ("optimizer.pt", "zeros of the same size"),
        ("memory.safetensors", "one flipped bit"),
        ("rank_0000.pt", "one flipped bit"),
    ],
)
def test_a_damaged_checkpoint_is_told_put_aside_and_the_one_before_resumed(name, how, steady, longer, tmp_path, capsys):
    run, flags = copied(steady, tmp_path / "run")
    newest = run / "checkpoints" / "step_000004"
    if how == "one flipped bit":
        flipped(newest / name)
    else:
        (newest / name).write_bytes(bytes((newest / name).stat().st_size))
    train_clip.main(flags)
    printed = capsys.readouterr().out
    assert f"{newest} is damaged: its {name} is not what was written" in printed and "steps      6 (from 2)" in printed
    assert same(run, longer) and newest.with_name("step_000004.damaged").is_dir()


def test_a_damaged_checkpoint_that_was_named_is_refused(steady, tmp_path):
    run, _ = copied(steady, tmp_path / "run")
    damaged = run / "checkpoints" / "step_000004"
    flipped(damaged / "optimizer.pt")
    with pytest.raises(InputError, match=r"--resume .*step_000004 is damaged: its optimizer.pt"):
        train_clip.main([*FLAGS, f"--resume={damaged}", f"--output-dir={tmp_path / 'other'}"])
    flipped(damaged / "model.safetensors")
    with pytest.raises(InputError, match=r"step_000004 is damaged: its model.safetensors"):
        TwoTowers.from_pretrained(damaged)


@pytest.mark.parametrize("content", ["[1]", "", '{"files": 3}', '{"progress": {}, "files": {"x": []}}', "[" * 100_000])
def test_a_manifest_that_says_nothing_is_no_checkpoint(content, steady, tmp_path):
    run, _ = copied(steady, tmp_path / "run")
    (run / "checkpoints" / "step_000004" / "checkpoint.json").write_text(content)
    assert newest_whole(run / "checkpoints").name == "step_000002"


def test_a_checkpoint_of_a_newer_version_is_refused_and_not_passed_over(steady, tmp_path):
    run, flags = copied(steady, tmp_path / "run")
    manifest = run / "checkpoints" / "step_000004" / "checkpoint.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 99}))
    with pytest.raises(InputError, match="has format version 99, and this program reads up to 1: update it"):
        train_clip.main(flags)


def test_a_checkpoint_of_before_with_sizes_and_no_version_resumes(steady, longer, tmp_path):
    run, flags = copied(steady, tmp_path / "run")
    manifest = run / "checkpoints" / "step_000004" / "checkpoint.json"
    content = json.loads(manifest.read_text())
    content["files"] = {name: entry["bytes"] for name, entry in content["files"].items()}
    del content["version"]
    manifest.write_text(json.dumps(content))
    train_clip.main(flags)
    assert same(run, longer)


def test_folders_of_other_names_beside_the_checkpoints_are_let_alone(steady, longer, tmp_path):
    run, flags = copied(steady, tmp_path / "run")
    checkpoints = run / "checkpoints"
    for name in ("step_000004.bak", "step_old", "step_4", "old_step_000004", "step_000009 (copy)"):
        shutil.copytree(checkpoints / "step_000004", checkpoints / name)
    (checkpoints / "step_000010").write_text("a file")
    train_clip.main([*flags, "--keep-checkpoints=1"])
    assert same(run, longer)
    assert {"step_000004.bak", "step_old", "step_4", "old_step_000004"} <= {f.name for f in checkpoints.iterdir()}


def test_a_run_copied_with_its_links_followed_resumes_and_keeps_its_best(tmp_path):
    """cp -rL, rsync -L and object storage make a folder of checkpoints/best."""
    run, flags = (
        tmp_path / "run",
        [*FLAGS, "--eval-every=2", "--save-every=2", "--keep-checkpoints=1", "--val-data=digits"],
    )
    train_clip.main([*flags, f"--output-dir={run}", "--steps=2"])
    shutil.copytree(run, tmp_path / "copy")
    best = tmp_path / "copy" / "checkpoints" / "best"
    assert best.is_dir() and not best.is_symlink()
    train_clip.main([*flags, f"--output-dir={tmp_path / 'copy'}", "--steps=4", "--resume=auto"])
    summary = json.loads((tmp_path / "copy" / "summary.json").read_text())
    assert best.is_symlink() and best.resolve().name == f"step_{summary['best']['step']:06d}"


@pytest.mark.parametrize("content", [b"", b"data: [digits\n", b"\xff\xfe\x00", b"[1]"], ids=repr)
def test_damaged_files_that_nothing_needs_stop_no_resume(content, steady, longer, tmp_path):
    run, flags = copied(steady, tmp_path / "run")
    for name in ("config.yaml", "summary.json"):
        (run / name).write_bytes(content)
    for name in ("metrics.jsonl", "skipped.jsonl"):
        with open(run / name, "ab") as file:
            file.write(content + b"\n")
    train_clip.main(flags)
    assert same(run, longer) and [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("content", [b"", b"data: [digits\n", b"\xff\xfe\x00"], ids=repr)
def test_damaged_files_that_nothing_needs_stop_no_evaluation_and_no_export(content, steady, tmp_path, capsys):
    run, _ = copied(steady, tmp_path / "run")
    for name in ("config.yaml", "summary.json", "metrics.jsonl"):
        (run / name).write_bytes(content)
    flags = ["--data=digits", "--workers=0", f"--output-dir={tmp_path / 'out'}", f"--cache-dir={tmp_path / 'cache'}"]
    assert evaluate.main(["zeroshot", f"--model={run}", "--split=test", *flags]) == 0
    assert f"{run / 'config.yaml'} is damaged: it is unknown whether" in capsys.readouterr().out
    export.main([str(run), f"--output={tmp_path / 'export'}"])
    assert (tmp_path / "export" / "README.md").is_file()


def test_an_extended_run_is_finished_once_the_export_of_its_new_end_is_there(steady, longer, tmp_path, monkeypatch):
    run, flags = copied(steady, tmp_path / "run")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("lib.finish.export", raising(KeyboardInterrupt))
        train_clip.main(flags)
    assert json.loads((run / "export" / "export.json").read_text())["step"] == 4
    train_clip.main(flags)
    assert json.loads((run / "export" / "export.json").read_text())["step"] == 6
    exported = load_file(run / "export" / "model.safetensors")
    assert all(torch.equal(exported[name], longer[name]) for name in longer)


def test_an_export_that_is_not_whole_is_made_again_and_a_card_may_be_edited(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    flags = [*FLAGS, f"--output-dir={run}", "--steps=4", "--save-every=2", "--eval-every=0", "--resume=auto"]
    (run / "export" / "README.md").write_text("a licence")
    train_clip.main(flags)
    assert "nothing is left to do" in capsys.readouterr().out
    (run / "export" / "model.safetensors").write_bytes(b"cut")
    train_clip.main(flags)
    assert "exported to" in capsys.readouterr().out and (run / "export" / "model.safetensors").stat().st_size > 3


def raising(kind: type[BaseException]):
    def fails(*_, **__):
        raise kind

    return fails


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
    """The same curve as an uninterrupted run on one rank, and counts that no rank loses or doubles."""
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


@pytest.mark.parametrize(
    ("earlier", "refused"),
    [
        ({"projection": "linear", "text_projection": "same"}, None),
        ({"projection": "linear"}, None),
        ({"projection": "linear", "dropout": 0.0, "projection_dropout": 0.2, "lora_dropout": 0.0}, None),
        ({"projection": "linear", "dropout": 0.0, "projection_dropout": 0.3}, "--dropout 0.2 is not that of the check"),
        ({"projection": "linear", "text_projection": "mlp"}, "--projection .* is not that of the checkpoint"),
        ({"projection": "mlp", "text_projection": "same"}, "--projection .* is not that of the checkpoint"),
    ],
)
def test_a_checkpoint_with_a_flag_for_each_head_still_resumes(finished, tmp_path, earlier, refused):
    """Earlier versions had --text-projection and --projection-dropout, too."""
    checkpoint = Path(shutil.copytree(finished / "checkpoints" / "step_000004", tmp_path / "step_000004"))
    manifest = json.loads((checkpoint / "checkpoint.json").read_text())
    manifest["progress"]["settings"] |= earlier
    (checkpoint / "checkpoint.json").write_text(json.dumps(manifest))
    flags = [*FLAGS, f"--resume={checkpoint}", f"--output-dir={tmp_path / 'run'}"]
    with pytest.raises(InputError, match=refused) if refused else nullcontext():
        train_clip.main(flags)
    if not refused:
        steps = [line["step"] for line in read_metrics(tmp_path / "run") if "loss" in line]
        assert steps == list(range(5, STEPS + 1))


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
