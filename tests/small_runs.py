"""Short training runs in this process on small encoders, and their files, for tests of trained and frozen weights."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertModel, ResNetConfig, ResNetModel, ViTConfig, ViTModel

import train_clip
from lib.runs.reporter import read_metrics
from lib.towers.processing import build_tokenizer

FLAGS = [
    "--effective-batch=16", "--chunk-size=8", "--xbm-size=0", "--warmup-steps=0", "--schedule=constant",
    "--eval-every=0", "--save-every=1", "--keep-checkpoints=0", "--workers=0", "--steps=2",
]  # fmt: skip


def train(folder: Path, *flags: str) -> Path:
    """Train the preset or what the flags name; returns the run's folder."""
    train_clip.main([*FLAGS, f"--output-dir={folder}", *flags])
    return folder


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run) if "loss" in line]


def saved(run: Path, step: int, name: str = "model") -> dict[str, Tensor]:
    """The tensors of a checkpoint's file."""
    return load_file(run / "checkpoints" / f"step_{step:06d}" / f"{name}.safetensors")


def moved(run: Path, first: int = 1, last: int = 2, name: str = "model") -> set[str]:
    """Names of what changed from one checkpoint to another."""
    before, after = saved(run, first, name), saved(run, last, name)
    return {key for key in before if not torch.equal(before[key], after[key])}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def save_encoders(folder: Path, layers: int = 3) -> Path:
    """A ResNet of two stages, a ViT and a BERT of so many layers, with a tokenizer; dropout in the last two."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(["a photo of the digit zero", "one two"])
    sizes = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 32}
    models = {
        "resnet": ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])),
        "vit": ViTModel(ViTConfig(image_size=32, patch_size=16, hidden_dropout_prob=0.1, **sizes)),
        "bert": BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def pair(encoders: Path, image: str, text: str = "bert") -> list[str]:
    """Flags of a pair composed of two of these."""
    return [
        f"--image-tower={encoders / image}", f"--text-tower={encoders / text}", "--image-size=32",
        "--projection-dim=24",
    ]  # fmt: skip
