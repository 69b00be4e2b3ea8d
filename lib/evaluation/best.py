"""Which validation figure picks the best checkpoint."""

from dataclasses import dataclass

from lib.data import EvaluationSet
from lib.errors import InputError

_CLASSES = ("accuracy", "macro_f1")
_RETRIEVAL = tuple(
    f"{direction}.{figure}"
    for direction in ("text_to_image", "image_to_text")
    for figure in ("R@1", "R@5", "R@10", "MRR", "median_rank")
)


@dataclass(frozen=True)
class BestMetric:
    """A figure's dotted name, and whether less of it is better."""

    name: str
    less_is_better: bool

    @classmethod
    def resolve(cls, name: str, validation: EvaluationSet | None) -> "BestMetric":
        """`auto` is accuracy where there are classes, else text-to-image R@1; InputError if the data has no such."""
        if validation is None:
            if name not in ("auto", "loss"):
                raise InputError(f"--best-metric {name} needs validation data and --eval-every above 0")
            return cls("loss", True)
        known = ["loss"]
        known += _CLASSES if validation.classes is not None else ()
        known += _RETRIEVAL if validation.captions is not None else ()
        if name == "auto":
            name = "accuracy" if validation.classes is not None else "text_to_image.R@1"
        if name not in known:
            raise InputError(f"--best-metric {name} is not measured on this data; choose from {', '.join(known)}")
        return cls(name, name == "loss" or name.endswith("median_rank"))

    def value(self, metrics: dict) -> float:
        """The figure in nested metrics."""
        group, _, name = self.name.partition(".")
        return float(metrics[group][name] if name else metrics[group])

    def better(self, value: float, than: float | None) -> bool:
        """Whether a new value beats the best so far."""
        return than is None or (value < than if self.less_is_better else value > than)
