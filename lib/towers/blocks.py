"""The blocks of a trunk in order: what `image.last:2` counts, and what layer-wise learning rates step through."""

import re

from torch import nn

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
    `layer4`), a convolution of transformers' MobileNetV1 (two make a depthwise separable one). What lies before
    the list or behind it, such as embeddings and the final norm, belongs to none.
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
    """The depth of every parameter by name: 0 below the blocks, 1 to L in them, L + 1 behind the last one.

    L is the number of blocks; where none are known, every parameter has depth 0. An embedding lies below the blocks
    wherever a model lists it (MPNet's of relative positions stands behind its layers).
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
            # Trunks list their parts in the order of their forward: this one stands between two blocks, or behind all.
            depth_of[name] = reached + 1 if found and reached == len(found) else reached
    return depth_of
