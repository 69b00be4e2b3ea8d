"""Every flag of training: the twelve most used, and nine groups of the others; a docstring is the help of its flag."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

LARGEST_SEED = 2**32 - 1  # what NumPy, scikit-learn and PyTorch all take
MOST_WORKERS = 256  # on each rank: more are a slip of the finger, and so many processes bring a machine down
HeadKind = Literal["none", "linear", "mlp"]
PrecisionFlag = Literal["auto", "bf16", "fp16", "fp32"]


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Settings:
    """Settings and the checks of their numbers; each fault is a clause that names flag, value and remedy."""

    def faults(self) -> list[str]:
        """Faults of numbers that are infinite or NaN; a class of settings adds its own."""
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
        """True where a field has another value than its default."""
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
class MostUsed:
    """The twelve flags that most runs set. Without any, the smallest preset trains on the embedded digits."""

    data: tuple[str, ...] = ("digits",)
    """Training pairs: `digits` (embedded), a folder with train/<class>/ images, images with metadata.csv or
    metadata.jsonl (imagefolder), a .csv/.tsv/.jsonl table of captions or classes, COCO, Flickr or Karpathy files,
    cifar10, cifar100, imagenette, WebDataset .tar shards (glob, braces, URL), parquet files or their folder, a folder
    of save_to_disk, or hub:OWNER/NAME[:SPLIT] of the Hugging Face Hub.
    Several are mixed, by weight where each has one: a::0.7 b::0.3."""
    hold_out: float | None = None
    """Fraction of the images of --data without splits that is kept from training: one half validates and chooses the
    checkpoint, evaluate.py with the same flag reports on the other. None: nothing is kept."""
    model: str = "tiny"
    """A CLIP, SigLIP, SigLIP 2, ChineseCLIP or AltCLIP model: preset `tiny`, a local folder, or a hub id;
    in Hugging Face or open_clip format."""
    image_tower: str | None = None
    """A vision encoder of transformers or timm (folder or hub id), or torchvision:NAME or timm:NAME,
    with NAME:random for no pretrained weights, or CLIP#image, the half of a dual encoder with its projection.
    With --text-tower it replaces --model."""
    text_tower: str | None = None
    """A transformers text encoder (folder or hub id), or CLIP#text, that half with its projection."""
    freeze: tuple[str, ...] = ("auto",)
    """Parts that do not train: image, text, image.trunk, image.head, text.trunk, text.head, scale, bias, batchnorm,
    image.last:N or text.last:N (a trunk's last N blocks), or re:PATTERN over the names of parameters; none: all train.
    auto: as suits model, data and device; the start-up plan names the parts."""
    effective_batch: int | Literal["auto"] = "auto"
    """N: pairs in one optimizer step over all ranks, all with exact gradient. auto: as suits the number of pairs."""
    xbm_size: int | Literal["auto"] = "auto"
    """Q: remembered pairs of past steps, extra negatives for every anchor; 0: none. auto: as suits the batch."""
    epochs: float | Literal["auto"] = "auto"
    """Passes over the data, unless --steps is given. auto: as suits the number of pairs."""
    lr: float | Literal["auto"] = "auto"
    """Peak learning rate. auto: 1e-5 for pretrained image-text models, 1e-3 for heads and from scratch."""
    output_dir: Path | None = None
    """Folder of the run; None: the next free runs/clip, runs/siglip, runs/siglip-2, ..."""
    resume: str = "none"
    """auto: from the newest complete checkpoint of --output-dir, if there is one; none; or a checkpoint folder."""


@dataclass(frozen=True)
class Data:
    """Training data, and how it is read."""

    val_data: str | None = None
    """Validation pairs, as --data; None: the val split of --data, else its test split, which chooses no checkpoint."""
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
    """Processes that decode images on each rank; auto: none for the digits, else the rank's cores less one."""
    cache_dir: Path | None = None
    """Folder for remote shards and stored tower outputs; None: contrastive-training in ~/.cache."""
    shard_cache_gib: float = 50.0
    """GiB of remote shards kept in --cache-dir, the least recently used go first; 0: all are kept."""
    allow_pipe: bool = False
    """Run what follows `pipe:` in --data as a command that writes a tar."""
    store_outputs: Literal["auto", "off"] = "auto"
    """auto: compute the outputs of a frozen trunk once and store them in --cache-dir, where nothing augments its inputs
    and the run reads the data more than once."""
    data_info: bool = False
    """Print a summary of the data, write a picture of random pairs to --output-dir, and exit."""


@dataclass(frozen=True)
class Images:
    """Size, shape and augmentation of images."""

    image_size: int | None = None
    """Side of the images in pixels, where the model leaves a choice; None: the model's own. A larger side that
    images are resized to before their middle is cut out grows or shrinks with it."""
    resize: Literal["auto", "crop", "pad", "squash"] = "auto"
    """How images become square; auto: as the model's own image processor does it, interpolation included, or an error;
    crop, pad, squash: to --image-size or the model's size at once, bicubic."""
    augment: Literal["auto", "none", "crop", "light", "jitter", "strong"] = "auto"
    """Image augmentation; crop: a mild random crop, light: with a horizontal flip, jitter: colour, strong: light and
    jitter with rotation and RandAugment. Where left and right have a meaning, as in text, use crop. auto: none where
    the image trunk is frozen, because its outputs can then be stored; else light."""


@dataclass(frozen=True)
class Model:
    """Heads of a composed pair of encoders (--image-tower and --text-tower), and dropout."""

    projection: tuple[HeadKind, ...] = ("linear",)
    """Heads of a composed pair of towers, one kind for both or the image's and the text's; mlp: two layers with GELU,
    none: an encoder's output is the embedding."""
    projection_dim: int = 512
    """Embedding dimension of a composed pair."""
    projection_hidden: int = 1024
    """Hidden width of mlp heads."""
    dropout: float = 0.0
    """Dropout probability in the towers of a preset, in mlp heads, and before the adapters of --lora."""


@dataclass(frozen=True)
class FineTuning:
    """Parts of the model that train; by default everything does."""

    unfreeze: tuple[str, ...] = ()
    """Parts of --freeze that train after all, named in the same way: --freeze image.trunk --unfreeze image.last:1."""
    head_epochs: float | Literal["auto"] = "auto"
    """Passes over the data that train new heads alone, on stored outputs of the pretrained trunks, before the first
    step and at a rate of 1e-3 (or --head-lr if that is higher); then the trunks start from gradients that mean
    something (LP-FT). 0: none. auto: where both train."""
    lora: int = 0
    """Rank of low-rank adapters in every attention layer that --freeze leaves; 0: none.
    They train in the place of the trunks' own weights, and are merged into the exported model."""


@dataclass(frozen=True)
class Batch:
    """How the batch fits into memory, and when the memory bank is used."""

    chunk_size: int | Literal["auto"] = "auto"
    """C: pairs per tower forward on one rank; sets the activation memory. auto: measured."""
    keep_graphs: int | Literal["auto"] | None = None
    """Chunks whose graph is kept instead of recomputed: faster, more memory. auto: as many as fit; default: auto on
    a CPU, except for the digits, and 0 on an accelerator, where the memory is better used for larger chunks."""
    gradient_checkpointing: bool = False
    """Keep the inputs of each block only and run it again in the backward pass: larger chunks fit, slower steps."""
    xbm_start: int | Literal["auto"] = "auto"
    """Step from which the memory is used; auto: after warm-up, once remembered embeddings have stopped drifting."""


@dataclass(frozen=True)
class Loss:
    """Positives, negatives and the logit scale."""

    positives: Literal["auto", "group", "pair"] = "auto"
    """group: all pairs of a class or image are positives of each other; pair: only the diagonal, as in the papers.
    auto: group."""
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


@dataclass(frozen=True)
class Optimizer:
    """Length of training, learning rates, and the optimizer."""

    steps: int | None = None
    """Optimizer steps; None: from --epochs."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """AdamW, Adam (weight decay is a part of the gradient), or plain SGD."""
    trunk_lr: tuple[float, float] | None = None
    """Peak learning rates of the image trunk and of the text trunk; None: --lr."""
    head_lr: float | Literal["auto"] = "auto"
    """Peak learning rate of both heads. auto: --lr, and 1e-3 for new heads without --head-epochs."""
    layer_decay: float | Literal["auto"] = "auto"
    """Factor on a trunk's learning rate from each block to the one below; 1: none.
    The last block has it once, the embeddings most often. auto: less than 1 for pretrained image-text models."""
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
    """stop: a loss or gradient that is NaN or infinite ends the run; skip: its update is left out, up to 10 in a row.
    Overflows of fp16 do not count."""
    ema: float = 0.0
    """Decay per step of a moving average of the weights, such as 0.999, that is evaluated and exported; 0: none."""
    seed: int = 0
    """Seed of weights, order, augmentation and dropout."""


@dataclass(frozen=True)
class Evaluation:
    """When validation runs, and how its metrics choose the best checkpoint."""

    eval_every: int = 50
    """Steps between evaluations on validation data (one also runs at the end); 0: none."""
    best_metric: str = "auto"
    """Metric that picks the best checkpoint: auto (accuracy, or text_to_image.R@1), loss, macro_f1, ...; of equal ones
    the lower validation loss does."""
    patience: int = 0
    """Stop early after this many evaluations in a row without a better --best-metric; 0: never. It needs a val split,
    --val-data or --hold-out."""


@dataclass(frozen=True)
class Run:
    """Output folder, checkpoints, tracking, precision and compilation."""

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
