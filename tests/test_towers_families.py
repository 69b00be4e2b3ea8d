"""Every supported dual encoder trains with both losses, and loads in plain transformers afterwards."""

import pytest
import torch
from accelerate.state import AcceleratorState
from made_models import CLASSES, FAMILIES, PATCH, SIDE, save_family
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, PreTrainedModel

import train_clip
import train_siglip
from lib.errors import InputError
from lib.towers import TwoTowers, load_towers
from lib.towers.processing import Processing

TEXTS = ["a photo of the digit zero", "one", "a dog runs over the grass and on and on"]
SHORT = [
    "--effective-batch=8", "--chunk-size=4", "--xbm-size=8", "--steps=5", "--eval-every=0", "--save-every=5",
    "--lr=1e-3", "--grad-clip=0",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_accelerate_state_from_other_runs():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {family: save_family(family, root / family) for family in FAMILIES}


@torch.no_grad()
def logits_of_transformers(model: PreTrainedModel, processor, pixels: torch.Tensor, processing: Processing):
    """Embeddings as in the model's own documentation; pixels: (n, 3, H, W) bytes."""
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    inputs = processor.image_processor(images, return_tensors="pt")
    padding = {"padding": processing.padding, "max_length": processing.max_length, "truncation": True}
    tokens = processor.tokenizer(TEXTS, return_tensors="pt", **padding)
    if processing.padding == "max_length":  # SigLIP is not told which tokens are padding
        tokens.pop("attention_mask", None)
    return model(**inputs, **tokens).logits_per_image


@torch.no_grad()
def logits_of_towers(towers: TwoTowers, processing: Processing, pixels: torch.Tensor) -> torch.Tensor:
    output = towers(pixels, *processing.tokenize(TEXTS))
    return output.logit_scale * output.image_embeds @ output.text_embeds.T + output.logit_bias


def random_pixels(side: int = SIDE) -> torch.Tensor:
    return torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("main", [train_clip.main, train_siglip.main], ids=["infonce", "sigmoid"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_and_its_export_gives_equal_logits_in_plain_transformers(family, main, families, tmp_path):
    main([*SHORT, f"--model={families[family]}", f"--output-dir={tmp_path}"])
    export = tmp_path / "export"
    model, report = CLASSES[family].from_pretrained(export, output_loading_info=True)
    assert type(AutoModel.from_pretrained(export)) is type(model)
    assert (
        not report["missing_keys"]
        and not report["mismatched_keys"]
        and set(report["unexpected_keys"]) <= {"logit_bias"}
    )
    trained, processing = (
        TwoTowers.from_pretrained(tmp_path / "checkpoints" / "step_000005"),
        Processing.from_pretrained(export),
    )
    found = logits_of_transformers(model.eval(), AutoProcessor.from_pretrained(export), random_pixels(), processing)
    if not family.startswith("siglip"):  # transformers' CLIP knows no bias
        found = found + trained.logit_bias
    torch.testing.assert_close(found, logits_of_towers(trained, processing, random_pixels()), rtol=0, atol=1e-5)
    start = TwoTowers.from_pretrained(families[family])
    assert all(
        not torch.equal(w, start.state_dict()[n])
        for n, w in trained.state_dict().items()
        if n.endswith("q_proj.weight")
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_gives_its_own_logits_from_its_own_files(family, families):
    """Before any training: pooling, projections, masks, normalization and scale are those of transformers."""
    towers, processing = load_towers(model=str(families[family]), family="clip" if "clip" in family else "siglip")
    model = CLASSES[family].from_pretrained(families[family]).eval()
    processor = AutoProcessor.from_pretrained(families[family])
    found = logits_of_towers(towers, processing, random_pixels())
    expected = logits_of_transformers(model, processor, random_pixels(), processing)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert towers.pretrained_bias == family.startswith("siglip")
    output = towers(random_pixels(), *processing.tokenize(TEXTS))
    (sum(embeds.sum() for embeds in output[:2]) + output.logit_scale + output.logit_bias).backward()
    idle = [name for name, p in towers.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle  # DistributedDataParallel waits for all of them
    assert processing.image_size == SIDE and processing.model_type == family


def test_padding_matters_only_where_the_model_is_told_of_none(families):
    for family in FAMILIES:
        towers, processing = TwoTowers.from_pretrained(families[family]), Processing.from_pretrained(families[family])
        alone = towers(None, *processing.tokenize(TEXTS[1:2])).text_embeds
        among = towers(None, *processing.tokenize(TEXTS)).text_embeds[1:2]
        torch.testing.assert_close(alone, among, rtol=0, atol=1e-6)


def test_positions_behind_the_padding_token_are_not_run_over(families):
    processing = Processing.from_pretrained(families["altclip"])
    assert processing.max_length == 64 - 2
    towers = TwoTowers.from_pretrained(families["altclip"])
    assert towers(None, *processing.tokenize(["a" * 500])).text_embeds.isfinite().all()


@pytest.mark.parametrize("family", ["siglip2", "chinese_clip", "altclip"])
def test_a_family_takes_another_image_size_and_keeps_it(family, families, tmp_path):
    towers, processing = load_towers(model=str(families[family]), family="clip", image_size=48)
    towers.save_pretrained(tmp_path)
    processing.save_pretrained(tmp_path)
    loaded, again = TwoTowers.from_pretrained(tmp_path), Processing.from_pretrained(tmp_path)
    assert loaded.image_size == again.image_size == 48
    expected = logits_of_towers(towers, processing, random_pixels(48))
    torch.testing.assert_close(logits_of_towers(loaded, again, random_pixels(48)), expected)
    model, processor = AutoModel.from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    torch.testing.assert_close(
        logits_of_transformers(model, processor, random_pixels(48), again), expected, rtol=0, atol=1e-5
    )
    with pytest.raises(InputError, match=f"--image-size 50 .*patch size {PATCH}; the nearest that is: 48"):
        load_towers(model=str(families[family]), family="clip", image_size=50)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_halves_go_into_a_pair_with_fresh_heads(family, families, tmp_path):
    folder = str(families[family])
    towers, processing = load_towers(family="siglip", image_tower=folder, text_tower=folder, projection_dim=12)
    assert towers.embed_dim == 12
    whole = TwoTowers.from_pretrained(folder)
    assert torch.equal(towers(random_pixels()).image_pooled, whole(random_pixels()).image_pooled)
    towers.save_pretrained(tmp_path)
    processing.save_pretrained(tmp_path)
    loaded, again = TwoTowers.from_pretrained(tmp_path), Processing.from_pretrained(tmp_path)
    expected = logits_of_towers(towers, processing, random_pixels())
    torch.testing.assert_close(logits_of_towers(loaded, again, random_pixels()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_halves_by_name_bring_their_own_projection(family, families, tmp_path):
    """`NAME#image` with `NAME#text` is the whole again."""
    folder = str(families[family])
    whole = TwoTowers.from_pretrained(folder)
    pair = {"image_tower": f"{folder}#image", "text_tower": f"{folder}#text", "projection": "mlp"}
    towers, processing = load_towers(family="clip", projection_dim=whole.embed_dim, **pair)
    ours, theirs = (t(random_pixels(), *processing.tokenize(TEXTS)) for t in (towers, whole))
    torch.testing.assert_close(ours.image_embeds, theirs.image_embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.text_embeds, theirs.text_embeds, rtol=0, atol=1e-6)
    towers.save_pretrained(tmp_path)
    processing.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path, config=towers.text.trunk.config)
    assert AutoImageProcessor.from_pretrained(tmp_path)
    loaded, again = TwoTowers.from_pretrained(tmp_path), Processing.from_pretrained(tmp_path)
    expected = logits_of_towers(towers, processing, random_pixels())
    torch.testing.assert_close(logits_of_towers(loaded, again, random_pixels()), expected, rtol=0, atol=0)
    with pytest.raises(InputError, match=rf"--projection-dim 99: .*use --projection-dim {whole.embed_dim}"):
        load_towers(family="clip", projection_dim=99, **pair)
