"""The few places where ways of running on several devices differ; today: one process, or DDP over many."""

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, ProjectConfiguration, is_wandb_available
from torch import Tensor, nn

from lib.errors import InputError

_SUPPORTED = (
    DistributedType.NO,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_NPU,
)


def start(tracker: str) -> Accelerator:
    """Set up devices and ranks; refuses what would train wrongly in silence."""
    if tracker == "wandb" and not is_wandb_available():
        raise InputError("--tracker wandb needs the wandb package; pip install wandb, or use tensorboard")
    on_cpu = not torch.accelerator.is_available()
    mixed_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if on_cpu and mixed_precision in ("fp16", "fp8"):
        raise InputError(f"--mixed_precision {mixed_precision} needs an accelerator; on a CPU use bf16 or no")
    # torch 2.15 renames the option; the old name is the one that Accelerate passes on, and that torch 2.11 knows.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
    accelerator = Accelerator(
        cpu=on_cpu,
        log_with=None if tracker == "none" else tracker,
        # Asked for before the ranks have agreed on the run's folder; the report puts the real one in place.
        project_config=ProjectConfiguration(logging_dir="."),
        # Batch-norm statistics are averaged once per step by the cached step, not broadcast at every chunk.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    if accelerator.distributed_type not in _SUPPORTED:
        raise InputError(
            f"accelerate is set to {accelerator.distributed_type.value}, which this version does not train with; "
            "choose one process or DDP (accelerate_configs/single_gpu.yaml, ddp.yaml)"
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
    if on_cpu:
        _use_all_cores(accelerator.num_processes)
    return accelerator


def no_sync(accelerator: Accelerator, towers: nn.Module) -> Callable[[], AbstractContextManager]:
    """A context in which backward accumulates without reducing across ranks."""
    if accelerator.num_processes == 1:
        return nullcontext
    return lambda: accelerator.no_sync(towers)


def clip_gradients(accelerator: Accelerator, towers: nn.Module, largest: float) -> Tensor:
    """Unscale (fp16), clip to this norm (0: only measure) and return the norm before clipping."""
    return accelerator.clip_grad_norm_(towers.parameters(), largest or float("inf"))


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on the accelerator, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on every platform

    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _use_all_cores(processes: int) -> None:
    """accelerate launch and torchrun set OMP_NUM_THREADS=1 where nobody chose: then share the cores over the ranks."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        torch.set_num_threads(max(1, usable_cores() // local))


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
