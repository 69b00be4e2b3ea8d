"""The layout of sentence-transformers: one model whose `encode` takes images and texts.

The folder loads with `sentence_transformers.SentenceTransformer(FOLDER)`, without code of this program. A composed pair
becomes a router with a row of modules for images and one for texts: encoder, pooling, head; a CLIP or SigLIP is one
module.
"""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torchvision.transforms.functional import to_pil_image
from transformers import CLIPProcessor, PreTrainedModel, TimmWrapperConfig, TimmWrapperModel

from lib.errors import InputError, raised_as
from lib.export import hugging_face
from lib.export.formats import PROBABILITIES, Format, Sample, check_tokens, importing
from lib.export.hugging_face import COMPOSED
from lib.towers import TwoTowers
from lib.towers.encoders import HALF_MODELS
from lib.towers.image_classifiers import is_of_another_size
from lib.towers.processing import Processing
from lib.towers.tower import ImageTower, TextTower

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Module, Transformer

FLAG = "--format sentence-transformers"


def check(towers: TwoTowers) -> None:
    """Raise InputError where the package is missing, or has no module for one of the towers."""
    with importing("sentence-transformers", "'sentence-transformers>=6.0'"):
        from sentence_transformers.base.modules import Normalize, Router, Transformer  # noqa: F401
    settings = towers.description
    if settings["model_type"] != COMPOSED:
        return
    image, text = settings["image_config"]["model_type"], settings["text_config"]["model_type"]
    if image == "torchvision":
        raise InputError(
            f"{FLAG}: only this program loads an image tower of torchvision; use --format onnx, or train with a model "
            "of timm or transformers"
        )
    for side, model_type in (("image", image), ("text", text)):
        if model_type in HALF_MODELS:
            raise InputError(
                f"{FLAG}: transformers' AutoModel cannot load the {side} tower alone, of type {model_type!r}; use "
                "--format onnx"
            )
    if towers.image.interpolate:
        raise InputError(
            f"{FLAG}: the image tower was made for {settings['image_config']['image_size']} pixels and runs at "
            f"{towers.image_size}, which sentence-transformers cannot request; use --format onnx"
        )


@torch.no_grad()
def write(towers: TwoTowers, processing: Processing, folder: Path) -> None:
    """Write modules.json and a folder for each module."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Router

    with TemporaryDirectory() as scratch:
        if processing.model_type == COMPOSED:
            rows = {
                "text": _text_modules(towers.text, processing, Path(scratch) / "text"),
                "image": _image_modules(towers, processing, Path(scratch) / "image"),
            }
            first: Module = Router(rows, allow_empty_key=False)
        else:
            first = _whole_model(towers, processing, Path(scratch))
        model = SentenceTransformer(modules=[first, Normalize()], device="cpu")
        model.save_pretrained(str(folder), create_model_card=False)


def _whole_model(towers: TwoTowers, processing: Processing, scratch: Path) -> "Transformer":
    """A CLIP or SigLIP, which transformers loads as one model."""
    from sentence_transformers.base.modules import Transformer

    hugging_face.write(towers, processing, scratch)
    asked: dict = {}
    if not towers.text.masked:  # SigLIP's texts have one length, and its text encoder attends to their padding
        asked["text"] = {"padding": "max_length", "return_attention_mask": False}
    if processing.patch_size:  # SigLIP 2's processor as a whole has another number
        asked["image"] = {
            "patch_size": processing.patch_size,
            "max_num_patches": (processing.image_size // processing.patch_size) ** 2,
        }
    features = {"text": "get_text_features", "image": "get_image_features"}
    return Transformer(
        str(scratch),
        modality_config={
            side: {"method": method, "method_output_name": "pooler_output"} for side, method in features.items()
        },
        module_output_name="sentence_embedding",
        processing_kwargs=asked,
    )


def _text_modules(tower: TextTower, processing: Processing, scratch: Path) -> list["Module"]:
    assert isinstance(tower.trunk, PreTrainedModel)
    tower.trunk.save_pretrained(scratch)
    if tower.trunk.config.model_type == "clip_text_model":  # transformers looks for a whole CLIP's processor there
        CLIPProcessor(processing.image_processor(), processing.tokenizer).save_pretrained(scratch)
    else:
        processing.tokenizer.save_pretrained(scratch)
    return _modules(tower, "text", "a text", scratch)


def _image_modules(towers: TwoTowers, processing: Processing, scratch: Path) -> list["Module"]:
    trunk, settings = towers.image.trunk, towers.description["image_config"]
    if settings["model_type"] == "timm":
        trunk = _wrapped(trunk, settings["name"], processing.image_size)
    assert isinstance(trunk, PreTrainedModel)  # towers of torchvision are refused
    trunk.save_pretrained(scratch)
    # SigLIP 2's image encoder takes patches, into which our own tower cuts the images.
    replace(processing, patch_size=towers.image.patch_size).image_processor().save_pretrained(scratch)
    blank = to_pil_image(torch.zeros(3, processing.image_size, processing.image_size, dtype=torch.uint8))
    return _modules(towers.image, "image", blank, scratch)


def _modules(tower: ImageTower | TextTower, side: str, example: object, scratch: Path) -> list["Module"]:
    """Encoder, pooling and head of a tower.

    scratch: the encoder's folder. example: an input, which shows the form of the encoder's output.
    """
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    output = "pooler_output" if tower.pooling in ("pooler", "ready") else "last_hidden_state"
    transformer = Transformer(
        str(scratch),
        modality_config={side: {"method": "forward", "method_output_name": output}},
        module_output_name="sentence_embedding",
    )
    modules: list[Module] = [transformer]
    found = transformer(transformer.preprocess([example]))["sentence_embedding"]
    if found.ndim == 3:  # (1, L, H): tokens, or the places of a map, of which a pooled one has a single place
        transformer.module_output_name = "token_embeddings"
        modules.append(Pooling(found.shape[-1], "cls" if tower.pooling == "cls" else "mean"))
    return modules + _head_modules(tower.head)


def _head_modules(head: nn.Module) -> list["Module"]:
    """A module for each linear layer of a head, with the activation after it; dropout is for training only."""
    from sentence_transformers.base.modules import Dense

    modules: list[Module] = []
    for layer in head if isinstance(head, nn.Sequential) else [head]:
        if isinstance(layer, nn.Linear):
            bias = None if layer.bias is None else layer.bias.detach().clone()
            width, dim = layer.in_features, layer.out_features
            modules.append(Dense(width, dim, bias is not None, None, layer.weight.detach().clone(), bias))
        elif isinstance(layer, nn.GELU):
            modules[-1].activation_function = layer
    return modules


def _wrapped(trunk: nn.Module, name: str, image_size: int) -> PreTrainedModel:
    """A model of timm as transformers loads it, without its classifier."""
    fitted = is_of_another_size(trunk, image_size)
    config = TimmWrapperConfig(architecture=name, model_args={"img_size": image_size} if fitted else {})
    model = TimmWrapperModel(config)
    with raised_as(
        lambda fault: InputError(
            f"{FLAG}: timm builds {name} with weights of other shapes for images of {image_size} pixels; use --format "
            "onnx, or train at the size in its name"
        ),
        RuntimeError,
    ):
        model.timm_model.load_state_dict(trunk.state_dict())
    return model.eval()


@torch.no_grad()
def logits(towers: TwoTowers, processing: Processing, folder: Path, sample: Sample) -> Tensor:
    """Through sentence-transformers alone, from pictures and tokens; its tokenizer is compared too."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    check_tokens(lambda texts: model.preprocess(texts)["input_ids"], processing)
    pictures = [to_pil_image(_framed(pixels, processing)) for pixels in sample.pixel_values.cpu()]
    image_embeds = model.encode(pictures, convert_to_tensor=True, show_progress_bar=False)
    tokens = {"input_ids": sample.input_ids.cpu(), "modality": "text"}
    tokens |= {"attention_mask": sample.attention_mask.cpu()} if towers.text.masked else {}
    text_embeds = model(tokens)["sentence_embedding"]
    return towers.logit_scale.exp().item() * image_embeds @ text_embeds.T + towers.logit_bias.item()


def _framed(pixels: Tensor, processing: Processing) -> Tensor:
    """A picture from which the image processor makes these pixels: it resizes nothing, and cuts the frame off."""
    if processing.resize.channels == "bgr":
        pixels = pixels.flip(0)
    frame = (processing.resize.side or processing.image_size) - processing.image_size
    before, after = frame // 2, frame - frame // 2
    return pad(pixels, (before, after, before, after))


def usage(towers: TwoTowers, processing: Processing, name: str, on_hub: bool) -> str:
    scale, bias = towers.logit_scale.exp().item(), towers.logit_bias.item()
    summand = f" + {bias!r}" if bias else ""
    return f"""from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
texts, image = ["a photo of a cat", "a photo of a dog"], Image.open("picture.jpg").convert("RGB")
logits = {scale!r} * model.similarity(model.encode([image]), model.encode(texts)){summand}
{PROBABILITIES[towers.use_bias]}"""


SENTENCE_TRANSFORMERS = Format(check, write, logits, usage, "sentence-transformers")
