"""`adamw` in plain PyTorch."""

from __future__ import annotations

from cvmk.ops._backend import Backend
from cvmk.ops.adamw import Call, numbers


def forward(c: Call) -> None:
    n = numbers(c)
    grad = c.grad if c.grad_scale is None else c.grad * c.grad_scale
    c.exp_avg.mul_(n.beta1).add_(grad, alpha=n.rest1)
    c.exp_avg_sq.mul_(n.beta2).addcmul_(grad, grad, value=n.rest2)
    c.param.mul_(n.keep).addcdiv_(c.exp_avg, c.exp_avg_sq.sqrt().mul_(n.root).add_(n.eps), value=-n.rate)


BACKENDS = (Backend("adamw", "reference", forward),)
