"""`python -m lib.export` as a user runs it, on the folder of a training run."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from conftest import ROOT
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HTTPError
from transformers import AutoModel

import train_siglip
from lib.errors import InputError, RunError
from lib.export.__main__ import main
from lib.runs.checkpoint import TrainingState, save_checkpoint
from lib.towers import TwoTowers
from lib.towers.processing import Processing

FLAGS = [
    "--effective-batch=32", "--chunk-size=16", "--xbm-size=32", "--steps=4", "--warmup-steps=0", "--save-every=2",
    "--eval-every=2", "--best-metric=loss", "--keep-checkpoints=0", "--augment=none", "--workers=0",
    "--val-data=digits",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_accelerate_state_from_other_runs():
    """A user's export begins in a process of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of 4 steps; nobody changes it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    AcceleratorState._reset_state(reset_partial_state=True)
    train_siglip.main([*FLAGS, f"--output-dir={folder}"])
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of it for one test."""
    return shutil.copytree(trained, tmp_path / "run", symlinks=True)


def same_logits(first: Path, second: Path) -> bool:
    ours, theirs = TwoTowers.from_pretrained(first).state_dict(), TwoTowers.from_pretrained(second).state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_the_command_exports_the_best_checkpoint_and_says_how_exact(run):
    shutil.rmtree(run / "export")
    command = [sys.executable, "-m", "lib.export", str(run), "--format", "hf"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    best = (run / "checkpoints" / "best").resolve()
    assert f"exported {best} to {run / 'export'}: largest logit difference " in done.stdout
    assert float(done.stdout.split()[-1]) <= 1e-4
    assert same_logits(run / "export", best)
    assert {path.name for path in (run / "export").iterdir()} >= {"config.json", "model.safetensors", "README.md"}


def test_a_checkpoint_of_two_ranks_is_exported_on_one(run):
    towers, processing = (kind.from_pretrained(run / "export") for kind in (TwoTowers, Processing))
    towers.set_scale_and_bias(7.0, None)
    both = threading.Barrier(2)

    def save(rank: int) -> None:
        state = TrainingState(progress={"step": 6, "world_size": 2}, optimizer={}, rank={"data": rank})
        weights = towers.state_dict()
        save_checkpoint(run / "checkpoints", 6, towers, weights, processing, state, rank=rank, barrier=both.wait)

    ranks = [threading.Thread(target=save, args=(rank,)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert (run / "checkpoints" / "step_000006" / "rank_0001.pt").is_file()
    main([str(run), "--checkpoint", "last", "--output", str(run / "out")])
    assert TwoTowers.from_pretrained(run / "out")().logit_scale.item() == pytest.approx(7.0)


def test_no_process_group_or_accelerator_is_started(run):
    main([str(run)])
    assert not AcceleratorState._shared_state and not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("checkpoint", "step", "folder"),
    [("last", 4, "export_last"), ("step_000002", 2, "export_step_000002"), ("PATH", 2, "export_step_000002")],
)
def test_any_checkpoint_can_be_named(run, checkpoint, step, folder, capsys):
    name = str(run / "checkpoints" / "step_000002") if checkpoint == "PATH" else checkpoint
    main([str(run), "--checkpoint", name])
    assert same_logits(run / folder, run / "checkpoints" / f"step_{step:06d}")
    assert "largest logit difference" in capsys.readouterr().out
    assert f"after step {step}." in (run / folder / "README.md").read_text()


def test_without_evaluations_best_is_the_last(run):
    (run / "checkpoints" / "best").unlink()
    main([str(run), "--output", str(run.parent / "out")])
    assert same_logits(run.parent / "out", run / "checkpoints" / "step_000004")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--checkpoint", "step_000003"], ["--checkpoint step_000003", "best, last, step_000002, step_000004"]),
        (["--checkpoint", "step_000002", "BREAK"], ["--checkpoint step_000002", "not whole"]),
        (["--output", "RUN/checkpoints"], ["--output", "holds something that is no export"]),
        (["--output", "RUN/config.yaml"], ["--output", "holds something that is no export"]),
        (["--private"], ["--private", "--push-to-hub"]),
        (["--push-to-hub", "not a name/at all"], ["--push-to-hub", "OWNER/NAME"]),
        (["--push-to-hub", "bare"], ["--push-to-hub", "OWNER/NAME"]),
    ],
)
def test_a_fault_of_the_users_is_told_and_leaves_everything(run, flags, words, monkeypatch):
    if flags[-1] == "BREAK":
        (run / "checkpoints" / flags[1] / "model.safetensors").write_bytes(b"")
        flags = flags[:-1]
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    with pytest.raises(InputError) as told:
        main([str(run), *(flag.replace("RUN", str(run)) for flag in flags)])
    assert all(word in str(told.value) for word in words) and "\n" not in str(told.value)
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before


def test_a_folder_that_is_no_run_is_told(tmp_path):
    with pytest.raises(InputError, match="RUN .*missing is no folder"):
        main([str(tmp_path / "missing")])
    with pytest.raises(InputError, match="holds no whole checkpoint and no export"):
        main([str(tmp_path)])


@pytest.mark.parametrize("checkpoint", ["best", "last"])
def test_a_run_that_kept_no_checkpoint_is_exported_from_its_export(run, checkpoint, capsys):
    expected = shutil.copytree(run / "export", run.parent / "expected")
    shutil.rmtree(run / "checkpoints")
    main([str(run), "--checkpoint", checkpoint, "--output", str(run.parent / "out")])
    assert f"exported {run / 'export'} to" in capsys.readouterr().out
    assert same_logits(run.parent / "out", expected)
    assert (run.parent / "out" / "README.md").read_text().replace("out", "export") == (
        expected / "README.md"
    ).read_text().replace("out", "export")
    main([str(run)])  # in place
    assert same_logits(run / "export", expected)
    with pytest.raises(InputError, match="--checkpoint step_000002: no such model"):
        main([str(run), "--checkpoint", "step_000002"])


@pytest.mark.parametrize(
    ("form", "package"),
    [
        ("open_clip", "open_clip"),
        ("sentence-transformers", "sentence_transformers.base.modules"),
        ("onnx", "onnxruntime"),
        ("onnx", "onnx"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(run, form, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    wanted = {
        "open_clip": "pip install open_clip_torch",
        "sentence-transformers": "pip install 'sentence-transformers>=6.0'",
        "onnx": "pip install onnx onnxruntime onnxscript",
    }[form]
    with pytest.raises(InputError, match=f"--format {form} .*{wanted}"):
        main([str(run), "--format", form])
    assert not (run / f"export_{form}").exists()


# ---- the model card ----


def test_every_export_has_a_card_from_the_runs_own_files(run):
    card = (run / "export" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "transformers" and header["pipeline_tag"] == "zero-shot-image-classification"
    assert "license" not in header and "base_model" not in header and "## Licence" in card
    for words in (
        "SiglipModel with",
        "the pairwise sigmoid loss",
        "| base model | none: random weights (preset tiny) |",
        "| data | digits, 1,442 images, 128 pairs read |",
        "| batch | 32 pairs in a step",
        "| contrasted with | 31 other pairs of the step, and up to 32 remembered ones |",
        "| length | 4 steps, 128 pairs,",
    ):
        assert words in card
    summary = json.loads((run / "summary.json").read_text())
    best = summary["best"]["step"]
    assert f"step {best} (this model, best loss" in card and "step 4 (" in card
    assert f" {summary['eval']['accuracy']:.4f} |" in card


def test_a_card_names_base_models_of_the_hub_and_no_folder_of_this_machine(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config |= {"image_tower": "timm:vit_tiny_patch16_224", "text_tower": "openai/clip-vit-base-patch32#text"}
    config |= {
        "data": ["/home/me/secret/cap|tions.csv", "https://me:pass@host.org/a.tar?key=abc", "pipe:cat /home/me/x"]
    }
    config |= {"freeze": ["image"], "unfreeze": ["image.last:1"], "lora": 8, "ema": 0.999}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    main([str(run)])
    text = "".join(
        path.read_text(errors="ignore") for path in (run / "export").iterdir() if path.suffix != ".safetensors"
    )
    header = yaml.safe_load(text[text.index("---\n") :].split("---")[1])
    assert header["base_model"] == ["openai/clip-vit-base-patch32"]
    assert r"| data | cap\|tions.csv https://host.org/a.tar the output of a command, " in text
    assert (
        "| frozen | image, but not image.last:1 |" in text and "| weights | moving average with decay 0.999 |" in text
    )
    assert "| adapters | of rank 8 on attention layers, merged |" in text
    for secret in ("/home/me", "pass", "key=abc", str(run), str(run.parent)):
        assert secret not in text


def test_a_model_of_elsewhere_has_a_card_without_figures(run, tmp_path):
    shutil.copytree(run / "export", tmp_path / "model")
    main([str(run), "--checkpoint", str(tmp_path / "model"), "--output", str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Evaluation" not in card and "## Training" not in card and "after step" not in card


# ---- the hub ----


@pytest.fixture
def hub(monkeypatch) -> list:
    """Records requests to the hub; a user is logged in."""
    calls = []

    def create_repo(self, repo_id, **options):
        calls.append(("create_repo", repo_id, options))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, **options):
        calls.append(("upload_folder", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    return calls


def test_a_push_makes_the_repository_and_uploads_the_checked_folder(run, hub, capsys):
    main([str(run), "--push-to-hub", "me/model", "--private"])
    files = sorted(path.name for path in (run / "export").iterdir())
    assert hub == [
        ("create_repo", "me/model", {"private": True, "exist_ok": True}),
        ("upload_folder", "me/model", files),
    ]
    assert "pushed to https://huggingface.co/me/model" in capsys.readouterr().out
    card = (run / "export" / "README.md").read_text()
    assert "# me/model" in card and 'AutoModel.from_pretrained("me/model")' in card


def test_a_push_that_fails_is_told_in_one_line_and_the_export_stays(run, hub, monkeypatch):
    def refuse(self, repo_id, **options):
        raise HTTPError("connection refused\nand more")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(RunError, match="--push-to-hub me/model failed .connection refused.; the export is whole in"):
        main([str(run), "--push-to-hub", "me/model", "--output", str(run / "pushed")])
    assert AutoModel.from_pretrained(run / "pushed")


@pytest.mark.parametrize(("offline", "words"), [(True, "HF_HUB_OFFLINE is set"), (False, "nobody is logged in")])
def test_without_network_or_login_nothing_is_begun(run, hub, offline, words, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("lib.export.__main__.get_token", lambda: None)
    shutil.rmtree(run / "export")
    with pytest.raises(InputError, match=words):
        main([str(run), "--push-to-hub", "me/model"])
    assert not (run / "export").exists() and not hub
