"""Class folders of coloured squares and an untrained model, for tests that learn from embeddings."""

from pathlib import Path

import numpy as np
from PIL import Image

from lib.towers import build_preset

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "dark grey": (70, 70, 70)}


def save_model(folder: Path) -> Path:
    """A run folder with small untrained towers in its export."""
    texts = [f"a photo of a {colour} square" for colour in COLOURS]
    towers, processing = build_preset("tiny-siglip", texts, use_bias=True)
    towers.save_pretrained(folder / "export")
    processing.save_pretrained(folder / "export")
    return folder


def make_squares(folder: Path, counts: dict[str, dict[str, int]], noise: int = 60) -> Path:
    """Noisy squares: counts[split][class] of them under folder/split/class; split "" for folders without splits."""
    rng = np.random.default_rng(0)
    for split, classes in counts.items():
        for name, count in classes.items():
            parent = folder / split / name.replace(" ", "_")
            parent.mkdir(parents=True)
            for number in range(count):
                pixels = rng.normal(COLOURS[name], noise, (16, 16, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(parent / f"{number:02d}.png")
    return folder
