"""The loss curve: training and validation loss against the step, where they part, and the picture of both."""

from collections.abc import Sequence
from pathlib import Path

NOTABLE_RISE = 0.01  # of the least validation loss: less is no sign of anything


def find_parting(lines: Sequence[dict]) -> dict | None:
    """Where validation loss was least, if since then it rose by 1% or more while training loss fell; else None.

    lines: those of metrics.jsonl. Returns the step, and both losses there and at the last evaluation. A step's
    training loss is noisy: the mean since the evaluation before is taken for it.
    """
    evaluations = [
        (line["step"], line["eval"]["loss"]) for line in lines if line.get("eval", {}).get("loss") is not None
    ]
    if len(evaluations) < 2:
        return None
    least = min(range(len(evaluations)), key=lambda index: evaluations[index][1])
    step, validation = evaluations[least]
    training, last_training = (_training_loss(lines, evaluations, index) for index in (least, len(evaluations) - 1))
    last_validation = evaluations[-1][1]
    if last_validation - validation < NOTABLE_RISE * abs(validation) or last_training >= training:
        return None
    return {
        "step": step,
        "training_loss": training,
        "validation_loss": validation,
        "last_training_loss": last_training,
        "last_validation_loss": last_validation,
    }


def parting_words(parting: dict) -> str:
    """Message with the numbers of `find_parting` and remedies."""
    return (
        f"overfitting since step {parting['step']}: training loss fell from {parting['training_loss']:.4f} to "
        f"{parting['last_training_loss']:.4f}, validation loss rose from {parting['validation_loss']:.4f} to "
        f"{parting['last_validation_loss']:.4f}. Add --patience to end such a run; --augment, dropout, --freeze and "
        "--weight-decay delay it"
    )


def _training_loss(lines: Sequence[dict], evaluations: Sequence[tuple[int, float]], index: int) -> float:
    after = evaluations[index - 1][0] if index else 0
    losses = [
        line["loss"] for line in lines if line.get("loss") is not None and after < line["step"] <= evaluations[index][0]
    ]
    return sum(losses) / len(losses) if losses else float("nan")


def draw_curve(lines: Sequence[dict], file: Path) -> None:
    """A panel each for training loss, validation loss, and validation figures in [0, 1], as far as there are any.

    The losses have panels of their own: both grow with the number of candidates, which is not the same.
    """
    from matplotlib.figure import Figure  # here: a run that ends with an error need not wait two seconds for it

    steps = [line for line in lines if "loss" in line]
    evaluations = [(line["step"], flatten(line["eval"])) for line in lines if "eval" in line]
    shares = sorted({name for _, e in evaluations for name, value in e.items() if name != "loss" and 0 <= value <= 1})
    count = 1 + bool(evaluations) + bool(shares)
    figure = Figure(figsize=(6 * count + bool(shares), 4), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False, sharex=True)
    losses = axes[0, : 1 + bool(evaluations)]
    training = losses[0]
    remembered = next((line["step"] for line in steps if line.get("xbm_used")), None)
    training.plot([s["step"] for s in steps], [s["loss"] for s in steps])
    training.set(title="Training loss (batch)" if remembered is None else "Training loss (batch and memory)")
    if remembered is not None and remembered > steps[0]["step"]:  # more candidates: the loss jumps, nothing broke
        training.axvline(remembered, color="grey", linestyle=":", label="memory used from here on")
    if evaluations:
        losses[1].plot([s for s, _ in evaluations], [e.get("loss") for _, e in evaluations], "o-", color="tab:orange")
        losses[1].set(title="Validation loss (its pairs as one batch)")
    if parting := find_parting(lines):
        for panel in losses:
            panel.axvline(
                parting["step"], color="tab:red", linestyle="--", label="lowest validation loss: overfitting starts"
            )
    for panel in losses:
        panel.set(xlabel="step", ylabel="loss")
        if panel.get_legend_handles_labels()[0]:
            panel.legend()
    if shares:
        for name in shares:
            axes[0, -1].plot([s for s, _ in evaluations], [e.get(name) for _, e in evaluations], "o-", label=name)
        axes[0, -1].set(xlabel="step", ylim=(0, 1.02), title="Validation")
        axes[0, -1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(file, dpi=110)


def flatten(metrics: dict, prefix: str = "") -> dict[str, float]:
    """Nested metrics as one level: {"text_to_image": {"R@1": x}} -> {"text_to_image.R@1": x}."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
