"""AdamW over flat memory: parameters, moments and gradients of a model in one piece each, so that a step is a few passes, however many there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from cvmk import ops
from cvmk.training.optimizers.base import Closure, Optimizer

_ALIGNED = 16  # elements; parameters begin on cache lines
_ROW = 1024  # elements that are summed at one time
_LARGE = 2**16  # elements of a matrix whose gradient is worth calls of its own and is not copied to the others'


class _Run(NamedTuple):
    """Neighbours in flat memory that take the same step: elements [begin, end) with the options of a group, step number `step`, by this gradient."""

    group: dict[str, Any]
    begin: int
    end: int
    step: int
    gradient: Tensor


class FlatAdamW(Optimizer):
    """`torch.optim.AdamW`, whose state and checkpoints it has, computed by `ops.adamw`.

    The parameters become views of one piece of memory, large ones behind the others. They are laid there anew where somebody has moved or cast
    them. A step gathers the gradients of the small ones and reads those of the large ones where they are; all stay where they are. Clipping is a
    factor that the step takes along. A parameter without a gradient is left alone, as PyTorch leaves it. The same bits for any number of threads.
    """

    def __init__(self, inner: torch.optim.AdamW) -> None:
        super().__init__(inner)
        self._steps = [0] * len(self.parameters)
        self._groups = [group for group in inner.param_groups for _ in group["params"]]
        self._large = [parameter.dim() > 1 and parameter.numel() >= _LARGE for parameter in self.parameters]
        self._order = sorted(range(len(self.parameters)), key=lambda i: self._large[i])
        ends = list(accumulate((self.parameters[i].numel() + _ALIGNED - 1) // _ALIGNED * _ALIGNED for i in self._order))
        self._places = {i: (begin, end) for i, begin, end in zip(self._order, [0, *ends], ends, strict=False)}
        self._small = max((self._places[i][1] for i in self._order if not self._large[i]), default=0)
        self._count = ends[-1]
        self._first, self._second = (self.parameters[0].new_zeros(self._count) for _ in range(2))
        self._weights = self._gradients = self._first[:0]
        self._seen: dict[int, Tensor] = {}
        self._addresses: list[int] = []
        self._scale: Tensor | None = None

    @staticmethod
    def takes(parameters: Sequence[torch.nn.Parameter]) -> bool:
        """Whether these can lie in one piece: on the CPU, all of one dtype."""
        return all(parameter.is_cpu and parameter.dtype == parameters[0].dtype and parameter.layout == torch.strided for parameter in parameters)

    def _views(self, flat: Tensor) -> Iterator[Tensor]:
        for i, parameter in enumerate(self.parameters):
            begin = self._places[i][0]
            yield flat[begin : begin + parameter.numel()].view(parameter.shape)

    def _lay(self) -> None:
        """See to it that the parameters lie in flat memory."""
        if self._addresses == [parameter.data_ptr() for parameter in self.parameters]:
            return
        weight = self.parameters[0]
        if not self.takes(self.parameters):
            raise RuntimeError("the parameters are no longer on the CPU or of one dtype: build the optimiser after moving or casting the model")
        self._weights, self._gradients = weight.new_zeros(self._count), weight.new_zeros((self._small + _ROW - 1) // _ROW * _ROW)
        self._first, self._second = self._first.to(weight.dtype), self._second.to(weight.dtype)
        for parameter, view in zip(self.parameters, self._views(self._weights), strict=True):
            view.copy_(parameter.detach())
            parameter.data = view
        self._addresses = [parameter.data_ptr() for parameter in self.parameters]

    def _gather(self) -> None:
        """The gradients of small parameters, 0 where there is none, to flat memory; those of large ones without gaps."""
        parts: list[Tensor] = []
        small = [i for i in self._order if not self._large[i]]
        zeros = self._gradients.new_zeros(max([_ROW, *(self.parameters[i].numel() for i in small if self.parameters[i].grad is None)]))
        for i in small:
            gradient, count, (begin, end) = self.parameters[i].grad, self.parameters[i].numel(), self._places[i]
            parts.append(zeros[:count] if gradient is None else gradient.reshape(-1))
            if count < end - begin:
                parts.append(zeros[: end - begin - count])
        parts.append(zeros[: len(self._gradients) - self._small])
        torch.cat(parts, out=self._gradients)
        large = {i: self.parameters[i].grad for i in self._order if self._large[i]}
        self._seen = {i: gradient.contiguous() for i, gradient in large.items() if gradient is not None}

    def gradient_norm(self) -> Tensor:
        """As of `Optimizer`; the step goes by the gradients that this has seen."""
        self._lay()
        self._gather()
        # sums of single rows, which no number of threads changes
        rows = [torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in (self._gradients.view(-1, _ROW), *self._seen.values())]
        every = torch.cat(rows)
        sums = torch.linalg.vector_norm(torch.nn.functional.pad(every, (0, -len(every) % _ROW)).view(-1, _ROW), dim=1)
        found: Tensor = torch.linalg.vector_norm(sums)
        return found

    def scale_down(self, norm: float, found: Tensor) -> None:
        """As of `Optimizer`, but that the gradients are scaled on their way into the step, where they stand."""
        self._scale = (norm / (found + 1e-6)).clamp(max=1.0) if norm else None

    def step(self, closure: Closure) -> None:
        """One step by the gradients that the last `gradient_norm` has seen."""
        there = [parameter.grad is not None for parameter in self.parameters]
        self._steps = [step + has for step, has in zip(self._steps, there, strict=True)]
        with torch.no_grad():
            for group, begin, end, step, gradient in self._runs(there):
                weights, first, second = (flat[begin:end] for flat in (self._weights, self._first, self._second))
                options = {"betas": group["betas"], "eps": group["eps"], "weight_decay": group["weight_decay"]}
                ops.adamw(weights, gradient, first, second, step=step, learning_rate=group["lr"], grad_scale=self._scale, **options)
        increment_version([parameter for parameter, has in zip(self.parameters, there, strict=True) if has])

    def _runs(self, there: list[bool]) -> list[_Run]:
        runs: list[_Run] = []
        for i in self._order:
            group, step, (begin, end) = self._groups[i], self._steps[i], self._places[i]
            if not there[i]:
                continue
            if self._large[i]:
                gradient = self._seen[i].view(-1)
                runs.append(_Run(group, begin, begin + len(gradient), step, gradient))
            elif runs and runs[-1].group is group and runs[-1].step == step and runs[-1].end == begin:
                runs[-1] = _Run(group, runs[-1].begin, end, step, self._gradients[runs[-1].begin : end])
            else:
                runs.append(_Run(group, begin, end, step, self._gradients[begin:end]))
        return runs

    def zero_grad(self) -> None:
        self._seen = {}
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
