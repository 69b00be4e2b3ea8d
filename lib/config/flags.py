"""TrainConfig: every setting of a training run, of all groups, and the checks across groups."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

LARGEST_SEED = 2**32 - 1  # what NumPy, scikit-learn and PyTorch all take
MOST_WORKERS = 256  # on each rank: more are a slip of the finger, and so many processes bring a machine down
PrecisionFlag = Literal["auto", "bf16", "fp16", "fp32"]


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Settings:
    """A group of flags: a box of its own in --help, whose text is the docstring of the class."""

    def faults(self) -> list[str]:
        """What cannot work, a clause for each flag, with the remedy; each group adds its own."""
        return [
            f"{flag(field.name)} {self.shown(field.name)} must be {'finite numbers' if many else 'a finite number'}"
            for field in dataclasses.fields(self)
            for many in [isinstance(getattr(self, field.name), tuple)]
            if any(isinstance(number, float) and not math.isfinite(number) for number in self._values(field.name))
        ]

    def at_least_one(self, *names: str) -> list[str]:
        """Faults of fields that count something."""
        return [f"{flag(name)} {value} must be at least 1" for name, value in self._numbers(names) if value < 1]

    def not_negative(self, *names: str) -> list[str]:
        """Faults of fields that 0 switches off."""
        return [
            f"{flag(name)} {value} must not be negative (0 switches it off)"
            for name, value in self._numbers(names)
            if value < 0
        ]

    def above_zero(self, *names: str) -> list[str]:
        """Faults of fields that 0 makes meaningless."""
        return [f"{flag(name)} {value} must be greater than 0" for name, value in self._numbers(names) if not value > 0]

    def fractions(self, *names: str, whole: bool = True) -> list[str]:
        """Faults of parts and probabilities; `whole`: 1 is one of them."""
        faulty = [(name, value) for name, value in self._numbers(names) if not 0 <= value <= 1]
        found = [f"{flag(name)} {value} must be a fraction between 0 and 1" for name, value in faulty]
        ones = [name for name, value in self._numbers(names) if value == 1 and not whole]
        return found + [f"{flag(name)} {getattr(self, name)} must be below 1" for name in ones]

    def shown(self, name: str) -> str:
        """A field's value as it is typed."""
        return " ".join(map(str, self._values(name)))

    def given(self, name: str) -> bool:
        """Whether a field has another value than its default."""
        return getattr(self, name) != self.__dataclass_fields__[name].default

    def _values(self, name: str) -> tuple:
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,)

    def _numbers(self, names: tuple[str, ...]) -> Iterator[tuple[str, int | float]]:
        """Those of the fields that hold a finite number, and no word such as auto."""
        for name in names:
            value = getattr(self, name)
            if isinstance(value, int | float) and math.isfinite(value):
                yield name, value


@dataclass(frozen=True)
class Data(Settings):
    """Training data, and how it is read."""

    data: tuple[str, ...] = ("digits",)
    """Training pairs: `digits` (embedded), a folder with train/<class>/ images, images with metadata.csv or
    metadata.jsonl (imagefolder), a .csv/.tsv/.jsonl table of captions or classes, COCO, Flickr or Karpathy files,
    cifar10, cifar100, imagenette, WebDataset .tar shards (glob, braces, URL), parquet files or their folder, a folder
    of save_to_disk, or hub:OWNER/NAME[:SPLIT] of the Hugging Face Hub.
    Several are mixed, by weight where each has one: a::0.7 b::0.3."""
    val_data: str | None = None
    """Validation pairs, as --data; None: the val or test part of --data where it has one."""
    hold_out: float | None = None
    """Fraction of the images of --data without parts (class folders, captions) that is kept from training, to validate
    and evaluate on: evaluate.py takes the same flag. None: nothing is kept."""
    prompts: str | None = None
    """Prompt templates for class names: a shipped bank (digits, activities, objects, simple) or a YAML file.
    None: those of the data set, or simple."""
    class_names: Path | None = None
    """YAML file with names to use instead of the data's, as n01440764: a list in its order, or a mapping "data's name:
    name"; evaluate.py takes the same flag."""
    captions: Literal["all", "one", "lines"] = "all"
    """all: every caption is a pair; one: one pair per image with a caption drawn anew in each epoch; lines: every line
    of the .txt members of tar shards is a pair."""
    image_root: str | None = None
    """Folder of the images that a table or annotation file names; None: beside it."""
    image_column: str | None = None
    """Column of a table or of hub or parquet data that holds or names the image; None: found by its name and type."""
    caption_column: str | None = None
    """The same for the captions, or for the class; None: found by its name and type."""
    max_bad: float = 0.5
    """Stop when more than this fraction of the pairs cannot be read."""
    workers: int | Literal["auto"] = "auto"
    """Processes that decode images on each rank; auto: none for the digits, else up to 4 of the rank's cores."""
    shuffle_buffer: int = 1000
    """Undecoded samples that each stream of shards keeps, to give out in random order."""
    cache_dir: Path | None = None
    """Folder for remote shards and stored tower outputs; None: contrastive-training in ~/.cache."""
    shard_cache_gib: float = 50.0
    """GiB of remote shards kept in --cache-dir, the least recently used go first; 0: all are kept."""
    allow_pipe: bool = False
    """Run what follows `pipe:` in --data as a command that writes a tar."""
    cache_text: bool = False
    """Compute a frozen text trunk's outputs once and store them in --cache-dir."""
    cache_image: bool = False
    """The same for a frozen image trunk, while nothing is augmented."""
    data_info: bool = False
    """Print what the data holds, leave a picture of random pairs in --output-dir, and exit."""

    def faults(self) -> list[str]:
        """As in Settings."""
        found = super().faults() + self.fractions("max_bad") + self.at_least_one("shuffle_buffer")
        found += self.not_negative("workers", "shard_cache_gib")
        if self.workers != "auto" and self.workers > MOST_WORKERS:
            found.append(
                f"--workers {self.workers} must be at most {MOST_WORKERS}, on each rank; auto suits most machines"
            )
        return found


LARGEST_SIDE = 4096  # pixels; a slip of the finger above it asks for more memory than there is


@dataclass(frozen=True)
class Images(Settings):
    """What is done to images before the model sees them."""

    image_size: int | None = None
    """Side of the images in pixels, where the model leaves a choice; None: the model's own. A larger side that
    images are resized to before their middle is cut out grows or shrinks with it."""
    resize: Literal["auto", "crop", "pad", "squash"] = "auto"
    """How images become square; auto: as the model's own image processor does it, interpolation included, or an error;
    crop, pad, squash: to --image-size or the model's size at once, bicubic."""
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

    def faults(self) -> list[str]:
        """As in Settings; the image pipeline checks what it takes itself."""
        found = super().faults() + self.at_least_one("image_size")
        if self.image_size is not None and self.image_size > LARGEST_SIDE:
            found.append(f"--image-size {self.image_size} must be at most {LARGEST_SIDE} pixels")
        return found


_HEADS = ("projection", "text_projection", "projection_dim", "projection_hidden", "projection_dropout")


@dataclass(frozen=True)
class Model(Settings):
    """Which model is trained: one with two towers, or two encoders with heads between them."""

    model: str = "tiny"
    """A CLIP, SigLIP, SigLIP 2, ChineseCLIP or AltCLIP model: preset `tiny`, a local folder, or a hub id;
    in Hugging Face or open_clip format."""
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
        found += self.fractions("projection_dropout", "dropout", whole=False)
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


@dataclass(frozen=True)
class FineTuning(Settings):
    """What of the model trains; by default everything does."""

    freeze: tuple[str, ...] = ()
    """What does not train: image, text, image.trunk, image.head, text.trunk, text.head, scale, bias,
    image.last:N or text.last:N (a trunk's last N blocks), or re:PATTERN over the names of parameters."""
    unfreeze: tuple[str, ...] = ()
    """What of --freeze trains after all, named alike: --freeze image.trunk --unfreeze image.last:1."""
    lora: int = 0
    """Rank of low-rank adapters in every attention layer that --freeze leaves; 0: none.
    They train in the place of the trunks' own weights, and are merged into the exported model."""
    lora_alpha: float | None = None
    """Adapters' outputs are multiplied by this over the rank; None: twice the rank."""
    lora_dropout: float = 0.0
    """Dropout probability before the adapters."""

    def faults(self) -> list[str]:
        """As in Settings."""
        found = super().faults() + self.not_negative("lora") + self.above_zero("lora_alpha")
        found += self.fractions("lora_dropout", whole=False)
        if self.unfreeze and not self.freeze:
            found.append(f"--unfreeze {' '.join(self.unfreeze)} needs --freeze: without it, everything trains")
        if not self.lora and (self.lora_alpha is not None or self.lora_dropout):
            found.append("--lora-alpha and --lora-dropout shape adapters; give their rank with --lora")
        return found


@dataclass(frozen=True)
class Batch(Settings):
    """How large the batch of a step is, and how it fits into memory."""

    effective_batch: int = 4096
    """N: pairs in one optimizer step over all ranks, all with exact gradient."""
    chunk_size: int | Literal["auto"] = "auto"
    """C: pairs per tower forward on one rank; sets the activation memory. auto: measured."""
    keep_graphs: int | Literal["auto"] = 0
    """Chunks whose graph is kept instead of recomputed: faster, more memory. auto: as many as fit."""
    gradient_checkpointing: bool = False
    """Keep the inputs of each block only and run it again in the backward pass: larger chunks fit, slower steps."""
    shared_texts: Literal["auto", "off"] = "auto"
    """Encode each distinct text of a step once, as with class prompts.
    auto: where nothing in the text tower is drawn at random (dropout), so that it is exact."""
    xbm_size: int = 4096
    """Q: remembered pairs of past steps, extra negatives for every anchor; 0: none."""
    xbm_start: int | Literal["auto"] = "auto"
    """Step from which the memory is used; auto: after warm-up, once remembered embeddings have stopped drifting."""
    xbm_gradients: Literal["both", "anchors"] = "both"
    """InfoNCE only, while the memory is used. both: the loss's gradients, through anchors and candidates;
    anchors: through the anchors alone, twice: better where the memory is much larger than the batch."""

    def faults(self) -> list[str]:
        """As in Settings."""
        found = super().faults() + self.at_least_one("effective_batch", "chunk_size")
        found += self.not_negative("keep_graphs", "xbm_size", "xbm_start")
        if self.effective_batch == 1 and not self.xbm_size:
            found.append("--effective-batch 1 without memory has no negatives; use at least 2")
        if self.xbm_gradients == "anchors" and not self.xbm_size:
            found.append("--xbm-gradients anchors has no meaning without a memory; leave it out, or give --xbm-size")
        return found

    def undivided(self, world_size: int) -> list[str]:
        """The fault of a batch that the ranks cannot share alike."""
        if self.effective_batch < 1 or not self.effective_batch % world_size:
            return []
        nearest = max(1, round(self.effective_batch / world_size)) * world_size
        return [
            f"--effective-batch {self.effective_batch} is not divisible by {world_size} ranks; "
            f"the nearest that is: {nearest}"
        ]


@dataclass(frozen=True)
class Loss(Settings):
    """Positives, negatives and the logit scale."""

    positives: Literal["group", "pair"] = "group"
    """group: all pairs of a class or image are positives of each other; pair: only the diagonal, as in the papers."""
    remembered_positives: Literal["use", "ignore"] = "use"
    """Remembered pairs of the anchor's group: positives, or left out (with --positives group)."""
    same_text: Literal["auto", "exclude", "positive", "negative"] = "auto"
    """Pairs of equal text and different group: left out for each other, positives, or negatives.
    auto: exclude for captions; negative for class prompts, whose equal texts are of one class."""
    negative_prompts: Path | None = None
    """YAML list of texts that fit no image, such as hard prompts; {} stands for each class name.
    Every step encodes them all, as further negatives of every image."""
    label_smoothing: float = 0.0
    """InfoNCE only: fraction of the target mass that is spread over all candidates."""
    pos_weight: float | Literal["balanced"] = 1.0
    """Sigmoid loss only: weight of the positives' terms; balanced: as many times as there are negatives for each."""
    scale_max: float = 0.0
    """Largest logit scale; the parameter is clamped after each step. 0: no limit."""
    scale_schedule: tuple[float, float] | None = None
    """Logit scale (1 / temperature) of the first and the last step, in equal ratios between them, such as 10 100,
    or 20 20 for a constant. None: it is learned, up to --scale-max."""
    verify_gradients: bool = False
    """At start, compare the cached step with plain autograd on a small batch, and stop if they differ."""

    def faults(self) -> list[str]:
        """As in Settings."""
        found = super().faults() + self.fractions("label_smoothing", whole=False)
        found += self.above_zero("pos_weight") + self.not_negative("scale_max")
        if self.positives == "pair" and self.remembered_positives == "ignore":
            found.append("--remembered-positives ignore has no meaning with --positives pair; leave it out")
        if self.scale_schedule and min(self.scale_schedule) <= 0:
            found.append(f"--scale-schedule {self.shown('scale_schedule')} must be greater than 0")
        return found


@dataclass(frozen=True)
class Optimizer(Settings):
    """How long and how fast is learned."""

    epochs: float = 30.0
    """Passes over the data, unless --steps is given."""
    steps: int | None = None
    """Optimizer steps; None: as many as --epochs makes."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """AdamW, Adam (weight decay is a part of the gradient), or plain SGD."""
    lr: float = 1e-3
    """Peak learning rate. The default suits training from scratch; about 1e-5 fine-tunes a pretrained model."""
    image_lr: float | None = None
    """Peak learning rate of the image trunk; None: --lr."""
    text_lr: float | None = None
    """Peak learning rate of the text trunk; None: --lr."""
    head_lr: float | None = None
    """Peak learning rate of both heads; None: --lr."""
    layer_decay: float = 1.0
    """Factor on a trunk's learning rate from each block to the one below; 1: none.
    The last block has it once, the embeddings most often."""
    warmup_steps: int | Literal["auto"] = "auto"
    """Steps of linear warm-up; auto: a tenth of all steps."""
    schedule: Literal["cosine", "constant", "linear"] = "cosine"
    """Learning rate after warm-up."""
    weight_decay: float = 0.1
    """Decay of matrices; norms, biases, scale and bias have none."""
    beta2: float = 0.98
    """Second-moment decay of AdamW and Adam."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0: no clipping."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite (fp16 overflows aside) ends the run, or its update is left out."""
    nonfinite_limit: int = 10
    """Updates in a row that --on-nonfinite skip may leave out before it stops."""
    ema: float = 0.0
    """Keep a moving average of the weights with this decay per step, such as 0.999; 0: none."""
    seed: int = 0
    """Seed of weights, order, augmentation and dropout."""

    def faults(self) -> list[str]:
        """As in Settings."""
        found = super().faults() + self.at_least_one("steps", "nonfinite_limit")
        found += self.above_zero("epochs", "lr", "image_lr", "text_lr", "head_lr")
        found += self.not_negative("warmup_steps", "weight_decay", "grad_clip")
        found += self.fractions("beta2", "ema", whole=False)
        if not 0 < self.layer_decay <= 1:
            found.append(f"--layer-decay {self.layer_decay} must be a fraction greater than 0, up to 1")
        if not 0 <= self.seed <= LARGEST_SEED:
            found.append(f"--seed {self.seed} must be from 0 to {LARGEST_SEED}")
        return found


@dataclass(frozen=True)
class Evaluation(Settings):
    """When is evaluated, and what the figures decide."""

    eval_every: int = 50
    """Steps between evaluations on validation data (one also runs at the end); 0: none."""
    best_metric: str = "auto"
    """Metric that picks the best checkpoint: auto (accuracy, or text_to_image.R@1), loss, macro_f1, ..."""
    patience: int = 0
    """Stop early after this many evaluations in a row without a better --best-metric; 0: never."""
    eval_ema: bool = False
    """Evaluate, choose the best of, and export the averaged weights of --ema instead of those of the last step."""

    def faults(self) -> list[str]:
        """As in Settings."""
        found = super().faults() + self.not_negative("eval_every", "patience")
        if self.patience and not self.eval_every:
            found.append(f"--patience {self.patience} counts evaluations; --eval-every 0 switches them off")
        return found


@dataclass(frozen=True)
class Run(Settings):
    """What a run leaves, what it goes on from, and how it is computed."""

    output_dir: Path | None = None
    """Folder of the run; None: the next free runs/clip, runs/siglip, runs/siglip-2, ..."""
    resume: str = "none"
    """auto: go on from the newest whole checkpoint of --output-dir, if there is one; none; or a checkpoint folder."""
    save_every: int = 100
    """Steps between checkpoints (one is also written at the end); 0: none."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep, besides the best; 0: all."""
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """Experiment tracker, through Accelerate."""
    precision: PrecisionFlag = "auto"
    """Number format in which the towers compute; weights, losses and sums stay float32. auto: bf16 where the
    accelerator has it, fp16 on older CUDA cards, fp32 on a CPU; accelerate launch --mixed_precision overrides auto."""
    deterministic: bool = False
    """On CUDA, use reproducible kernels only, so that a resumed run is bit-identical there too; slower.
    On a CPU runs are bit-identical without it."""
    compile: bool = False
    """Compile the trunks with torch.compile: the first step takes a minute or more longer, the others less time."""
    compile_backend: Literal["inductor", "aot_eager"] = "inductor"
    """inductor generates code (on a CPU it needs a C++ compiler); aot_eager only traces, to find faults."""

    def faults(self) -> list[str]:
        """As in Settings."""
        found = super().faults() + self.not_negative("save_every", "keep_checkpoints")
        if self.resume == "auto" and self.output_dir is None:
            found.append("--resume auto needs the --output-dir whose run should go on")
        if self.given("compile_backend") and not self.compile:
            found.append(f"--compile-backend {self.compile_backend} has no meaning without --compile; add it")
        return found


@dataclass(frozen=True)
class TrainConfig(Run, Evaluation, Optimizer, Loss, Batch, FineTuning, Model, Images, Data):
    """Settings of a run. 0 switches a thing off where a number says how much or how often."""

    def problems(self, world_size: int) -> list[str]:
        """What is wrong with these settings on this many ranks, one clause for each flag, each with its remedy."""
        found = self.faults() + self.undivided(world_size) + self._contradictions()
        first = {problem.split()[0]: problem for problem in reversed(found)}  # more about the same flag is noise
        return [problem for problem in found if first[problem.split()[0]] is problem]

    def _contradictions(self) -> list[str]:
        found = []
        if self.cache_image and self.augment != "none":
            found.append(
                f"--cache-image and --augment {self.augment} exclude each other: it makes new images every time"
            )
        if self.eval_ema and not self.ema:
            found.append("--eval-ema needs --ema, such as --ema 0.999")
        return found
