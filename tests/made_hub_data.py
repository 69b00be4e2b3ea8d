"""Small data sets of the `datasets` library made for a test; tests that import this are skipped without the library."""

from pathlib import Path

import pytest
from made_shards import png

datasets = pytest.importorskip("datasets", reason="needs the optional package datasets")

IMAGE = datasets.Image()
TEXT = datasets.Value("string")
TEXTS = datasets.List(TEXT)
NUMBER = datasets.Value("int64")


def classes(*names: str):
    return datasets.ClassLabel(names=list(names))


def stored(*numbers: int | None) -> list[dict | None]:
    """A column of images; None for a row without."""
    return [None if number is None else {"bytes": png(number), "path": None} for number in numbers]


def rows(**columns: tuple):
    """A data set of columns, each a type and its values."""
    features = datasets.Features({name: kind for name, (kind, _) in columns.items()})
    return datasets.Dataset.from_dict({name: values for name, (_, values) in columns.items()}, features=features)


def write(data, path: Path) -> Path:
    """Write a parquet file; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data.to_parquet(str(path))
    return path


def captioned(count: int = 6, first: int = 0):
    """Good rows with two captions each."""
    numbers = range(first, first + count)
    return rows(image=(IMAGE, stored(*numbers)), captions=(TEXTS, [[f"a {n}", f"b {n}"] for n in numbers]))


def labelled(count: int = 6, *, of: int = 3, first: int = 0):
    """Good rows of so many classes."""
    names = ["cat", "dog", "sea_gull"][:of]
    numbers = range(first, first + count)
    return rows(image=(IMAGE, stored(*numbers)), label=(classes(*names), [number % of for number in numbers]))
