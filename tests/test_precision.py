"""The precision: how it is chosen for a device, by flag or launcher, and its use in training and evaluation."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from conftest import ROOT

import evaluate
import train_clip
from lib import losses
from lib.backends.precision import LAUNCHED, Precision, choose_precision, full_float32, set_up_kernels
from lib.config import TrainConfig
from lib.errors import InputError, RunError
from lib.evaluation import subject
from lib.runs.reporter import read_metrics
from lib.setup.announce import compile_lines
from lib.towers import TwoTowers

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = ["--effective-batch=64", "--chunk-size=16", "--xbm-size=0", "--steps=2", "--save-every=0", "--eval-every=0"]


@pytest.fixture(autouse=True)
def nobody_launched_this(monkeypatch):
    """Accelerate remembers devices and precision for the whole process; a user's run has a process of its own."""
    monkeypatch.delenv(LAUNCHED, raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def a_gpu(monkeypatch, has_bf16: bool) -> None:
    """torch says that old cards support bf16, where it emulates it."""
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16 or including_emulation
    )


def test_auto_is_what_the_device_computes_in(monkeypatch):
    assert choose_precision("auto", CPU).name == "fp32"
    a_gpu(monkeypatch, has_bf16=True)
    assert choose_precision("auto", CUDA).name == "bf16"
    a_gpu(monkeypatch, has_bf16=False)
    assert choose_precision("auto", CUDA).name == "fp16"
    for modules, name in (
        ({"is_bf16_supported": lambda: True}, "bf16"),
        ({"is_bf16_supported": lambda: False}, "fp32"),
    ):
        monkeypatch.setattr(torch, "get_device_module", lambda device, modules=modules: SimpleNamespace(**modules))
        assert choose_precision("auto", torch.device("xpu")).name == name
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    assert choose_precision("auto", torch.device("mps")).name == "fp32"


@pytest.mark.parametrize("launched", ["bf16", "fp16"])
def test_what_accelerate_launch_says_holds_and_no_says_nothing(monkeypatch, launched):
    a_gpu(monkeypatch, has_bf16=True)
    monkeypatch.setenv(LAUNCHED, "no")
    assert [choose_precision(asked, CUDA).name for asked in ("auto", "fp32", "fp16")] == ["bf16", "fp32", "fp16"]
    monkeypatch.setenv(LAUNCHED, launched)
    assert choose_precision("auto", CUDA).name == launched == choose_precision(launched, CPU).name
    with pytest.raises(InputError, match=f"--precision fp32 contradicts {launched} of accelerate launch"):
        choose_precision("fp32", CUDA)
    monkeypatch.setenv(LAUNCHED, "fp8")
    with pytest.raises(InputError, match="fp8 is not supported; use bf16, fp16 or no"):
        choose_precision("auto", CUDA)


def test_a_card_that_emulates_bf16_is_told_so(monkeypatch):
    a_gpu(monkeypatch, has_bf16=False)
    assert str(choose_precision("bf16", CUDA)) == "bf16 (this GPU only emulates it: fp16 is faster)"
    a_gpu(monkeypatch, has_bf16=True)
    assert str(choose_precision("bf16", CUDA)) == "bf16"


def test_tf32_is_for_cuda_and_not_for_losses(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    try:
        set_up_kernels(CPU, deterministic=False)
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.benchmark
        set_up_kernels(CUDA, deterministic=False)
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.benchmark
        with pytest.raises(KeyError), full_float32():
            assert torch.get_float32_matmul_precision() == "highest"
            raise KeyError
        assert torch.get_float32_matmul_precision() == "high"
        set_up_kernels(CUDA, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(False)


def test_losses_and_the_comparison_of_gradients_run_in_full_float32(tmp_path, monkeypatch):
    seen, infonce = [], losses.infonce

    def noting(*given, **options):
        seen.append(torch.get_float32_matmul_precision())
        return infonce(*given, **options)

    monkeypatch.setattr(losses, "infonce", noting)
    torch.set_float32_matmul_precision("high")
    try:
        train_clip.main([*SMALL, "--verify-gradients", f"--output-dir={tmp_path / 'run'}"])
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["highest"] * 3


def test_deterministic_runs_train_and_a_forbidden_kernel_is_one_line(tmp_path, monkeypatch):
    try:
        train_clip.main([*SMALL, "--deterministic", f"--output-dir={tmp_path / 'run'}"])
        assert torch.are_deterministic_algorithms_enabled()

        def forbidden(self, **inputs):
            raise RuntimeError(
                "adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you set "
                "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation"
            )

        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(TwoTowers, "forward", forbidden)
        monkeypatch.setattr("lib.setup.plan.measure_activations", lambda towers, inputs: 1)
        monkeypatch.setattr("lib.setup.build.shares_texts", lambda *_: False)
        with pytest.raises(RunError, match="--deterministic: adaptive_avg_pool2d_backward_cuda has no reproducible"):
            flags = [*SMALL, "--deterministic", f"--output-dir={tmp_path / 'forbidden'}"]
            train_clip.main(flags)
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_plan_says_what_was_chosen_and_the_flag_changes_the_towers(tmp_path, capsys):
    found = {}
    for asked, said in (("auto", "fp32 (auto: on a CPU)"), ("bf16", "bf16")):
        AcceleratorState._reset_state(reset_partial_state=True)
        train_clip.main([*SMALL, f"--precision={asked}", f"--output-dir={tmp_path / asked}"])
        assert f"precision  {said}\n" in capsys.readouterr().out
        found[asked] = [line["loss"] for line in read_metrics(tmp_path / asked)]
    assert found["auto"] != found["bf16"] == pytest.approx(found["auto"], rel=0.05)


def test_the_plan_suggests_compile_where_it_helps():
    on = {
        (device, compiled, sharded): compile_lines(
            TrainConfig(compile=compiled),
            SimpleNamespace(accelerator=SimpleNamespace(device=device), shards_weights=sharded),
        )
        for device in (CPU, CUDA)
        for compiled in (False, True)
        for sharded in (False, True)
    }
    suggesting = [case for case, lines in on.items() if any("no: --compile makes" in line for line in lines)]
    assert suggesting == [(CUDA, False, False)]
    assert all(lines for case, lines in on.items() if case[1])


def test_the_configurations_for_gpus_ask_for_bf16():
    files = {file.stem: yaml.safe_load(file.read_text()) for file in (ROOT / "accelerate_configs").glob("*.yaml")}
    asked = {name: settings["mixed_precision"] for name, settings in files.items()}
    assert asked.pop("cpu") == "no"
    assert "single_gpu" in asked and set(asked.values()) == {"bf16"}


def test_evaluation_runs_in_it_keeps_float32_embeddings_and_does_not_mix_stored_ones(tmp_path, monkeypatch):
    train_clip.main([*SMALL[:-3], "--steps=40", "--lr=3e-3", "--eval-every=0", f"--output-dir={tmp_path / 'run'}"])
    embedded, embed = [], subject.embed_images

    def noting(*given, **options):
        embedded.append(embed(*given, **options))
        return embedded[-1]

    monkeypatch.setattr(subject, "embed_images", noting)
    figures = {}
    common = [f"--model={tmp_path / 'run'}", "--data=digits", f"--cache-dir={tmp_path / 'cache'}"]
    for name in ("fp32", "bf16", "bf16"):
        folder = tmp_path / name
        assert evaluate.main(["zeroshot", *common, f"--precision={name}", f"--output-dir={folder}"]) == 0
        figures[name] = json.loads((folder / "metrics.json").read_text())
    assert len(embedded) == 2, "the second in bf16 comes from the store"
    plain, short = (each.embeds for each in embedded)
    assert plain.dtype == short.dtype == torch.float32 and not torch.equal(plain, short)
    assert (plain * short).sum(1).min() > 0.999
    assert figures["bf16"]["accuracy"] == pytest.approx(figures["fp32"]["accuracy"], abs=0.01)


def test_stored_outputs_of_another_precision_are_others():
    assert Precision("fp32", CPU).identity() == ()
    kinds = {Precision(name, device).identity() for name in ("fp32", "bf16", "fp16") for device in (CPU, CUDA)}
    assert len(kinds) == 6
