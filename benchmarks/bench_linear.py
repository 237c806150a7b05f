"""int8_linear and int4_linear beside bf16 linear and PyTorch's own quantised products; fused_linear beside F.linear and an activation.

`-k cpu` gives the table; `-k cliff` the rows around the sizes where a kernel changes its way of working. fused_linear's rows are layers in training, on a
batch of 120 sentences of 17 tokens: forward pass, and both passes with the gradients of input, weight and bias; in float32, and with float32 weights and
bfloat16 inputs under autocast, as in `cvmk train`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from limits import cpu_limit
from torch import Tensor
from torch.nn import functional as F

from cvmk import ops
from cvmk.nn.linear import activate

ROWS = (1, 4, 16, 32, 64, 256, 1024)
CLIFF = (2, 3, 4, 5, 8, 15, 16, 17, 18, 24, 31, 32, 33, 48, 63, 64, 65, 66, 96, 127, 128, 129, 255, 256, 257)  # `-k cliff`: no step may cost much
TRAINED = 120 * 17  # rows of a batch
LAYERS = (  # K, N, activation: of models of d 128, 256 and 512
    (128, 384, None), (128, 128, None), (128, 256, "relu"), (256, 128, None), (256, 768, None), (256, 512, "gelu"), (512, 256, None),
    (512, 1536, None), (512, 2048, "relu"), (2048, 512, None), (512, 4096, "swiglu"),
)  # fmt: skip
SIZES = ((512, 512), (512, 2048), (2048, 512), (4096, 4096))  # K, N


def _data(rows: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    k, n = size
    return torch.randn(rows, k, dtype=torch.bfloat16), torch.randn(n, k) * k**-0.5


def _int8(compare: Callable[..., Any], rows: int, size: tuple[int, int]) -> None:
    x, weight = _data(rows, size)
    packed, dense = ops.quantize_int8(weight), weight.bfloat16()
    scale = weight.abs().amax(1) / 127
    columns = (weight / scale[:, None]).round().to(torch.int8).t().contiguous()

    def int_mm() -> Tensor:
        amax = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12)
        quantised = (x / (amax / 127)).round().to(torch.int8)
        return (torch._int_mm(quantised, columns).float() * (amax / 127) * scale).bfloat16()

    operations = 2 * rows * size[0] * size[1]
    with torch.inference_mode():
        compare(
            lambda: ops.int8_linear(x, packed),
            {"bf16 linear": lambda: F.linear(x, dense), "_int_mm": int_mm},
            case=f"int8_linear M{rows} K{size[0]} N{size[1]}",
            limit=cpu_limit(operations=operations, dtype=torch.int8, traffic=weight.numel() + 2 * rows * sum(size)),
        )


def _int4(compare: Callable[..., Any], rows: int, size: tuple[int, int], group: int = 128, *, symmetric: bool = True, ordered: bool = False) -> None:
    x, weight = _data(rows, size)
    order = torch.randperm(size[0]) if ordered else None
    packed, dense = ops.quantize_int4(weight, group, symmetric=symmetric, order=order), weight.bfloat16()
    codes = torch.randint(0, 16, weight.shape, dtype=torch.int32)
    theirs = torch._convert_weight_to_int4pack_for_cpu(codes, 2)
    scales = torch.rand(size[0] // group, size[1], 2, dtype=torch.bfloat16)
    operations = 2 * rows * size[0] * size[1]
    options = ("" if symmetric else " zeros") + (" order" if ordered else "")
    with torch.inference_mode():
        compare(
            lambda: ops.int4_linear(x, packed),
            {"bf16 linear": lambda: F.linear(x, dense), "int4pack_mm": lambda: torch._weight_int4pack_mm_for_cpu(x, theirs, group, scales)},
            case=f"int4_linear g{group}{options} M{rows} K{size[0]} N{size[1]}",
            limit=cpu_limit(operations=operations, dtype=torch.bfloat16, traffic=weight.numel() / 2 + 2 * rows * sum(size)),
        )


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"K{size[0]} N{size[1]}")
@pytest.mark.parametrize("rows", ROWS)
def test_cpu_int8_linear(compare: Callable[..., Any], rows: int, size: tuple[int, int]) -> None:
    _int8(compare, rows, size)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"K{size[0]} N{size[1]}")
@pytest.mark.parametrize("rows", ROWS)
def test_cpu_int4_linear(compare: Callable[..., Any], rows: int, size: tuple[int, int]) -> None:
    _int4(compare, rows, size)


@pytest.mark.parametrize("rows", (1, 16, 256))
@pytest.mark.parametrize("group,symmetric,ordered", ((64, True, False), (32, True, False), (128, False, False), (32, False, True)))
def test_cpu_int4_formats(compare: Callable[..., Any], rows: int, group: int, symmetric: bool, ordered: bool) -> None:
    """Small groups, zero points and activation order beside the same peers."""
    _int4(compare, rows, (2048, 512), group, symmetric=symmetric, ordered=ordered)


@pytest.mark.parametrize("both", (False, True), ids=("forward", "both passes"))
@pytest.mark.parametrize("lowered", (True, False), ids=("bf16", "fp32"))
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: "K{} N{} {}".format(*layer))
def test_cpu_fused_linear(compare: Callable[..., Any], layer: tuple[int, int, Any], lowered: bool, both: bool) -> None:
    k, n, activation = layer
    dtype = torch.bfloat16 if lowered else torch.float32
    x, weight, bias = torch.randn(TRAINED, k).to(dtype).requires_grad_(), (torch.randn(n, k) * k**-0.5).requires_grad_(), torch.zeros(n).requires_grad_()
    leaves, columns = (x, weight, bias), n // 2 if activation == "swiglu" else n
    g = torch.randn(TRAINED, columns).to(dtype)

    def step(function: Callable[[], Tensor]) -> Callable[[], Any]:
        def run() -> Any:
            with torch.autocast("cpu", torch.bfloat16, enabled=lowered, cache_enabled=False):  # a step uses a weight once
                out = function()
            return torch.autograd.grad(out, leaves, g) if both else out

        return run

    passes = 3 if both else 1
    compare(
        step(lambda: ops.fused_linear(*leaves, activation=activation)),
        {"F.linear": step(lambda: activate(F.linear(*leaves), activation))},
        case=f"fused_linear {'both passes' if both else 'forward'} {'bf16' if lowered else 'fp32'} M{TRAINED} K{k} N{n} {activation or ''}".rstrip(),
        limit=cpu_limit(operations=passes * 2 * TRAINED * k * n, dtype=dtype),
    )


@pytest.mark.parametrize("rows", CLIFF)
def test_cliff_int8_linear(compare: Callable[..., Any], rows: int) -> None:
    _int8(compare, rows, (2048, 512))


@pytest.mark.parametrize("rows", CLIFF)
def test_cliff_int4_linear(compare: Callable[..., Any], rows: int) -> None:
    _int4(compare, rows, (2048, 512))
