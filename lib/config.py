"""TrainConfig: every setting of a training run, where it comes from (defaults, YAML, command line), and its checks."""

import dataclasses
import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
import yaml

from lib.errors import InputError


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. 0 switches a thing off where a number says how much or how often."""

    # Data
    data: tuple[str, ...] = ("digits",)
    """Training pairs: `digits` (embedded), a folder with train/<class>/ images, a .csv/.tsv/.jsonl table of captions,
    COCO, Flickr or Karpathy files, cifar10, cifar100, imagenette, or WebDataset .tar shards (glob, braces, URL).
    Several are mixed, by weight where each has one: a::0.7 b::0.3."""
    val_data: str | None = None
    """Validation pairs, as --data; without it, the val or test part of --data where it has one."""
    hold_out: float | None = None
    """Fraction of the images of --data without parts (class folders, captions) that is kept from training, to validate
    and evaluate on: evaluate.py takes the same flag."""
    prompts: str | None = None
    """Prompt templates for class names: a shipped bank (digits, activities, objects, simple) or a YAML file."""
    negative_prompts: Path | None = None
    """YAML list of texts that fit no image, such as hard prompts; {} stands for each class name. Every step encodes
    them all, as further negatives of every image."""
    captions: Literal["all", "one"] = "all"
    """Every caption is a pair, or one pair per image with a caption drawn anew in each epoch."""
    workers: int | Literal["auto"] = "auto"
    """Processes that decode images on each rank; auto: none for the digits, else up to 4 of the rank's cores."""
    max_bad: float = 0.5
    """Stop when more than this fraction of the pairs cannot be read."""
    image_root: str | None = None
    """Folder of the images that a table or annotation file names, where they do not lie beside it."""
    shuffle_buffer: int = 1000
    """Undecoded samples that each stream of shards keeps, to give out in random order."""
    cache_dir: Path | None = None
    """Folder for remote shards and stored tower outputs; default: contrastive-training in ~/.cache."""
    shard_cache_gib: float = 50.0
    """Remote shards kept in --cache-dir, the least recently used go first; 0: all are kept."""
    allow_pipe: bool = False
    """Run what follows `pipe:` in --data as a command that writes a tar."""
    cache_text: bool = False
    """Compute a frozen text trunk's outputs once and store them in --cache-dir."""
    cache_image: bool = False
    """The same for a frozen image trunk, while nothing is augmented."""
    data_info: bool = False
    """Print what the data holds, leave a picture of random pairs in --output-dir, and exit."""
    augment: Literal["none", "light", "jitter", "strong"] = "none"
    """Image augmentation; light: flip and mild crop, jitter: colour, strong: both with rotation and RandAugment."""
    crop_scale: tuple[float, float] = (0.7, 1.0)
    """Part of the area that a random crop keeps, least and most (light, strong)."""
    flip: float = 0.5
    """Probability of a horizontal flip (light, strong)."""
    color_jitter: tuple[float, float, float, float] = (0.2, 0.2, 0.2, 0.1)
    """Largest change of brightness, contrast, saturation and hue (jitter, strong)."""
    rotation: float = 10.0
    """Largest rotation in degrees (strong)."""
    randaugment: tuple[int, int] = (2, 9)
    """Operations of RandAugment and their magnitude, 0 to 30 (strong)."""
    resize: Literal["auto", "crop", "pad", "squash"] = "auto"
    """How images become square; auto: as the model's own image processor does."""
    image_size: int | None = None
    """Side of the images in pixels, where the model leaves a choice."""

    # Model
    model: str = "tiny"
    """A CLIP, SigLIP, SigLIP 2, ChineseCLIP or AltCLIP model: preset `tiny`, a local folder, or a hub id."""
    image_tower: str | None = None
    """A transformers vision encoder (folder or hub id), or torchvision:NAME or timm:NAME (NAME:random: no pretrained
    weights), or CLIP#image, the half of a dual encoder with its projection. With --text-tower it replaces --model."""
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
    """Dropout in mlp heads."""
    dropout: float = 0.0
    """Dropout in the towers of a preset."""
    freeze: tuple[str, ...] = ()
    """What does not train: image, text, image.trunk, image.head, text.trunk, text.head, scale, bias; image.last:N or
    text.last:N, a trunk's last N blocks; or re:PATTERN over the names of parameters."""
    unfreeze: tuple[str, ...] = ()
    """What of --freeze trains after all, named alike: --freeze image.trunk --unfreeze image.last:1."""
    lora: int = 0
    """Rank of low-rank adapters, which train in the place of the trunks' own weights in every attention layer that
    --freeze leaves; merged into the exported model. 0: none."""
    lora_alpha: float | None = None
    """Adapters' outputs are multiplied by this over the rank; default: twice the rank."""
    lora_dropout: float = 0.0
    """Dropout before the adapters."""
    scale_max: float = 0.0
    """Largest logit scale; the parameter is clamped after each step. 0: no limit."""
    scale_schedule: tuple[float, float] | None = None
    """The logit scale (1 / temperature) of the first and the last step, in equal ratios between them, in the place of
    a learned one, whatever --scale-max: 10 100, or 20 20 for a constant."""

    # Batch
    effective_batch: int = 4096
    """N: pairs in one optimizer step over all ranks, all with exact gradient."""
    chunk_size: int | Literal["auto"] = "auto"
    """C: pairs per tower forward on one rank; sets the activation memory. auto: measured."""
    keep_graphs: int | Literal["auto"] = 0
    """Chunks whose graph is kept instead of recomputed: faster, more memory. auto: as many as fit."""
    shared_texts: Literal["auto", "off"] = "auto"
    """Encode each distinct text of a step once, as with class prompts; auto: where nothing in the text tower is drawn
    at random (dropout), so that it is exact."""
    xbm_size: int = 4096
    """Q: remembered pairs of past steps, extra negatives for every anchor."""
    xbm_start: int | Literal["auto"] = "auto"
    """Step from which the memory is used; auto: after warm-up, once remembered embeddings have stopped drifting."""
    positives: Literal["group", "pair"] = "group"
    """group: all pairs of a class or image are positives of each other; pair: only the diagonal, as in the papers."""
    remembered_positives: Literal["use", "ignore"] = "use"
    """Remembered pairs of the anchor's group: positives, or left out (with --positives group)."""
    label_smoothing: float = 0.0
    """InfoNCE only: target mass spread over all candidates."""
    pos_weight: float | Literal["balanced"] = 1.0
    """Sigmoid loss only: weight of the positives' terms; balanced: as many times as there are negatives for each."""
    verify_gradients: bool = False
    """At start, compare the cached step with plain autograd on a small batch, and stop if they differ."""

    # Optimizer
    epochs: float = 30.0
    """Passes over the data, unless --steps is given."""
    steps: int | None = None
    """Optimizer steps; overrides --epochs."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """AdamW, Adam (weight decay is a part of the gradient), or plain SGD."""
    lr: float = 1e-3
    """Peak learning rate. The default suits training from scratch; about 1e-5 fine-tunes a pretrained model."""
    image_lr: float | None = None
    """Peak learning rate of the image trunk; default: --lr."""
    text_lr: float | None = None
    """Peak learning rate of the text trunk; default: --lr."""
    head_lr: float | None = None
    """Peak learning rate of both heads; default: --lr."""
    layer_decay: float = 1.0
    """Factor on a trunk's learning rate from each block to the one below; the last block has it once, the embeddings
    most often. 1: none."""
    weight_decay: float = 0.1
    """Decay of matrices; norms, biases, scale and bias have none."""
    beta2: float = 0.98
    """Second-moment decay of AdamW and Adam."""
    warmup_steps: int | Literal["auto"] = "auto"
    """Steps of linear warm-up; auto: a tenth of all steps."""
    schedule: Literal["cosine", "constant", "linear"] = "cosine"
    """Learning rate after warm-up."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0: no clipping."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite (fp16 overflows aside) ends the run, or its update is left out."""
    nonfinite_limit: int = 10
    """Updates in a row that --on-nonfinite skip may leave out before it stops."""
    ema: float = 0.0
    """Keep a moving average of the weights with this decay, such as 0.999. 0: none."""
    eval_ema: bool = False
    """Evaluate, choose the best of, and export the averaged weights instead of those of the last step."""
    seed: int = 0
    """Seed of weights, order, augmentation and dropout."""

    # Run
    output_dir: Path | None = None
    """Folder of the run; default: the next free runs/clip, runs/siglip, runs/siglip-2, ..."""
    resume: str = "none"
    """auto: go on from the newest whole checkpoint of --output-dir, if there is one; none; or a checkpoint folder."""
    gradient_checkpointing: bool = False
    """Keep the inputs of each block only and run it again in the backward pass: larger chunks fit, slower steps."""
    compile: bool = False
    """Compile the trunks with torch.compile: the first steps take longer, the others less."""
    compile_backend: Literal["inductor", "aot_eager"] = "inductor"
    """inductor generates code (on a CPU it needs a C++ compiler); aot_eager only traces, to find faults."""
    save_every: int = 100
    """Steps between checkpoints (one is also written at the end)."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep, besides the best; 0: all."""
    eval_every: int = 50
    """Steps between evaluations on validation data (one also runs at the end)."""
    best_metric: str = "auto"
    """Metric that picks the best checkpoint: auto (accuracy, or text_to_image.R@1), loss, macro_f1, ..."""
    patience: int = 0
    """Stop early after this many evaluations in a row without a better --best-metric. 0: never."""
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """Experiment tracker, through Accelerate."""

    def problems(self, world_size: int) -> list[str]:
        """What is wrong with these settings on this many ranks, each with its remedy; empty if nothing is."""
        found = []
        for name in _AT_LEAST_ONE:
            if getattr(self, name) is not None and getattr(self, name) != "auto" and getattr(self, name) < 1:
                found.append(f"{flag(name)} {getattr(self, name)} must be at least 1")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) != "auto" and getattr(self, name) < 0:
                found.append(f"{flag(name)} {getattr(self, name)} must not be negative (0 switches it off)")
        for name in _FRACTIONS:
            if not 0 <= getattr(self, name) <= 1:
                found.append(f"{flag(name)} {getattr(self, name)} must be a fraction between 0 and 1")
        for name in _POSITIVE:
            if getattr(self, name) not in (None, "balanced") and not getattr(self, name) > 0:
                found.append(f"{flag(name)} {getattr(self, name)} must be greater than 0")
        if self.effective_batch >= 1 and self.effective_batch % world_size:
            nearest = max(1, round(self.effective_batch / world_size)) * world_size
            found.append(
                f"--effective-batch {self.effective_batch} is not divisible by {world_size} ranks; "
                f"the nearest that is: {nearest}"
            )
        if self.effective_batch == 1 and not self.xbm_size:
            found.append("--effective-batch 1 without memory has no negatives; use at least 2")
        if self.beta2 == 1 or self.epochs == float("inf"):
            found.append(f"--beta2 {self.beta2} must be below 1, and --epochs {self.epochs} finite")
        if self.image_tower and self.model != _default("model"):
            found.append(f"--model {self.model} and --image-tower {self.image_tower} exclude each other; give one")
        for name in ("projection", "text_projection", "projection_dim", "projection_hidden", "projection_dropout"):
            if not self.image_tower and getattr(self, name) != _default(name):
                found.append(
                    f"{flag(name)} {getattr(self, name)} shapes heads of --image-tower and --text-tower; give them"
                )
        if (self.image_tower is None) != (self.text_tower is None):
            found.append("--image-tower and --text-tower go together; give both, or use --model")
        if self.positives == "pair" and self.remembered_positives == "ignore":
            found.append("--remembered-positives ignore has no meaning with --positives pair; leave it out")
        if self.cache_image and self.augment != "none":
            found.append(
                f"--cache-image and --augment {self.augment} exclude each other: it makes new images every time"
            )
        found += self._problems_of_what_trains()
        if self.patience and not self.eval_every:
            found.append(f"--patience {self.patience} counts evaluations; --eval-every 0 switches them off")
        if self.resume == "auto" and self.output_dir is None:
            found.append("--resume auto needs the --output-dir whose run should go on")
        return found

    def _problems_of_what_trains(self) -> list[str]:
        found = []
        if self.unfreeze and not self.freeze:
            found.append(f"--unfreeze {' '.join(self.unfreeze)} needs --freeze: without it, everything trains")
        if not self.lora and (self.lora_alpha is not None or self.lora_dropout):
            found.append("--lora-alpha and --lora-dropout shape adapters; give their rank with --lora")
        if self.scale_schedule and min(self.scale_schedule) <= 0:
            found.append(f"--scale-schedule {self.scale_schedule[0]} {self.scale_schedule[1]} must be greater than 0")
        if self.eval_ema and not self.ema:
            found.append("--eval-ema needs --ema, such as --ema 0.999")
        if self.ema == 1 or self.lora_dropout == 1:
            found.append(f"--ema {self.ema} and --lora-dropout {self.lora_dropout} must be below 1")
        if self.compile_backend != _default("compile_backend") and not self.compile:
            found.append(f"--compile-backend {self.compile_backend} has no meaning without --compile; add it")
        return found


_AT_LEAST_ONE = (
    "effective_batch",
    "chunk_size",
    "steps",
    "projection_dim",
    "projection_hidden",
    "image_size",
    "shuffle_buffer",
    "nonfinite_limit",
)
_NOT_NEGATIVE = (
    "keep_graphs", "xbm_size", "xbm_start", "weight_decay", "warmup_steps", "grad_clip", "seed",
    "save_every", "keep_checkpoints", "eval_every", "workers", "scale_max", "shard_cache_gib", "lora", "patience",
)  # fmt: skip
_FRACTIONS = (
    "max_bad", "label_smoothing", "projection_dropout", "dropout", "beta2", "lora_dropout", "layer_decay", "ema",
)  # fmt: skip
_POSITIVE = ("epochs", "lr", "pos_weight", "image_lr", "text_lr", "head_lr", "layer_decay", "lora_alpha")


def _default(name: str) -> object:
    return TrainConfig.__dataclass_fields__[name].default


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def parse_config(
    defaults: TrainConfig,
    description: str,
    arguments: Sequence[str] | None = None,
    of_another_script: Mapping[str, str] | None = None,
) -> TrainConfig:
    """The settings of this run: `defaults`, then the YAML file of --config, then the command line.

    `of_another_script` names fields that this script's loss does not have, with the script that has them.
    Raises InputError with all problems at once; tyro itself exits with code 2 on an unknown or malformed flag.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    arguments, yaml_file = _take_config_file(arguments)
    from_yaml = _flags_of_yaml(yaml_file) if yaml_file else []
    config = tyro.cli(
        TrainConfig,
        default=defaults,
        args=[*from_yaml, *arguments],
        description=f"{description}\n\n--config FILE reads settings from a YAML file; the command line wins.",
        console_outputs=os.environ.get("RANK", "0") == "0",  # one message, not one per rank
    )
    problems = config.problems(int(os.environ.get("WORLD_SIZE", "1")))
    for name, script in (of_another_script or {}).items():
        if getattr(config, name) != getattr(defaults, name):
            problems.append(f"{flag(name)} {getattr(config, name)} has no meaning here; it belongs to {script}")
    if problems:
        raise InputError("; ".join(problems))
    return config


def save_config(config: TrainConfig, file: Path) -> None:
    """Write every setting, so that `--config FILE` repeats the run."""
    values = {
        name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
    }
    file.write_text(yaml.safe_dump(values, sort_keys=False))


def _take_config_file(arguments: list[str]) -> tuple[list[str], str | None]:
    """Split `--config FILE` (or `--config=FILE`) off the other arguments."""
    rest, file = [], None
    queue = iter(arguments)
    for argument in queue:
        if argument == "--config":
            file = next(queue, None)
            if file is None:
                raise InputError("--config needs a YAML file")
        elif argument.startswith("--config="):
            file = argument.removeprefix("--config=")
        else:
            rest.append(argument)
    return rest, file


def _flags_of_yaml(file: str) -> list[str]:
    """A YAML file's settings as command-line flags, so that both are read and checked in one way."""
    try:
        settings = yaml.safe_load(Path(file).read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"--config {file} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise InputError(f"--config {file} must hold `name: value` lines, not a {type(settings).__name__}")
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    flags: list[str] = []
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise InputError(f"--config {file}: unknown setting {key!r}{hint}")
        if isinstance(value, bool):
            flags.append(flag(name) if value else "--no-" + flag(name)[2:])
        else:
            flags += [flag(name), *(map(str, value) if isinstance(value, list) else [str(value)])]
    return flags
