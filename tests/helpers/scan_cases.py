"""Random arguments of the selective scan and of its single step, and how a backend is checked against the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cvmk.ops import selective_scan, selective_state_update, use


def inputs(
    batch: int,
    dim: int,
    states: int,
    length: int,
    *,
    B: int | None = 1,
    C: int | None = 1,
    optional: str = "D z delta_bias initial_state",
    dtype: torch.dtype = torch.float32,
    sequences: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random arguments in the range of a trained model; B and C with so many groups, or None for constant ones."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def weights(groups: int | None) -> Tensor:
        return normal(dim, states) if groups is None else normal(batch, groups, states, length).to(dtype)

    made = {
        "u": normal(batch, dim, length).to(dtype),
        "delta": (normal(batch, dim, length) - 2).to(dtype),
        "A": 0.02 - 8 * torch.rand(dim, states, generator=generator),
        "B": weights(B),
        "C": weights(C),
    }
    more = {
        "D": normal(dim),
        "z": (3 * normal(batch, dim, length)).to(dtype),
        "delta_bias": normal(dim),
        "initial_state": normal(batch if sequences is None else sequences, dim, states),
    }
    made.update({name: more[name] for name in optional.split()})
    return made


Outputs = dict[str, Tensor]


def run(arguments: dict[str, Tensor], backend: str, last: bool = True, **options: Any) -> Outputs:
    """Both outputs and every gradient, for gradients of the outputs that are random but always the same."""
    with use(backend):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in arguments.items()}
        scan: Any = selective_scan
        outputs = scan(**leaves, **options, return_last_state=True)
        generator = torch.Generator().manual_seed(7)
        grads = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
        count = 2 if last else 1
        gradients = torch.autograd.grad(outputs[:count], list(leaves.values()), grads[:count])
    return {"out": outputs[0].detach(), "last": outputs[1].detach()} | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def assert_within(found: Tensor, plain: Tensor, law: Tensor, factor: int, name: str) -> None:
    """Two baselines: at most `factor` times the error of the reference in the same dtype, in the mean and in the worst element.

    The floors are two roundings of the mean (eight for less than 256 numbers, whose errors are partly luck) and eight of the largest element.
    """
    assert found.dtype == plain.dtype and found.shape == law.shape, name
    if not found.numel():
        return
    eps = torch.finfo(found.dtype).eps
    errors = [x.double() - law for x in (found, plain)]
    for measure, floor in ((lambda x: x.pow(2).mean().sqrt().item(), (2 if found.numel() >= 256 else 8) * eps), (lambda x: x.abs().max().item(), 8 * eps)):
        error, other = (measure(x) for x in errors)
        assert error <= factor * other + floor * measure(law), (name, error, other, measure(law))


def check(backend: str, arguments: dict[str, Tensor], **options: Any) -> None:
    if not options.get("delta_softplus"):
        arguments = arguments | {name: arguments[name].abs() / 4 for name in ("delta", "delta_bias") if name in arguments}
    found, plain = run(arguments, backend, **options), run(arguments, "reference", **options)
    exact = run({name: tensor.double() for name, tensor in arguments.items()}, "reference", **options)
    for name, value in found.items():
        assert_within(value, plain[name], exact[name], 2 if name in ("out", "last") else 3, name)


def equal(a: Outputs, b: Outputs) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def step_inputs(
    batch: int,
    dim: int,
    states: int,
    *,
    heads: int | None = None,
    groups: int = 1,
    optional: str = "D z dt_bias",
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
    tied: bool = False,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = (dim,) if heads is None else (heads, dim)
    A = -8 * torch.rand(*rows, states, generator=generator)
    made = {
        "state": normal(batch, *rows, states).to(state_dtype),
        "x": normal(batch, *rows).to(dtype),
        "dt": (normal(batch, *rows) - 2).to(dtype),
        "A": A[..., :1].expand(*rows, states) if tied else A,
        "B": normal(batch, groups, states).to(dtype),
        "C": normal(batch, groups, states).to(dtype),
    }
    more = {"D": normal(*rows), "z": normal(batch, *rows).to(dtype), "dt_bias": normal(*rows)}
    return made | {name: more[name] for name in optional.split()}


def step(arguments: dict[str, Tensor], backend: str, softplus: bool = True) -> tuple[Tensor, Tensor]:
    own = {name: t.clone(memory_format=torch.preserve_format) if name == "state" else t for name, t in arguments.items()}
    with use(backend):
        return selective_state_update(**own, dt_softplus=softplus), own["state"]


def check_step(backend: str, arguments: dict[str, Tensor], softplus: bool = True) -> None:
    if not softplus:
        arguments = arguments | {name: arguments[name].abs() / 4 for name in ("dt", "dt_bias") if name in arguments}
    exact = step({name: t.double() for name, t in arguments.items()}, "reference", softplus)
    for name, found, plain, law in zip(("y", "state"), step(arguments, backend, softplus), step(arguments, "reference", softplus), exact, strict=True):
        assert_within(found, plain, law, 2, name)
