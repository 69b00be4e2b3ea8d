"""A model's own preparation of images and our pipeline give the same pixels, or the model is refused."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from transformers import (
    BertConfig,
    BitImageProcessor,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    EfficientNetImageProcessor,
    GLPNImageProcessor,
    LevitImageProcessor,
    MobileViTImageProcessor,
    Siglip2ImageProcessor,
    SiglipImageProcessor,
    ViTImageProcessor,
)

from lib.data.pipeline import ImagePipeline, Resize
from lib.errors import InputError
from lib.towers.image_form import (
    DEFAULT_FORMS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    TOLERANCE,
    ImageForm,
    Preparation,
    difference,
    measured_form,
    preparation,
    probe,
    read_image_form,
)
from lib.towers.processing import build_tokenizer, make_processing

DEFAULT = DEFAULT_FORMS["two_towers"]
IMAGENET = {"image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}
SQUARE = {"height": 64, "width": 64}
NOT_NORMALIZED = (0.0,) * 3, (1.0,) * 3
HALF = (0.5,) * 3, (0.5,) * 3

# The processors of case 23 and their kin: what they ask for, and the form that does it.
OWN = {
    "MobileViT": (MobileViTImageProcessor(), ImageForm(256, *NOT_NORMALIZED, Resize("crop", 224, "bicubic", "bgr"))),
    "MobileViT, smaller crop": (
        MobileViTImageProcessor(size={"shortest_edge": 72}, crop_size=SQUARE, resample=2),
        ImageForm(64, *NOT_NORMALIZED, Resize("crop", 72, "bilinear", "bgr")),
    ),
    "EfficientNet, normalized twice": (
        EfficientNetImageProcessor(size=SQUARE, resample=0, **IMAGENET),
        ImageForm(64, (0.485, 0.456, 0.406), (0.052441, 0.050176, 0.050625), Resize("squash", None, "nearest")),
    ),
    "EfficientNet, with an offset": (
        EfficientNetImageProcessor(size=SQUARE, rescale_factor=1 / 127.5, rescale_offset=True, include_top=False),
        ImageForm(64, (0.75,) * 3, (0.25,) * 3, Resize("squash")),
    ),
    "ConvNeXt": (
        ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.875),
        ImageForm(224, *HALF, Resize("crop", 256)),
    ),
    "ConvNeXt of 384": (
        ConvNextImageProcessor(size={"shortest_edge": 384}, resample=2),
        ImageForm(384, *HALF, Resize("squash", None, "bilinear")),
    ),
    "DINOv2": (
        BitImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, **IMAGENET),
        ImageForm(224, IMAGENET_MEAN, IMAGENET_STD, Resize("crop", 256)),
    ),
    "ViT": (ViTImageProcessor(), ImageForm(224, *HALF, Resize("squash", None, "bilinear"))),
    "DeiT": (DeiTImageProcessor(resample=1), ImageForm(224, *HALF, Resize("squash", 256, "lanczos"))),
    "LeViT": (LevitImageProcessor(), ImageForm(224, IMAGENET_MEAN, IMAGENET_STD, Resize("crop", 256))),
    "SigLIP": (SiglipImageProcessor(), ImageForm(224, *HALF, Resize("squash"))),
    "CLIP": (CLIPImageProcessor(), DEFAULT_FORMS["clip"]),
    "padded": (
        CLIPImageProcessor(size={"max_height": 64, "max_width": 64}, crop_size=SQUARE, do_normalize=False),
        ImageForm(64, *NOT_NORMALIZED, Resize("pad")),
    ),
}


def picture(width: int, height: int) -> Image.Image:
    """Smooth areas with noise on them; no probe image."""
    random = np.random.default_rng(width)
    smooth = Image.fromarray(random.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize((width, height))
    return Image.fromarray(np.clip(np.asarray(smooth) + random.normal(0, 20, (height, width, 3)), 0, 255).astype("u1"))


def normalized(form: ImageForm, image: Image.Image) -> np.ndarray:
    """The naive twin of what the towers do, in float64."""
    pixels = ImagePipeline(form.size, form.resize)(image, 0).double().numpy()
    return (pixels / 255 - np.array(form.mean)[:, None, None]) / np.array(form.std)[:, None, None]


def gap(form: ImageForm, processor, image: Image.Image) -> float:
    """Mean difference of normalized units."""
    theirs = processor(image, return_tensors="np")["pixel_values"][0]
    ours = normalized(form, image)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).mean())


def saved(processor, folder: Path) -> Path:
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", OWN)
def test_our_pixels_are_those_of_the_models_own_processor(name, tmp_path):
    processor, expected = OWN[name]
    form = read_image_form(saved(processor, tmp_path), DEFAULT)
    assert form == expected
    for size in ((400, 300), (301, 450)):
        assert gap(form, processor, picture(*size)) < 0.01


@pytest.mark.parametrize("name", OWN)
def test_the_form_survives_save_and_load(name, tmp_path):
    """Through the image-processor files of a run or an export, and through the config.json of a composed pair."""
    processor, form = OWN[name]
    config = BertConfig(hidden_size=8, num_attention_heads=2)
    processing = make_processing(build_tokenizer(["a cat"]), config, form, "two_towers")
    processing.save_pretrained(tmp_path)
    assert read_image_form(tmp_path, DEFAULT) == form == processing.image_form
    assert gap(form, processing.image_processor(), picture(301, 450)) < 0.01 > gap(form, processor, picture(90, 70))
    assert ImageForm.of(json.loads(json.dumps(asdict(form)))) == form


@pytest.mark.parametrize("size", [32, 224, 256, 384, 518])
def test_another_interpolation_side_or_order_is_noticed(size, tmp_path):
    """Negative control: the least of the differences is above the tolerance, and rounding is far below it."""
    square = {"height": size, "width": size}
    own = preparation(CLIPImageProcessor(size={"shortest_edge": size}, crop_size=square, resample=2))
    theirs, form = own.process(probe()), measured_form(own, DEFAULT, "--image-tower it")
    assert form.resize == Resize("crop", None, "bilinear") and difference(form, theirs, probe()) < TOLERANCE / 10
    wrong = [replace(form.resize, interpolation=each) for each in ("bicubic", "lanczos", "nearest")]
    wrong += [replace(form.resize, side=size + 1), replace(form.resize, way="squash"), replace(form.resize, way="pad")]
    wrong += [replace(form.resize, channels="bgr")]
    for resize in wrong:
        assert difference(replace(form, resize=resize), theirs, probe()) > 2 * TOLERANCE, resize
    for other in (replace(form, mean=(0.5,) * 3), replace(form, std=IMAGENET_STD)):
        assert difference(other, theirs, probe()) > 2 * TOLERANCE
    bicubic, lanczos = (replace(form, resize=replace(form.resize, interpolation=i)) for i in ("bicubic", "lanczos"))
    assert difference(bicubic, lanczos.normalized(probe()), probe()) > TOLERANCE  # the two that are most alike


def test_pixels_resized_as_floats_differ_by_rounding_alone():
    def process(image: Image.Image) -> Tensor:
        pixels = v2.functional.pil_to_tensor(image) / 255
        return v2.functional.resize(pixels, [48, 48], v2.InterpolationMode.BICUBIC, antialias=True)

    own = Preparation(process, ())
    form = measured_form(own, DEFAULT, "--image-tower it")
    assert form == ImageForm(48, *NOT_NORMALIZED, Resize("squash"))
    assert 0.1 < difference(form, process(probe()), probe()) < 0.4


def test_a_crop_that_is_placed_one_pixel_further_is_the_same_form():
    """torchvision and timm round half pixels up, transformers down."""
    process = v2.Compose([v2.Resize(43), v2.CenterCrop(32), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    form = measured_form(Preparation(process, (43,)), DEFAULT, "--image-tower it")
    assert form.resize == Resize("crop", 43, "bilinear")


def brighter(image: Image.Image) -> Tensor:
    pixels = v2.functional.pil_to_tensor(image.resize((32, 32), Image.Resampling.BICUBIC)) / 255
    return pixels.sqrt()


def within_a_frame(image: Image.Image) -> Tensor:
    pixels = v2.functional.pil_to_tensor(image.resize((30, 30), Image.Resampling.BICUBIC)) / 255
    return v2.functional.pad(pixels, [1, 1, 1, 1], fill=1)


def broken(image: Image.Image) -> Tensor:
    raise KeyError("clusters")


def normalized_bgr(image: Image.Image) -> Tensor:
    pixels = v2.functional.pil_to_tensor(image.resize((32, 32), Image.Resampling.BICUBIC)) / 255
    return pixels.flip(0) - 0.5


@pytest.mark.parametrize(
    ("process", "reason"),
    [
        (brighter, "does more to colours than a mean and a standard deviation"),
        (
            within_a_frame,
            r"gives pixels that differ by \d+\.\d of 255 levels on average from our nearest \(squash, \w+, RGB\)",
        ),
        (broken, "cannot be run on an image"),
        (normalized_bgr, "gives normalized channels in the order BGR"),
    ],
)
def test_what_no_form_of_ours_gives_is_refused_in_one_line(process, reason):
    own = Preparation(process, (32,))
    with pytest.raises(
        InputError, match=f"^--image-tower it: its image processor {reason}.*; --resize crop"
    ) as refused:
        measured_form(own, DEFAULT, "--image-tower it")
    assert "\n" not in str(refused.value)
    assert measured_form(own, DEFAULT, "--image-tower it", "crop").resize.way == "crop"


def test_a_processor_that_keeps_an_images_proportions_is_refused_and_our_own_form_taken_on_request(tmp_path):
    saved(GLPNImageProcessor(), tmp_path)
    with pytest.raises(InputError, match=rf"--model {tmp_path}: .* makes 480 x 992 pixels .*--resize crop, pad or squ"):
        read_image_form(tmp_path, DEFAULT)
    own = read_image_form(tmp_path, DEFAULT, resize="pad")
    assert own == ImageForm(DEFAULT.size, *NOT_NORMALIZED, Resize("pad"))


def test_our_own_form_keeps_size_normalization_and_order_of_the_channels(tmp_path):
    saved(OWN["MobileViT, smaller crop"][0], tmp_path)
    assert read_image_form(tmp_path, DEFAULT, resize="squash") == ImageForm(
        64, *NOT_NORMALIZED, Resize("squash", channels="bgr")
    )


@pytest.mark.parametrize("content", ["{broken", '{"image_processor_type": "NobodysImageProcessor"}'])
def test_files_that_cannot_be_read_are_no_missing_files(content, tmp_path):
    assert read_image_form(tmp_path, DEFAULT) is DEFAULT
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(InputError, match=r"--image-tower it: its image processor cannot be loaded \(.*--resize crop"):
        read_image_form(tmp_path, DEFAULT, "--image-tower it")
    assert read_image_form(tmp_path, DEFAULT, resize="crop") == DEFAULT


def test_siglip_2_of_any_resolution_keeps_its_interpolation_on_square_images(tmp_path):
    processor = Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    form = read_image_form(saved(processor, tmp_path), DEFAULT)
    assert form == ImageForm(32, *HALF, Resize("squash", None, "bilinear"))
    image = picture(80, 80)
    own = preparation(processor).process(image)
    assert own.shape == (3, 32, 32)
    np.testing.assert_allclose(own.numpy(), normalized(form, image), atol=1e-5)


def test_another_size_takes_the_larger_side_along():
    form = OWN["DINOv2"][1]
    assert form.at(None) == form and form.at(224) == form
    assert form.at(448) == replace(form, size=448, resize=Resize("crop", 512))
    assert DEFAULT.at(98) == replace(DEFAULT, size=98)
    image = picture(400, 300)
    half = normalized(form.at(112), image)
    whole = np.asarray(normalized(form, image)).reshape(3, 112, 2, 112, 2).mean((2, 4))
    assert np.abs(half - whole).mean() < 0.1 < np.abs(normalized(replace(form, size=112), image) - whole).mean()


def test_forms_of_older_runs_still_load():
    older = {"size": 32, "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "resize": "pad"}
    assert ImageForm.of(older) == ImageForm(32, (0.1, 0.2, 0.3), (1, 1, 1), Resize("pad"))
