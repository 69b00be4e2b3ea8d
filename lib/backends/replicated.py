"""One process, or DDP over many: every rank has all weights, gradients and moments."""

import copy
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from lib.backends.optim import load_moments, moments_by_name
from lib.backends.precision import LossScale, Precision
from lib.towers import TwoTowers


class Backend:
    """The towers on the ranks: one process or DDP here; FSDP2 and ZeRO override it.

    After `prepare`, the order of an optimizer step is: `gradients_of_a_step` around everything that runs `backward`,
    `clip_gradients`, then `step`, or `drop_gradients` where something is not finite. All ranks call all methods.
    """

    shards_weights = False
    """Each rank holds a shard of the weights: all ranks must run the same forwards, of the towers as a whole."""

    def __init__(self, accelerator: Accelerator, precision: Precision) -> None:
        self.accelerator, self.precision = accelerator, precision
        self.loss_scale = LossScale() if precision.name == "fp16" else None
        self.towers: TwoTowers
        self.wrapped: nn.Module
        self.optimizer: Optimizer

    def prepare(self, towers: TwoTowers, optimizer: Optimizer, largest_norm: float) -> nn.Module:
        """Take over the towers and their optimizer; returns the module that all passes run through.

        largest_norm: that of `clip_gradients`, for kinds that clip within their update.
        """
        self.towers, self.optimizer = towers, optimizer
        self.precision.wrap(towers)
        self._twin = self._copy_on_host() if self.shards_weights and self.accelerator.is_main_process else None
        self.wrapped = self._wrap(largest_norm)
        return self.wrapped

    def _wrap(self, largest_norm: float) -> nn.Module:
        return self.accelerator.prepare(self.towers) if self.accelerator.num_processes > 1 else self.towers

    def _copy_on_host(self) -> TwoTowers:
        """A float32 copy in the host's memory, for whole weights while `towers` will hold shards of them."""
        twin = copy.deepcopy(self.towers)
        vars(twin).pop("forward", None)  # the precision's, which would run the original
        return twin.cpu()

    def state_bytes(self, weights: int, trained: int, moments: int) -> int:
        """Bytes of weights, gradients and optimizer on one rank's device.

        weights, trained: bytes of all weights, and of those that train; moments: that the optimizer keeps of each.
        """
        return weights + trained * (1 + moments)

    def no_sync(self) -> AbstractContextManager:
        """A context in which forward and backward accumulate gradients without reducing them over the ranks.

        DDP decides in its forward whether the backward will reduce: the context has to enclose both.
        """
        return self.accelerator.no_sync(self.wrapped) if self.accelerator.num_processes > 1 else nullcontext()

    def gradients_of_a_step(self) -> AbstractContextManager:
        """The context of all passes of one optimizer step."""
        return nullcontext()

    def backward(self, value: Tensor) -> None:
        """Accumulate the gradients of a scalar, multiplied with the loss scale until they are clipped."""
        (value * self.loss_scale.value if self.loss_scale else value).backward()

    def clip_gradients(self, largest: float) -> Tensor:
        """Clip to this norm (0: only measure); returns the norm over all ranks before clipping, equal on each: ()."""
        gradients = [p.grad for p in self.towers.parameters() if p.grad is not None]
        if self.loss_scale:
            for gradient in gradients:
                gradient.div_(self.loss_scale.value)
        return self._clip(gradients, largest or math.inf)

    def _clip(self, gradients: list[Tensor], largest: float) -> Tensor:
        norm = get_total_norm(gradients)
        clip_grads_with_norm_(self.towers.parameters(), largest, norm)
        return norm

    def step(self) -> None:
        """Update the weights from the clipped gradients, and clear these."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.loss_scale:
            self.loss_scale.update(finite=True)

    def drop_gradients(self) -> None:
        """Skip the update, because a value was not finite; lowers the loss scale, if there is one."""
        self.forget_gradients()
        if self.loss_scale:
            self.loss_scale.update(finite=False)

    def forget_gradients(self) -> None:
        """Let the next step's gradients start from zero."""
        self.optimizer.zero_grad()

    def gradients(self) -> dict[str, Tensor]:
        """Before clipping, the mean over ranks of each parameter's gradient by its name, whole on every rank."""
        scale = self.loss_scale.value if self.loss_scale else 1.0
        return {name: p.grad.detach() / scale for name, p in self.towers.named_parameters() if p.grad is not None}

    @contextmanager
    def editing(self, *parameters: nn.Parameter) -> Iterator[None]:
        """A context in which scale and bias may be changed in place, by the same value on all ranks."""
        yield

    def whole_towers(self) -> TwoTowers | None:
        """The towers with all of their weights on the main process; on the others None where weights are sharded."""
        if not self.shards_weights:
            return self.towers
        twins = dict(self._twin.named_parameters()) if self._twin else {}
        for name, parameter in self.towers.named_parameters():
            with self._gathered(parameter) as whole:  # one at a time: all of them may not fit next to the shards
                if self._twin:
                    twins[name].data.copy_(whole)
        if self._twin:  # buffers are whole on every rank
            for copied, buffer in zip(self._twin.buffers(), self.towers.buffers(), strict=True):
                copied.copy_(buffer)
        return self._twin

    def _gathered(self, parameter: nn.Parameter) -> AbstractContextManager[Tensor]:
        """The whole of a sharded parameter within the context, on every rank."""
        raise NotImplementedError

    def moments(self) -> dict[str, dict]:
        """The optimizer's state of each parameter, by name; complete on the main process."""
        return moments_by_name(self.optimizer, self.towers)

    def load_moments(self, moments: dict[str, dict]) -> None:
        """Restore the result of `moments`, on this or another kind and number of ranks."""
        load_moments(self.optimizer, self.towers, moments)

    def autocast(self) -> AbstractContextManager:
        """A context in which other towers than the prepared ones compute in the run's precision."""
        return self.precision.autocast()


def on_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory."""
    return tensor.detach().to("cpu", copy=True)
