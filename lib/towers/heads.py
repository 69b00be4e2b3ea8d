"""Projection heads of composed pairs: from a trunk's pooled output into the common space."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from lib.errors import InputError

HeadKind = Literal["none", "linear", "mlp"]


@dataclass(frozen=True)
class Head:
    """The form of a tower's projection into D dimensions.

    kind: "linear", "mlp" with one hidden layer of GELU units, or "none": the pooled output is the embedding.
    hidden: units of that layer; None for four times the trunk's width.
    dropout: behind the hidden layer.
    bias: of a linear head; CLIP's own have none.
    """

    kind: HeadKind
    dim: int
    hidden: int | None = None
    dropout: float = 0.0
    bias: bool = True

    def build(self, width: int) -> nn.Module:
        """A head for a trunk whose pooled output is this wide; InputError for "none" if that is not D."""
        if self.kind == "none":
            if width != self.dim:
                raise InputError(
                    f"--projection-dim {self.dim}: a tower without a head gives {width} numbers; use "
                    f"--projection-dim {width}, or a linear head"
                )
            return nn.Identity()
        if self.kind == "mlp":
            hidden = self.hidden or 4 * width
            return nn.Sequential(
                nn.Linear(width, hidden), nn.GELU(), nn.Dropout(self.dropout), nn.Linear(hidden, self.dim)
            )
        linear = nn.Linear(width, self.dim, bias=self.bias)
        # Orthogonal, so that a frozen encoder below a frozen head keeps the angles that it was trained for.
        nn.init.orthogonal_(linear.weight)
        if self.bias:
            nn.init.zeros_(linear.bias)
        return linear

    def of(self, projection: nn.Module, name: str) -> "Head":
        """The form of a pretrained projection; InputError where it does not lead into these D dimensions.

        name: of the half of a dual encoder that it belongs to.
        """
        if not isinstance(projection, nn.Linear):
            return Head("none", self.dim)
        if projection.out_features != self.dim:
            raise InputError(
                f"--projection-dim {self.dim}: {name} projects into {projection.out_features} dimensions; use "
                f"--projection-dim {projection.out_features}"
            )
        return Head("linear", self.dim, bias=projection.bias is not None)
