"""On every backend the optimizer steps are those of plain autograd on one process, with one reduction each."""

import json
import math
import os
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState
from naive import naive_infonce, naive_sigmoid, with_normalizers
from ranks import on_ranks
from torch.utils._python_dispatch import TorchDispatchMode

import train_clip
from lib import backends
from lib.data import Chunk
from lib.distributed import logsumexp_over_ranks, rank_and_world_size
from lib.errors import InputError
from lib.gradcache.step import GradCache, cached_step
from lib.losses import Pairs, infonce, sigmoid
from lib.losses.positives import Ids
from lib.losses.xbm import CrossBatchMemory
from lib.towers import TwoTowers, build_preset

pytestmark = pytest.mark.slow

COUNT, STEPS, RATE, CLIP, CHUNK, SCALE = 12, 3, 0.05, 0.5, 2, 4.0
LOSSES = {
    "infonce": (partial(infonce, merge_logsumexp=logsumexp_over_ranks), naive_infonce),
    "sigmoid": (sigmoid, naive_sigmoid),
}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def zero(stage: int, offload: str = "none") -> dict[str, str]:
    """Environment variables of accelerate launch."""
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": offload,
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": offload if stage == 3 else "none",
    }


KINDS = {
    "ddp": {}, "fsdp2": FSDP2, "zero1": zero(1), "zero2": zero(2), "zero3": zero(3), "zero2_offload": zero(2, "cpu"),
    "zero3_offload": zero(3, "cpu"),
}  # fmt: skip


def towers_and_tokens() -> tuple[TwoTowers, torch.Tensor, torch.Tensor]:
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
    towers, processing = build_preset("tiny-siglip", words, use_bias=True, scale=8.0)
    return towers.train(), *processing.tokenize(words)


def batch(step: int, tokens: tuple[torch.Tensor, torch.Tensor], size: int) -> Chunk:
    """All pairs of a step, the same on any number of ranks."""
    generator = torch.Generator().manual_seed(step)
    pixel_values = torch.randint(256, (COUNT, 3, size, size), generator=generator, dtype=torch.uint8)
    group = torch.randint(5, (COUNT,), generator=generator)
    sample = torch.arange(COUNT) + COUNT * step
    return Chunk(pixel_values, *tokens, group, sample, text_id=sample)


def by_plain_autograd(loss: str, scale: float | None = None) -> dict[str, torch.Tensor]:
    """One process, all graphs at once, a double loop as loss, clipping and optimizer of torch.

    scale: the logit scale is put there before the last step.
    """
    towers, *tokens = towers_and_tokens()
    optimizer, memory = torch.optim.SGD(towers.parameters(), lr=RATE), CrossBatchMemory(8, towers.embed_dim)
    for step in range(STEPS):
        if scale and step == STEPS - 1:
            towers.set_scale_and_bias(scale, None)
        pairs = batch(step, tokens, towers.image_size)
        output = towers(**pairs.inputs)
        fresh = Pairs(output.image_embeds, output.text_embeds, *Ids.of(pairs))
        LOSSES[loss][1](fresh, memory.pairs(), output.logit_scale, output.logit_bias).backward()
        torch.nn.utils.clip_grad_norm_(towers.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        memory.enqueue(with_normalizers(fresh, memory.pairs(), output.logit_scale), step)
    return {name: parameter.detach() for name, parameter in towers.named_parameters()}


class Reduced(TorchDispatchMode):
    """Counts the numbers that are reduced over the ranks."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if name.startswith("c10d.") and "reduce" in name:
            tensors = args[1] if "reduce_scatter" in name else args[0]
            tensors = tensors if isinstance(tensors, list | tuple) else [tensors]
            self.numbers += sum(t.numel() for each in tensors for t in (each if isinstance(each, list) else [each]))
        return function(*args, **(kwargs or {}))


def started(kind: str, precision: str = "no") -> backends.Backend:
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.update(KINDS[kind] | {"ACCELERATE_MIXED_PRECISION": precision})
    return backends.start("none")


def by_backend(
    kind: str, loss: str, precision: str = "no", odd: bool = False, no_sync=None
) -> tuple[dict[str, torch.Tensor], float]:
    """All parameters of this rank after the steps, and the number of reductions of each in the last step.

    odd: before the last step, one whose gradients are dropped, and the logit scale put at `SCALE`.
    """
    towers, *tokens = towers_and_tokens()
    backend = started(kind, precision)
    optimizer, memory = torch.optim.SGD(towers.parameters(), lr=RATE), CrossBatchMemory(8, towers.embed_dim)
    trained = sum(parameter.numel() for parameter in towers.parameters())
    wrapped = backend.prepare(towers, optimizer, CLIP)
    rank, world_size = rank_and_world_size()
    share = COUNT // world_size

    def gradients(step: int, factor: float = 1.0):
        own = batch(step, tokens, towers.image_size).rows(rank * share, (rank + 1) * share)
        with backend.gradients_of_a_step():
            return cached_step(
                GradCache(
                    wrapped,
                    torch.device("cpu"),
                    backward=lambda value: backend.backward(factor * value),
                    no_sync=no_sync or backend.no_sync,
                ),
                [own.rows(start, start + CHUNK) for start in range(0, share, CHUNK)],
                LOSSES[loss][0],
                memory.pairs(),
            )

    for step in range(STEPS):
        if odd and step == STEPS - 1:
            for factor in (math.nan, 1.0):  # of which the second could be used
                gradients(step, factor)
                assert math.isfinite(backend.clip_gradients(CLIP)) == math.isfinite(factor)
                backend.drop_gradients()
            with backend.editing(towers.logit_scale):
                towers.set_scale_and_bias(SCALE, None)
        with Reduced() as reduced:
            result = gradients(step)
        while not math.isfinite(backend.clip_gradients(CLIP)):  # fp16 finds its scale
            assert precision == "fp16"
            backend.drop_gradients()
            result = gradients(step)
        backend.step()
        memory.enqueue(result.fresh, step)
    whole = backend.whole_towers()
    parameters = {name: p.detach().clone() for name, p in whole.named_parameters()} if rank == 0 else {}
    return parameters, reduced.numbers / trained


def by_backends(cases: list[tuple]) -> dict:
    """Result of each case: (kind, loss), and more of `by_backend`'s arguments."""
    return {case: by_backend(*case) for case in cases}


def largest_difference(result: dict, twin: dict) -> float:
    assert result.keys() == twin.keys()
    return max((result[name] - twin[name]).abs().max().item() for name in twin)


PLAIN = [(kind, "infonce") for kind in KINDS if kind != "zero2_offload"]
ODD = [(kind, "sigmoid", "no", True) for kind in KINDS if kind != "zero3_offload"]
HALF = [(kind, "sigmoid", "fp16") for kind in ("ddp", "fsdp2", "zero2")]
REDUCED_PER_CHUNK = ("fsdp2", "sigmoid", "no", False, nullcontext)


@pytest.fixture(scope="module")
def results() -> dict:
    return on_ranks(2, by_backends, [*PLAIN, *ODD, *HALF, REDUCED_PER_CHUNK])


def test_three_steps_on_two_ranks_are_those_of_one_process(results):
    twin = by_plain_autograd("infonce")
    for case in PLAIN:
        assert largest_difference(results[case][0], twin) <= 1e-5, case


def test_dropped_gradients_leave_nothing_and_an_edited_scale_is_the_optimizers_too(results):
    twin = by_plain_autograd("sigmoid", SCALE)
    for case in ODD:
        assert largest_difference(results[case][0], twin) <= 1e-5, case


def test_every_gradient_is_reduced_once_in_a_step(results):
    for case in (*PLAIN, *ODD):
        assert 1 <= results[case][1] < 1.1, case
    assert results[REDUCED_PER_CHUNK][1] > 2.9  # negative control: three chunks


def test_fp16_moves_the_weights_as_float32_does(results):
    """Parameters differ by at most a twentieth of their change in three steps."""
    start, twin = dict(towers_and_tokens()[0].named_parameters()), by_plain_autograd("sigmoid")
    for case in HALF:
        way = largest_difference(twin, {name: parameter.detach() for name, parameter in start.items()})
        assert 0 < largest_difference(results[case][0], twin) <= 0.05 * way, case


def refusals(cases: dict[str, tuple[dict, list[str]]]) -> dict[str, str]:
    """Message of training for each case's environment and flags."""
    said = {}
    for name, (environment, flags) in cases.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.update({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "none"} | environment)
        with pytest.raises(InputError) as error:
            train_clip.main(["--effective-batch=8", "--steps=1", *flags])
        said[name] = str(error.value)
    return said


def test_what_a_backend_cannot_do_is_refused_before_the_first_batch(tmp_path):
    own = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}
    (tmp_path / "own.json").write_text(json.dumps(own))
    cases = {
        "--keep-graphs 2: not with FSDP2 or ZeRO 3": (zero(3), ["--keep-graphs=2"]),
        "--ema 0.9 and --compile: not with FSDP2 or ZeRO 3": (zero(3), ["--ema=0.9", "--compile"]),
        "zero_stage 0 is none of 1, 2, 3": (zero(0), []),
        "the DeepSpeed settings have 'optimizer': take it out, and use --optimizer": (
            zero(2) | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "own.json")},
            [],
        ),
        "offload_optimizer goes to the cpu or stays": (zero(2, "nvme"), []),
        "FSDP of version 1 is not supported": ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, []),
        "fsdp_offload_params is not supported": (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, []),
    }
    cases = {name: (given, [*flags, f"--output-dir={tmp_path / 'run'}"]) for name, (given, flags) in cases.items()}
    for expected, said in on_ranks(1, refusals, cases).items():
        assert expected in said
