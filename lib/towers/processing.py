"""Processing of a model's inputs: the same tokens and images for training, evaluation and export."""

import json
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import transformers
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.image_processing_utils import BaseImageProcessor

from lib.data.pipeline import Resize, ResizeFlag
from lib.towers.image_form import DEFAULT_FORMS, ImageForm, model_image_form, read_image_form
from lib.towers.model_files import ModelFolder, find_model, is_open_clip, reading
from lib.towers.open_clip_files import open_clip_settings
from lib.towers.text_form import is_canonical, load_tokenizer, text_length

ModelType = Literal["clip", "chinese_clip", "altclip", "siglip", "siglip2", "two_towers"]

# Only the beginning of a text is tokenized: 248 tokens are some 1200 characters, and a caption may be a whole book.
MAX_CHARACTERS = 8192
_COUNTED_AT_ONCE = 1000
# Letters, digits or marks in a row: the time to train a BPE grows with the square of that.
_MAX_RUN = 256
_LONG_RUN = re.compile(rf"[^\W\d_]{{{_MAX_RUN + 1},}}|\d{{{_MAX_RUN + 1},}}|(?:[^\w\s]|_){{{_MAX_RUN + 1},}}")

PROCESSORS = {
    "clip": transformers.CLIPProcessor,
    "chinese_clip": transformers.ChineseCLIPProcessor,
    "altclip": transformers.AltCLIPProcessor,
    "siglip": transformers.SiglipProcessor,
    "siglip2": transformers.Siglip2Processor,
}


@dataclass(frozen=True)
class Processing:
    """The tokenizer and image form of a model; picklable, so that DataLoader workers can tokenize.

    max_length, padding: texts are cut at max_length tokens, and padded to the longest of a chunk
        or to max_length.
    canonical: SigLIP's text form, lower-case without punctuation (Zhai et al. 2023, arXiv:2303.15343).
    image_mean, image_std: of pixels in [0, 1], one number a channel, in the order that `resize` puts them in.
    model_type: decides on the files that `save_pretrained` writes.
    patch_size: side of a patch, for a model that takes images in patches (SigLIP 2 of any resolution), else None.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    padding: Literal["longest", "max_length"]
    canonical: bool
    image_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    resize: Resize
    model_type: ModelType = "two_towers"
    patch_size: int | None = None

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Returns input_ids and attention_mask, both (C, L) int64.

        Only the first MAX_CHARACTERS of a text are read; the tokens are the same unless nearly all of these are white
        space or punctuation that the tokenizer drops.
        """
        tokens = self.tokenizer(
            self._shortened(texts),
            padding=self.padding,
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return tokens["input_ids"], tokens["attention_mask"]

    def count_cut(self, texts: Sequence[str]) -> int:
        """Count the texts with more tokens than max_length: their ends are not read."""
        # A token is a character of ASCII or more, and most captions are short.
        most = self.max_length - self.tokenizer.num_special_tokens_to_add() - 1
        long = [text for text in texts if len(text) > most or not text.isascii()]
        parts = (long[start : start + _COUNTED_AT_ONCE] for start in range(0, len(long), _COUNTED_AT_ONCE))
        return sum(map(self._count_cut, parts))

    def _count_cut(self, texts: list[str]) -> int:
        texts = self._shortened(texts)
        if not self.tokenizer.is_fast:
            return sum(len(ids) > self.max_length for ids in self.tokenizer(texts, verbose=False)["input_ids"])
        # The settings of `tokenize`: they stay in the tokenizer, and are saved with it.
        tokens = self.tokenizer(texts, padding=self.padding, truncation=True, max_length=self.max_length)
        return sum(bool(encoding.overflowing) for encoding in tokens.encodings or ())

    def _shortened(self, texts: Sequence[str]) -> list[str]:
        """The beginnings of the texts, in canonical form where the model wants that."""
        texts = [text[:MAX_CHARACTERS] for text in texts]
        return [canonical_form(text) for text in texts] if self.canonical else texts

    def text_identity(self) -> str:
        """Everything that the tokens of a text depend on; changes when any of it does."""
        if not self.tokenizer.is_fast:
            return repr((sorted(self.tokenizer.get_vocab().items()), self._text_form()))
        rules = json.loads(self.tokenizer.backend_tokenizer.to_str())
        # These two are set by every call.
        rules |= {"truncation": None, "padding": None}
        return json.dumps([rules, self._text_form()])

    def _text_form(self) -> tuple:
        return self.max_length, self.padding, self.canonical, self.tokenizer.pad_token_id

    @property
    def image_form(self) -> ImageForm:
        """Size, normalization and way of resizing of the images."""
        return ImageForm(self.image_size, self.image_mean, self.image_std, self.resize)

    def image_processor(self) -> BaseImageProcessor:
        """The image processor of transformers that makes the pixels of our own pipeline.

        SigLIP 2's own keeps an image's proportions; the results are the same for square ones only.
        """
        square, side = {"height": self.image_size, "width": self.image_size}, self.resize.side or self.image_size
        form = {
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "resample": Image.Resampling[self.resize.interpolation.upper()],
        }
        if self.patch_size:
            patches = (self.image_size // self.patch_size) ** 2
            return transformers.Siglip2ImageProcessor(patch_size=self.patch_size, max_num_patches=patches, **form)
        if self.resize.way == "squash" and side == self.image_size and self.resize.channels == "rgb":
            return transformers.SiglipImageProcessor(size=square, **form)
        # a centre crop that is larger than the picture pads it with black
        size = {
            "crop": {"shortest_edge": side},
            "squash": {"height": side, "width": side},
            "pad": {"max_height": side, "max_width": side},
        }[self.resize.way]
        kind = (
            transformers.MobileViTImageProcessor if self.resize.channels == "bgr" else transformers.CLIPImageProcessor
        )
        return kind(size=size, crop_size=square, **form)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer and image processor; a CLIP-like or SigLIP folder then loads with `AutoProcessor`."""
        if self.model_type == "two_towers":
            self.tokenizer.save_pretrained(folder)
            self.image_processor().save_pretrained(folder)
            return
        PROCESSORS[self.model_type](self.image_processor(), self.tokenizer).save_pretrained(folder)

    @classmethod
    def from_pretrained(
        cls, name: str | Path | ModelFolder, resize: ResizeFlag = "auto", *, measured: ImageForm | None = None
    ) -> "Processing":
        """Read what `save_pretrained` wrote, or the files of a CLIP or SigLIP model by folder or hub id.

        resize: as in `lib.towers.image_form.measured_form`. measured: the form of the folder's image processor, where
        loading the model has measured it (it does unless config.json has the form): that takes a second.
        """
        model = find_model("--model", name, weights=False)
        with reading(model.flag, model.name):
            settings = read_settings(model)
            model_type: ModelType = settings["model_type"]
            composed = model_type == "two_towers"
            config = AutoConfig.for_model(**(settings["text_config"] if composed else settings))
            text_config = config if composed else config.text_config
            # transformers knows no configuration for a composed pair's folder as a whole
            tokenizer = load_tokenizer(model, text_config, own_config=not composed)
            patch_size = config.vision_config.patch_size if model_type == "siglip2" else None
            form = model_image_form(settings)
            if measured and "image_form" not in settings:
                form = measured
            else:
                form = read_image_form(model.path, form, f"{model.flag} {model.name}", resize)
            return make_processing(tokenizer, text_config, form, model_type, patch_size)


def read_settings(model: ModelFolder) -> dict:
    """The settings in config.json, or those equal to open_clip's; InputError for a model type that is not read here."""
    if is_open_clip(model.path):
        return open_clip_settings(model)
    settings, _ = PretrainedConfig.get_config_dict(model.path)
    model_type = settings.get("model_type")
    if model_type is None:
        raise model.fault(
            "no config.json there that names a model type; a run's models are in its folders export and checkpoints/*"
        )
    if model_type not in DEFAULT_FORMS:
        raise model.fault(
            f"a model of type {model_type!r} is neither CLIP nor SigLIP, ChineseCLIP or AltCLIP, nor written by this "
            "program; put single encoders together with --image-tower and --text-tower"
        )
    return settings


def make_processing(
    tokenizer: PreTrainedTokenizerBase,
    text_config: PretrainedConfig,
    form: ImageForm,
    model_type: ModelType,
    patch_size: int | None = None,
) -> Processing:
    """Combine a tokenizer and an image form with the lengths and padding of the text encoder's configuration.

    SigLIP's text encoders pool the last position, so every text is padded to their full length.
    """
    is_siglip = text_config.model_type.startswith("siglip")
    max_length = text_length(tokenizer, text_config)
    tokenizer.model_max_length = max_length
    if not is_siglip:  # rows of several lengths are put together, and CLIP's texts run without a mask
        tokenizer.padding_side = "right"
    return Processing(
        tokenizer=tokenizer,
        max_length=max_length,
        padding="max_length" if is_siglip else "longest",
        canonical=is_siglip and is_canonical(tokenizer),
        image_size=form.size,
        image_mean=tuple(form.mean),
        image_std=tuple(form.std),
        resize=form.resize,
        model_type=model_type,
        patch_size=patch_size,
    )


def canonical_form(text: str) -> str:
    """Lower-case, without ASCII punctuation, white space collapsed: SigLIP's form of a text."""
    return re.sub(r"\s+", " ", text.lower().translate(str.maketrans("", "", string.punctuation))).strip()


def build_tokenizer(
    texts: list[str], vocab_size: int = 1000, max_length: int = 64, canonical: bool = False
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the given texts, without a network; it can encode any text.

    The same texts give the same tokenizer. It learns from the first MAX_CHARACTERS of each, without runs of more than
    256 letters, digits or marks, which are no words. canonical: it puts texts into SigLIP's form by itself.
    """
    tokenizer = Tokenizer(models.BPE())
    steps = [normalizers.NFC(), normalizers.Lowercase()]
    if canonical:
        punctuation = Regex("[" + re.escape(string.punctuation) + "]")
        steps.append(normalizers.Replace(punctuation, ""))
    steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    # The end token is not number 2: transformers takes that value as the mark of a faulty CLIP configuration.
    special_tokens = ["<pad>", "<eos>", "<bos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((_LONG_RUN.sub(" ", text[:MAX_CHARACTERS]) for text in texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        model_max_length=max_length,
        # As SigLIP's own: its text encoder attends to the padding.
        model_input_names=["input_ids"] if canonical else ["input_ids", "attention_mask"],
    )
