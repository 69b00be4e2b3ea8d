"""The loss as people read it, the step from which training and validation loss diverge, and the picture of both."""

from collections.abc import Mapping, Sequence
from math import isnan, log, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NOTABLE_RISE = 0.01  # of the least validation loss: less is no sign of anything
PER_CANDIDATE, CHANCE = "loss_per_candidate", "chance_loss"


def loss_figures(
    family: str, loss: float, pairs: int, remembered: int = 0, negative_texts: int = 0
) -> dict[str, float]:
    """A loss, and the figure by which it compares with losses of other batch and memory sizes, and with validation.

    family: siglip adds the loss per anchor and candidate, clip the loss of a model without knowledge, which is the
    logarithm of the number of candidates. pairs: N of the batch; remembered: Q that were used.
    """
    if family == "siglip":  # remembered pairs share the weight of the fresh ones
        return {"loss": loss, PER_CANDIDATE: loss / (pairs + negative_texts)}
    of_texts = pairs + remembered
    return {"loss": loss, CHANCE: (log(of_texts + negative_texts) + log(of_texts)) / 2}


def readable(line: Mapping) -> float:
    """The loss that is shown of a step or an evaluation; nan where there is none or it was not finite."""
    loss = line.get(PER_CANDIDATE, line.get("loss"))
    return nan if loss is None else float(loss)


def loss_words(line: Mapping) -> str:
    """The readable loss, as printed: `loss per candidate 0.0123` or `loss 4.1 (chance 4.85)`."""
    if PER_CANDIDATE in line:
        return f"loss per candidate {readable(line):.4g}"
    return f"loss {readable(line):.4g}" + (f" (chance {line[CHANCE]:.4g})" if CHANCE in line else "")


def find_parting(lines: Sequence[dict]) -> dict | None:
    """Where validation loss was least, if since then it rose by 1% or more while training loss fell; else None.

    lines: those of metrics.jsonl. Returns the step, both losses there and at the last evaluation, and their scale: per
    candidate, or relative to chance, so that a memory bank that came into use changes nothing. A step's training loss
    is noisy: the mean since the evaluation before is taken for it.
    """
    evaluations = [(line["step"], line["eval"]) for line in lines if not isnan(readable(line.get("eval", {})))]
    if len(evaluations) < 2:
        return None
    values = [_comparable(evaluation) for _, evaluation in evaluations]
    least, steps = min(range(len(values)), key=values.__getitem__), [step for step, _ in evaluations]
    training, last_training = (_training_loss(lines, steps, index) for index in (least, len(steps) - 1))
    notable = NOTABLE_RISE * abs(readable(evaluations[least][1]))
    if values[-1] - values[least] < notable or last_training >= training:
        return None
    return {
        "step": steps[least],
        "training_loss": training,
        "validation_loss": values[least],
        "last_training_loss": last_training,
        "last_validation_loss": values[-1],
        "scale": "per candidate" if PER_CANDIDATE in evaluations[0][1] else "relative to chance",
    }


def parting_words(parting: dict) -> str:
    """Message with the numbers of `find_parting` and remedies."""
    return (
        f"overfitting since step {parting['step']}: training loss fell from {parting['training_loss']:.4g} to "
        f"{parting['last_training_loss']:.4g} while validation loss rose from {parting['validation_loss']:.4g} to "
        f"{parting['last_validation_loss']:.4g} ({parting['scale']}). Add --patience to end such a run; --augment, "
        "dropout, --freeze and --weight-decay delay it"
    )


def _comparable(line: Mapping) -> float:
    """The readable loss of a step or an evaluation, InfoNCE's less that of chance; nan as in `readable`."""
    return readable(line) - float(line.get(CHANCE, 0))


def _training_loss(lines: Sequence[dict], evaluated: Sequence[int], index: int) -> float:
    """The mean of the steps up to evaluation `index` and after the one before."""
    after = evaluated[index - 1] if index else 0
    losses = [_comparable(line) for line in lines if after < line["step"] <= evaluated[index]]
    losses = [loss for loss in losses if not isnan(loss)]
    return sum(losses) / len(losses) if losses else nan


def draw_curve(lines: Sequence[dict], file: Path) -> None:
    """A panel each for training loss, validation loss, and validation figures in [0, 1], as far as there are any.

    Each loss is the readable one; InfoNCE's has a dashed line at the level of chance.
    """
    from matplotlib.figure import Figure  # here: a run that ends with an error need not wait two seconds for it

    steps = [line for line in lines if "loss" in line]
    evaluations = [(line["step"], flatten(line["eval"])) for line in lines if "eval" in line]
    of_losses = {"loss", PER_CANDIDATE, CHANCE}
    shares = sorted({name for _, e in evaluations for name, v in e.items() if name not in of_losses and 0 <= v <= 1})
    count = 1 + bool(evaluations) + bool(shares)
    figure = Figure(figsize=(6 * count + bool(shares), 4), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False, sharex=True)
    losses = axes[0, : 1 + bool(evaluations)]
    training = losses[0]
    remembered = next((line["step"] for line in steps if line.get("xbm_used")), None)
    _plot_loss(training, [(s["step"], s) for s in steps])
    training.set(title="Training loss (batch)" if remembered is None else "Training loss (batch and memory)")
    if remembered is not None and remembered > steps[0]["step"]:  # more candidates: the loss jumps, nothing broke
        training.axvline(remembered, color="grey", linestyle=":", label="memory used from here on")
    if evaluations:
        _plot_loss(losses[1], evaluations, marker="o", color="tab:orange")
        losses[1].set(title="Validation loss (its pairs as one batch)")
    if parting := find_parting(lines):
        for panel in losses:
            panel.axvline(
                parting["step"], color="tab:red", linestyle="--", label="lowest validation loss: overfitting starts"
            )
    for panel in losses:
        panel.set(xlabel="step", ylabel="loss per candidate" if PER_CANDIDATE in (steps or [{}])[0] else "loss")
        if panel.get_legend_handles_labels()[0]:
            panel.legend()
    if shares:
        for name in shares:
            axes[0, -1].plot([s for s, _ in evaluations], [e.get(name) for _, e in evaluations], "o-", label=name)
        axes[0, -1].set(xlabel="step", ylim=(0, 1.02), title="Validation")
        axes[0, -1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(file, dpi=110)


def _plot_loss(panel: "Axes", lines: Sequence[tuple[int, Mapping]], **style: Any) -> None:
    """The readable losses against their steps, and the level of chance where it is known."""
    at = [step for step, _ in lines]
    panel.plot(at, [readable(line) for _, line in lines], **style)
    if lines and CHANCE in lines[0][1]:
        panel.plot(
            at, [float(line.get(CHANCE, nan)) for _, line in lines], "--", color="grey", label="chance: log(candidates)"
        )


def flatten(metrics: dict, prefix: str = "") -> dict[str, float]:
    """Nested metrics as one level: {"text_to_image": {"R@1": x}} -> {"text_to_image.R@1": x}."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
