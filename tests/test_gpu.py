"""Checks that need a GPU: `python3 -m pytest -m gpu tests/test_gpu.py`, first in gpu.sh.

Skipped without a CUDA device. Nothing here needs the shared data or a network.
"""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from conftest import ROOT
from test_shared_texts import prompted_chunks
from toy import ToyTowers, toy_chunks

import evaluate
import train_clip
import train_siglip
from lib.backends.precision import LAUNCHED, full_float32
from lib.data.loading import ImageBuffer
from lib.errors import StoppedEarly
from lib.gradcache.prefetch import on_device
from lib.gradcache.step import GradCache, cached_step
from lib.losses import Pairs, infonce, sigmoid
from lib.losses.objective import dense_infonce, dense_sigmoid
from lib.runs import reporter as report
from lib.runs.reporter import read_metrics

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FLAGS = [
    "--effective-batch=64",
    "--chunk-size=16",
    "--xbm-size=64",
    "--xbm-start=1",
    "--eval-every=0",
    "--save-every=0",
]
MOST_SYNCHRONIZATIONS = 5
TRUNK_GRAPHS = 6  # each trunk with and without a graph, the text trunk for its first number of texts and for any


@pytest.fixture(autouse=True)
def a_process_of_its_own(monkeypatch):
    """Accelerate remembers devices for the whole process."""
    monkeypatch.delenv(LAUNCHED, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_float32_matmul_precision("highest")
    torch.cuda.empty_cache()


def train(main, folder: Path, *flags: str) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    main([*FLAGS, "--steps=3", *flags, f"--output-dir={folder}"])
    return folder


def test_the_digits_train_to_a_finite_loss_in_the_gpus_precision(tmp_path, capsys):
    for main in (train_siglip.main, train_clip.main):
        run = train(main, tmp_path / main.__module__, "--steps=20", "--eval-every=20")
        lines = [line for line in read_metrics(run) if "loss" in line]
        assert all(math.isfinite(line["loss"]) for line in lines) and len(lines) == 20
        assert lines[-1]["peak_reserved_bytes"] >= lines[-1]["peak_memory_bytes"] > 0
        assert (run / "export" / "model.safetensors").exists()
    wanted = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    assert f"precision  {wanted} (auto" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gradients_are_those_of_plain_autograd(precision, tmp_path, capsys):
    for number, main in enumerate((train_clip.main, train_siglip.main)):
        flags = (f"--precision={precision}", "--verify-gradients", "--dropout=0.1", "--steps=1")
        train(main, tmp_path / str(number), *flags)
    assert capsys.readouterr().out.count("verify-gradients: largest relative difference") == 2


@pytest.mark.parametrize("kept", [0, 1, 3], ids=["no graph kept", "one", "all"])
@pytest.mark.parametrize("kind", ["pairs", "shared texts", "negatives"])
def test_the_cached_step_gives_on_cuda_what_it_gives_on_the_cpu(kind, kept):
    """In float64, without dropout, whose numbers differ by device."""
    gradients = {}
    for device in (CPU, CUDA):
        towers = ToyTowers(0.0).to(device)
        chunks = prompted_chunks(4, 3) if kind == "shared texts" else toy_chunks(12, 4, 4)
        generator = torch.Generator().manual_seed(3)
        embeds = [F.normalize(torch.randn(9, 6, generator=generator, dtype=torch.float64)) for _ in range(2)]
        old = Pairs(*(embed.to(device) for embed in embeds), *(torch.arange(9, device=device) for _ in range(3)))
        negatives = [{"input_ids": torch.arange(8).view(2, 4), "attention_mask": torch.ones(2, 4, dtype=torch.int64)}]
        for loss in (infonce, sigmoid):
            cache = GradCache(
                towers,
                device,
                keep_graphs=kept,
                share_texts=kind == "shared texts",
                negatives=negatives if kind == "negatives" else (),
            )
            cached_step(cache, chunks, loss, old)
        gradients[device.type] = {name: p.grad.cpu() for name, p in towers.named_parameters()}
    for name, expected in gradients["cpu"].items():
        assert (gradients["cuda"][name] - expected).abs().max() <= 1e-8 * max(1.0, expected.abs().max().item()), name


def test_pixels_arrive_whole_while_the_gpu_is_busy():
    """Random chunks through reused page-locked slots, copied during large products."""
    slots, rows, generator = 4, 64, torch.Generator().manual_seed(0)
    buffer = ImageBuffer(slots, rows, torch.zeros(3, 64, 64, dtype=torch.uint8), pin=True)
    assert buffer[0].is_pinned()
    left = torch.randn(2048, 2048, device=CUDA)
    for turn in range(6):
        expected, found = [], []
        for number in range(slots):
            buffer[turn * slots + number].copy_(
                torch.randint(256, (rows, 3, 64, 64), generator=generator, dtype=torch.uint8)
            )
            expected.append(buffer[turn * slots + number].long().sum((1, 2, 3)))
        slot = [{"pixel_values": buffer[turn * slots + number]} for number in range(slots)]
        for _, inputs in on_device(range(slots), slot.__getitem__, CUDA):
            for _ in range(8):
                left = torch.tanh(left @ left)
            found.append(inputs["pixel_values"].long().sum((1, 2, 3)))
        assert torch.equal(torch.cat(found).cpu(), torch.cat(expected))
    buffer.close()


def test_the_measured_peak_is_what_the_plan_said(tmp_path):
    flags = ("--model=small", "--effective-batch=512", "--chunk-size=auto", "--xbm-size=512", "--steps=2")
    torch.cuda.reset_peak_memory_stats()
    run = train(train_clip.main, tmp_path / "run", *flags)
    numbers = json.loads((run / "summary.json").read_text())["prediction"]["peak_memory_bytes"]
    assert abs(numbers["off"]) <= 0.15, numbers


def test_dropout_is_replayed_in_pass_2(tmp_path, monkeypatch):
    flags = ("--dropout=0.2", "--steps=2")
    exact = [line["replay_difference"] for line in read_metrics(train(train_clip.main, tmp_path / "run", *flags))]
    monkeypatch.setattr("lib.gradcache.random_state.RandomState.restore", lambda self: None)
    other = [line["replay_difference"] for line in read_metrics(train(train_clip.main, tmp_path / "other", *flags))]
    assert max(exact) < 0.01 < min(other)


@pytest.mark.parametrize(("tiled", "dense"), [(infonce, dense_infonce), (sigmoid, dense_sigmoid)])
def test_losses_equal_the_dense_ones_in_float64_at_8192(tiled, dense):
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(8192, 512, generator=generator, dtype=torch.float64)).to(CUDA)
    texts = F.normalize(images + 3 * F.normalize(torch.randn(8192, 512, generator=generator)).double().to(CUDA))
    ids = torch.arange(8192, device=CUDA)
    scale, bias = (torch.tensor(value, device=CUDA) for value in (100.0, -10.0))
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (images, texts, scale.double(), bias.double())]
    value = dense(Pairs(leaves[0], leaves[1], ids, ids, ids), None, leaves[2], leaves[3])
    value.backward()
    with full_float32():
        share = tiled(Pairs(images.float(), texts.float(), ids, ids, ids), None, scale, bias, slice(0, 8192))
    assert share.loss.item() == pytest.approx(value.item(), rel=1e-3)
    for ours, leaf in ((share.image_embeds, leaves[0]), (share.text_embeds, leaves[1])):
        assert ((ours - leaf.grad).norm() / leaf.grad.norm()).item() < 1e-3


def test_a_stopped_run_resumes(tmp_path, monkeypatch):
    original = report.Reporter.step

    def stopping(self, metrics):
        original(self, metrics)
        if metrics["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(StoppedEarly, match="after step 3 of 6"):
        patch.setattr(report.Reporter, "step", stopping)
        train(train_clip.main, tmp_path / "run", "--steps=6")
    run = train(train_clip.main, tmp_path / "run", "--steps=6", "--resume=auto")
    whole = train(train_clip.main, tmp_path / "whole", "--steps=6")
    losses = [[line["loss"] for line in read_metrics(folder) if "loss" in line] for folder in (run, whole)]
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=0.02)


def test_deterministic_runs_are_bit_identical(tmp_path):
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    for name in ("one", "two"):
        flags = [*FLAGS, "--steps=3", "--deterministic", "--dropout=0.1", f"--output-dir={tmp_path / name}"]
        command = [sys.executable, str(ROOT / "train_clip.py"), *flags]
        finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
        assert finished.returncode == 0, finished.stderr[-2000:]
    one, two = (tmp_path / name / "export" / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_compiled_trunks_are_few_graphs_and_train_the_same(tmp_path):
    counters = torch._dynamo.utils.counters
    plain = train(train_clip.main, tmp_path / "plain", "--precision=fp32")
    torch.compiler.reset()
    counters.clear()
    compiled = train(train_clip.main, tmp_path / "compiled", "--precision=fp32", "--compile")
    tried = 1  # the compiler itself, on one function
    assert counters["stats"]["unique_graphs"] <= TRUNK_GRAPHS + tried and not counters["graph_break"]
    losses = [[line["loss"] for line in read_metrics(folder) if "loss" in line] for folder in (plain, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_a_step_waits_for_the_gpu_a_few_times_and_no_chunk_does(tmp_path, monkeypatch):
    """Counts torch's warnings for operations that make the host wait."""
    per_step = {chunk: synchronizations(tmp_path / str(chunk), monkeypatch, chunk) for chunk in (32, 4)}
    print("synchronizations of the last steps:", per_step)
    for counts in per_step.values():
        assert max(counts) <= MOST_SYNCHRONIZATIONS
    assert per_step[32] == per_step[4], "2 and 16 chunks wait equally often"


def synchronizations(folder: Path, monkeypatch, chunk_size: int) -> list[int]:
    seen: list[int] = []
    places: Counter = Counter()
    original = report.Reporter.step
    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def counting(self, metrics):
            original(self, metrics)
            of_step = [each for each in caught if "synchroniz" in str(each.message)]
            places.update(f"{Path(each.filename).name}:{each.lineno}" for each in of_step)
            seen.append(len(of_step))
            caught.clear()

        patch.setattr(report.Reporter, "step", counting)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train(train_clip.main, folder, f"--chunk-size={chunk_size}", "--steps=5")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    print(chunk_size, places.most_common(8))
    return seen[-2:]


def test_evaluation_on_cuda_equals_that_on_the_cpu(tmp_path, monkeypatch):
    run = train(train_siglip.main, tmp_path / "run", "--steps=60", "--lr=3e-3")
    figures = {}
    for place, environment in (("cuda", {}), ("cpu", {"ACCELERATE_USE_CPU": "true"})):
        AcceleratorState._reset_state(reset_partial_state=True)
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            flags = [f"--model={run}", "--precision=fp32", f"--cache-dir={tmp_path / place}"]
            assert evaluate.main(["zeroshot", *flags, f"--output-dir={tmp_path / place}"]) == 0
        figures[place] = json.loads((tmp_path / place / "metrics.json").read_text())
    images = sum(map(sum, figures["cpu"]["confusion"]))
    for name in ("accuracy", "top5", "macro_f1"):  # rounding may turn one image
        assert figures["cuda"][name] == pytest.approx(figures["cpu"][name], abs=max(1e-3, 1.5 / images))


BACKENDS = {
    "DDP": {},
    "ZeRO 2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "FSDP2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
}


def test_every_backend_takes_a_step_with_nccl(tmp_path):
    """One rank each, at the same time: what takes long is to start. DDP wraps one rank here, as it wraps several."""
    running = {}
    for name, environment in BACKENDS.items():
        if name == "ZeRO 2":
            try:
                import deepspeed  # noqa: F401
            except ImportError:
                continue
        flags = [*FLAGS, "--steps=2", "--xbm-size=0", f"--output-dir={tmp_path / name.replace(' ', '_')}"]
        flags = [flag for flag in flags if not flag.startswith("--xbm-start")]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", f"--master-port={free_port()}"]
        running[name] = subprocess.Popen(
            [*command, str(ROOT / "tests" / "one_rank.py"), *flags],
            env=os.environ | environment | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    for name, process in running.items():
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, f"{name}: {output[-3000:]}"
        assert re.search(r"backend nccl", output), output[-3000:]
        run = tmp_path / name.replace(" ", "_")
        assert all(math.isfinite(line["loss"]) for line in read_metrics(run) if "loss" in line)
        assert (run / "export" / "model.safetensors").exists()
    if "ZeRO 2" not in running:
        pytest.skip("DDP and FSDP2 took their steps; deepspeed is not installed")


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
