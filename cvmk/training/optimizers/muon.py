"""Muon (Jordan et al. 2024): momentum, made orthogonal, for matrices of hidden layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.autograd.graph import increment_version

from cvmk.training.optimizers.base import Closure, Optimizer


class Muon(Optimizer):
    """`torch.optim.Muon`, which takes each projection of a matrix that stacks several (queries, keys and values) as the matrix that it is.

    groups   in the form of torch.optim, of matrices.
    rows     by id of the matrix: the rows of each of its projections.
    options  what `torch.optim.Muon` takes.
    """

    def __init__(self, groups: list[dict[str, Any]], rows: Mapping[int, Sequence[int]], **options: Any) -> None:
        self._rows = [rows[id(matrix)] for group in groups for matrix in group["params"]]
        parts = [{**group, "params": [part for matrix in group["params"] for part in _parts(matrix, rows[id(matrix)])]} for group in groups]
        super().__init__(torch.optim.Muon(parts, **options))
        self._parts, self.parameters = self.parameters, [matrix for group in groups for matrix in group["params"]]

    def step(self, closure: Closure) -> None:
        parts = iter(self._parts)
        for matrix, rows in zip(self.parameters, self._rows, strict=True):
            gradients = [None] * len(rows) if matrix.grad is None else matrix.grad.split(list(rows))
            for weight, gradient in zip(matrix.detach().split(list(rows)), gradients, strict=True):
                part = next(parts)
                part.data, part.grad = weight, gradient  # the matrix may have been laid elsewhere
        self.inner.step()
        increment_version([matrix for matrix in self.parameters if matrix.grad is not None])

    def zero_grad(self) -> None:
        for parameter in (*self.parameters, *self._parts):
            parameter.grad = None


def _parts(matrix: torch.nn.Parameter, rows: Sequence[int]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(part) for part in matrix.detach().split(list(rows))]
