"""The forms that a model can be exported in."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lib.export import hugging_face, onnx, open_clip, sentence_transformers
from lib.export.sample import Sample
from lib.towers import TwoTowers
from lib.towers.processing import Processing


@dataclass(frozen=True)
class Format:
    """What is done to write a model in one form, and to load it again."""

    check: Callable[[TwoTowers], None]
    """Raise InputError where a package is missing, or the form is not for this model."""
    write: Callable[[TwoTowers, Processing, Path], None]
    """Write the files into an empty folder."""
    logits: Callable[[TwoTowers, Processing, Path, Sample], Tensor]
    """Load the folder as its users do: (n, n) logits. The towers tell only what the files cannot say."""
    usage: Callable[[TwoTowers, Processing, str, bool], str]
    """Python that loads the folder of that name; whether the name is one of the hub."""
    library: str
    """The hub's name of the library that loads it."""


HUGGING_FACE = Format(hugging_face.check, hugging_face.write, hugging_face.logits, hugging_face.usage, "transformers")
OPEN_CLIP = Format(open_clip.check, open_clip.write, open_clip.logits, open_clip.usage, "open_clip")
ONNX = Format(onnx.check, onnx.write, onnx.logits, onnx.usage, "onnx")
SENTENCE_TRANSFORMERS = Format(
    sentence_transformers.check,
    sentence_transformers.write,
    sentence_transformers.logits,
    sentence_transformers.usage,
    "sentence-transformers",
)
