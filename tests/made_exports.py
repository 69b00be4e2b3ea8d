"""Small towers of every exported kind with changed weights, and the logits that their exports must give."""

from pathlib import Path

import torch
from made_models import FAMILIES, save_family
from PIL import Image
from torch import Tensor
from transformers import BertConfig, BertModel, ResNetConfig, ResNetModel

from lib.towers import TwoTowers, load_towers
from lib.towers.processing import Processing, build_tokenizer

TEXTS = ["a photo of a cat", "a photo of a dog"]  # those of the examples in model cards
OF_TRANSFORMERS = (*FAMILIES, "clip with bias", "siglip without bias")
COMPOSED = "composed"


def made_towers(kind: str, folder: Path) -> tuple[TwoTowers, Processing]:
    """Towers of a kind with changed weights; folder: for the files they start from."""
    torch.manual_seed(0)
    if kind == COMPOSED:
        towers, processing = load_towers(family="siglip", projection="mlp", image_size=32, **encoders(folder))
    else:
        family, _, how = kind.partition(" ")
        use_bias = how == "with bias" if how else family.startswith("siglip")
        towers, processing = load_towers(model=str(save_family(family, folder)), family="clip", use_bias=use_bias)
    with torch.no_grad():
        for parameter in towers.parameters():
            parameter.mul_(1.01)
    towers.set_scale_and_bias(10.0, -6.0 if towers.use_bias else None)
    return towers, processing


def encoders(folder: Path) -> dict[str, str]:
    """Folders of a ResNet and a BERT, as the flags that take them."""
    tokenizer = build_tokenizer(TEXTS)
    blocks = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    ResNetModel(blocks).save_pretrained(folder / "image")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    return {"image_tower": str(folder / "image"), "text_tower": str(folder / "text")}


def picture(folder: Path) -> Image.Image:
    """The picture.jpg that the examples in model cards open, of the towers' own size."""
    noise = torch.randint(256, (32, 32, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(folder / "picture.jpg")
    return Image.open(folder / "picture.jpg").convert("RGB")


@torch.no_grad()
def logits_of(towers: TwoTowers, processing: Processing, image: Image.Image) -> Tensor:
    """(1, 2): of the picture with `TEXTS`, by the towers themselves."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, 32, 32, 3).permute(0, 3, 1, 2)
    output = towers(pixels, *processing.tokenize(TEXTS))
    return output.logit_scale * output.image_embeds @ output.text_embeds.T + output.logit_bias


def run_example(card: str, folder: Path, monkeypatch) -> Tensor:
    """Run the Python of a model card in the folder that holds the export and picture.jpg; its logits."""
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(card.split("```python\n")[1].split("```")[0], names)
    assert names["probabilities"].shape == (1, 2) and (names["probabilities"] > 0).all()
    return torch.as_tensor(names["logits"])
