"""The pattern of bitsandbytes' test_ops.py for its quantised linears, written anew: every op's result has the stated shape, type and device and
agrees with the dense product, and the op behind it passes `torch.library.opcheck` with the weight in whatever layout this machine packs it.

Its grids: a [10, 20] times [30, 20] int8 product with and without bias, into every float type; 4-bit products of one row and of batches
over block sizes (those that cvmk has: 32, 64, 128).
"""

from __future__ import annotations

import pytest
import torch

from cvmk import ops
from cvmk.ops.int4_linear import prepare as prepare4
from cvmk.ops.int8_linear import prepare as prepare8

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SYMMETRIC = pytest.mark.parametrize("symmetric", [True, False])
BIAS = pytest.mark.parametrize("has_bias", [True, False])


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def agrees(got: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, relative: float = 0.0) -> None:
    """The shape, type and device, and an error of at most `relative` and four ulps of the largest value."""
    assert got.shape == exact.shape and got.dtype == dtype and got.device == exact.device and got.is_contiguous()
    assert (got.double() - exact).abs().max() <= (relative + 4 * torch.finfo(dtype).eps) * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", [None, *DTYPES])
@BIAS
@pytest.mark.parametrize("shape", [(10, 20), (1, 20), (2, 5, 20)])
def test_int8_linear(shape: tuple[int, ...], dtype: torch.dtype, out_dtype: torch.dtype | None, has_bias: bool) -> None:
    x, bias = random(*shape, dtype=dtype), random(30, dtype=dtype) if has_bias else None
    weight = ops.quantize_int8(random(30, 20))
    exact = torch.nn.functional.linear(x.double(), weight.dequantize(torch.float64), None if bias is None else bias.double())
    got = ops.int8_linear(x, weight, bias, out_dtype=out_dtype)
    agrees(got, exact, out_dtype or dtype, relative=0.02)  # a step of a row's 127 over twenty inputs
    arguments = prepare8(x, weight, bias, out_dtype=out_dtype)
    torch.library.opcheck(torch.ops.cvmk.int8_linear_forward.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [32, 64, 128])
@SYMMETRIC
@BIAS
def test_int4_linear(dtype: torch.dtype, block: int, symmetric: bool, has_bias: bool) -> None:
    weight = ops.quantize_int4(random(30, 256), block, symmetric=symmetric)
    dense, bias = weight.dequantize(torch.float64), random(30, dtype=dtype) if has_bias else None
    for shape in ((1, 256), (1, 1, 256), (10, 256), (2, 17, 256)):
        x = random(*shape, dtype=dtype)
        exact = torch.nn.functional.linear(x.double(), dense, None if bias is None else bias.double())
        agrees(ops.int4_linear(x, weight, bias), exact, dtype)
    arguments = prepare4(random(10, 256, dtype=dtype), weight, bias)
    torch.library.opcheck(torch.ops.cvmk.int4_linear_forward.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_through_autograd(dtype: torch.dtype) -> None:
    """The whole check, gradients included, of the weights as packed here."""
    x = random(10, 64, dtype=dtype).requires_grad_()
    torch.library.opcheck(torch.ops.cvmk.int8_linear_forward.default, prepare8(x.detach(), ops.quantize_int8(random(30, 64))))
    torch.library.opcheck(torch.ops.cvmk.int4_linear_forward.default, prepare4(x.detach(), ops.quantize_int4(random(30, 64), 32)))
    for weight, linear in ((ops.quantize_int8(random(30, 64)), ops.int8_linear), (ops.quantize_int4(random(30, 64), 32), ops.int4_linear)):
        (grad,) = torch.autograd.grad(linear(x, weight).sum(), x)
        expected = weight.dequantize(torch.float64).sum(0).expand(10, 64)
        assert grad.dtype == dtype and (grad.double() - expected).abs().max() <= 8 * torch.finfo(dtype).eps * weight.dequantize().abs().sum(0).max()
