"""Stored outputs of frozen trunks: equal to the trunk's, computed once, never mistaken for another's."""

import csv
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from ranks import on_ranks

import train_clip
from lib.backends import Precision
from lib.data import BadImage, ImagePipeline, Prepare, TrainingData, open_sources
from lib.data.pack.__main__ import main as pack
from lib.data.prepare import StoredOutputs, text_key
from lib.runs.reporter import read_metrics
from lib.setup import tower_outputs
from lib.setup.tower_outputs import FrozenTrunks
from lib.towers import build_preset
from lib.towers.trainable import set_trainable
from lib.towers.two_towers import TwoTowers

CPU = torch.device("cpu")
PIPELINE = ImagePipeline(32)


@pytest.fixture(autouse=True)
def no_accelerate_state_from_other_runs():
    """Accelerate remembers devices for the whole process; a user's run has a process of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks, the last not full."""
    monkeypatch.setattr(tower_outputs, "BLOCK", 4)


def captions_table(folder: Path, count: int = 10) -> str:
    """Two captions an image; image 3 is no image."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = random.integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "3.png").write_bytes(b"no image")
    rows = [[f"{number}.png", f"{kind} picture, number {number}"] for number in range(count) for kind in ("a", "the")]
    with open(folder / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows([["filename", "caption"], *rows])
    return str(folder / "captions.csv")


def towers_of(seed: int = 0, texts: tuple[str, ...] = ("a picture",)):
    towers, processing = build_preset("tiny-clip", list(texts), seed=seed)
    set_trainable(towers, ["image.trunk", "text.trunk"])
    return towers.train(), processing


def fill(cache: Path, data: str, seed: int = 0, images: ImagePipeline = PIPELINE, texts=("a picture",), towers=None):
    """Both outputs stored, for a source made of the table."""
    own, processing = towers_of(seed, texts)
    source, _ = open_sources(data, None, None)
    trunks = FrozenTrunks(towers or own, processing, cache, Precision("fp32", CPU), workers=0, batch_size=3)
    return trunks.store(Prepare(images, processing.tokenize), source), source, own


def rows_run(cache: Path, data: str, **changes) -> int:
    """Number of rows that go through the trunks when both outputs are requested."""
    counts = []
    original = TwoTowers.forward

    def counted(self, *arguments, **inputs):
        counts.append(len(next(iter(inputs.values()))))
        return original(self, *arguments, **inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TwoTowers, "forward", counted)
        fill(cache, data, **changes)
    return sum(counts)


def test_embeddings_of_stored_rows_are_those_of_the_towers(tmp_path):
    prepare, source, towers = fill(tmp_path / "cache", captions_table(tmp_path / "data"))
    _, processing = towers_of()
    towers.eval()
    with torch.no_grad():
        for text in source.texts:
            input_ids, attention_mask = processing.tokenize([text])
            expected = towers(input_ids=input_ids, attention_mask=attention_mask).text_embeds[0]
            found = towers(text_pooled=prepare.text_outputs.row(text_key(text))[None]).text_embeds[0]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        for image in np.unique(source.image):
            key = int(source.image_id[image])
            if source.images.keys[image] == "3.png":
                with pytest.raises(BadImage, match="not_an_image"):
                    prepare.image_outputs.row(key)
                continue
            pixels = PIPELINE(source.images.open(int(image), PIPELINE.extent), 0)
            expected = towers(pixel_values=pixels[None]).image_embeds[0]
            found = towers(image_pooled=prepare.image_outputs.row(key)[None]).image_embeds[0]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert len(prepare.text_outputs) == len(set(source.texts)) == 20 and len(prepare.image_outputs) == 9
    with pytest.raises(KeyError):
        prepare.text_outputs.row(12345)


def test_the_same_data_and_towers_are_run_once_and_anything_else_again(tmp_path):
    cache, data = tmp_path / "cache", captions_table(tmp_path / "data")
    assert rows_run(cache, data) == 30
    assert rows_run(cache, data) == 0
    assert rows_run(cache, data, seed=1) == 30  # other weights
    assert rows_run(cache, data, texts=("other words make another tokenizer",)) > 0
    assert rows_run(cache, data, images=ImagePipeline(32, "squash")) == 10
    image = Path(data).parent / "5.png"
    os.utime(image, ns=(1, 1))
    assert rows_run(cache, data) == 10  # the file may be another one now
    with open(data, "a") as table:
        table.write("6.png,one more caption\n")
    assert rows_run(cache, data) == 21
    assert rows_run(cache, data) == 0


def test_an_interrupted_pass_goes_on_where_it_stopped(tmp_path, monkeypatch):
    cache, data = tmp_path / "cache", captions_table(tmp_path / "data")
    whole, *_ = fill(tmp_path / "other", data)
    seal = tower_outputs._list_blocks

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tower_outputs, "_list_blocks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill(cache, data)
    monkeypatch.setattr(tower_outputs, "_list_blocks", seal)
    (folder,) = (cache / "outputs").iterdir()
    (folder / "block_00001.safetensors").unlink()
    # Of the images only that block is run again; the texts had not begun.
    assert rows_run(cache, data) == 4 + 20
    found, *_ = fill(cache, data)
    for key, place in zip(whole.image_outputs._sorted, found.image_outputs._sorted, strict=True):
        assert key == place and torch.equal(whole.image_outputs.row(key), found.image_outputs.row(key))
    assert found.image_outputs.unreadable == whole.image_outputs.unreadable != {}


@pytest.mark.parametrize("how", ["cut", "one flipped bit", "zeros"])
def test_a_damaged_block_is_computed_again(how, tmp_path, capsys):
    cache, data = tmp_path / "cache", captions_table(tmp_path / "data")
    whole, *_ = fill(cache, data)
    (block,) = (cache / "outputs").glob("image-*/block_00001.safetensors")
    content = bytearray(block.read_bytes())
    content[-5] ^= 0x40
    block.write_bytes({"cut": content[:100], "one flipped bit": content, "zeros": bytes(len(content))}[how])
    assert rows_run(cache, data) == 4  # of that block alone
    again, *_ = fill(cache, data)
    assert f"{block} is damaged: its outputs are computed again" in "".join(capsys.readouterr())
    for key in whole.image_outputs._sorted:
        assert torch.equal(whole.image_outputs.row(key), again.image_outputs.row(key))


def test_outputs_for_packed_shards_are_those_for_the_table(tmp_path):
    """The same rows under the same keys, and training from them opens no image."""
    data = captions_table(tmp_path / "data")
    table, *_ = fill(tmp_path / "a", data)
    pack([data, "--out", str(tmp_path / "shards"), "--shard-size", "4"])
    shards, source, _ = fill(tmp_path / "b", str(tmp_path / "shards"))
    for kind in ("image_outputs", "text_outputs"):
        ours, theirs = getattr(table, kind), getattr(shards, kind)
        assert set(ours._sorted) == set(theirs._sorted) and ours.unreadable == theirs.unreadable
        for key in ours._sorted:
            torch.testing.assert_close(ours.row(int(key)), theirs.row(int(key)), rtol=0, atol=1e-5)
    steps = TrainingData(
        source, shards, effective_batch=9, chunk_size=9, rank=0, world_size=1, workers=0, seed=0
    ).steps(0, 2)
    for (chunk,) in steps:
        assert set(chunk.inputs) == {"image_pooled", "text_pooled"}
    with open(min((tmp_path / "shards").glob("*.tar")), "ab") as shard:
        shard.write(bytes(512))
    assert rows_run(tmp_path / "b", str(tmp_path / "shards")) == 10  # the file may be another one now


def stored_on_ranks(cache: Path, data: str) -> list[tuple[int, list[float]]]:
    torch.use_deterministic_algorithms(True)
    tower_outputs.BLOCK = 4
    prepare, *_ = fill(cache, data)
    outputs = prepare.image_outputs
    return [(int(key), outputs.row(int(key)).tolist()) for key in outputs._sorted]


@pytest.mark.slow
def test_ranks_share_the_work_and_find_the_same(tmp_path):
    data = captions_table(tmp_path / "data")
    assert on_ranks(2, stored_on_ranks, tmp_path / "two", data) == stored_on_ranks(tmp_path / "one", data)
    names = {folder.name for folder in (tmp_path / "two" / "outputs").iterdir()}
    assert names == {folder.name for folder in (tmp_path / "one" / "outputs").iterdir()}


def test_outputs_travel_to_workers(tmp_path):
    prepare, source, _ = fill(tmp_path / "cache", captions_table(tmp_path / "data"))
    key = text_key(source.texts[0])
    first = prepare.text_outputs.row(key)  # with open files by now
    assert torch.equal(pickle.loads(pickle.dumps(prepare.text_outputs)).row(key), first)
    assert torch.equal(StoredOutputs(prepare.text_outputs.folder).row(key), first)


TRAIN = [
    "--freeze", "image.trunk", "text.trunk", "--effective-batch=8", "--chunk-size=4", "--xbm-size=0", "--epochs=3",
    "--eval-every=0", "--workers=1", "--lr=0.01",
]  # fmt: skip


def test_a_run_with_stored_outputs_is_the_run_without(tmp_path, monkeypatch):
    """The same losses, counts and skips; and the trunks are not run again after the one pass that stores."""
    data, seen = captions_table(tmp_path / "data"), []
    forward = TwoTowers.forward

    def watched(self, *arguments, **inputs):  # the export alone gives them by position
        seen.append({name for name, tensor in inputs.items() if tensor is not None})
        return forward(self, *arguments, **inputs)

    monkeypatch.setattr(TwoTowers, "forward", watched)
    flags = [*TRAIN, "--data", data, "--cache-dir", str(tmp_path / "cache")]
    train_clip.main([*flags, "--output-dir", str(tmp_path / "plain"), "--store-outputs=off"])
    plain, seen[:] = list(seen), []
    train_clip.main([*flags, "--output-dir", str(tmp_path / "stored")])
    runs = [{line["step"]: line for line in read_metrics(tmp_path / name)} for name in ("plain", "stored")]
    losses = [[line["loss"] for line in run.values()] for run in runs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) > 5
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("plain", "stored")]
    assert summaries[0]["data"] == summaries[1]["data"] and summaries[0]["data"]["skipped"] == {"not_an_image": 2}
    skipped = [(tmp_path / name / "skipped.jsonl").read_text() for name in ("plain", "stored")]
    assert skipped[0] == skipped[1]
    pooled = {"image_pooled", "text_pooled"}
    first = seen.index(pooled)
    # Up to the export: two of measuring, two of texts alone, then pass 1 in a forward or two and pass 2 in two.
    assert first > 0 and all(inputs <= pooled for inputs in seen[first : first + 4 + 4 * len(losses[1])])
    assert sum({"pixel_values", "input_ids"} <= inputs for inputs in plain) >= len(losses[0])
    text_forwards = sum("input_ids" in inputs for inputs in seen[:first])
    assert text_forwards == 5  # 20 distinct texts in blocks of 4


@pytest.mark.parametrize(
    "flags, stored",
    [
        ((), ()),
        (("--freeze", "text.trunk"), ("text",)),
        (("--freeze", "image", "text.trunk"), ("image", "text")),
        (("--freeze", "image", "text.trunk", "--augment=light"), ("text",)),
        (("--freeze", "image", "--unfreeze", "image.last:1"), ()),
        (("--freeze", "image", "text.trunk", "--store-outputs=off"), ()),
        (("--freeze", "image", "text.trunk", "--epochs=0.5"), ()),
    ],
)
def test_outputs_are_stored_where_they_stay_the_same_and_are_read_again(tmp_path, flags, stored):
    common = ["--effective-batch=512", "--xbm-size=0", "--epochs=2", "--eval-every=0", "--save-every=0"]
    train_clip.main([*common, "--cache-dir", str(tmp_path / "cache"), "--output-dir", str(tmp_path / "run"), *flags])
    outputs = tmp_path / "cache" / "outputs"
    found = sorted(folder.name.split("-")[0] for folder in outputs.iterdir()) if outputs.exists() else []
    assert found == list(stored)
