"""Which model is trained."""

from dataclasses import dataclass
from typing import Literal

from lib.config.settings import Settings, flag

_HEADS = ("projection", "text_projection", "projection_dim", "projection_hidden", "projection_dropout")


@dataclass(frozen=True)
class Model(Settings):
    """Which model is trained: one with two towers, or two encoders with heads between them."""

    model: str = "tiny"
    """A CLIP, SigLIP, SigLIP 2, ChineseCLIP or AltCLIP model: preset `tiny`, a local folder, or a hub id."""
    image_tower: str | None = None
    """A vision encoder of transformers or timm (folder or hub id), or torchvision:NAME or timm:NAME,
    with NAME:random for no pretrained weights, or CLIP#image, the half of a dual encoder with its projection.
    With --text-tower it replaces --model."""
    text_tower: str | None = None
    """A transformers text encoder (folder or hub id), or CLIP#text, that half with its projection."""
    projection: Literal["none", "linear", "mlp"] = "linear"
    """Heads of a composed pair of towers; mlp: two layers with GELU, none: an encoder's output is the embedding."""
    text_projection: Literal["same", "none", "linear", "mlp"] = "same"
    """The text tower's head, where it differs from --projection."""
    projection_dim: int = 512
    """Embedding dimension of a composed pair."""
    projection_hidden: int = 1024
    """Hidden width of mlp heads."""
    projection_dropout: float = 0.0
    """Dropout probability in mlp heads."""
    dropout: float = 0.0
    """Dropout probability in the towers of a preset."""

    def faults(self) -> list[str]:
        """As in Settings."""
        found = super().faults() + self.at_least_one("projection_dim", "projection_hidden")
        found += self.fractions("projection_dropout", "dropout")
        if self.image_tower and self.given("model"):
            found.append(f"--model {self.model} and --image-tower {self.image_tower} exclude each other; give one")
        shaped = [] if self.image_tower else [name for name in _HEADS if self.given(name)]
        found += [
            f"{flag(name)} {getattr(self, name)} shapes heads of --image-tower and --text-tower; give them"
            for name in shaped
        ]
        if (self.image_tower is None) != (self.text_tower is None):
            found.append("--image-tower and --text-tower go together; give both, or use --model")
        found += [
            f"{flag(name)} '' is empty; name one"
            for name in ("model", "image_tower", "text_tower")
            if getattr(self, name) == ""
        ]
        return found
