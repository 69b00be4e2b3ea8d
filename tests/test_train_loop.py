"""Training as a user starts it, in this process: curves, files, memory, evaluation, stops and errors."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from made_data import make_images, make_table
from made_shards import first_step
from PIL import Image
from ranks import on_ranks
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

import train_clip
import train_siglip
from lib import losses
from lib.data import ImagePipeline, Prepare, TrainingData, open_sources
from lib.errors import InputError, RunError
from lib.gradcache import step as gradcache_step
from lib.gradcache.random_state import RandomState
from lib.runs.reporter import _duration, read_metrics
from lib.towers import TwoTowers
from lib.towers.processing import Processing

SMALL = [
    "--effective-batch=64", "--xbm-size=64", "--chunk-size=32", "--steps=4", "--warmup-steps=0",
    "--eval-every=2", "--save-every=2",
]  # fmt: skip


def run(main, folder: Path, *flags: str) -> Path:
    """Train in this process with small settings and the given flags on top; returns the run's folder."""
    main([*SMALL, f"--output-dir={folder}", *flags])
    return folder


def steps_of(folder: Path) -> list[dict]:
    return [line for line in read_metrics(folder) if "loss" in line]


@pytest.fixture(autouse=True)
def no_accelerate_state_from_other_runs():
    """Accelerate remembers precision and devices for the whole process; a user's run has a process of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def siglip_run(tmp_path_factory) -> Path:
    return run(train_siglip.main, tmp_path_factory.mktemp("siglip") / "run", "--val-data=digits")


def test_a_run_leaves_the_promised_files(siglip_run):
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "loss_curve.png"):
        assert (siglip_run / name).stat().st_size > 0, name
    first, *_, last = steps_of(siglip_run)
    assert (first["step"], last["step"]) == (1, 4)
    assert {"epoch", "loss", "lr", "logit_scale", "logit_bias", "pairs_per_second"} <= first.keys()
    assert {"data_seconds", "peak_memory_bytes", "grad_norm", "replay_difference"} <= first.keys()
    assert first["replay_difference"] < 1e-5
    summary = json.loads((siglip_run / "summary.json").read_text())
    assert (summary["steps"], summary["pairs"]) == (4, 256)
    assert summary["data"] == {"read": 256, "used": 256, "skipped": {}, "images": 1442}
    lengths = {"looked_at": 40, "cut": 0, "token_limit": 64}
    assert summary["texts"] == lengths | {"same_text": "negative", "shared_pairs": None}
    assert {"wall_seconds", "peak_memory_bytes", "eval"} <= summary.keys()
    assert 0 <= summary["eval"]["accuracy"] <= 1
    evaluations = [line["step"] for line in read_metrics(siglip_run) if "eval" in line]
    assert evaluations == [2, 4]


def test_the_export_loads_with_plain_transformers(siglip_run):
    model = AutoModel.from_pretrained(siglip_run / "export")
    AutoProcessor.from_pretrained(siglip_run / "export")
    best = load_file(siglip_run / "checkpoints" / "best" / "model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(value, best[name]), name


def test_the_written_config_repeats_the_run(siglip_run, tmp_path):
    train_siglip.main(["--config", str(siglip_run / "config.yaml"), f"--output-dir={tmp_path / 'again'}"])
    assert [s["loss"] for s in steps_of(tmp_path / "again")] == [s["loss"] for s in steps_of(siglip_run)]


def test_best_is_the_checkpoint_with_the_best_figure(siglip_run):
    found = {line["step"]: line["eval"] for line in read_metrics(siglip_run) if "eval" in line}
    best = max(found, key=lambda step: (found[step]["accuracy"], -found[step]["loss"], step))
    assert (siglip_run / "checkpoints" / "best").resolve().name == f"step_{best:06d}"


CURVE = [
    "--effective-batch=128",
    "--xbm-size=96",
    "--xbm-start=3",
    "--steps=10",
    "--eval-every=0",
    "--save-every=0",
]


def curve(main, folder: str, *flags: str) -> list[float]:
    run(main, Path(folder), *CURVE, *flags)
    return [step["loss"] for step in steps_of(Path(folder))]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("main", [train_clip.main, train_siglip.main], ids=["clip", "siglip"])
def test_the_loss_curve_does_not_depend_on_the_chunk_size(main, optimizer, tmp_path):
    whole = curve(main, tmp_path / "whole", "--chunk-size=128", f"--optimizer={optimizer}")
    assert whole[-1] != pytest.approx(whole[0], rel=1e-2)  # the weights do move
    for size, kept in ((32, 0), (50, 0), (32, 2)):
        flags = (f"--chunk-size={size}", f"--keep-graphs={kept}", f"--optimizer={optimizer}")
        assert curve(main, tmp_path / f"{size}-{kept}", *flags) == pytest.approx(whole, rel=1e-4)


MAINS = {"clip": train_clip.main, "siglip": train_siglip.main}


def curve_on_this_rank(name: str, folder: str) -> list[float]:
    return curve(MAINS[name], folder, "--chunk-size=24")


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "name"), [(2, "siglip"), (4, "clip")])
def test_the_loss_curve_does_not_depend_on_the_number_of_ranks(world_size, name, tmp_path):
    one = curve(MAINS[name], tmp_path / "one", "--chunk-size=128")
    assert on_ranks(world_size, curve_on_this_rank, name, str(tmp_path / "many")) == pytest.approx(one, rel=1e-4)


def test_the_memory_changes_training_only_from_its_start_on(tmp_path):
    off = curve(train_clip.main, tmp_path / "off", "--xbm-size=0")
    on = curve(train_clip.main, tmp_path / "on", "--xbm-start=4")
    assert on[:3] == off[:3] and on[3] > off[3]  # further candidates make the softmax's task harder
    used = [step["xbm_used"] for step in steps_of(tmp_path / "on")]
    filled = [step["xbm_filled"] for step in steps_of(tmp_path / "on")]
    assert used == [0] * 3 + [96] * 7 and filled[:2] == [96, 96]
    assert "xbm_used" not in steps_of(tmp_path / "off")[0]


def test_the_drift_of_recurring_samples_is_reported(tmp_path):
    """1,442 digits recur within a memory of 1,500: readings come with the second epoch."""
    run(
        train_clip.main,
        tmp_path / "run",
        "--effective-batch=721",
        "--xbm-size=1500",
        "--steps=3",
        "--eval-every=0",
    )
    first, second, third = steps_of(tmp_path / "run")
    assert first["drift_samples"] == second["drift_samples"] == 0 and first["drift_image"] is None
    assert third["drift_samples"] == 721 and 0 < third["drift_image"] < 2 and 0 < third["drift_text"] < 2


def test_group_and_pair_positives_are_different_losses(tmp_path):
    group = curve(train_siglip.main, tmp_path / "group")
    pair = curve(train_siglip.main, tmp_path / "pair", "--positives=pair")
    assert group[0] != pytest.approx(pair[0], rel=0.05)


def captions_said_of_several_images(folder: Path) -> str:
    """Sixteen images: four captions are those of three images each, four of one."""
    rows = [["filename", "caption"]]
    make_images(folder, *(f"{number}.png" for number in range(16)))
    rows += [[f"{number}.png", f"colour {number % 4 if number < 12 else number}"] for number in range(16)]
    return make_table(folder / "captions.csv", rows)


OF_SIXTEEN = ("--effective-batch=16", "--chunk-size=8", "--xbm-size=16", "--xbm-start=0", "--eval-every=0")


def test_images_with_the_same_caption_are_no_negatives_of_each_other(tmp_path, capsys):
    data, first, second = captions_said_of_several_images(tmp_path), {}, {}
    for way in ("auto", "exclude", "positive", "negative"):
        run(train_clip.main, tmp_path / way, *OF_SIXTEEN, f"--data={data}", f"--same-text={way}", "--verify-gradients")
        first[way], second[way] = (step["loss"] for step in steps_of(tmp_path / way)[:2])
        printed = capsys.readouterr().out
        counts = {"positive": "positives", "negative": "negatives"}.get(way, "no negatives")
        line = f"; 12 captions are identical to a caption of another image: {counts} of each other (--same-text)"
        assert line in printed and "texts      8 distinct texts" in printed
        assert "verify-gradients: largest relative difference" in printed
        said = json.loads((tmp_path / way / "summary.json").read_text())["texts"]
        assert (said["same_text"], said["shared_pairs"]) == ("exclude" if way == "auto" else way, 12)
    assert (first["auto"], second["auto"]) == (first["exclude"], second["exclude"])
    # Nothing is learned yet: the loss is about the logarithm of the candidates, for twelve of sixteen 14 instead of 16.
    assert first["negative"] - first["exclude"] == pytest.approx(0.75 * math.log(16 / 14), abs=0.05)
    assert second["exclude"] < second["negative"] - 0.05
    # Equal texts have equal logits: to InfoNCE it is all the same which of them is the target. Remembered ones differ.
    assert first["positive"] == pytest.approx(first["negative"], rel=1e-6)
    assert second["positive"] != pytest.approx(second["negative"], rel=1e-3)


def test_the_bias_starts_without_the_negatives_that_are_left_out(tmp_path):
    """Twelve of sixteen pairs have two fewer; of class prompts, all that --positives pair makes of one class."""
    flags = ("--steps=1", "--lr=1e-9", "--xbm-size=0", f"--data={captions_said_of_several_images(tmp_path)}")
    for way, ratio in {"auto": 13.5, "positive": 13.5 / 2.5, "negative": 15}.items():
        run(train_siglip.main, tmp_path / way, *OF_SIXTEEN, *flags, f"--same-text={way}")
        assert steps_of(tmp_path / way)[0]["logit_bias"] == pytest.approx(-math.log(ratio), abs=1e-4)
    negatives = {}
    for way in ("auto", "exclude"):
        flags = ("--positives=pair", f"--same-text={way}", "--steps=1", "--lr=1e-9", "--xbm-size=0", "--eval-every=0")
        run(train_siglip.main, tmp_path / f"prompts_{way}", *flags)
        negatives[way] = math.exp(-steps_of(tmp_path / f"prompts_{way}")[0]["logit_bias"])
    assert negatives["auto"] == pytest.approx(63, abs=1e-2) and negatives["exclude"] < 62


def test_the_bias_starts_where_the_data_wants_it(tmp_path):
    """Pair positives: N - 1 negatives for each positive, with whose weight the memory makes do."""
    run(train_siglip.main, tmp_path / "run", "--positives=pair", "--steps=1", "--lr=1e-9", "--eval-every=0")
    assert steps_of(tmp_path / "run")[0]["logit_bias"] == pytest.approx(-math.log(63), abs=1e-4)


def test_a_softmax_clip_gets_its_bias_solved_from_the_first_batch(tmp_path):
    clip = run(train_clip.main, tmp_path / "clip", "--steps=2", "--eval-every=0", "--save-every=0")
    flags = ("--model", str(clip / "export"), "--steps=1", "--lr=1e-9", "--eval-every=0", "--xbm-size=0")
    run(train_siglip.main, tmp_path / "siglip", *flags, "--chunk-size=64")
    (step,) = steps_of(tmp_path / "siglip")
    assert step["logit_bias"] != 0
    towers = TwoTowers.from_pretrained(tmp_path / "siglip" / "export").eval()
    source, _ = open_sources("digits", None, None)
    data = TrainingData(
        source, Prepare(ImagePipeline(32, "crop"), Processing.from_pretrained(clip / "export").tokenize),
        effective_batch=64, chunk_size=64, rank=0, world_size=1, workers=0, seed=0,
    )  # fmt: skip
    (chunk,) = first_step(data)
    with torch.no_grad():
        output = towers(chunk.pixel_values, chunk.input_ids, chunk.attention_mask)
    logits = output.logit_scale * output.image_embeds @ output.text_embeds.T + output.logit_bias
    positive = chunk.group[:, None] == chunk.group
    # There the sigmoid loss is flat in the bias: as many positives are predicted as there are.
    assert logits.sigmoid().sum().item() == pytest.approx(positive.sum().item(), rel=1e-3)


def test_the_scale_is_clamped(tmp_path):
    """It starts at 1 / 0.07 = 14.3."""
    clamped = run(train_clip.main, tmp_path / "clamped", "--scale-max=13")
    free = run(train_clip.main, tmp_path / "free", "--scale-max=0")
    assert max(step["logit_scale"] for step in steps_of(clamped)) == pytest.approx(13)
    assert min(step["logit_scale"] for step in steps_of(free)) > 14


def test_frozen_parts_stay_put_and_others_move(tmp_path):
    still = run(train_clip.main, tmp_path / "run", "--freeze", "text", "--save-every=1", "--keep-checkpoints=0")
    weights = [load_file(still / "checkpoints" / f"step_{s:06d}" / "model.safetensors") for s in (1, 4)]
    moved = {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    assert moved and not any(name.startswith(("text_model", "text_projection")) for name in moved)


def test_old_checkpoints_are_pruned_and_the_best_is_kept(tmp_path):
    folder = run(
        train_clip.main,
        tmp_path / "run",
        "--steps=6",
        "--save-every=1",
        "--eval-every=1",
        "--val-data=digits",
        "--keep-checkpoints=2",
    )
    kept = {path.name for path in (folder / "checkpoints").glob("step_*")}
    best = (folder / "checkpoints" / "best").resolve().name
    assert kept == {"step_000005", "step_000006", best}


def test_zero_switches_evaluation_and_checkpoints_off(tmp_path):
    folder = run(train_clip.main, tmp_path / "run", "--eval-every=0", "--save-every=0", "--steps=1")
    assert not list((folder / "checkpoints").glob("*"))
    assert not [line for line in read_metrics(folder) if "eval" in line]
    assert (folder / "export" / "model.safetensors").exists()


def test_a_diverged_run_names_the_step_and_the_last_checkpoint(tmp_path, monkeypatch):
    clean = losses.infonce
    calls = []

    def broken(fresh, *arguments, **options):
        share = clean(fresh, *arguments, **options)
        calls.append(len(fresh))  # what is timed before the first step has another size
        return share if calls.count(64) < 4 else type(share)(**vars(share) | {"loss": share.loss * float("nan")})

    monkeypatch.setattr(losses, "infonce", broken)
    with pytest.raises(RunError, match=r"step 4: loss nan.*--resume auto resumes from .*step_000002"):
        run(train_clip.main, tmp_path / "run", "--steps=8", "--eval-every=0")


def test_verify_gradients_passes_and_stops_a_broken_build(tmp_path, monkeypatch, capsys):
    run(train_siglip.main, tmp_path / "good", "--verify-gradients", "--dropout=0.2", "--steps=1")
    assert "image tower" in capsys.readouterr().out
    with monkeypatch.context() as broken, pytest.raises(RunError, match="verify-gradients"):
        broken.setattr(RandomState, "restore", lambda self: None)
        run(train_siglip.main, tmp_path / "no_replay", "--verify-gradients", "--dropout=0.2", "--steps=1")
    surrogate = gradcache_step.surrogate
    with monkeypatch.context() as broken, pytest.raises(RunError, match="verify-gradients.*'logit_scale': [12]"):
        broken.setattr(gradcache_step, "surrogate", lambda *given, final: surrogate(*given, final=True))
        run(train_siglip.main, tmp_path / "scale_times_chunks", "--verify-gradients", "--steps=1")


def test_the_plan_names_negatives_texts_and_recurrence(tmp_path, capsys):
    run(
        train_siglip.main,
        tmp_path / "run",
        "--effective-batch=2048",
        "--xbm-size=512",
        "--chunk-size=512",
        "--steps=1",
        "--eval-every=0",
    )
    plan = capsys.readouterr().out
    assert "2,047 fresh and 512 remembered negatives" in plan
    assert "40 distinct texts" in plan
    assert "repeats each 1.4 times a step" in plan and "--effective-batch 256 --xbm-size 1792" in plan


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--eval-every=0",)], ids=["best", "last"])
@pytest.mark.parametrize("main", [train_clip.main, train_siglip.main], ids=["clip", "siglip"])
def test_bf16_trains_evaluates_and_exports(main, flags, tmp_path, monkeypatch):
    flags = (*flags, "--lr=1e-4")
    plain = run(main, tmp_path / "plain", *flags)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    half = run(main, tmp_path / "half", *flags)
    losses = [[step["loss"] for step in steps_of(folder)] for folder in (plain, half)]
    assert losses[1] != losses[0]  # it is another precision
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_an_unknown_precision_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(InputError, match="fp8 is not supported; use bf16, fp16 or no"):
        run(train_clip.main, tmp_path / "run")


@pytest.mark.slow
def test_tensorboard_gets_the_metrics(tmp_path):
    run(train_clip.main, tmp_path / "run", "--tracker=tensorboard", "--steps=2")
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data=/no/such/folder"], "/no/such/folder"),
        (["--effective-batch=0"], "--effective-batch 0 must be at least 1"),
        (["--chunk-size=-1", "--lr=0"], "--chunk-size -1 .*; --lr 0.0 must be greater than 0"),
        (["--image-tower=somewhere"], "--image-tower and --text-tower go together"),
        (["--resume=/no/checkpoint"], "--resume /no/checkpoint is not a whole checkpoint"),
        (["--best-metric=acuracy"], "--best-metric acuracy is not measured.*accuracy"),
        (["--freeze", "image", "text", "scale", "bias"], "--freeze image text scale bias leaves nothing"),
        (["--freeze", "imagee"], "imagee.*image"),
        (["--label-smoothing=0.1"], "--label-smoothing 0.1 .*train_clip.py"),
        (["--output-dir=/proc/nowhere"], "--output-dir /proc/nowhere cannot be written"),
        (["--dropout=1.5"], "--dropout 1.5 must be a fraction"),
        (["--model=tiny", "--dropout=0.1", "--image-size=33"], "33"),
        (["--projection=mlp"], "--projection mlp shapes heads of --image-tower"),
        (["--beta2=1"], "--beta2 1.0 must be below 1"),
        (["--tracker=wandb"], "--tracker wandb needs the wandb package"),
    ],
)
def test_bad_input_gets_one_clear_error_before_the_first_batch(flags, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run(train_siglip.main, tmp_path / "run", *flags)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_unknown_yaml_key_suggests_the_nearest(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"efective_batch": 64}))
    with pytest.raises(InputError, match="efective_batch.*did you mean effective_batch"):
        train_clip.main(["--config", str(tmp_path / "c.yaml")])


def test_the_command_line_wins_over_yaml(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"steps": 3, "lr": 1e-3, "freeze": ["text"], "val_data": None}))
    run(train_clip.main, tmp_path / "run", "--config", str(tmp_path / "c.yaml"), "--steps=1")
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (written["steps"], written["freeze"], written["lr"]) == (1, ["text"], 1e-3)


def test_a_folder_that_holds_a_run_is_not_written_over(siglip_run):
    with pytest.raises(InputError, match="already holds a run.*--resume auto"):
        run(train_siglip.main, siglip_run)


def test_data_info_tells_of_the_data_and_trains_nothing(tmp_path, capsys):
    train_clip.main(["--data", "digits", "--data-info", "--output-dir", str(tmp_path / "info")])
    told = capsys.readouterr().out
    assert "1,442 pairs" in told and "held out   digits (test): 355 images" in told
    assert {file.name for file in (tmp_path / "info").iterdir()} == {"data_info.json", "data_info.png"}


def test_the_remaining_time_is_printed_after_three_steps(tmp_path, capsys):
    flags = ("--eval-every=0", "--save-every=0")
    run(train_clip.main, tmp_path / "short", *flags, "--steps=3")
    assert " remaining: " not in capsys.readouterr().out
    run(train_clip.main, tmp_path / "long", *flags, "--steps=5")
    said = [line for line in capsys.readouterr().out.splitlines() if " remaining: " in line]
    assert len(said) == 1 and re.fullmatch(r"about \d+ s remaining: 2 steps of [\d.e-]+ s, and evaluations", said[0])


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5999, "100 min"), (6000, "1.7 h")]
)
def test_durations_are_in_seconds_minutes_or_hours(seconds, words):
    assert _duration(seconds) == words


def test_augmentation_reaches_the_images(tmp_path):
    """The same run but for its augmentation."""
    losses = set()
    for augment in ("none", "crop", "light", "jitter", "strong"):
        run(
            train_clip.main, tmp_path / augment, f"--augment={augment}", "--steps=1", "--eval-every=0", "--save-every=0"
        )
        losses.add(steps_of(tmp_path / augment)[0]["loss"])
    assert len(losses) == 5


def test_several_sources_are_mixed_by_weight(tmp_path):
    """Digits and a table in one run: counts of both, and an exact resume."""
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    (tmp_path / "captions.csv").write_text("filename,caption\nred.png,a red square\ngone.png,not there\n")
    flags = ["--data", "digits::0.75", f"{tmp_path / 'captions.csv'}::0.25", "--workers=0", "--eval-every=0"]
    folder = run(train_siglip.main, tmp_path / "run", *flags)
    data = json.loads((folder / "summary.json").read_text())["data"]
    assert data["skipped"] == {"missing": 1} and data["read"] == data["used"] + 1
    run(train_siglip.main, tmp_path / "run", *flags, "--steps=6", "--resume=auto")
    assert [line["step"] for line in steps_of(folder)] == [1, 2, 3, 4, 5, 6]
