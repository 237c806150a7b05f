"""GPU rows of int8_linear and int4_linear beside bf16 products and every quantised product of PyTorch, torchao and bitsandbytes. Run by contestants.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from cvmk import ops
from gpu.contestants import INT8, Row, peer

GROUP = 128


def rows(device: torch.device, small: bool) -> Iterator[Row]:
    shapes = [(m, 4096, 4096) for m in (1, 16, 17, 64, 65, 256, 1024, 8192)] + [(m, k, n) for k, n in ((512, 2048), (1024, 1024)) for m in (1, 64, 1024)]
    for m, k, n in [(3, 256, 64)] if small else shapes:
        with torch.no_grad():
            yield _int8(device, m, k, n)
            yield _int4(device, m, k, n)


def _data(device: torch.device, m: int, k: int, n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(m, k, device=device).bfloat16(), torch.randn(n, k, device=device) * k**-0.5


def _int8(device: torch.device, m: int, k: int, n: int) -> Row:
    x, weight = _data(device, m, k, n)
    packed, dense = ops.quantize_int8(weight), weight.bfloat16()
    scale = weight.abs().amax(1) / 127
    columns = (weight / scale[:, None]).round().to(torch.int8).t()

    def int_mm() -> Tensor:
        amax = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12)
        quantised = (x / (amax / 127)).round().to(torch.int8)
        return (torch._int_mm(quantised, columns).float() * (amax / 127) * scale).bfloat16()

    def scaled_mm() -> Callable[[], Tensor]:
        top = torch.finfo(torch.float8_e4m3fn).max
        w_scale = (weight.abs().amax(1, keepdim=True) / top).t().contiguous()
        w = (weight / w_scale.t()).to(torch.float8_e4m3fn).t()

        def run() -> Tensor:
            x_scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / top
            return torch._scaled_mm((x / x_scale).to(torch.float8_e4m3fn), w, x_scale, w_scale, out_dtype=torch.bfloat16)

        run()
        return run

    def torchao() -> Callable[[], Tensor]:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        layer = _layer(dense)
        quantize_(layer, Int8DynamicActivationInt8WeightConfig())
        layer(x)
        return lambda: layer(x)

    def bitsandbytes() -> Callable[[], Tensor]:
        import bitsandbytes as bnb

        layer = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(dense.half(), requires_grad=False)
        layer = layer.to(x.device)
        half = x.half()
        layer(half)
        return lambda: layer(half)

    return Row(
        "int8_linear",
        f"M{m} K{k} N{n}",
        lambda: ops.int8_linear(x, packed),
        {
            "bf16": lambda: F.linear(x, dense),
            "_int_mm": int_mm,
            "_scaled_mm fp8": peer("_scaled_mm", scaled_mm),
            "torchao": peer("torchao", torchao),
            "bitsandbytes": peer("bitsandbytes", bitsandbytes),
        },
        operations=2.0 * m * k * n,
        rate=INT8,
        traffic=float(k * n + 2 * m * (k + n)),
        targets=(("bf16", 1.6 if m >= 1024 else 1.5 if m <= 64 else 1.0),),
        host=m <= 64,
        arguments=functools.partial(ops.explain, "int8_linear", x, packed),
    )


def _int4(device: torch.device, m: int, k: int, n: int) -> Row:
    x, weight = _data(device, m, k, n)
    packed, dense = ops.quantize_int4(weight, GROUP), weight.bfloat16()

    def tinygemm() -> Callable[[], Tensor]:
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
        theirs = torch._convert_weight_to_int4pack(codes, 8)
        scales = torch.rand(k // GROUP, n, 2, device=device).bfloat16()
        torch._weight_int4pack_mm(x, theirs, GROUP, scales)
        return lambda: torch._weight_int4pack_mm(x, theirs, GROUP, scales)

    def torchao() -> Callable[[], Tensor]:
        from torchao.quantization import Int4WeightOnlyConfig, quantize_

        layer = _layer(dense)
        quantize_(layer, Int4WeightOnlyConfig(group_size=GROUP))
        layer(x)
        return lambda: layer(x)

    def bitsandbytes() -> Callable[[], Tensor]:
        import bitsandbytes as bnb

        layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(dense, requires_grad=False, quant_type="nf4")
        layer = layer.to(x.device)
        layer(x)
        return lambda: layer(x)

    return Row(
        "int4_linear",
        f"M{m} K{k} N{n} g{GROUP}",
        lambda: ops.int4_linear(x, packed),
        {
            "bf16": lambda: F.linear(x, dense),
            "_weight_int4pack_mm": peer("_weight_int4pack_mm", tinygemm),
            "torchao": peer("torchao", torchao),
            "bitsandbytes": peer("bitsandbytes", bitsandbytes),
        },
        operations=2.0 * m * k * n,
        traffic=k * n * (0.5 + 4 / GROUP) + 2.0 * m * (k + n),
        targets=(("bf16", 3.0 if m <= 16 else 1.0),),
        host=m <= 16,
        arguments=functools.partial(ops.explain, "int4_linear", x, packed),
    )


def _layer(weight: Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    return layer
