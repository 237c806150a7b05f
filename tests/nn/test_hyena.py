"""Hyena against the paper's sums, written here for one row, one channel and one position at a time in float64."""

from __future__ import annotations

import cmath
import copy
import math

import pytest
import torch
from mixer_models import Make
from torch import Tensor

from cvmk.config.schema import ModelConfig
from cvmk.errors import ConfigError, DataError
from cvmk.nn import decays
from cvmk.nn.mixers import build_mixer
from cvmk.nn.mixers.hyena import Hyena, long_convolution
from cvmk.nn.positions import Span

LENGTH = 40


def mixer_of(causal: bool = True, **options: object) -> Hyena:
    torch.manual_seed(1)
    made = build_mixer("hyena", ModelConfig(**{"d_model": 8, "heads": 2, "max_length": LENGTH, **options}), causal).double().eval()
    assert isinstance(made, Hyena)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def taps_of(mixer: Hyena, t: int, length: int = LENGTH) -> Tensor:
    """The taps at distance t, [2, 8], of a mixer of 8 channels."""
    f = mixer.forwards.filter
    frequencies = [1e-4 + (15 - 1e-4) * i / 15 for i in range(16)]
    waves = [cmath.exp(-2j * math.pi * frequency * t / length) for frequency in frequencies]
    hidden = torch.tensor([t / length, *(wave.real for wave in waves), *(wave.imag for wave in waves)], dtype=torch.float64)
    for layer in range(3):
        hidden = torch.sin(f.frequency * (f.weights[layer] @ hidden + f.biases[layer]))
    rates = torch.tensor([math.log(100) / 1.5 + (math.log(100) / 0.3 - math.log(100) / 1.5) * c / 7 for c in range(8)], dtype=torch.float64)
    return (f.weights[3] @ hidden).view(2, 8) * torch.exp(-rates * t / length)


def law(mixer: Hyena, x: Tensor) -> Tensor:
    """One row x [T, d] of a causal mixer of 8 channels."""
    p = mixer.forwards
    u = x @ p.project.weight.T + p.project.bias
    rows = []
    for t in range(len(x)):
        taps = p.short.weight.T
        row = p.short.bias + taps[2] * u[t] + (taps[1] * u[t - 1] if t >= 1 else 0) + (taps[0] * u[t - 2] if t >= 2 else 0)
        rows.append(row)
    z, *gates = torch.stack(rows).split(8, dim=-1)
    taps = [taps_of(mixer, t) for t in range(len(x))]
    for n in range(2):
        convolved = torch.stack([sum(taps[t - s][n] * z[s] for s in range(t + 1)) for t in range(len(x))])
        z = gates[n] * (convolved + p.skip[n] * z)
    return z @ mixer.out.weight.T + mixer.out.bias


def test_it_is_what_the_paper_says() -> None:
    mixer, x = mixer_of(), torch.randn(2, 23, 8, dtype=torch.float64)
    with torch.no_grad():
        found = mixer(x, Span(0, 23, 23), False)[0]
        for row in range(2):
            torch.testing.assert_close(found[row], law(mixer, x[row]), atol=1e-10, rtol=1e-10)


def test_gradients_are_those_of_the_sums() -> None:
    mixer, x = mixer_of(), torch.randn(1, 11, 8, dtype=torch.float64, requires_grad=True)
    seed, inputs = torch.randn(11, 8, dtype=torch.float64), [x, *mixer.parameters()]
    found = torch.autograd.grad((mixer(x, Span(0, 11, 11), False)[0][0] * seed).sum(), inputs)
    expected = torch.autograd.grad((law(mixer, x[0]) * seed).sum(), inputs)
    for a, b in zip(found, expected, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("count", [1, 4, 7])
def test_gradcheck(count: int) -> None:
    torch.manual_seed(0)
    z, taps = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, count, 3), (count, 3)))
    assert torch.autograd.gradcheck(long_convolution, (z, taps))


def test_a_convolution_of_thousands_keeps_its_digits_in_float32() -> None:
    torch.manual_seed(0)
    z, taps = torch.randn(1, 4096, 4), torch.randn(4096, 4)
    exact = long_convolution(z.double(), taps.double())
    assert float((long_convolution(z, taps) - exact).norm() / exact.norm()) < 1e-6
    direct = torch.stack([(taps[: t + 1].flip(0).double() * z[0, : t + 1].double()).sum(0) for t in (0, 1, 2047, 4095)])
    torch.testing.assert_close(exact[0, [0, 1, 2047, 4095]], direct, atol=1e-9, rtol=1e-9)


def test_taps_of_float32_are_those_of_float64() -> None:
    """Three layers of sines with a frequency of 14 would amplify the roundings of float32."""
    mixer = mixer_of().requires_grad_(False)
    at, exact = torch.arange(LENGTH), mixer.forwards.filter(torch.arange(LENGTH))
    single = mixer.float().forwards.filter
    assert single(at).dtype == torch.float32
    again = torch.cat([single(at[t : t + 1]) for t in range(LENGTH)])
    torch.testing.assert_close(again, single(at), atol=3e-7, rtol=0)
    assert float((single(at) - exact).abs().max()) < 1e-3  # of which the roundings of the weights are the cause


def test_a_model_in_bfloat16_has_the_filters_of_float32(make: Make) -> None:
    model = make(mixers=("hyena",), dtype=torch.float32)
    taps = model.decoder.blocks[0].mixer.forwards.filter(torch.arange(32))
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    again = make(mixers=("hyena",), dtype=torch.bfloat16)
    again.load_state_dict(narrow.state_dict())
    for one in (narrow, again):
        mixer = one.decoder.blocks[0].mixer
        assert mixer.forwards.short.weight.dtype == mixer.out.weight.dtype == torch.bfloat16
        assert torch.equal(mixer.forwards.filter(torch.arange(32)), taps)
    assert {parameter.dtype for parameter in narrow.to(torch.float64).parameters()} == {torch.float64}


def test_what_decays() -> None:
    mixer = mixer_of(causal=False)
    found = {f"{prefix}.{name}" for prefix, module in mixer.named_modules() for name, _ in module.named_parameters(recurse=False) if decays(module, name)}
    assert found == {"out.weight", *(f"{side}.{layer}.weight" for side in ("forwards", "backwards") for layer in ("project", "short"))}
    with pytest.raises(ConfigError, match=r"model\.d_model is 9, and must be even"):
        mixer_of(causal=False, d_model=9, heads=3)


def test_a_state_of_another_length_is_refused(make: Make) -> None:
    """The filters of a model are functions of the position over its max_length."""
    model, other = (make(mixers=("hyena",), max_length=length) for length in (32, 16))
    with torch.inference_mode():
        state = model.start(model.encode(torch.tensor([[5, 6, 7]])), max_length=6)
        model.step(torch.tensor([2]), state)
        saved = state.save()
        assert model.restore_decoder(saved).position == 1
        with pytest.raises(DataError, match="max_length = 32 and this one has 16"):
            other.restore_decoder(saved)


def test_bytes_grow_by_the_position(make: Make) -> None:
    model = make(mixers=("hyena",), dtype=torch.float32)
    assert model.decoder_state_bytes(5, 11) - model.decoder_state_bytes(5, 10) == 2 * 16 * 16  # layers, bytes, d
