"""Models of the benchmarks: CLIP pairs with random weights, and batches of random pixels and tokens."""

from dataclasses import dataclass, replace

import measured  # noqa: F401  (puts lib on the path)
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel

from lib.data import Chunk
from lib.towers import TwoTowers
from lib.towers.dual import dual_parts
from lib.towers.image_form import DEFAULT_FORMS


@dataclass(frozen=True)
class Subject:
    """A CLIP pair: side and patch of the images in pixels, tokens of a text, and each encoder's width and layers."""

    image_size: int
    patch_size: int
    tokens: int
    vision: tuple[int, int]
    text: tuple[int, int]
    embed_dim: int
    vocabulary: int


SUBJECTS = {
    "small": Subject(32, 8, 16, vision=(128, 3), text=(128, 3), embed_dim=128, vocabulary=1000),
    "narrow": Subject(32, 8, 16, vision=(64, 2), text=(64, 2), embed_dim=64, vocabulary=1000),
    "wide": Subject(32, 8, 16, vision=(384, 6), text=(384, 6), embed_dim=384, vocabulary=1000),
    "vit-b-32": Subject(224, 32, 77, vision=(768, 12), text=(512, 12), embed_dim=512, vocabulary=49408),
    "vit-b-16": Subject(224, 16, 77, vision=(768, 12), text=(512, 12), embed_dim=512, vocabulary=49408),
}


def make_towers(name: str, device: torch.device) -> TwoTowers:
    """The pair with random weights, in training mode (without dropout)."""
    subject, end = SUBJECTS[name], SUBJECTS[name].vocabulary - 1
    sizes = [
        {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
        | {"num_attention_heads": max(1, width // 64)}
        for width, layers in (subject.vision, subject.text)
    ]
    tokens = {"vocab_size": subject.vocabulary, "max_position_embeddings": subject.tokens}
    tokens |= {"pad_token_id": 0, "bos_token_id": end - 1, "eos_token_id": end}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            vision_config=sizes[0] | {"image_size": subject.image_size, "patch_size": subject.patch_size},
            text_config=sizes[1] | tokens,
            projection_dim=subject.embed_dim,
        )
    )
    return TwoTowers(dual_parts(model, DEFAULT_FORMS["clip"], None)).to(device).train()


def make_batch(name: str, size: int, pin: bool = False) -> Chunk:
    """Random pixels and tokens on the host; every pair is its own group."""
    subject, generator = SUBJECTS[name], torch.Generator().manual_seed(1)
    side, end = subject.image_size, subject.vocabulary - 1
    pixels = torch.randint(256, (size, 3, side, side), dtype=torch.uint8, generator=generator)
    input_ids = torch.randint(1, end - 1, (size, subject.tokens), generator=generator)
    input_ids[:, -1] = end
    if pin:
        pixels, input_ids = pixels.pin_memory(), input_ids.pin_memory()
    return Chunk(pixels, input_ids, torch.ones_like(input_ids), *(torch.arange(size) for _ in range(3)))


def chunked(batch: Chunk, chunk_size: int) -> list[Chunk]:
    return [batch.rows(start, start + chunk_size) for start in range(0, len(batch), chunk_size)]


def repeated_chunks(chunk: Chunk, size: int) -> list[Chunk]:
    """A batch of `size` pairs in chunks that share one chunk's pixels and tokens; every pair is its own group."""
    ids = torch.arange(size).split(len(chunk))
    return [replace(chunk.rows(0, len(own)), group=own, sample_id=own) for own in ids]


class Autocast(nn.Module):
    """The towers in bfloat16 on an accelerator, as Accelerate runs them under --mixed_precision bf16."""

    def __init__(self, towers: TwoTowers, device: torch.device) -> None:
        super().__init__()
        self.towers, self.device, self.enabled = towers, device, device.type != "cpu"

    def forward(self, **inputs: Tensor):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.enabled):
            return self.towers(**inputs)


def flops_of_a_pair(name: str) -> int:
    """Multiplications plus additions of one pair's forward and backward pass, without a second forward."""
    towers = make_towers(name, torch.device("meta"))  # only shapes
    with FlopCounterMode(display=False) as counter:
        output = towers(**make_batch(name, 2).to("meta").inputs)
        (output.image_embeds.sum() + output.text_embeds.sum()).backward()
    return counter.get_total_flops() // 2
