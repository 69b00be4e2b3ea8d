"""FSDP2: every rank holds a shard of each weight, gradient and moment, and gathers a block's weights while it runs."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lib.backends.optim import load_moments
from lib.backends.replicated import Backend, on_host
from lib.towers import TwoTowers
from lib.towers.trainable import blocks


class FullyShardedBackend(Backend):
    """torch's fully_shard (Zhao et al. 2023, arXiv:2304.11277), each trunk's blocks as units, the rest as one more.

    `logit_scale` and `logit_bias` have nothing to shard and stay whole: the surrogate gives every rank their whole
    gradient.
    """

    shards_weights = True

    def _wrap(self, largest_norm: float) -> nn.Module:
        # It warns of embeddings that are a view of a trunk's output; no code changes them in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
        name_of = {id(parameter): name for name, parameter in self.towers.named_parameters()}
        names = [[name_of[id(parameter)] for parameter in group["params"]] for group in self.optimizer.param_groups]
        mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
        for tower in (self.towers.image, self.towers.text):
            for block in blocks(tower.trunk):
                fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
        scalars = {parameter for parameter in self.towers.parameters() if parameter.ndim == 0}
        fully_shard(self.towers, mesh=mesh, ignored_params=scalars)
        self._give_optimizer(names)
        return self.towers

    def _give_optimizer(self, names: list[list[str]]) -> None:
        """Replace the whole parameters by the sharded ones; parameters that stay whole get groups of their own.

        The optimizer updates the tensors of a group together: they must be of one kind.
        """
        now, groups = dict(self.towers.named_parameters()), []
        for group, members in zip(self.optimizer.param_groups, names, strict=True):
            for sharded in (True, False):
                of_kind = [now[name] for name in members if isinstance(now[name], DTensor) == sharded]
                groups += [group | {"params": of_kind}] if of_kind else []
        self.optimizer.param_groups[:] = groups

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        sharded = cast(FSDPModule, self.towers)
        sharded.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            sharded.set_requires_gradient_sync(True)

    def _clip(self, gradients: list[Tensor], largest: float) -> Tensor:
        sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
        plain = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
        norm = torch.stack([_whole(get_total_norm(of_kind)) for of_kind in (sharded, plain) if of_kind]).norm()
        for kind in (True, False):
            of_kind = [p for p in self.towers.parameters() if isinstance(p, DTensor) == kind]
            clip_grads_with_norm_(of_kind, largest, norm)
        return norm

    def gradients(self) -> dict[str, Tensor]:
        return {name: _whole(gradient) for name, gradient in super().gradients().items()}

    def whole_towers(self) -> TwoTowers | None:
        self._reshard()
        return super().whole_towers()

    @contextmanager
    def _gathered(self, parameter: nn.Parameter) -> Iterator[Tensor]:
        yield _whole(parameter.detach())

    def moments(self) -> dict[str, dict]:
        self._reshard()
        main = self.accelerator.is_main_process
        found: dict[str, dict] = {}
        for name, state in super().moments().items():
            for key, value in state.items():
                whole = _whole(value)
                if main:
                    found.setdefault(name, {})[key] = on_host(whole)
        return found

    def state_bytes(self, weights: int, trained: int, moments: int) -> int:
        parts = weights + trained * (1 + moments)
        return trained + parts // self.accelerator.num_processes  # gradients are whole until they are reduced

    def _reshard(self) -> None:
        """Free the weights that an evaluation's forward left gathered: the optimizer only knows the shards."""
        for module in self.towers.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def load_moments(self, moments: dict[str, dict]) -> None:
        parameters, device = dict(self.towers.named_parameters()), self.accelerator.device
        load_moments(
            self.optimizer,
            self.towers,
            {
                name: {key: _sharded_as(parameters[name], value.to(device)) for key, value in state.items()}
                for name, state in moments.items()
            },
        )


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _sharded_as(parameter: nn.Parameter, value: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:  # Adam's count of steps
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)
