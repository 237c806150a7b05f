"""AdamW over flat memory: parameters, moments and gradients of a model in one piece each, so that a step is a few passes, however many there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from cvmk import ops
from cvmk.training.optimizers.base import Closure, Optimizer

_ALIGNED = 16  # elements; parameters begin on cache lines
_ROW = 1024  # elements that are summed at one time


class _Run(NamedTuple):
    """Neighbours in flat memory that take the same step: elements [begin, end) with the options of a group, step number `step`."""

    group: dict[str, Any]
    begin: int
    end: int
    step: int


class FlatAdamW(Optimizer):
    """`torch.optim.AdamW`, whose state and checkpoints it has, computed by `ops.adamw`.

    The parameters become views of one piece of memory. They are laid there anew where somebody has moved or cast them. A step gathers the
    gradients, which stay where they are; clipping is a factor that the step takes along. A parameter without a gradient is left alone, as
    PyTorch leaves it. The same bits for any number of threads.
    """

    def __init__(self, inner: torch.optim.AdamW) -> None:
        super().__init__(inner)
        self._steps = [0] * len(self.parameters)
        self._groups = [group for group in inner.param_groups for _ in group["params"]]
        sizes = ((parameter.numel() + _ALIGNED - 1) // _ALIGNED * _ALIGNED for parameter in self.parameters)
        self._starts = [0, *accumulate(sizes)]
        self._count = (self._starts[-1] + _ROW - 1) // _ROW * _ROW
        self._first, self._second = (self.parameters[0].new_zeros(self._count) for _ in range(2))
        self._weights = self._gradients = self._first[:0]
        self._addresses: list[int] = []
        self._scale: Tensor | None = None

    @staticmethod
    def takes(parameters: Sequence[torch.nn.Parameter]) -> bool:
        """Whether these can lie in one piece: on the CPU, all of one dtype."""
        return all(parameter.is_cpu and parameter.dtype == parameters[0].dtype and parameter.layout == torch.strided for parameter in parameters)

    def _views(self, flat: Tensor) -> Iterator[Tensor]:
        for parameter, start in zip(self.parameters, self._starts, strict=False):
            yield flat[start : start + parameter.numel()].view(parameter.shape)

    def _lay(self) -> None:
        """See to it that the parameters lie in flat memory."""
        if self._addresses == [parameter.data_ptr() for parameter in self.parameters]:
            return
        weight = self.parameters[0]
        if not self.takes(self.parameters):
            raise RuntimeError("the parameters are no longer on the CPU or of one dtype: build the optimiser after moving or casting the model")
        self._weights, self._gradients = (weight.new_zeros(self._count) for _ in range(2))
        self._first, self._second = self._first.to(weight.dtype), self._second.to(weight.dtype)
        for parameter, view in zip(self.parameters, self._views(self._weights), strict=True):
            view.copy_(parameter.detach())
            parameter.data = view
        self._addresses = [parameter.data_ptr() for parameter in self.parameters]

    def _gather(self) -> None:
        """All gradients, 0 where there is none, to flat memory."""
        parts: list[Tensor] = []
        zeros = self._gradients.new_zeros(max(_ROW, *(parameter.numel() if parameter.grad is None else 0 for parameter in self.parameters)))
        for parameter, (start, end) in zip(self.parameters, pairwise(self._starts), strict=True):
            gradient, count = parameter.grad, parameter.numel()
            parts.append(zeros[:count] if gradient is None else gradient.reshape(-1))
            if count < end - start:
                parts.append(zeros[: end - start - count])
        parts.append(zeros[: self._count - self._starts[-1]])
        torch.cat(parts, out=self._gradients)

    def clip(self, norm: float) -> Tensor:
        """As of `Optimizer`, but that the gradients are scaled on their way into the step, where they stand."""
        self._lay()
        self._gather()
        rows = torch.linalg.vector_norm(self._gradients.view(-1, _ROW), dim=1)  # sums that no number of threads changes
        found: Tensor = torch.linalg.vector_norm(rows)
        self._scale = (norm / (found + 1e-6)).clamp(max=1.0) if norm else None
        return found

    def step(self, closure: Closure) -> None:
        """One step by the gradients that the last `clip` has seen."""
        there = [parameter.grad is not None for parameter in self.parameters]
        self._steps = [step + has for step, has in zip(self._steps, there, strict=True)]
        with torch.no_grad():
            for group, begin, end, step in self._runs(there):
                weights, gradients, first, second = (flat[begin:end] for flat in (self._weights, self._gradients, self._first, self._second))
                options = {"betas": group["betas"], "eps": group["eps"], "weight_decay": group["weight_decay"]}
                ops.adamw(weights, gradients, first, second, step=step, learning_rate=group["lr"], grad_scale=self._scale, **options)
        increment_version([parameter for parameter, has in zip(self.parameters, there, strict=True) if has])

    def _runs(self, there: list[bool]) -> list[_Run]:
        runs: list[_Run] = []
        for group, step, has, (start, end) in zip(self._groups, self._steps, there, pairwise(self._starts), strict=True):
            if not has:
                continue
            if runs and runs[-1].group is group and runs[-1].step == step and runs[-1].end == start:
                runs[-1] = runs[-1]._replace(end=end)
            else:
                runs.append(_Run(group, start, end, step))
        return runs

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """In the form of `torch.optim.AdamW`."""
        for parameter, step, first, second in zip(self.parameters, self._steps, self._views(self._first), self._views(self._second), strict=True):
            if step:
                self.inner.state[parameter] = {"step": torch.tensor(float(step)), "exp_avg": first, "exp_avg_sq": second}
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)
        self._groups = [group for group in self.inner.param_groups for _ in group["params"]]
        for i, (parameter, first, second) in enumerate(zip(self.parameters, self._views(self._first), self._views(self._second), strict=True)):
            saved = self.inner.state.get(parameter)
            self._steps[i] = int(saved["step"]) if saved else 0
            first.copy_(saved["exp_avg"]) if saved else first.zero_()
            second.copy_(saved["exp_avg_sq"]) if saved else second.zero_()
        self.inner.state.clear()
