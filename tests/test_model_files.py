"""Models by folder and by hub id: the same weights, bias and tokens; no code of a folder runs; faults are one line."""

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from made_exports import made_towers
from made_hub import offline_cache, publish
from made_models import save_family
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPModel

from lib.errors import InputError
from lib.evaluation.subject import check_there
from lib.towers import TwoTowers, build_preset, load_towers, model_files
from lib.towers.model_files import find_model
from lib.towers.processing import Processing, build_tokenizer

TEXTS = ["a photo of the digit zero", "a dog runs over the grass"]
NO_CODE_NEEDED = {"TwoTowers", "Processing"}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    return offline_cache(tmp_path / "hub", monkeypatch)


@pytest.fixture
def clip(tmp_path) -> Path:
    return save_family("clip", tmp_path / "clip")


def edit(file: Path, change) -> None:
    settings = json.loads(file.read_text())
    change(settings)
    file.write_text(json.dumps(settings))


def as_pickle(folder: Path, **more: object) -> Path:
    """Replace the safetensors of a folder by torch's pickle of the same weights."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights | more, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def refusal(**flags) -> str:
    with pytest.raises(InputError) as error:
        load_towers(**{"family": "clip", **flags})
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- no code from folders ----


def loading_calls() -> list[tuple[str, ast.Call]]:
    """Every call in lib of from_pretrained and from_config, of other classes than ours."""
    found = []
    for file in sorted((ROOT / "lib").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value)
                if node.func.attr in ("from_pretrained", "from_config") and owner not in NO_CODE_NEEDED:
                    found.append((f"{file.relative_to(ROOT)}:{node.lineno}", node))
    return found


def test_every_call_into_transformers_forbids_code_of_the_folder():
    calls = loading_calls()
    assert len(calls) >= 8
    for place, call in calls:
        words = [ast.unparse(keyword) for keyword in call.keywords]
        assert "**NO_CODE" in words or "trust_remote_code=False" in words, place
    assert model_files.NO_CODE["trust_remote_code"] is False


def with_code(folder: Path, marker: Path) -> None:
    """Python in the folder that leaves a marker when it is run, named in every json file that can name it."""
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Any: ...\n")
    auto = ("AutoConfig", "AutoModel", "AutoImageProcessor", "AutoProcessor")
    names = {"auto_map": dict.fromkeys(auto, "evil.Any") | {"AutoTokenizer": ["evil.Any", "evil.Any"]}}
    edit(folder / "config.json", lambda settings: settings.update(names, model_type="never_heard_of"))
    edit(folder / "tokenizer_config.json", lambda s: s.update(names, tokenizer_class="NeverHeardOf"))


@pytest.mark.parametrize("flags", ["--model {}", "--image-tower {} --text-tower {}"])
def test_code_of_a_folder_is_not_run_whatever_the_answer_on_stdin(flags, clip, tmp_path):
    marker = tmp_path / "marker"
    with_code(clip, marker)
    command = [sys.executable, str(ROOT / "train_clip.py"), *flags.format(clip, clip).split()]
    command += ["--effective-batch=4", "--chunk-size=4", "--steps=1", f"--output-dir={tmp_path / 'run'}"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run(command, input="y\n" * 9, capture_output=True, text=True, env=environment, timeout=120)
    assert run.returncode == 2 and not marker.exists()
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and str(clip) in errors[0] and "Traceback" not in run.stderr


def test_code_of_tokenizers_and_image_encoders_is_refused_with_the_reason(clip, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    marker = tmp_path / "marker"
    with_code(clip, marker)
    assert "needs Python code from its own folder" in refusal(image_tower=str(clip), text_tower=str(clip))
    edit(clip / "config.json", lambda settings: settings.update(model_type="clip"))
    towers, _ = load_towers(family="clip", model=str(clip))  # transformers' own classes are taken
    assert towers.image_size == 32 and not marker.exists()


# ---- pickles ----


def test_a_pickle_of_tensors_loads_with_the_bias_in_it(clip):
    expected = TwoTowers.from_pretrained(clip).state_dict()
    as_pickle(clip, logit_bias=torch.tensor(-3.5))
    found = TwoTowers.from_pretrained(clip)
    assert found.logit_bias.item() == -3.5 and found.use_bias
    assert all(torch.equal(found.state_dict()[name], value) for name, value in expected.items())


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_pickle_with_more_than_tensors_is_refused_and_not_run(clip, tmp_path):
    marker = tmp_path / "marker"
    file = as_pickle(clip, extra=Evil(marker))
    message = refusal(model=str(clip))
    assert "pickle with more than tensors" in message and "safetensors.torch.save_file" in message
    assert not marker.exists()
    torch.load(file, weights_only=False)  # the control: it would have run
    assert marker.is_dir()


def test_torchvisions_files_are_read_as_tensors_alone(clip, tmp_path, monkeypatch):
    from torchvision.models import MobileNet_V3_Small_Weights

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = MobileNet_V3_Small_Weights.DEFAULT.url.rpartition("/")[2]
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(pickle.dumps(Evil(tmp_path / "marker")))
    message = refusal(image_tower="torchvision:mobilenet_v3_small", text_tower=str(clip))
    assert f"{name} cannot be read (a pickle with more than tensors" in message and not (tmp_path / "marker").exists()


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_pickle_is_one_line(part, clip):
    file = as_pickle(clip)
    file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])
    assert "cannot be loaded (" in refusal(model=str(clip))


# ---- weights that do not fit ----


def test_weights_of_another_shape_are_refused(clip):
    edit(clip / "config.json", lambda settings: settings["vision_config"].update(image_size=64))
    message = refusal(model=str(clip))
    assert message.startswith(f"--model {clip}: vision_model.embeddings.position_embedding.weight is of shape (17, 16)")
    assert "(65, 16) by its configuration" in message
    assert "(65, 16)" in refusal(image_tower=f"{clip}#image", text_tower=f"{clip}#text")


@pytest.mark.parametrize("change", [{"hidden_size": "16"}, {"num_attention_heads": 3}, {"hidden_act": "none"}])
def test_a_configuration_that_makes_no_model_is_one_line(change, clip):
    edit(clip / "config.json", lambda settings: settings["vision_config"].update(change))
    assert refusal(model=str(clip)).startswith(f"--model {clip}: cannot be loaded (")


def test_a_siglip_without_pooling_is_refused(tmp_path):
    folder = save_family("siglip", tmp_path / "siglip")
    edit(folder / "config.json", lambda settings: settings["vision_config"].update(vision_use_head=False))
    assert "no pooling head" in refusal(model=str(folder))


def test_parameters_that_no_embedding_depends_on_do_not_train(clip, monkeypatch):
    """DistributedDataParallel would wait for their gradients."""
    from lib.towers import dual

    class WithIdle(CLIPModel):
        def __init__(self, config):
            super().__init__(config)
            self.vision_model.idle = torch.nn.Linear(2, 2)

    model = WithIdle(CLIPModel.from_pretrained(clip).config)
    model.save_pretrained(clip)
    monkeypatch.setitem(dual.DUAL_MODELS, "clip", WithIdle)
    towers, processing = load_towers(family="clip", model=str(clip))
    fixed = {name for name, parameter in towers.named_parameters() if not parameter.requires_grad}
    assert fixed == {"image.trunk.idle.weight", "image.trunk.idle.bias"}
    output = towers(torch.rand(2, 3, 32, 32), *processing.tokenize(TEXTS))
    sum(value.sum() for value in output if value is not None).backward()
    without = {name for name, parameter in towers.named_parameters() if parameter.grad is None}
    assert without == fixed


# ---- tokens ----


def test_a_token_without_an_embedding_is_refused(clip):
    tokenizer = AutoTokenizer.from_pretrained(clip)
    rows = len(tokenizer)
    tokenizer.add_tokens(["<person>"])
    tokenizer.save_pretrained(clip)
    for flags in (
        {"model": str(clip)},
        {"image_tower": f"{clip}#image", "text_tower": str(clip), "projection_dim": 24},
    ):
        message = refusal(**flags)
        assert f"{clip}: its tokenizer numbers '<person>' {rows}" in message and f"above {rows - 1};" in message


def test_sentinels_of_mt5_need_no_embedding(tmp_path):
    """The multilingual SigLIP has 250,000 embeddings, its tokenizer a hundred tokens more that no caption holds."""
    folder = save_family("siglip", tmp_path / "siglip")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra_id_{i}>" for i in range(3)])
    tokenizer.save_pretrained(folder)
    assert (
        len(Processing.from_pretrained(folder).tokenizer)
        > TwoTowers.from_pretrained(folder).text.trunk.config.vocab_size
    )


def test_texts_are_pooled_at_their_end_token_or_the_model_is_refused(clip):
    """Old files pool at the largest token: right while that is the end token."""
    tokenizer = AutoTokenizer.from_pretrained(clip)
    settings = json.loads((clip / "config.json").read_text())["text_config"]
    assert settings["eos_token_id"] == tokenizer.eos_token_id == 1
    edit(clip / "config.json", lambda settings: settings["text_config"].update(eos_token_id=2))
    largest = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    message = refusal(model=str(clip))
    assert repr(largest) in message and "set text_config.eos_token_id in its config.json to 1" in message
    edit(clip / "config.json", lambda settings: settings["text_config"].update(eos_token_id=7))
    assert "pools texts at token 7" in refusal(model=str(clip))
    edit(clip / "config.json", lambda settings: settings["text_config"].update(eos_token_id=1))
    assert load_towers(family="clip", model=str(clip))


# ---- hub ids ----


def test_a_clip_by_hub_id_keeps_its_bias(tmp_path, cache):
    towers, processing = build_preset("tiny-clip", TEXTS, use_bias=True)
    towers.set_scale_and_bias(10.0, -7.0)
    towers.save_pretrained(tmp_path / "made")
    processing.save_pretrained(tmp_path / "made")
    snapshot = publish(tmp_path / "made", "somebody/clip", cache)
    for name in (str(snapshot), "somebody/clip"):
        loaded, _ = load_towers(family="siglip", model=name)
        assert loaded.logit_bias.item() == -7.0 and loaded.pretrained_bias
    assert find_model("--model", "somebody/clip").path == snapshot
    check_there("somebody/clip", "--models")


def test_a_composed_pair_and_halves_load_by_hub_id(tmp_path, cache, clip):
    towers, processing = made_towers("composed", tmp_path / "start")
    towers.save_pretrained(tmp_path / "made")
    processing.save_pretrained(tmp_path / "made")
    publish(tmp_path / "made", "me/pair", cache)
    loaded, again = TwoTowers.from_pretrained("me/pair"), Processing.from_pretrained("me/pair")
    inputs = torch.rand(2, 3, 32, 32), *processing.tokenize(TEXTS)
    for ours, theirs in zip(towers(*inputs), loaded(*inputs), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(again.tokenize(TEXTS)[0], processing.tokenize(TEXTS)[0])
    publish(clip, "me/clip", cache)
    halves, _ = load_towers(family="clip", image_tower="me/clip#image", text_tower="me/clip#text", projection_dim=24)
    whole, same = load_towers(family="clip", model="me/clip")
    inputs = inputs[0], *same.tokenize(TEXTS)
    for ours, theirs in zip(halves(*inputs)[:2], whole(*inputs)[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_sharded_weights_load_by_hub_id_with_the_bias_in_a_shard(tmp_path, cache, clip):
    expected = CLIPModel.from_pretrained(clip)
    (clip / "model.safetensors").unlink()
    expected.save_pretrained(clip, max_shard_size="20KB")
    index = json.loads((clip / "model.safetensors.index.json").read_text())
    last = sorted(set(index["weight_map"].values()))[-1]
    save_file(load_file(clip / last) | {"logit_bias": torch.tensor(2.5)}, clip / last, metadata={"format": "pt"})
    index["weight_map"]["logit_bias"] = last
    (clip / "model.safetensors.index.json").write_text(json.dumps(index))
    assert len(set(index["weight_map"].values())) > 2
    publish(clip, "me/shards", cache)
    towers = TwoTowers.from_pretrained("me/shards")
    assert towers.logit_bias.item() == 2.5
    pixels = torch.rand(2, 3, 32, 32)
    expected_embeds = expected.eval().get_image_features(pixels).pooler_output
    found = towers(pixels).image_embeds
    torch.testing.assert_close(found, torch.nn.functional.normalize(expected_embeds), rtol=0, atol=1e-6)


def test_of_a_repository_only_the_files_that_are_read_are_downloaded(clip, monkeypatch):
    """Against a hub that hands out copies of one folder and notes which files were asked for."""
    both = ("pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "model.fp16.safetensors", "README.md")
    (clip / "onnx").mkdir()
    for name in both:
        (clip / name).write_bytes(b"large")
    local, fetched = clip.with_name("snapshot"), []

    def download(repo_id: str, allow_patterns: list[str], revision: str | None = None) -> str:
        from fnmatch import fnmatch

        for file in sorted(each for each in clip.rglob("*") if each.is_file()):
            name = str(file.relative_to(clip))
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (local / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, local / name)
                fetched.append(name)
        return str(local)

    monkeypatch.setattr(model_files.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(model_files, "snapshot_download", download)
    find_model("--model", "some/clip", weights=False)
    assert fetched and not any("model." in name for name in fetched)
    assert load_towers(family="clip", model="some/clip")[0].image_size == 32
    assert set(fetched) == {"config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json"} | {
        "model.safetensors"
    }
    (clip / "model.safetensors").unlink()
    shutil.rmtree(local)
    fetched.clear()
    find_model("--model", "some/clip")
    assert "pytorch_model.bin" in fetched and "tf_model.h5" not in fetched


def test_without_a_network_the_cache_is_used_as_it_is(clip, cache):
    """A listing of the repository names files that no model of that kind needs, such as another form of the weights."""
    pytest.importorskip("huggingface_hub._tree_cache", reason="this release keeps no listings")
    snapshot = publish(clip, "some/clip", cache)
    listing = {name: {"size": 1, "blob_id": "0" * 40} for name in ("config.json", "tokenizer.model", "tf_model.h5")}
    (snapshot.parents[1] / "trees").mkdir()
    content = {"format_version": 1, "files": listing}
    (snapshot.parents[1] / "trees" / f"{snapshot.name}.json").write_text(json.dumps(content))
    with pytest.raises(LocalEntryNotFoundError):  # the control: by default a snapshot must be complete
        snapshot_download("some/clip", local_files_only=True)
    assert find_model("--model", "some/clip").path == snapshot
    assert load_towers(family="clip", model="some/clip")[0].image_size == 32
    (snapshot / "model.safetensors").unlink()
    assert "no file named model.safetensors" in refusal(model="some/clip")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nobody/nothing", "cannot be loaded ("),
        ("runs/none/at/all", "there is no such folder"),
        ("./nowhere", "there is"),
    ],
)
def test_an_id_that_cannot_be_had_is_one_line(name, words, cache):
    assert refusal(model=name).startswith(f"--model {name}: {words}")


def test_a_tokenizer_without_padding_is_refused(clip):
    tokenizer = build_tokenizer(TEXTS)
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(clip)
    assert "no padding token" in refusal(model=str(clip))
