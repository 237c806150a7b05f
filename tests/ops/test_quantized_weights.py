"""What people do to quantised weights outside of cvmk: modules that are cast, extreme numbers, tensors put together by hand."""

from __future__ import annotations

import pytest
import torch

from cvmk import ops
from cvmk.ops.quantize import QuantizedWeight, quantize_int4, quantize_int8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_module_that_was_cast_is_refused(dtype: torch.dtype, bits: int, backend: str) -> None:
    """Its scales were read as float32 whatever they were, and behind their end."""
    with ops.use(backend):
        w = quantize_int8(torch.randn(200, 64)) if bits == 8 else quantize_int4(torch.randn(200, 64), 32)
        linear = ops.int8_linear if bits == 8 else ops.int4_linear

        class Layer(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("values", w.values)
                self.register_buffer("scales", w.scales)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                held = QuantizedWeight(self.values, self.scales, None, None, 200, 64, bits, w.group_size, w.layout)
                return linear(x, held)

        x = torch.randn(5, 64)
        assert torch.equal(Layer()(x), linear(x, w))
        with pytest.raises(TypeError, match=r"scales are torch\.\w+ and must be float32: a module that holds them was cast"):
            Layer().to(dtype)(x)


@pytest.mark.parametrize("symmetric", [False, True])
def test_ranges_past_the_largest_float(symmetric: bool) -> None:
    w = torch.full((2, 32), 3e38)
    w[:, ::2] *= -1
    w[1] *= 1e-3
    found = quantize_int4(w, 32, symmetric=symmetric)
    assert torch.isfinite(found.tensors()["scales"]).all()
    scales = found.tensors()["scales"]
    assert ((found.dequantize(torch.float64) - w.double()).abs() <= scales.double() * 0.5001).all()
    assert torch.isfinite(quantize_int8(w).dequantize(torch.float64)).all()


def test_weights_put_together_from_tensors_run_where_others_do() -> None:
    made = quantize_int8(torch.randn(40, 64))
    again = QuantizedWeight.from_tensors(made.tensors())
    x = torch.randn(3, 64)
    chosen = [[row.backend for row in ops.explain("int8_linear", x, each) if row.chosen] for each in (made, again)]
    assert chosen[0] == chosen[1] and again.layout == made.layout and torch.equal(ops.int8_linear(x, made), ops.int8_linear(x, again))
