"""Parameters that train, by part, last blocks or a pattern over names, and the order of a trunk's blocks.

The order also decides on layer-wise learning rates, and the blocks are the units that FSDP2 shards.
"""

import difflib
import re
from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lib.errors import InputError, raised_as
from lib.towers import TwoTowers

PARTS = ("image", "image.trunk", "image.head", "text", "text.trunk", "text.head", "scale", "bias", "batchnorm")
PATTERN = "re:"
_LAST = re.compile(r"(image|text)\.last:(\d+)")
_ALL_NAMES = (*PARTS, "image.last:N", "text.last:N")


def set_trainable(towers: TwoTowers, freeze: Sequence[str], unfreeze: Sequence[str] = ()) -> None:
    """Stop training what `freeze` names, then train again what `unfreeze` names of it.

    A name is one of `PARTS`; `image.last:N` for the last N blocks of a trunk with the norm and pooler after them; or
    `re:PATTERN`, searched in the names of parameters. Parameters that did not train before, because an encoder's
    output does not depend on them, stay frozen. Frozen modules stay in eval mode (see `TwoTowers.train`).
    Raises InputError for an unknown name and for one that names nothing.
    """
    can_train = {name: p for name, p in towers.named_parameters() if p.requires_grad}
    for flag, names, train in (("--freeze", freeze, False), ("--unfreeze", unfreeze, True)):
        for name in names:
            for chosen in _parameters_of(towers, f"{flag} {name}"):
                if chosen in can_train:
                    can_train[chosen].requires_grad_(train)
    towers.train(towers.training)


def trained_share(towers: TwoTowers) -> tuple[int, int]:
    """Count of the parameters that train, and of all."""
    counts = [(p.numel(), p.requires_grad) for p in towers.parameters()]
    return sum(count for count, trains in counts if trains), sum(count for count, _ in counts)


def _parameters_of(towers: TwoTowers, asked: str) -> list[str]:
    """Names of the parameters that a flag with its value, as in `--freeze image.last:2`, chooses."""
    name = asked.split(" ", 1)[1]
    if name.startswith(PATTERN):
        return _matching(towers, asked, name.removeprefix(PATTERN))
    if last := _LAST.fullmatch(name):
        return _last_blocks(towers, asked, last[1], int(last[2]))
    if name not in PARTS:
        nearest = difflib.get_close_matches(name, _ALL_NAMES, n=1, cutoff=0.0)[0]
        raise InputError(
            f"{asked}: no such part, the nearest is {nearest}; all are {', '.join(_ALL_NAMES)}, or {PATTERN}PATTERN"
        )
    if name == "scale":
        return ["logit_scale"]
    if name == "bias":
        return ["logit_bias"] if towers.use_bias else []
    if name == "batchnorm":
        return batch_norms(towers)
    found = [f"{name}.{own}" for own, _ in towers.get_submodule(name).named_parameters()]
    if not found:
        tower = name.split(".")[0]
        raise InputError(f"{asked}: this model's {tower} tower has no head; use {asked.split(' ')[0]} {tower}")
    return found


def batch_norms(towers: TwoTowers) -> list[str]:
    """Names of the parameters of all batch norms; those without any stay in training mode whatever is frozen."""
    norms = [(name, module) for name, module in towers.named_modules() if isinstance(module, _BatchNorm)]
    return [f"{name}.{own}" for name, module in norms for own, _ in module.named_parameters()]


def _matching(towers: TwoTowers, asked: str, pattern: str) -> list[str]:
    names = [name for name, _ in towers.named_parameters()]
    with raised_as(lambda fault: InputError(f"{asked}: not a regular expression ({fault})"), re.error):
        found = [name for name in names if re.search(pattern, name)]
    if not found:
        plain = re.sub(r"[^\w.]+", "", pattern)
        nearest = difflib.get_close_matches(plain, names, n=1, cutoff=0.0)[0]
        raise InputError(f"{asked}: it matches no parameter; the nearest name is {nearest}")
    return found


def _last_blocks(towers: TwoTowers, asked: str, tower: str, count: int) -> list[str]:
    trunk: nn.Module = towers.get_submodule(f"{tower}.trunk")
    depth_of = depths(trunk)
    count_of_all = len(blocks(trunk))
    if not count_of_all:
        raise InputError(
            f"{asked}: the blocks of a {type(trunk).__name__} are not known; name them by a pattern over the names of "
            f"parameters, such as {PATTERN}{tower}.trunk.{next(iter(depth_of)).split('.')[0]}"
        )
    if not 1 <= count <= count_of_all:
        raise InputError(
            f"{asked}: the {tower} tower has {count_of_all} blocks; give a number from 1 to {count_of_all}"
        )
    return [f"{tower}.trunk.{name}" for name, depth in depth_of.items() if depth > count_of_all - count]


# Where transformers, torchvision and timm keep the list of their blocks.
BLOCK_LISTS = (
    "encoder.layers",  # CLIP, SigLIP, Swin; torchvision's ViT
    "encoder.layer",  # BERT and its kin, DINOv2
    "encoder.stages",  # ResNet, RegNet, ConvNeXt
    "encoder.blocks",  # EfficientNet
    "encoder.block",  # T5
    "transformer.layer",  # DistilBERT
    "roberta.encoder.layers",  # AltCLIP's texts
    "roberta.encoder.layer",
    "layers",  # ViT, ModernBERT; torchvision's MNASNet, timm's Swin
    "layer",  # MobileNet
    "h",  # GPT-2
    "features",  # torchvision's MobileNet, EfficientNet, ConvNeXt, Swin, DenseNet, VGG
    "trunk_output",  # torchvision's RegNet
    "blocks",  # timm's ViT, EfficientNet and MobileNet; torchvision's MaxViT
    "stages",  # timm's ConvNeXt
)
# ResNets of torchvision and timm (layer1 to layer4), ShuffleNet (stage2 to stage4), timm's RegNet (s1 to s4).
NUMBERED = re.compile(r"(layer|stage|s)\d+")


def blocks(trunk: nn.Module) -> list[nn.Module]:
    """The blocks of an encoder, first to last; empty for a kind that is not known.

    A block is what the encoder's own code lists: a transformer's layer, a stage of a ResNet (the last is
    `layer4`), a convolution of transformers' MobileNetV1 (two make a depthwise separable one). Modules before and
    after the list, such as embeddings and the final norm, belong to none.
    """
    found = [module for name, module in trunk.named_children() if NUMBERED.fullmatch(name)]
    for path in BLOCK_LISTS:
        found = found or _listed(trunk, path)
    # DenseNet, MNASNet and VGG list norms and activations among their blocks.
    return [block for block in found if any(parameter.ndim > 1 for parameter in block.parameters())]


def _listed(trunk: nn.Module, path: str) -> list[nn.Module]:
    module: nn.Module | None = trunk
    for name in path.split("."):
        module = getattr(module, name, None)
    return list(module) if isinstance(module, nn.ModuleList | nn.Sequential) else []


def depths(trunk: nn.Module) -> dict[str, int]:
    """The depth of every parameter by name: 0 below the blocks, 1 to L in them, L + 1 after the last one.

    L is the number of blocks; where none are known, every parameter has depth 0. An embedding lies below the blocks
    wherever a model lists it (MPNet lists that of relative positions after its layers).
    """
    found = blocks(trunk)
    block_of = {id(p): number for number, block in enumerate(found, start=1) for p in block.parameters()}
    embeddings = {id(p) for m in trunk.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    depth_of, reached = {}, 0
    for name, parameter in trunk.named_parameters():
        if id(parameter) in block_of:
            reached = block_of[id(parameter)]
            depth_of[name] = reached
        elif id(parameter) in embeddings:
            depth_of[name] = 0
        else:
            # Trunks list their parts in the order of their forward: this one is between two blocks, or after all.
            depth_of[name] = reached + 1 if found and reached == len(found) else reached
    return depth_of
