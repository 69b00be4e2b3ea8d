"""Low-rank adapters on attention layers (LoRA), and the plain weights that they and the layers below add up to.

Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, arXiv:2106.09685. The layers are peft's.
"""

import re

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lib.errors import InputError
from lib.towers import TwoTowers
from lib.towers.tower import is_frozen

ADAPTER = "default"
ALPHA_PER_RANK = 2
"""The adapters' output is multiplied by alpha / rank: with alpha in proportion, a rate suits every rank."""
_ATTENTION = re.compile("attn|attention", re.IGNORECASE)


def add_adapters(towers: TwoTowers, rank: int, dropout: float, seed: int) -> None:
    """Let low-rank adapters train in place of the trunks' own weights, in every attention layer that trains.

    Adapters go to the projections of queries, keys, values and outputs; all other parameters of these trunks are
    frozen. Heads, scale and bias are left as they are.
    """
    for tower, trunk in (("image", towers.image.trunk), ("text", towers.text.trunk)):
        if is_frozen(trunk):
            continue
        names = _attention_projections(trunk)
        if not names:
            raise InputError(
                f"--lora {rank}: no attention layer of the {tower} tower's {type(trunk).__name__} trains; "
                f"add --freeze {tower}.trunk, or leave --lora out"
            )
        width = min(min(trunk.get_parameter(f"{name}.weight").shape) for name in names)
        if rank > width:
            raise InputError(
                f"--lora {rank} is above {width}, the width of the {tower} tower's attention; 4 to 64 is usual"
            )
        targets = "|".join(map(re.escape, names))
        settings = LoraConfig(r=rank, lora_alpha=ALPHA_PER_RANK * rank, lora_dropout=dropout, target_modules=targets)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # alike on all ranks
            inject_adapter_in_model(settings, trunk, ADAPTER)
    if not any(isinstance(module, LoraLayer) for module in towers.modules()):
        raise InputError(f"--lora {rank}: both trunks are frozen; leave it out, or --freeze less")
    towers.train(towers.training)


def merged_weights(towers: TwoTowers) -> dict[str, Tensor]:
    """The state dict of the plain model: each adapter added to its layer. Without adapters, the towers' own."""
    weights = towers.state_dict()
    for name, layer in _adapted(towers):
        own = {key: weights.pop(key) for key in list(weights) if key.startswith(f"{name}.")}
        plain = {key: value for key, value in own.items() if key.startswith(f"{name}.base_layer.")}
        weights |= {key.replace(".base_layer.", "."): value for key, value in plain.items()}
        weights[f"{name}.weight"] = layer.base_layer.weight.detach() + layer.get_delta_weight(ADAPTER).detach()
    return weights


def merge(towers: TwoTowers) -> None:
    """Turn the towers into the plain model; its adapters are gone."""
    weights = merged_weights(towers)
    for name, layer in _adapted(towers):
        towers.set_submodule(name, layer.base_layer)
    towers.load_state_dict(weights)


def _adapted(towers: TwoTowers) -> list[tuple[str, LoraLayer]]:
    return [(name, module) for name, module in towers.named_modules() if isinstance(module, LoraLayer)]


def _attention_projections(trunk: nn.Module) -> list[str]:
    """Names of the linear layers in attention modules that train: q_proj, query, out_proj, output.dense, qkv, ..."""
    found = []
    for name, module in trunk.named_modules():
        parent, _, _ = name.rpartition(".")
        # torch's own attention reads the weights of its projections without their forward: an adapter would do nothing.
        within_torchs = isinstance(trunk.get_submodule(parent), nn.MultiheadAttention)
        if isinstance(module, nn.Linear) and _ATTENTION.search(parent) and not within_torchs:
            found += [name] if module.weight.requires_grad else []
    return found
