"""Tokenizers of model folders, in the form of texts that the model was trained with, checked against its encoder."""

import gzip
import re
from pathlib import Path

from tokenizers import Regex, Tokenizer, normalizers
from transformers import (
    AutoTokenizer,
    CLIPTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lib.errors import raised_as
from lib.towers.model_files import NO_CODE, OPEN_CLIP_CONFIG, ModelFolder, find_model, is_open_clip
from lib.towers.open_clip_files import open_clip_content

# Captions and prompts are short: an encoder of documents that could read 512 tokens or more is not given that many.
MAX_TEXT_LENGTH = 128
# Text encoders of image-text models, which were trained with as many tokens as they have positions.
OWN_LENGTH = ("clip_text_model", "siglip_text_model", "siglip2_text_model")
# Their position embeddings begin after the padding token's number.
OFFSET_POSITIONS = ("altclip_text_model", "camembert", "mpnet", "roberta", "xlm-roberta")
# T5 and its kin list a hundred of these, which mT5's vocabulary has and SigLIP's embedding of it has not.
_SENTINEL = re.compile(r"▁?<extra_id_\d+>")
_SPACES = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
_PUNCTUATION = normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), "")
# What open_clip does to texts before the tokenizer, where that is more than to collapse white space.
_CLEAN: dict[str, list[normalizers.Normalizer]] = {
    "whitespace": [],
    "lower": [normalizers.Lowercase()],
    "canonicalize": [normalizers.Replace("_", " "), _PUNCTUATION, normalizers.Lowercase(), *_SPACES],
}


def text_length(tokenizer: PreTrainedTokenizerBase, text_config: PretrainedConfig) -> int:
    """Longest text in tokens: all positions of CLIP and SigLIP, at most 128 of other encoders."""
    positions = getattr(text_config, "max_position_embeddings", MAX_TEXT_LENGTH)
    if text_config.model_type in OWN_LENGTH:
        return positions
    if text_config.model_type in OFFSET_POSITIONS:
        positions -= text_config.pad_token_id + 1
    return min(tokenizer.model_max_length, positions, MAX_TEXT_LENGTH)


def load_tokenizer(
    model: ModelFolder, text_config: PretrainedConfig, *, own_config: bool = True
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; one without a padding token (GPT-like) pads with its end token.

    own_config: whether the folder's config.json is one of transformers, from which it knows the kind of tokenizer.
    InputError where there is none, or where its tokens are not those of the text encoder.
    """
    if is_open_clip(model.path):
        tokenizer, steps = _of_open_clip(model, text_config)
    else:
        with raised_as(_no_tokenizer, ValueError, KeyError):
            config = None if own_config else text_config
            tokenizer = AutoTokenizer.from_pretrained(model.path, config=config, **NO_CODE)
        steps = _ignored_steps(tokenizer, text_config)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer = with_steps(tokenizer, steps) if steps else tokenizer
    _check_tokens(tokenizer, text_config, model)
    return tokenizer


def with_steps(tokenizer: PreTrainedTokenizerBase, steps: list[normalizers.Normalizer]) -> PreTrainedTokenizerFast:
    """The same tokenizer with steps before its own normalization, which its files then hold for every program."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    own = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([*steps, *own])
    lower = {"do_lower_case": True} if tokenizer.init_kwargs.get("do_lower_case") else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        model_input_names=tokenizer.model_input_names,
        **tokenizer.special_tokens_map,
        **lower,
    )


def is_canonical(tokenizer: PreTrainedTokenizerBase) -> bool:
    """The tokenizer of a SigLIP expects canonical texts: that of version 1 does, that of version 2 does not."""
    by_name = "SiglipTokenizer" in (type(tokenizer).__name__, tokenizer.init_kwargs.get("tokenizer_class"))
    return by_name or tokenizer("A, cat_dog!")["input_ids"] == tokenizer("a catdog")["input_ids"]


def _of_open_clip(
    model: ModelFolder, text_config: PretrainedConfig
) -> tuple[PreTrainedTokenizerBase, list[normalizers.Normalizer]]:
    """The tokenizer, and the steps that open_clip applies to texts before it.

    It is that in the folder, else one of the hub named in the settings, else CLIP's own from open_clip's package.
    """
    text = open_clip_content(model)["model_cfg"]["text_cfg"]
    name, options = text.get("hf_tokenizer_name"), text.get("tokenizer_kwargs") or {}
    clean = options.get("clean", "whitespace")
    if clean not in _CLEAN or any(value for key, value in options.items() if key != "clean"):
        raise model.fault(f"{OPEN_CLIP_CONFIG} has tokenizer_kwargs {options}, of which only clean is read here")
    if any((model.path / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        tokenizer = AutoTokenizer.from_pretrained(model.path, config=text_config, **NO_CODE)
    elif name:
        other = find_model(model.flag, name, weights=False)
        tokenizer = AutoTokenizer.from_pretrained(other.path, **NO_CODE)
    else:
        tokenizer = _clip_tokenizer(model)
    return tokenizer, _CLEAN[clean]


def _clip_tokenizer(model: ModelFolder) -> PreTrainedTokenizerBase:
    """CLIP's vocabulary of 49,408 tokens out of the package, as transformers' tokenizer."""
    remedy = "its folder has no tokenizer, and CLIP's vocabulary comes with open_clip: pip install open_clip_torch"
    with raised_as(lambda _: model.fault(remedy), ImportError):
        from open_clip.tokenizer import bytes_to_unicode, default_bpe
    lines = gzip.decompress(Path(default_bpe()).read_bytes()).decode("utf-8").split("\n")
    letters = list(bytes_to_unicode().values())
    merges = [tuple(line.split()) for line in lines[1 : 49408 - 2 - 2 * len(letters) + 1]]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges)


def _no_tokenizer(fault: Exception) -> OSError:
    """One line in place of errors that list every class of transformers."""
    if "trust_remote_code" in str(fault):
        return OSError(str(fault))
    return OSError("no tokenizer is there that transformers can read, such as tokenizer.json")


def _ignored_steps(tokenizer: PreTrainedTokenizerBase, text_config: PretrainedConfig) -> list[normalizers.Normalizer]:
    """Lower-casing that the settings of a SigLIP's tokenizer ask for and its class does not do (GemmaTokenizer)."""
    if not (text_config.model_type.startswith("siglip") and tokenizer.init_kwargs.get("do_lower_case")):
        return []
    done = not tokenizer.is_fast or tokenizer("A DOG")["input_ids"] == tokenizer("a dog")["input_ids"]
    return [] if done or is_canonical(tokenizer) else [normalizers.Lowercase()]


def _check_tokens(tokenizer: PreTrainedTokenizerBase, text_config: PretrainedConfig, model: ModelFolder) -> None:
    """Refuse tokens without an embedding, padding without a token, and texts pooled elsewhere than at their end."""
    if tokenizer.pad_token is None:
        raise model.fault("its tokenizer has no padding token; add a pad_token to its tokenizer_config.json")
    rows = getattr(text_config, "vocab_size", None)
    if rows is None:  # CANINE hashes characters
        return
    vocabulary = {token: i for token, i in tokenizer.get_vocab().items() if not _SENTINEL.fullmatch(token)}
    token, largest = max(vocabulary.items(), key=lambda each: each[1])
    if largest >= rows:
        raise model.fault(
            f"its tokenizer numbers {token!r} {largest}, but its text encoder has no embedding above {rows - 1}; "
            "use the tokenizer that belongs to the model, or remove the added tokens"
        )
    if text_config.model_type != "clip_text_model":
        return
    text, end = tokenizer("a")["input_ids"], text_config.eos_token_id
    if end == 2 and text[-1] != largest:  # the mark of old files: transformers pools at the largest number
        raise model.fault(
            f"it pools texts at their largest token, which can be {token!r} instead of the end token {text[-1]}; if it "
            f"was trained to pool at the end token, set text_config.eos_token_id in its config.json to {text[-1]}"
        )
    if end not in (2, *text):
        raise model.fault(
            f"it pools texts at token {end}, which its tokenizer does not put into them (they end with {text[-1]}); "
            "use the tokenizer that belongs to the model"
        )
