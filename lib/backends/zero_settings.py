"""What DeepSpeed is told: as `accelerate launch` and its configuration say, where that is possible here."""

import os
from importlib.metadata import PackageNotFoundError, version

import torch
from accelerate.utils import DeepSpeedPlugin

from lib.errors import InputError

_SAID_ELSEWHERE = {
    "optimizer": "--optimizer",
    "scheduler": "--schedule",
    "gradient_clipping": "--grad-clip",
    "train_batch_size": "--effective-batch",
    "train_micro_batch_size_per_gpu": "--chunk-size",
    "fp16": "accelerate launch --mixed_precision",
    "bf16": "accelerate launch --mixed_precision",
}


def zero_settings(device: torch.device) -> dict:
    """Stage, offload and more, from Accelerate's environment or the file that it names; InputError with a remedy."""
    try:
        installed = version("deepspeed")
    except PackageNotFoundError:
        raise InputError("ZeRO needs DeepSpeed: pip install 'deepspeed>=0.19.2', or choose DDP or FSDP2") from None
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if not hasattr(deepspeed.DeepSpeedEngine, "coalesce_grad_reduction"):
        raise InputError(
            f"deepspeed {installed} cannot reduce once for many chunks; pip install 'deepspeed>=0.19.2', or choose DDP "
            "or FSDP2"
        )
    try:
        settings = DeepSpeedPlugin().deepspeed_config
    except ValueError as error:
        raise InputError(f"accelerate cannot read its DeepSpeed settings: {error}") from error
    _check(settings)
    return _without_auto(settings)


def _check(settings: dict) -> None:
    """Refuse what this project does itself, and what it does not do."""
    stage = settings["zero_optimization"].get("stage")
    if stage not in (1, 2, 3):
        raise InputError(f"zero_stage {stage} is none of 1, 2, 3; for whole copies use accelerate_configs/ddp.yaml")
    for name, instead in _SAID_ELSEWHERE.items():
        if settings.get(name) not in (None, "auto", {"enabled": False}):
            raise InputError(f"the DeepSpeed settings have {name!r}, which {instead} says here: take it out")
    if settings.get("gradient_accumulation_steps") not in (1, "auto", None):
        raise InputError(
            f"gradient_accumulation_steps {settings['gradient_accumulation_steps']} must be 1: --effective-batch and "
            "--chunk-size do its work, exactly"
        )
    for name in ("offload_optimizer", "offload_param"):
        if settings["zero_optimization"].get(name, {}).get("device") not in ("none", "cpu", None):
            raise InputError(f"{name} goes to the cpu or stays (none); other devices are not supported")


def _without_auto(settings: dict) -> dict:
    """Leave out what DeepSpeed or this module fills in."""
    return {
        name: _without_auto(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if value not in ("auto", None)
    }
