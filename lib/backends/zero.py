"""DeepSpeed ZeRO: every rank holds a shard of the moments (1), of the gradients too (2), and of the weights (3)."""

# DeepSpeed adds attributes to parameters (ds_tensor, ds_shape, all_gather), which torch's types do not know.
# mypy: disable-error-code="attr-defined"

import logging
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn

from lib.backends.precision import Precision
from lib.backends.replicated import Backend, on_host
from lib.errors import InputError, raised_as

LARGEST_BUCKET = 50_000_000  # elements reduced at once: 200 MB


class ZeroBackend(Backend):
    """DeepSpeed's engine (Rajbhandari et al. 2020, arXiv:1910.02054), driven directly.

    Accelerate's wrapper would update after every backward; `coalesce_grad_reduction` reduces once per step. Lower
    precision is autocast's here too, because DeepSpeed's bf16 would sum the chunks' gradients in bfloat16 and round the
    logit scale.
    """

    def __init__(self, accelerator: Accelerator, precision: Precision, settings: dict) -> None:
        super().__init__(accelerator, precision)
        self.settings = settings
        self.stage: int = settings["zero_optimization"]["stage"]
        self.shards_weights = self.stage == 3

    def _wrap(self, largest_norm: float) -> nn.Module:
        import deepspeed  # an optional package, slow to import

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of optimizers other than its own
        # Its collectives for CPUs would be compiled first, for minutes; gloo has them.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        trained = sum(parameter.numel() for parameter in self.towers.parameters() if parameter.requires_grad)
        zero = {
            "reduce_bucket_size": min(trained, LARGEST_BUCKET),
            "overlap_comm": False,  # there is nothing to overlap with: all is reduced after the last backward
        }
        settings = self.settings | {
            "train_micro_batch_size_per_gpu": 1,  # has to be a number; no data passes through DeepSpeed
            "gradient_accumulation_steps": 1,
            "gradient_clipping": largest_norm,
            "steps_per_print": 2**31,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # its Adam needs a compiler, and would stand in for SGD too
            "zero_optimization": zero | self.settings["zero_optimization"],
        }
        self._scalars = [parameter for parameter in self.towers.parameters() if parameter.ndim == 0]
        if self.stage == 3:
            _divide_scalars(self._scalars, settings)
        with _not_broadcast(self._scalars):
            self.engine, *_ = deepspeed.initialize(model=self.towers, optimizer=self.optimizer, config=settings)
        self._keep_scalars_whole()
        return self.engine

    def state_bytes(self, weights: int, trained: int, moments: int) -> int:
        """Gradients are whole until they are reduced, once; ZeRO 1 and 2 copy the weights that they update."""
        offloads = self.settings["zero_optimization"]
        optimizer, parameters = (offloads.get(f"offload_{of}", {}).get("device") for of in ("optimizer", "param"))
        weights = weights if self.stage < 3 else 0 if parameters == "cpu" else weights // self.accelerator.num_processes
        parts = trained * (1 + moments + (self.stage < 3)) // self.accelerator.num_processes
        return weights + trained + (0 if optimizer == "cpu" else parts)

    def _keep_scalars_whole(self) -> None:
        """Scale and bias are read between forwards too; ZeRO 3 keeps such small ones gathered once they are."""
        if self.stage == 3 and self._scalars:
            self._scalars[0].all_gather(param_list=self._scalars)

    def no_sync(self) -> AbstractContextManager:
        return nullcontext()

    def gradients_of_a_step(self) -> AbstractContextManager:
        return self.engine.coalesce_grad_reduction()

    def backward(self, value: Tensor) -> None:
        if self.loss_scale:  # the engine multiplies with it, and divides before it clips
            self.engine.optimizer.override_loss_scale(self.loss_scale.value)
        self.engine.backward(value)

    def clip_gradients(self, largest: float) -> Tensor:
        """Measure the norm; the engine clips in its update."""
        optimizer = self.engine.optimizer
        if optimizer.has_overflow():  # asked first: some versions write -1 for a norm that is not finite
            return torch.tensor(math.inf)
        if self.stage == 3:
            norm = torch.stack([torch.as_tensor(of_group).float() for of_group in optimizer._get_norm_groups()]).norm()
        else:
            norm = optimizer.scaled_global_norm()
        return torch.as_tensor(norm) / (self.loss_scale.value if self.loss_scale else 1.0)

    def step(self) -> None:
        self.engine.step()
        if self.loss_scale:
            self.loss_scale.update(finite=True)

    def forget_gradients(self) -> None:
        optimizer = self.engine.optimizer
        if self.stage == 3:
            optimizer._overflow_clean_up(optimizer.loss_scale)
            return
        looks = optimizer.check_grad_overflow
        optimizer.check_grad_overflow, optimizer.has_overflow = True, lambda *_, **__: True
        self.engine.step()  # drops gradients that overflow
        optimizer.check_grad_overflow = looks
        del optimizer.has_overflow

    def gradients(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_grad

        scale = self.loss_scale.value if self.loss_scale else 1.0
        trained = ((name, p) for name, p in self.towers.named_parameters() if p.requires_grad)
        found = {name: safe_get_full_grad(p) for name, p in trained}
        return {name: gradient / scale for name, gradient in found.items() if gradient is not None}

    @contextmanager
    def editing(self, *parameters: nn.Parameter) -> Iterator[None]:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        yield
        for parameter in parameters:  # the optimizer updates a copy of its own
            if self.stage == 3:
                parameter.ds_tensor.copy_(self._own_part(parameter, parameter.detach()))
                safe_set_local_fp32_param(parameter, parameter.ds_tensor)
            else:
                safe_set_full_fp32_param(parameter, parameter.detach())

    @contextmanager
    def _gathered(self, parameter: nn.Parameter) -> Iterator[Tensor]:
        import deepspeed

        whole = parameter.shape == parameter.ds_shape
        with nullcontext() if whole else deepspeed.zero.GatheredParameters([parameter]):
            yield parameter

    def moments(self) -> dict[str, dict]:
        from deepspeed.utils import safe_get_full_optimizer_state

        if not self.optimizer.state:
            return {}
        of_a_part = next(iter(self.optimizer.state.values()))
        keys = [key for key, value in of_a_part.items() if torch.is_tensor(value) and value.ndim]
        counts = {key: on_host(torch.as_tensor(value)) for key, value in of_a_part.items() if key not in keys}
        if self.stage != 3:
            self._link_moments()
        found = {}
        for name, parameter in self._trained():
            whole = {key: safe_get_full_optimizer_state(parameter, key) for key in keys}
            if self.accelerator.is_main_process:
                # A count for each: one for all would be raised once by every parameter that resumes with it.
                own_counts = {key: count.clone() for key, count in counts.items()}
                found[name] = own_counts | {key: on_host(value) for key, value in whole.items()}
        return found

    def load_moments(self, moments: dict[str, dict]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if not moments:
            return
        sharded = self.engine.optimizer
        parts = sharded.fp32_partitioned_groups_flat if self.stage == 3 else sharded.single_partition_of_fp32_groups
        example = next(iter(moments.values()))
        keys = [key for key, value in example.items() if value.ndim or key != "step"]
        for part in parts:  # the optimizer would make these at its first update
            zeros = {key: torch.zeros_like(part) for key in keys}
            self.optimizer.state[part] = {key: value.clone() for key, value in example.items()} | zeros
        if self.stage != 3:
            self._link_moments()
        for name, parameter in self._trained():
            for key in keys if name in moments else ():
                value = moments[name][key].to(self.accelerator.device)
                if self.stage == 3:
                    safe_set_local_optimizer_state(parameter, self._own_part(parameter, value), key)
                else:
                    safe_set_full_optimizer_state(parameter, value, key)

    def _link_moments(self) -> None:
        """Link parameters to moments: DeepSpeed does so after its first group's update, when other groups had none."""
        optimizer = self.engine.optimizer
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()

    def _own_part(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This rank's share of a whole tensor, padded as ZeRO 3 pads it."""
        size, ranks = parameter.ds_tensor.numel(), self.accelerator.num_processes
        padded = F.pad(value.flatten(), (0, size * ranks - value.numel()))
        return padded[self.accelerator.process_index * size :][:size]

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.towers.named_parameters() if parameter.requires_grad]


@contextmanager
def _not_broadcast(scalars: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let ZeRO 1 and 2 start without sending scale and bias from rank 0: all ranks have loaded the same.

    They would be sent as bytes, and a scalar cannot be viewed as bytes. The mark is DeepSpeed's own, for parameters
    that ranks do not share.
    """
    for parameter in scalars:
        parameter.ds_optim_param = True
    yield
    for parameter in scalars:
        del parameter.ds_optim_param


def _divide_scalars(scalars: list[nn.Parameter], settings: dict) -> None:
    """Let ZeRO 3 take scale and bias over as vectors of one, for the same reason; gathered, they are scalars again."""
    import deepspeed

    for parameter in scalars:
        parameter.data = parameter.data.view(1)
    deepspeed.init_distributed()
    deepspeed.zero.Init(module=nn.ParameterList(scalars), config_dict_or_path=settings)
    for parameter in scalars:
        parameter.ds_shape = torch.Size([])


_OWN_FLAGS = {
    "optimizer": "--optimizer",
    "scheduler": "--schedule",
    "gradient_clipping": "--grad-clip",
    "train_batch_size": "--effective-batch",
    "train_micro_batch_size_per_gpu": "--chunk-size",
    "fp16": "accelerate launch --mixed_precision",
    "bf16": "accelerate launch --mixed_precision",
}


def zero_settings(device: torch.device) -> dict:
    """DeepSpeed's settings (stage, offload, ...) from Accelerate's environment or the file that it names."""
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
    with raised_as(lambda fault: InputError(f"accelerate cannot read its DeepSpeed settings: {fault}"), ValueError):
        settings = DeepSpeedPlugin().deepspeed_config
    _check(settings)
    return _without_auto(settings)


def _check(settings: dict) -> None:
    """Refuse settings that our flags replace, and those that are not supported."""
    stage = settings["zero_optimization"].get("stage")
    if stage not in (1, 2, 3):
        raise InputError(f"zero_stage {stage} is none of 1, 2, 3; for whole copies use accelerate_configs/ddp.yaml")
    for name, instead in _OWN_FLAGS.items():
        if settings.get(name) not in (None, "auto", {"enabled": False}):
            raise InputError(f"the DeepSpeed settings have {name!r}: take it out, and use {instead}")
    if settings.get("gradient_accumulation_steps") not in (1, "auto", None):
        raise InputError(
            f"gradient_accumulation_steps {settings['gradient_accumulation_steps']} must be 1: --effective-batch and "
            "--chunk-size do its work, exactly"
        )
    for name in ("offload_optimizer", "offload_param"):
        if settings["zero_optimization"].get(name, {}).get("device") not in ("none", "cpu", None):
            raise InputError(f"{name} goes to the cpu or stays (none); other devices are not supported")


def _without_auto(settings: dict) -> dict:
    """Leave out the settings that DeepSpeed or this module fills in."""
    return {
        name: _without_auto(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if value not in ("auto", None)
    }
