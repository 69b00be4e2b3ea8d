"""Fitting into memory: chunk sizes, kept graphs, compiled trunks, and the texts that are measured."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from lib.config import TrainConfig
from lib.data import ImagePipeline, Prepare, open_sources
from lib.errors import RunError
from lib.setup import chunk_memory
from lib.setup import plan as planning
from lib.setup.chunk_memory import ChunkMemory, even_chunk, largest_chunk, largest_that_fits, repeated
from lib.setup.data import TwoLengths, longest_text, sample_inputs
from lib.towers import build_preset
from train_clip import DEFAULTS

CUDA = torch.device("cuda")


def growing(tried: list[int], limit: float = float("inf"), error: Exception | None = None):
    """Peaks of 100 + 10 a pair, noted; `error` above `limit` pairs."""

    def measure(pairs: int) -> ChunkMemory:
        tried.append(pairs)
        if pairs > limit:
            raise error
        return ChunkMemory(5 * pairs, 100 + 10 * pairs)

    return measure


def test_chunks_are_a_quarter_of_a_power_of_two_apart():
    for room, expected in ((740, 64), (900, 80), (1061, 96), (1379, 112), (1380, 128)):
        tried: list[int] = []
        assert largest_that_fits(growing(tried), 4096, room) == expected
        assert max(tried) == expected, "what cannot fit is not tried"
    assert largest_that_fits(growing([]), 40, 10_000) == 40 and largest_that_fits(growing([]), 45, 10_000) == 40
    assert largest_that_fits(growing([]), 4096, 50) == 1
    assert [largest_chunk(2**20, 10_000), largest_chunk(2**20 * 5 // 4, 10_000), largest_chunk(2**40, 9)] == [
        256,
        192,
        1,
    ]
    assert largest_chunk(1, 100) == 96


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("FIND was unable to find an engine to execute this computation"),
        RuntimeError("CUDA error: out of memory"),
    ],
    ids=["torch", "cuBLAS", "cuDNN", "cuDNN's search", "driver"],
)
def test_a_chunk_that_runs_out_of_memory_is_taken_as_too_large(error):
    assert largest_that_fits(growing([], 5, error), 4096, 10**9) == 5
    assert largest_that_fits(growing([], 4, error), 4096, 10**9) == 4


def test_another_fault_while_measuring_is_not_taken_for_one():
    with pytest.raises(RuntimeError, match="illegal memory access"):
        largest_that_fits(growing([], 4, RuntimeError("CUDA error: an illegal memory access")), 4096, 10**9)


def test_compiled_chunks_are_all_alike_where_the_batch_allows_it():
    assert even_chunk(32768, 700) == 512 and even_chunk(1000, 300) == 250 and even_chunk(100, 64) == 50
    assert even_chunk(32771, 512) == 512, "a prime has no divisor: its chunks differ by one"


def on_an_accelerator(monkeypatch, measure, free: int, **changes) -> planning.BatchPlan:
    """The plan where memory is measured, with measurements of our own."""
    towers, processing = build_preset("tiny-clip", ["a photo of a cat"])
    input_ids, attention_mask = processing.tokenize(["a photo of a cat"] * 4)
    inputs = {"pixel_values": torch.zeros(4, 3, 32, 32), "input_ids": input_ids, "attention_mask": attention_mask}
    backend = SimpleNamespace(
        accelerator=SimpleNamespace(device=CUDA, num_processes=1),
        autocast=nullcontext,
        shards_weights=False,
        state_bytes=lambda weights, trained, moments: weights + trained * (1 + moments),
    )
    config = TrainConfig(**vars(DEFAULTS) | {"effective_batch": 1024, "xbm_size": 0} | changes)
    monkeypatch.setattr(planning, "memory_of_chunk", lambda towers, inputs, device, pairs: measure(pairs))
    monkeypatch.setattr(planning, "free_memory", lambda device: free)
    monkeypatch.setattr(planning, "total_memory", lambda device: free)
    return planning.make_plan(config, backend, towers, inputs, 1000, None)


MEGA = 2**20


def test_on_an_accelerator_the_plan_has_what_was_measured(monkeypatch):
    measure = lambda pairs: ChunkMemory(2 * MEGA * pairs, 3 * MEGA * pairs)  # noqa: E731
    plan = on_an_accelerator(monkeypatch, measure, free=1700 * MEGA, keep_graphs="auto")
    assert plan.chunk_size == 448 and plan.chunk_pairs == 342 and plan.chunks == 3
    assert plan.chunk_bytes == 3 * MEGA * 342 and plan.graph_bytes == 2 * MEGA * 342
    assert plan.keep_graphs == 0 and planning.MARGIN * 1700 * MEGA > plan.device_bytes > 3 * MEGA * 342
    plan = on_an_accelerator(monkeypatch, measure, free=10_000 * MEGA, keep_graphs="auto", chunk_size=128)
    assert (plan.chunk_size, plan.chunks, plan.keep_graphs) == (128, 8, 8)


def test_compiled_trunks_are_measured_and_get_the_larger_chunks_that_fit(monkeypatch):
    compiled, resets, tried = [], [], []

    def measure(pairs: int) -> ChunkMemory:
        tried.append((pairs, bool(compiled)))
        return ChunkMemory(MEGA * pairs, (2 if compiled else 4) * MEGA * pairs)

    monkeypatch.setattr(planning, "compile_trunks", lambda *given: compiled.append(given))
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(tried[-1][0]))
    plan = on_an_accelerator(monkeypatch, measure, free=1400 * MEGA, compile=True)
    assert plan.chunk_size == 512 and plan.chunk_pairs == 512
    assert [pairs for pairs, after in tried if after] == [256, 512, 512]
    assert resets == [256], "each size is compiled for itself, and what the run uses is kept"
    fixed = on_an_accelerator(monkeypatch, measure, free=1400 * MEGA, compile=True, chunk_size=100)
    assert fixed.chunk_size == 100 and fixed.chunk_pairs == 94


def test_a_chunk_that_does_not_fit_is_one_error_before_the_first_batch(monkeypatch):
    def measure(pairs: int) -> ChunkMemory:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has")

    with pytest.raises(RunError) as told:
        on_an_accelerator(monkeypatch, measure, free=10**9, chunk_size=512)
    assert str(told.value) == (
        "out of memory with chunks of 512 pairs (20.00 MiB more were asked for): use --chunk-size 256"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose memory can be measured")
def test_a_chunk_on_a_gpu_takes_memory_with_its_pairs():
    towers, processing = build_preset("tiny-clip", ["a photo of a cat"])
    towers.cuda().train()
    input_ids, attention_mask = (tokens.cuda() for tokens in processing.tokenize(["a photo of a cat"] * 4))
    pixel_values = torch.zeros(4, 3, 32, 32, dtype=torch.uint8, device=CUDA)
    inputs = {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}
    # The first also takes what cuBLAS keeps for its products.
    _, few, many = (chunk_memory.memory_of_chunk(towers, inputs, CUDA, pairs) for pairs in (8, 512, 4096))
    assert 4 * few.peak < many.peak < 16 * few.peak and few.graph < few.peak
    assert all(parameter.grad is None for parameter in towers.parameters())


def test_rows_are_repeated():
    assert repeated({"a": torch.arange(3)}, 7)["a"].tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_texts_as_long_as_the_longest_are_measured_and_compiled_for(tmp_path):
    """The longest of many captions, not the first; of shards, whose texts are not known, the most tokens."""
    rows = [f"{number}.png,cat {number}" for number in range(100)]
    rows[90] = "90.png," + "dog " * 9
    (tmp_path / "captions.csv").write_text("\n".join(["filename,caption", *rows]))
    for number in range(100):
        (tmp_path / f"{number}.png").write_bytes(b"not looked at here")
    source, _ = open_sources(str(tmp_path / "captions.csv"), None, None)
    _, processing = build_preset("tiny-clip", ["cat dog"])
    prepare = Prepare(ImagePipeline(32), processing.tokenize)
    longest = sample_inputs(source, prepare, torch.device("cpu"))["input_ids"]
    assert torch.equal(longest, processing.tokenize(["dog " * 9])[0].repeat(4, 1))
    even = TwoLengths(processing.tokenize, longest.shape[1], processing.max_length)
    short, long = even(["cat"]), even(["dog " * 20])
    assert short[0].shape == (1, longest.shape[1]) and long[0].shape == (1, processing.max_length)
    assert short[1].sum() == processing.tokenize(["cat"])[1].sum()
    assert longest_text(SimpleNamespace(), prepare)[0].shape == (4, processing.max_length)
