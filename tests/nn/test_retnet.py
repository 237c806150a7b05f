"""Retention against the paper's recurrence, written here for one row and one position at a time in complex numbers of float64."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch import Tensor

from cvmk.config.schema import ModelConfig
from cvmk.errors import ConfigError
from cvmk.nn import CVMTransformer, decays
from cvmk.nn.mixers import build_mixer
from cvmk.nn.mixers.retnet import RetNet, log_decays, remembered, retention
from cvmk.nn.positions import Span


def mixer_of(causal: bool = True, **options: object) -> RetNet:
    torch.manual_seed(1)
    made = build_mixer("retnet", ModelConfig(**{"d_model": 16, "heads": 2, "max_length": 256, **options}), causal).double().eval()
    assert isinstance(made, RetNet)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def law(mixer: RetNet, x: Tensor, eps: float = 1e-5, base: float = 10000.0) -> Tensor:
    """One row x [T, d] of a causal mixer of two heads of 8 channels."""
    heads, size, width = 2, 8, 16
    weight, bias = mixer.forwards.qkvg.weight, mixer.forwards.qkvg.bias
    states = [torch.zeros(size // 2, 2 * size, dtype=torch.complex128) for _ in range(heads)]
    rows = []
    for n, token in enumerate(x):
        q, k, v, gate = (weight @ token + bias).split((width, width, 2 * width, 2 * width))
        outputs = []
        for head in range(heads):
            turn = torch.tensor([cmath.exp(1j * n * base ** (-2 * i / size)) for i in range(size // 2)], dtype=torch.complex128)
            gamma = 1 - 2.0 ** (-5 - head)
            key, query = (torch.complex(*y[head * size : (head + 1) * size].chunk(2)) * turn for y in (k, q))
            value = v[head * 2 * size : (head + 1) * 2 * size]
            states[head] = gamma * states[head] + torch.outer(key.conj(), value.to(torch.complex128))
            o = (query @ states[head]).real / math.sqrt(size)
            outputs.append((o - o.mean()) / torch.sqrt(((o - o.mean()) ** 2).mean() + eps))
        gated = gate * torch.sigmoid(gate) * torch.cat(outputs)
        rows.append(mixer.out.weight @ gated + mixer.out.bias)
    return torch.stack(rows)


def test_the_parallel_form_is_the_recurrence_of_the_paper() -> None:
    """150 positions: two chunk borders are crossed, and the last chunk is not full."""
    mixer, x = mixer_of(), torch.randn(2, 150, 16, dtype=torch.float64)
    with torch.no_grad():
        found = mixer(x, Span(0, 150, 150), False)[0]
        for row in range(2):
            torch.testing.assert_close(found[row], law(mixer, x[row]), atol=1e-10, rtol=0)


def test_gradients_are_those_of_the_recurrence() -> None:
    mixer, x = mixer_of(), torch.randn(1, 70, 16, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(70, 16, dtype=torch.float64)
    inputs = [x, *mixer.parameters()]
    found = torch.autograd.grad((mixer(x, Span(0, 70, 70), False)[0][0] * seed).sum(), inputs)
    expected = torch.autograd.grad((law(mixer, x[0]) * seed).sum(), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    v, memory = (torch.randn(1, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (3, 2))
    decay = log_decays(2, q)
    assert torch.autograd.gradcheck(lambda q, k, v, m: (retention(q, k, v, decay, m), remembered(k, v, decay, m, torch.tensor([2]))), (q, k, v, memory))


def test_decays_are_one_a_head() -> None:
    assert torch.allclose(log_decays(3, torch.zeros((), dtype=torch.float64)).exp(), 1 - torch.tensor([1 / 32, 1 / 64, 1 / 128], dtype=torch.float64))
    assert log_decays(40, torch.zeros(())).lt(0).all()  # 1 - 2^-44 is 1 in float32, and its logarithm is not 0


def test_long_sums_keep_their_digits_in_float32() -> None:
    """4,096 positions of the slowest decay of 8 heads: the state is a sum of thousands."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 8, 4096, size, dtype=torch.float64) for size in (16, 16, 32))
    exact = retention(q, k, v, log_decays(8, q))
    narrow = [x.float() for x in (q, k, v)]
    found = retention(*narrow, log_decays(8, narrow[0]))
    assert float((found - exact).norm() / exact.norm()) < 1e-6


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match=r"model\.heads is 2, and retnet turns pairs: its heads of 5 channels"):
        mixer_of(d_model=10)
    with pytest.raises(ConfigError, match=r"model\.d_model is 9, and must be even"):
        mixer_of(causal=False, d_model=9, heads=1)
    assert mixer_of(causal=False, d_model=12, heads=3).forwards.size == 2  # three heads of half the size each


def test_all_matrices_decay_and_nothing_else() -> None:
    model = CVMTransformer(ModelConfig(d_model=8, ffn=8, heads=2, encoder_layers=1, decoder_layers=1, encoder_mixers=["retnet"]), 9)
    mixer = model.encoder.blocks[0].mixer
    found = {f"{prefix}.{name}" for prefix, module in mixer.named_modules() for name, _ in module.named_parameters(recurse=False) if decays(module, name)}
    assert found == {"forwards.qkvg.weight", "backwards.qkvg.weight", "out.weight"}
    assert sum(parameter.numel() for name, parameter in mixer.named_parameters() if name.endswith("weight")) == 8 * 8 * 8
