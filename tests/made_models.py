"""Tiny models of every family that training starts from, saved as transformers saves them: no network is needed."""

from pathlib import Path

import torch
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    AltCLIPProcessor,
    BertTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPImageProcessor,
    ChineseCLIPModel,
    ChineseCLIPProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    Siglip2Processor,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    XLMRobertaTokenizer,
)

from lib.towers.processing import build_tokenizer

SIDE, PATCH = 32, 8
WIDTHS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
FAMILIES = ("clip", "siglip", "siglip2", "chinese_clip", "altclip")
CLASSES = {
    "clip": CLIPModel,
    "siglip": SiglipModel,
    "siglip2": Siglip2Model,
    "chinese_clip": ChineseCLIPModel,
    "altclip": AltCLIPModel,
}


def save_family(family: str, folder: Path) -> Path:
    """A folder with model, tokenizer and image processor, as a checkpoint of the hub has them."""
    torch.manual_seed(1)
    tokenizer = _tokenizer(family)
    _model(family, tokenizer).save_pretrained(folder)
    square = {"height": SIDE, "width": SIDE}
    cropped = {"size": {"shortest_edge": SIDE}, "crop_size": square}
    patches = (SIDE // PATCH) ** 2
    processor = {
        "clip": lambda: CLIPProcessor(CLIPImageProcessor(**cropped), tokenizer),
        "siglip": lambda: SiglipProcessor(SiglipImageProcessor(size=square), tokenizer),
        "siglip2": lambda: Siglip2Processor(
            Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=patches), tokenizer
        ),
        "chinese_clip": lambda: ChineseCLIPProcessor(ChineseCLIPImageProcessor(**cropped), tokenizer),
        "altclip": lambda: AltCLIPProcessor(CLIPImageProcessor(**cropped), tokenizer),
    }[family]
    processor().save_pretrained(folder)
    return folder


def _tokenizer(family: str) -> PreTrainedTokenizerBase:
    if family == "chinese_clip":
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        words = [*special, *LETTERS, *(f"##{letter}" for letter in LETTERS), *"零一二三四五六七八九"]
        return BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=32)
    if family == "altclip":
        special = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
        pieces = [*special, ("▁", -1.0), *((letter, -2.0) for letter in LETTERS), ("<mask>", 0.0)]
        return XLMRobertaTokenizer(vocab=pieces, model_max_length=64)
    if family == "siglip2":
        special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
        words = {word: i for i, word in enumerate([*special, "▁", *LETTERS])}
        return Siglip2Tokenizer(vocab=words, merges=[], model_max_length=16)
    return build_tokenizer(["a photo of the digit zero"], max_length=16, canonical=family == "siglip")


def _model(family: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    vision = WIDTHS | {"patch_size": PATCH}
    vision |= {"num_patches": (SIDE // PATCH) ** 2} if family == "siglip2" else {"image_size": SIDE}
    text = WIDTHS | {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    text |= {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    if family in ("siglip", "siglip2"):
        configs = {"siglip": SiglipConfig, "siglip2": Siglip2Config}
        model = CLASSES[family](configs[family](text_config=text, vision_config=vision))
        with torch.no_grad():  # from a configuration transformers starts both at 0
            model.logit_scale.fill_(2.0)
            model.logit_bias.fill_(-9.0)
        return model
    configs = {"clip": CLIPConfig, "chinese_clip": ChineseCLIPConfig, "altclip": AltCLIPConfig}
    text |= {"project_dim": 20} if family == "altclip" else {}
    return CLASSES[family](configs[family](text_config=text, vision_config=vision, projection_dim=24))
