"""Predict the chunk size and memory of a bf16 step of 32,768 pairs for several graphics cards, without such a card.

python benchmarks/predict.py prints the README's table and writes benchmarks/results/predicted.json. Activations are
those that autograd saves under bfloat16 autocast, computed with fake tensors that have shapes but no data. On a GPU
`--chunk-size auto` measures instead.
"""

from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import measured
import torch
import tyro
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPConfig, CLIPModel, PretrainedConfig, PreTrainedModel, SiglipConfig, SiglipModel

from lib.losses.tiles import ACCELERATOR_TILE
from lib.setup.chunk_memory import LARGEST_CHUNK, largest_chunk_below, measure_activations
from lib.setup.plan import INPUT_COPIES, MARGIN, BatchPlan, embedding_bytes
from lib.towers import TwoTowers
from lib.towers.dual import dual_parts
from lib.towers.image_form import DEFAULT_FORMS

CONTEXT = 0.6 * 2**30  # memory of CUDA itself


@dataclass(frozen=True)
class Settings:
    """The cards and the batch."""

    cards: tuple[int, ...] = (8, 12, 16, 24, 40, 80)
    """GiB of device memory."""
    batch: int = 32768
    """N and Q."""
    output: Path = measured.RESULTS / "predicted.json"
    """JSON file of the results."""


def clip(patch: int, vision: tuple[int, int, int], text: tuple[int, int, int], dimension: int) -> CLIPConfig:
    """CLIP config; vision, text: width, layers, heads."""
    return CLIPConfig(
        vision_config=sizes(*vision) | {"patch_size": patch, "image_size": 224},
        text_config=sizes(*text) | {"eos_token_id": 49407},
        projection_dim=dimension,
    )


def siglip(side: int, patch: int, tower: tuple[int, int, int], inner: int) -> SiglipConfig:
    """SigLIP config with two equal towers; inner: width of the feed-forward layers."""
    both = sizes(*tower) | {"intermediate_size": inner}
    return SiglipConfig(vision_config=both | {"patch_size": patch, "image_size": side}, text_config=both)


def sizes(width: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


MODELS: dict[str, tuple[type[PreTrainedModel], PretrainedConfig]] = {
    "CLIP ViT-B/32": (CLIPModel, clip(32, (768, 12, 12), (512, 12, 8), 512)),
    "CLIP ViT-B/16": (CLIPModel, clip(16, (768, 12, 12), (512, 12, 8), 512)),
    "CLIP ViT-L/14": (CLIPModel, clip(14, (1024, 24, 16), (768, 12, 12), 768)),
    "SigLIP base, 224 px": (SiglipModel, siglip(224, 16, (768, 12, 12), 3072)),
    "SigLIP so400m, 384 px": (SiglipModel, siglip(384, 14, (1152, 27, 16), 4304)),
}


def main(settings: Settings) -> None:
    rows = [predicted(name, settings) for name in MODELS]
    measured.write(settings.output, torch.device("cpu"), {"batch": settings.batch, "rows": rows})
    head = ["model", "a pair", *(f"{card} GB" for card in settings.cards), "images on the host"]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        cells = [f"{cell['chunk']:,} ({cell['device'] / 2**30:.0f})" if cell["chunk"] else "" for cell in row["cards"]]
        host = f"{row['host'] / 2**30:.1f} GiB"
        print("| " + " | ".join([row["model"], f"{row['activations'] / 2**20:.0f} MiB", *cells, host]) + " |")


def predicted(name: str, settings: Settings) -> dict:
    """Activations of a pair, and the largest chunk and device memory on each card."""
    kind, config = MODELS[name]
    family = "siglip" if kind is SiglipModel else "clip"
    with patch.object(PreTrainedModel, "init_weights"):  # their values do not matter
        towers = TwoTowers(dual_parts(kind(config), DEFAULT_FORMS[family], None)).train().to("meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        return _predicted(name, config, towers.to_empty(device="cpu"), settings)


def _predicted(name: str, config: PretrainedConfig, towers: TwoTowers, settings: Settings) -> dict:
    side, length = config.vision_config.image_size, config.text_config.max_position_embeddings
    pixels = torch.zeros(4, 3, side, side, dtype=torch.uint8)
    input_ids = torch.full((4, length), config.text_config.vocab_size - 1)
    inputs = {"pixel_values": pixels, "input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    with torch.autocast("cpu", torch.bfloat16):
        activations = measure_activations(towers, inputs)
    weights = sum(parameter.nbytes for parameter in towers.parameters())
    cards = [on_a_card(towers, card, activations, pixels[0].nbytes, weights, settings) for card in settings.cards]
    return {
        "model": name,
        "parameters": weights // 4,
        "activations": activations,
        "host": 2 * settings.batch * pixels[0].nbytes,  # this step and the next, which is read ahead
        "cards": [{"card": card} | found for card, found in zip(settings.cards, cards, strict=True)],
    }


def on_a_card(towers: TwoTowers, card: int, a_pair: int, image_bytes: int, weights: int, settings: Settings) -> dict:
    """The largest chunk that leaves the planner's margin, and the device memory of the step; 0 if none fits."""
    embeddings = embedding_bytes(settings.batch, settings.batch, towers.embed_dim, ACCELERATOR_TILE)
    cast = weights // 2  # the bf16 copies that autocast makes for every graph
    room = MARGIN * (card * 2**30 - CONTEXT - 4 * weights - embeddings) - cast
    pair_bytes = a_pair + INPUT_COPIES * image_bytes
    if room < pair_bytes:
        return {"chunk": 0, "device": 0}
    chunk = largest_chunk_below(room / pair_bytes, LARGEST_CHUNK)
    plan = BatchPlan(
        effective_batch=settings.batch,
        world_size=1,
        chunk_size=chunk,
        keep_graphs=0,
        xbm_size=settings.batch,
        embed_dim=towers.embed_dim,
        image_bytes=image_bytes,
        graph_bytes=chunk * a_pair + cast,
        chunk_bytes=chunk * pair_bytes + cast,
        state_bytes=4 * weights,
        tile=ACCELERATOR_TILE,
    )
    return {"chunk": chunk, "device": plan.device_bytes}


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
