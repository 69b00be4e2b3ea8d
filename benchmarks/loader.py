"""Images a second in one process, from JPEG bytes in memory to the model's input: ours compared with open_clip_torch's.

pip install -r benchmarks/requirements.txt; python benchmarks/loader.py --images FOLDER [--repeats 9] decodes the
folder's photographs in their own size and enlarged to 1,600 pixels, and writes benchmarks/results/loader.json.
Four ways alternate in every repeat, with one thread each:

open_clip: Pillow's decoding and open_clip's training transform with its defaults, a random resized crop (90% of the
area or more) to 224, float32, normalized on the host.
light: ours for training, a flip and a random resized crop (70% or more), uint8 that the device normalizes.
light_host: the same, then float32 and normalized on the host, so that it has the same output as open_clip.
none: ours for evaluation, resize and middle crop, uint8.
"""

import io
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import open_clip
import PIL
import torch
import torchvision
import tyro
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lib.backends import usable_cores  # noqa: E402
from lib.data import ImagePipeline, decode_image  # noqa: E402
from lib.data.find_images import is_image_name  # noqa: E402
from lib.towers.image_form import CLIP_MEAN, CLIP_STD  # noqa: E402

SIZE = 224
Way = Callable[[bytes], torch.Tensor]


@dataclass(frozen=True)
class Settings:
    """Photographs to decode, and the number of repeats."""

    images: Path
    """Folder of photographs."""
    repeats: int = 9
    """Passes over the images, of which the median counts."""
    enlarged: int = 1600
    """Longer side, in pixels, of the large images, encoded again as JPEG of quality 90."""
    output: Path = ROOT / "benchmarks" / "results" / "loader.json"
    """JSON file of the results."""


def main(settings: Settings) -> None:
    torch.set_num_threads(1)
    paths = sorted(path for path in settings.images.iterdir() if is_image_name(path.name))
    if not paths:
        raise SystemExit(f"--images {settings.images} holds no images")
    original = [path.read_bytes() for path in paths]
    ways = {"open_clip": open_clip_training()} | our_ways()
    results = {}
    for name, files in (
        ("original", original),
        (f"enlarged_{settings.enlarged}", [enlarged(file, settings.enlarged) for file in original]),
    ):
        rates = measure(ways, files, settings.repeats)
        results[name] = {"images": len(files), "images_per_second": rates} | {
            "ratio": {way: round(rate / rates["open_clip"], 2) for way, rate in rates.items() if way != "open_clip"}
        }
        print(as_line(name, results[name]), flush=True)
    content = {"machine": machine(), "size": SIZE, "repeats": settings.repeats, "results": results}
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    settings.output.write_text(json.dumps(content, indent=1) + "\n")


def open_clip_training() -> Way:
    """open_clip's training transform with its default augmentation."""
    transform = open_clip.image_transform(SIZE, is_train=True, mean=CLIP_MEAN, std=CLIP_STD)
    return lambda file: transform(Image.open(io.BytesIO(file)))


def our_ways() -> dict[str, Way]:
    """Our transforms, with one seed per image."""
    light, none = ImagePipeline(SIZE, augment="light"), ImagePipeline(SIZE)
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (CLIP_MEAN, CLIP_STD))
    seeds = count()

    def pixels(pipeline: ImagePipeline, file: bytes) -> torch.Tensor:
        return pipeline(decode_image(file, pipeline.extent), next(seeds))

    return {
        "light": lambda file: pixels(light, file),
        "light_host": lambda file: pixels(light, file).float().sub_(mean).div_(std),
        "none": lambda file: pixels(none, file),
    }


def enlarged(file: bytes, side: int) -> bytes:
    """The photograph with its longer side of `side` pixels."""
    image = Image.open(io.BytesIO(file)).convert("RGB")
    scale = side / max(image.size)
    image = image.resize([round(length * scale) for length in image.size], Image.Resampling.BICUBIC)
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=90)
    return encoded.getvalue()


def measure(ways: dict[str, Way], files: list[bytes], repeats: int) -> dict[str, float]:
    """Median images a second of each way; they alternate, so that other load on the machine affects all equally."""
    seconds = {name: [] for name in ways}
    for way in ways.values():  # warm-up: the first image builds and loads objects
        way(files[0])
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            for file in files:
                way(file)
            seconds[name].append(time.perf_counter() - began)
    return {name: round(len(files) / statistics.median(times), 1) for name, times in seconds.items()}


def as_line(name: str, result: dict) -> str:
    """A line of results, ratios first."""
    ratios, rates = result["ratio"], result["images_per_second"]
    ours = "  ".join(f"{way} x{ratio:.2f} ({rates[way]:.0f}/s)" for way, ratio in ratios.items())
    return f"{name:14} {ours}  compared with open_clip {rates['open_clip']:.0f}/s, {result['images']} images"


def machine() -> str:
    """Cores and versions."""
    versions = {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
        "open_clip": open_clip.__version__,
    }
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"1 of {usable_cores()} cores, {platform.machine()}, {named}"


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
