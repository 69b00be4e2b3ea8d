"""Small images and tables for tests, and the texts of a source by image."""

import csv
from pathlib import Path

from PIL import Image


def make_images(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)


def make_table(path: Path, rows: list[list[str]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(rows)
    return str(path)


def texts_by_image(source) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for pair in range(source.size):
        first = source.first_text[pair]
        texts = source.texts[first : first + source.text_count[pair]]
        found.setdefault(source.images.keys[source.image[pair]], []).extend(texts)
    return found
