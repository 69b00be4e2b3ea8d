"""The model card: the README.md of an export, from the run's own files."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import ModelCardData

from lib.config.safe_yaml import read_yaml
from lib.data.fields import shown
from lib.errors import InputError
from lib.export.formats import Format
from lib.export.hugging_face import COMPOSED, HUGGING_FACE
from lib.export.open_clip import OPEN_CLIP
from lib.runs.reporter import CONFIG, flatten, read_metrics, read_summary
from lib.towers import PRESETS, TwoTowers
from lib.towers.load import SIZES
from lib.towers.processing import Processing

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(
    run: Path,
    step: int | None,
    towers: TwoTowers,
    processing: Processing,
    form: Format,
    name: str,
    on_hub: bool = False,
    mixture: str = "",
) -> str:
    """The card's text; parts without facts in the run's folder are left out.

    step: of the checkpoint; None for a model that is no checkpoint of the run, which the run's files do not describe.
    name: of the export: its folder's, or that of a repository of the hub.
    mixture: sentences about a blend or a soup, to which the run's evaluations do not apply.
    No folder of this machine is named: the card is made to be published.
    """
    config, summary = (_read(run / CONFIG), read_summary(run)) if step is not None else ({}, {})
    composed = processing.model_type == COMPOSED
    known_to_hub = form.library in (HUGGING_FACE.library, OPEN_CLIP.library) and not composed
    data = ModelCardData(
        library_name=None if composed and form is HUGGING_FACE else form.library,
        pipeline_tag="zero-shot-image-classification" if known_to_hub else None,
        tags=["image-text", "contrastive-learning", "siglip" if towers.use_bias else "clip"],
        base_model=[base for base in map(_hub_id, _base_models(config)) if base] or None,
    )
    usage = form.usage(towers, processing, name, on_hub)
    title = name if on_hub else run.resolve().name
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{_what(towers, processing, step)}",
        mixture,
        _training(config, summary),
        _evaluation(read_metrics(run), summary.get("best", {}), step) if step is not None and not mixture else "",
        f"## Use\n\n```python\n{usage}\n```\n\nLoaded again from these files, it gave the trained model's logits to "
        "within 1e-4; the number is in `export.json`, with the scale and the bias of the logits.",
        "## Licence\n\nNot chosen yet: name one here and as `license:` at the top of this file. The licences of the "
        "base models and of the data apply.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _what(towers: TwoTowers, processing: Processing, step: int | None) -> str:
    kind = "A composed pair of towers" if processing.model_type == COMPOSED else towers.description["architectures"][0]
    count = sum(parameter.numel() for parameter in towers.parameters())
    loss = "the pairwise sigmoid loss" if towers.use_bias else "symmetric InfoNCE"
    after = "" if step is None else f", after step {step:,}"
    return (
        f"{kind} with {count:,} parameters: images of {processing.image_size} x {processing.image_size} pixels and "
        f"texts of up to {processing.max_length} tokens, in {towers.embed_dim} common dimensions. Trained with "
        f"{loss}{after}."
    )


def _training(config: Mapping, summary: Mapping) -> str:
    if not config:
        return ""
    counts = summary.get("data", {})
    numbers = [
        f"{counts[key]:,} {word}" for key, word in (("images", "images"), ("read", "pairs read")) if key in counts
    ]
    rows = {
        "base model": " and ".join(_described(base) for base in _base_models(config)),
        "data": ", ".join([" ".join(_public(each) for each in config["data"]), *numbers]),
        "batch": f"{config['effective_batch']:,} pairs in a step, all with exact gradient",
        "contrasted with": f"{config['effective_batch'] - 1:,} other pairs of the step"
        + (f", and up to {config['xbm_size']:,} remembered ones" if config["xbm_size"] else ""),
        "positives": "pairs of the same class or image" if config["positives"] == "group" else "the pair alone",
        "optimizer": f"{config['optimizer']}, learning rate {config['lr']:g} ({config['schedule']}), "
        f"weight decay {config['weight_decay']:g}",
        "frozen": ", ".join(config["freeze"]) or "nothing",
    }
    # Runs of earlier versions lack these settings.
    if config.get("unfreeze"):
        rows["frozen"] += f", but not {', '.join(config['unfreeze'])}"
    if config.get("lora"):
        rows["adapters"] = f"of rank {config['lora']} on attention layers, merged"
    if config.get("ema"):
        rows["weights"] = f"moving average with decay {config['ema']:g}"
    if summary:
        rows["length"] = (
            f"{summary['steps']:,} steps, {summary['pairs']:,} pairs, {summary['wall_seconds'] / 60:.1f} min"
        )
    lines = (f"| {name} | " + value.replace("|", r"\|") + " |" for name, value in rows.items())
    return "## Training\n\n| | |\n|---|---|\n" + "\n".join(lines)


def _evaluation(lines: Sequence[Mapping], best: Mapping, step: int) -> str:
    """A table with a column for this checkpoint, the best and the last evaluation, where they differ."""
    evaluations = {line["step"]: flatten(line["eval"]) for line in lines if "eval" in line}
    if not evaluations:
        return ""
    last = max(evaluations)
    roles = {"this model": step, f"best {best.get('metric')}": best.get("step"), "last": last}
    columns: dict[int, list[str]] = {}
    for role, at in roles.items():
        if at in evaluations:
            columns.setdefault(at, []).append(role)

    def figure(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    titles = [f"step {at:,} ({', '.join(names)})" for at, names in columns.items()]
    rows = [f"| on held-out data | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for metric in evaluations[last]:
        rows.append(f"| {metric} | {' | '.join(figure(evaluations[at].get(metric)) for at in columns)} |")
    return "## Evaluation\n\n" + "\n".join(rows)


def _base_models(config: Mapping) -> Sequence[str]:
    if not config:
        return []
    return [config["image_tower"], config["text_tower"]] if config["image_tower"] else [config["model"]]


def _described(base: str) -> str:
    if base in (*PRESETS, *SIZES):
        return f"none: random weights (preset {base})"
    return _public(base)


def _hub_id(base: str) -> str | None:
    """The repository of a base model, if it is one of the hub."""
    name = base.split("#")[0]
    return name if _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _public(source: str) -> str:
    """The name of a model or a data set without folders of this machine, commands, and secrets of an address."""
    if "pipe:" in source:
        return "the output of a command"
    if "://" in source:
        address = urlsplit(source)
        return f"{address.scheme}://{address.hostname}{address.path}"
    is_path = source.startswith(("/", "~")) or ":/" in source or ":~" in source
    return shown(source.rstrip("/").rsplit("/", 1)[-1] if is_path else source)


def _read(file: Path) -> dict:
    """The run's settings; nothing where the file is missing or damaged."""
    with suppress(InputError):
        settings = read_yaml(file, str(file)) if file.is_file() else {}
        return settings if isinstance(settings, dict) else {}
    return {}
