"""Training on one process, DDP, FSDP2 or DeepSpeed ZeRO: `start` chooses, and each has the methods of `Backend`.

On all of them weights, gradients, sums over ranks and the optimizer are float32; lower precision is autocast's.
"""

import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, ProjectConfiguration, is_wandb_available

from lib.backends.device import auto_workers, peak_memory_bytes, usable_cores, use_all_cores
from lib.backends.precision import Precision, choose_precision, set_up_kernels
from lib.backends.replicated import Backend
from lib.backends.zero import ZeroBackend, zero_settings
from lib.config.flags import PrecisionFlag
from lib.distributed import meeting
from lib.errors import InputError

__all__ = [
    "Backend",
    "Precision",
    "auto_workers",
    "choose_precision",
    "peak_memory_bytes",
    "start",
    "usable_cores",
]

_SUPPORTED = (
    DistributedType.NO,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_NPU,
)
_CONFIGS = "accelerate_configs/single_gpu.yaml, ddp.yaml, fsdp2.yaml, zero1.yaml, zero2.yaml, zero3.yaml"

# Rank 0 exports alone, fills stores or waits for another job's lock, while the others wait in a collective. The
# watchdog ends the job when a rank is lost; the default timeouts (NCCL 10 minutes, gloo 30) would end it while all
# ranks are well.
_LONGEST_WAIT = timedelta(hours=24)


def start(tracker: str, precision: PrecisionFlag = "auto", deterministic: bool = False) -> Backend:
    """Set up devices, ranks and kernels as launched; refuses settings that would train wrongly in silence."""
    if tracker == "wandb" and not is_wandb_available():
        raise InputError("--tracker wandb needs the wandb package; pip install wandb, or use tensorboard")
    # Taken out of the environment, so that Accelerate starts the ranks as for DDP: sharding, its settings and autocast
    # are done by this package.
    zero, fsdp = _asked("ACCELERATE_USE_DEEPSPEED"), _asked("ACCELERATE_USE_FSDP")
    with meeting():
        accelerator = _accelerator(tracker)
    _check(accelerator)
    if accelerator.device.type == "cpu":
        use_all_cores()
    set_up_kernels(accelerator.device, deterministic)
    chosen = choose_precision(precision, accelerator.device)
    if zero:
        if not dist.is_initialized():
            raise InputError("ZeRO has to be started by accelerate launch or torchrun, on one GPU too")
        return ZeroBackend(accelerator, chosen, zero_settings(accelerator.device))
    if fsdp and dist.is_initialized():
        return _fsdp2(accelerator, chosen)
    return Backend(accelerator, chosen)


def _asked(name: str) -> bool:
    return os.environ.pop(name, "false").lower() == "true"


def _accelerator(tracker: str) -> Accelerator:
    # torch 2.15 renames the option; the old name is the one that Accelerate passes on, and that torch 2.11 knows.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
    return Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no",
        log_with=None if tracker == "none" else tracker,
        # Needed before the ranks have agreed on the run's folder; the report replaces it by the real one.
        project_config=ProjectConfiguration(logging_dir="."),
        # Batch-norm statistics are averaged once per step by the cached step, not broadcast at every chunk.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=_LONGEST_WAIT),
        ],
    )


def _check(accelerator: Accelerator) -> None:
    if accelerator.distributed_type not in _SUPPORTED:
        raise InputError(
            f"accelerate is set to {accelerator.distributed_type.value}, which this version does not train with; "
            f"choose one of {_CONFIGS}"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise InputError(
            f"accelerate's gradient_accumulation_steps {accelerator.gradient_accumulation_steps} must be 1: "
            "--effective-batch and --chunk-size do its work, exactly"
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise InputError(
            f"{launched} processes were launched but each sees {accelerator.num_processes}: they would train apart; "
            "start them with torchrun or accelerate launch --multi_gpu"
        )


def _fsdp2(accelerator: Accelerator, precision: Precision) -> Backend:
    from lib.backends.fsdp2 import FullyShardedBackend  # torch's newest part: nobody else should depend on it

    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError("FSDP of version 1 is not supported; set fsdp_version: 2, as accelerate_configs/fsdp2.yaml")
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise InputError("fsdp_offload_params is not supported; offload with accelerate_configs/zero3_offload.yaml")
    return FullyShardedBackend(accelerator, precision)
