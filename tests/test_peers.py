"""The benchmarks' peers do the same work as ours: the towers' gradients are the same."""

import sys

import pytest
import torch
from conftest import ROOT


@pytest.fixture(scope="module")
def gradients():
    """Gradients of the three ways on the same towers and chunks, by name."""
    pytest.importorskip("open_clip")
    pytest.importorskip("sentence_transformers")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from floor import ours
        from peers import open_clip_step, sentence_transformers_step
        from subjects import Autocast, chunked, make_batch, make_towers
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    device = torch.device("cpu")
    towers, chunks = Autocast(make_towers("narrow", device), device), chunked(make_batch("narrow", 24), 8)
    found = {}
    for step in (ours, open_clip_step, sentence_transformers_step):
        towers.zero_grad()
        step(towers, chunks)
        found[step.__name__] = {n: p.grad.clone() for n, p in towers.named_parameters() if p.grad is not None}
    return found


@pytest.mark.parametrize("peer", ["open_clip_step", "sentence_transformers_step"])
def test_peers_have_our_gradients_for_the_towers(gradients, peer):
    ours = {name: value for name, value in gradients["ours"].items() if "logit_scale" not in name}
    largest = max(value.abs().max() for value in ours.values())
    assert max((gradients[peer][name] - value).abs().max() for name, value in ours.items()) < 1e-4 * largest


def test_open_clip_multiplies_the_scales_gradient_by_the_number_of_chunks(gradients):
    name = "towers.logit_scale"
    assert gradients["open_clip_step"][name] == pytest.approx(3 * gradients["ours"][name].item(), rel=1e-3)
