"""--verify-gradients passes, changes nothing, and stops a build with a fault in any feature of the run."""

import os
from functools import partial
from pathlib import Path

import pytest
import small_runs
import torch
from accelerate.state import AcceleratorState
from ranks import on_ranks
from test_backends import KINDS

import train_siglip
from lib.backends import Backend
from lib.errors import RunError
from lib.gradcache import step
from lib.losses import tiles as logit_tiles
from lib.runs.reporter import read_metrics

FLAGS = [
    "--effective-batch=32", "--chunk-size=8", "--xbm-size=16", "--xbm-start=0", "--steps=2", "--warmup-steps=0",
    "--dropout=0.2", "--eval-every=0", "--save-every=0", "--workers=0", "--optimizer=sgd", "--lr=0.1",
]  # fmt: skip


NEGATIVES = "negatives.yaml"


@pytest.fixture(autouse=True)
def negative_prompts(tmp_path):
    (tmp_path / NEGATIVES).write_text("- a letter\n- no digit at all\n")


def all_parts(folder: Path) -> list[str]:
    """Flags of a run with everything that is verified: memory, negative prompts, and two of four graphs kept."""
    return [
        "--chunk-size=4", "--xbm-size=16", f"--negative-prompts={folder / NEGATIVES}", "--keep-graphs=2",
        "--verify-gradients", "--steps=1", "--save-every=0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "flags",
    [
        ("--label-smoothing=0.1", "--dropout=0.2"),
        ("--same-text=exclude", "--label-smoothing=0.1"),
        ("--positives=pair", "--same-text=positive", "--keep-graphs=4"),
    ],
)
def test_it_passes_with_all_that_a_run_uses(flags, tmp_path, capsys):
    small_runs.train(tmp_path / "run", *all_parts(tmp_path), *flags)
    assert "verify-gradients: largest relative difference image tower" in capsys.readouterr().out


def broken_memory(patch):
    add = logit_tiles.Logits.add

    def but_of_memory(self, tile, *slopes):
        if tile.block.d_others is not None:
            add(self, tile, *slopes)

    patch.setattr(logit_tiles.Logits, "add", but_of_memory)


def broken_negatives(patch):
    cache = step._cache

    def without(forwards, d_images, d_texts, d_negatives):
        cache(forwards, d_images, d_texts, None if d_negatives is None else torch.zeros_like(d_negatives))

    patch.setattr(step, "_cache", without)


def broken_tiles(patch):
    slices = logit_tiles._slices
    patch.setattr(logit_tiles, "_slices", lambda rows, side: list(slices(rows, side))[-1:])


def broken_kept_graphs(patch):
    embed = step.embed

    def one_graph_lost(cache, *given):
        embedded = embed(cache, *given)
        if cache.keep_graphs > 1:
            output = embedded.forwards[1].output
            embedded.forwards[1].output = output._replace(image_embeds=output.image_embeds.detach())
        return embedded

    patch.setattr(step, "embed", one_graph_lost)


def changed_gradients(way: int, change, patch) -> None:
    """Change the gradients of the cached step (0) or of plain autograd (1) by `change(gradients)`."""
    found, calls = Backend.gradients, []

    def changed(self):
        gradients = found(self)
        calls.append(gradients)
        if len(calls) % 2 == (way + 1) % 2:
            change(gradients)
        return gradients

    patch.setattr(Backend, "gradients", changed)


def nan(gradients) -> None:
    name = list(gradients)[-1]
    gradients[name] = gradients[name] * torch.nan


def missing(gradients) -> None:
    gradients.popitem()


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        (broken_memory, "with a memory, and not without: "),
        (broken_negatives, "with negative prompts, and not without: "),
        (broken_tiles, "with more than one tile of logits, and not without: "),
        (broken_kept_graphs, "with kept graphs, and not without: "),
        (partial(changed_gradients, 0, nan), "autograd's: the gradient of .* is not finite in the cached step"),
        (partial(changed_gradients, 1, nan), "autograd's: the gradient of .* is not finite in plain autograd"),
        (partial(changed_gradients, 0, missing), "autograd's: .* has no gradient in the cached step"),
        (partial(changed_gradients, 1, missing), "autograd's: .* has no gradient in plain autograd"),
    ],
    ids=["memory", "negatives", "tiles", "kept", "nan", "nan_of_twin", "missing", "missing_of_twin"],
)
def test_it_names_the_part_with_a_fault(sabotage, message, tmp_path, monkeypatch):
    sabotage(monkeypatch)
    with pytest.raises(RunError, match=f"--verify-gradients: .*{message}"):
        small_runs.train(tmp_path / "run", *all_parts(tmp_path))


def losses(folder: Path, kind: str, *flags: str) -> list[float]:
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.update(KINDS[kind])
    train_siglip.main([*FLAGS, f"--output-dir={folder}", f"--negative-prompts={folder.parent / NEGATIVES}", *flags])
    return [line["loss"] for line in read_metrics(folder)]


def verified(folder: Path, kind: str) -> list[float]:
    return losses(folder / "verified", kind, "--verify-gradients")


def stopped(folder: Path, kind: str) -> bool:
    """True if scale gradients multiplied by the number of chunks stop the run."""
    surrogate = step.surrogate
    step.surrogate = lambda *given, final: surrogate(*given, final=True)
    try:
        losses(folder / "broken", kind, "--verify-gradients")
    except RunError as error:
        return "logit_scale" in str(error)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero2", "zero3", "fsdp2"])
def test_it_passes_on_two_ranks_and_leaves_the_run_as_it_is(kind, tmp_path):
    assert on_ranks(2, verified, tmp_path, kind) == on_ranks(2, losses, tmp_path / "plain", kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero2"])
def test_it_stops_a_broken_build_on_two_ranks(kind, tmp_path):
    assert on_ranks(2, stopped, tmp_path, kind)
