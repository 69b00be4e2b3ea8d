"""What is tried before the first step: the largest chunk, the seconds of a step, and how far off the plan was."""

import json

import pytest
import torch

import train_siglip
from lib.losses import sigmoid
from lib.prediction import told
from lib.probe import MARGIN, Costs, largest_that_fits, measure_costs, measure_loss, peak_of_chunk, repeated, spread
from lib.towers import build_preset

CPU = torch.device("cpu")


def inputs_of(processing) -> dict[str, torch.Tensor]:
    input_ids, attention_mask = processing.tokenize(["a photo of a cat"] * 4)
    pixel_values = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    return {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}


def test_the_largest_chunk_leaves_a_margin():
    tried = []

    def peak_of(pairs: int) -> int:
        tried.append(pairs)
        return 100 + 10 * pairs

    room = 1000 / MARGIN
    assert largest_that_fits(peak_of, 4096, room) == 64  # 740 of 1000; 128 pairs would take 1380
    assert max(tried) == 64  # what cannot fit is not tried
    assert largest_that_fits(peak_of, 40, room) == 32  # no more than the rank has
    assert largest_that_fits(peak_of, 4096, 50) == 1


def test_a_chunk_that_runs_out_of_memory_is_taken_as_too_large():
    def peak_of(pairs: int) -> int:
        if pairs > 4:
            raise torch.OutOfMemoryError
        return pairs

    assert largest_that_fits(peak_of, 4096, 10**9) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose memory can be measured")
def test_a_chunk_on_a_gpu_takes_memory_with_its_pairs():
    towers, processing = build_preset("tiny-clip", ["a photo of a cat"])
    towers.cuda().train()
    inputs = {name: tensor.cuda() for name, tensor in inputs_of(processing).items()}
    few, many = (peak_of_chunk(towers, inputs, torch.device("cuda"), pairs) for pairs in (64, 512))
    assert 4 * few < many < 16 * few


def test_trying_the_towers_leaves_them_as_they_were():
    towers, processing = build_preset("tiny-siglip", ["a photo of a cat"], dropout=0.3)
    towers.train()
    state, weights = torch.get_rng_state(), {n: p.clone() for n, p in towers.named_parameters()}
    costs = measure_costs(towers, inputs_of(processing), 8, CPU, "all", "none")
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(weights[n], p) and p.grad is None for n, p in towers.named_parameters())
    assert costs.image_pass_1 > 0 and costs.image_pass_2 > 0 and costs.text_pass_1 > 0
    assert costs.text_pass_2 == 0  # a frozen tower does not run again


def test_seconds_of_a_step_are_those_of_its_images_and_distinct_texts():
    costs = Costs(1.0, 3.0, 0.1, 0.3)
    assert costs.seconds(10, 5, kept=0.0) == pytest.approx(10 * 4 + 5 * 0.4)
    assert costs.seconds(10, 5, kept=1.0) == pytest.approx(10 * 3 + 5 * 0.3)  # no graph is computed twice
    assert spread(None, 7) == 7 and spread(1, 7) == 1
    assert spread(10, 10_000) == pytest.approx(10)


def two_seconds(run, device) -> float:
    run()
    return 2.0


def test_the_loss_is_reckoned_from_a_block(monkeypatch):
    monkeypatch.setattr("lib.probe._timed", two_seconds)
    assert measure_loss(sigmoid, 8, rows=4096, columns=8192, device=CPU) == 2.0 * 4 * 8
    assert measure_loss(sigmoid, 8, rows=64, columns=64, device=CPU) == 2.0


def test_rows_are_repeated():
    assert repeated({"a": torch.arange(3)}, 7)["a"].tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_the_plan_foretells_a_step_and_the_summary_says_how_far_off_it_was(tmp_path, capsys):
    flags = ["--effective-batch=64", "--xbm-size=64", "--steps=3", "--eval-every=0", "--save-every=0", "--workers=0"]
    train_siglip.main([*flags, f"--output-dir={tmp_path / 'run'}"])
    printed = capsys.readouterr().out
    comparison = json.loads((tmp_path / "run" / "summary.json").read_text())["prediction"]
    assert "without waiting for data or other ranks" in printed and told(comparison) in printed
    assert comparison.keys() == {"step_seconds", "peak_memory_bytes", "host_memory_bytes"}
    for numbers in comparison.values():
        assert numbers["off"] == pytest.approx(numbers["measured"] / numbers["predicted"] - 1)
    assert abs(comparison["host_memory_bytes"]["off"]) < 0.5  # but times vary
