"""Recurrent mixers: what they compute, in both directions, whatever stands behind a row's end, and what they remember."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixer_models import VOCAB, make_model
from torch import Tensor

from cvmk.config.schema import ModelConfig
from cvmk.errors import ConfigError
from cvmk.nn import decays
from cvmk.nn.mixers import Mixer, build_mixer
from cvmk.nn.positions import Span
from cvmk.nn.state import row_nbytes

NAMES = ["ssru"]
WIDTH = 64
named = pytest.mark.parametrize("name", NAMES)
directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def mixer_of(name: str, causal: bool = True, dtype: torch.dtype = torch.float64, **options: Any) -> Mixer:
    torch.manual_seed(1)
    mixer = build_mixer(name, ModelConfig(**{"d_model": WIDTH, "heads": 4, **options}), causal)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer.to(dtype)


def rows(count: int, length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, length, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def whole(mixer: Mixer, x: Tensor, lengths: Tensor | None = None) -> Tensor:
    return mixer(x, Span(0, x.shape[1], x.shape[1], lengths), False)[0]


# -- what each computes -----------------------------------------------------------------------------------------------------------
def ssru_by_hand(mixer: Any, x: Tensor, channels: slice, reverse: bool) -> Tensor:
    """Kim et al. 2019, one step after the other."""
    gate = torch.sigmoid(x @ mixer.gate.weight.T + mixer.gate.bias)[..., channels]
    value = (x @ mixer.value.weight.T)[..., channels]
    cell, found = torch.zeros_like(value[:, 0]), [value[:, 0]] * x.shape[1]
    for t in range(x.shape[1])[:: -1 if reverse else 1]:
        cell = gate[:, t] * cell + (1 - gate[:, t]) * value[:, t]
        found[t] = cell.clamp(min=0)
    return torch.stack(found, 1)


@directions
@pytest.mark.parametrize("scale", [1.0, 300.0], ids=["usual", "saturated"])
def test_ssru_is_the_papers(causal: bool, scale: float) -> None:
    """Where gates are 0 or 1 to rounding, too: nothing is divided by them."""
    mixer, x = mixer_of("ssru", causal), rows(3, 9)
    with torch.no_grad():
        mixer.gate.weight.mul_(scale)  # type: ignore[union-attr,operator]
    leaves = [x.requires_grad_(), *mixer.parameters()]
    if causal:
        want = ssru_by_hand(mixer, x, slice(None), False)
    else:
        want = torch.cat([ssru_by_hand(mixer, x, slice(0, WIDTH // 2), False), ssru_by_hand(mixer, x, slice(WIDTH // 2, None), True)], -1)
    found = whole(mixer, x)
    torch.testing.assert_close(found, want, atol=1e-12, rtol=1e-12)
    weights = torch.randn_like(want)
    for got, expected in zip(torch.autograd.grad(found, leaves, weights), torch.autograd.grad(want, leaves, weights), strict=True):
        assert expected.isfinite().all()
        torch.testing.assert_close(got, expected, atol=1e-11 * scale, rtol=1e-9)


def test_ssru_in_float32_is_exact_where_a_gate_stays_open() -> None:
    """A gate of 1 - 1e-7 keeps what a cell holds; the drive that belongs to it is neither lost nor blown up."""
    mixer = mixer_of("ssru", dtype=torch.float32)
    with torch.no_grad():
        mixer.gate.weight.zero_()  # type: ignore[union-attr,operator]
        mixer.gate.bias.copy_(torch.linspace(-200, 200, WIDTH))  # type: ignore[union-attr,operator]
    x = rows(2, 12, torch.float32).requires_grad_()
    found, want = whole(mixer, x), ssru_by_hand(mixer.double(), x.double(), slice(None), False)
    torch.testing.assert_close(found.double(), want, atol=1e-6, rtol=1e-5)
    mixer.float()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(whole(mixer, x).sum(), [x, *mixer.parameters()]))


def test_ssru_halves_need_an_even_width() -> None:
    config = ModelConfig(d_model=9, heads=1)
    with pytest.raises(ConfigError, match=r"model\.d_model is 9, and the mixer ssru .* make it even"):
        build_mixer("ssru", config, causal=False)
    assert build_mixer("ssru", config, causal=True).causal


# -- the contract -----------------------------------------------------------------------------------------------------------------
@named
@directions
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_its_padding(name: str, causal: bool, dtype: torch.dtype) -> None:
    """Rows of different lengths, one of padding only, beside themselves alone; gradients too."""
    mixer, x, lengths = mixer_of(name, causal, dtype), rows(4, 9, dtype), [9, 4, 1, 0]
    real = torch.arange(9) < torch.tensor(lengths)[:, None]
    close = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 0.04}[dtype]
    padded = [x.masked_fill(~real[..., None], filler).requires_grad_() for filler in (0.0, 7.0)]
    one, other = (whole(mixer, each, torch.tensor(lengths)) for each in padded)
    assert torch.equal(one[real], other[real])
    weights = torch.randn_like(one) * real[..., None]
    grads = [torch.autograd.grad(out, [each, *mixer.parameters()], weights) for out, each in ((one, padded[0]), (other, padded[1]))]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True)) and not grads[0][0][~real].any()
    for row, length in enumerate(lengths):
        alone = whole(mixer, x[row : row + 1, :length])
        torch.testing.assert_close(one[row : row + 1, :length], alone, atol=close, rtol=close)


@named
def test_a_direction_sees_only_what_is_behind_it(name: str) -> None:
    causal, both, x = mixer_of(name), mixer_of(name, causal=False), rows(1, 7).requires_grad_()
    for mixer, sees in ((causal, lambda t, s: s <= t), (both, lambda t, s: True)):
        for t in range(7):
            (grad,) = torch.autograd.grad(whole(mixer, x)[:, t].sum(), x)
            assert [bool(grad[0, s].any()) for s in range(7)] == [sees(t, s) for s in range(7)]


@named
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_equal_the_parallel_form(name: str, dtype: torch.dtype) -> None:
    """One by one and in right-padded pieces of different lengths; in bfloat16 neither is farther from float64 than the other by much."""
    mixer, x = mixer_of(name, dtype=dtype), rows(3, 10, dtype)
    exact = whole(mixer_of(name).double(), x.double()) if dtype is torch.bfloat16 else None
    with torch.inference_mode():
        full = whole(mixer, x)
        state = mixer.start(3, 10, x.device, dtype)
        steps = torch.cat([mixer.extend(x[:, t : t + 1], Span(t, 1, t + 1), state) for t in range(10)], 1)
        pieces, ragged, at = torch.full_like(x, float("nan")), mixer.start(3, 10, x.device, dtype), torch.zeros(3, dtype=torch.long)
        for lengths in ([4, 0, 1], [1, 3, 9], [5, 7, 0]):
            piece = torch.zeros(3, max(lengths), WIDTH, dtype=dtype)
            for row, length in enumerate(lengths):
                piece[row, :length] = x[row, at[row] : at[row] + length]
            out = mixer.extend(piece, Span(at, piece.shape[1], 10, torch.tensor(lengths)), ragged)
            for row, length in enumerate(lengths):
                pieces[row, at[row] : at[row] + length] = out[row, :length]
            at = at + torch.tensor(lengths)
    close = 2e-6 if dtype is torch.float32 else 0.02 * full.abs().max().item()
    for found in (steps, pieces):
        torch.testing.assert_close(found, full, atol=close, rtol=close)
        if exact is not None:
            assert (found - exact).abs().mean() <= 1.5 * (full - exact).abs().mean() + 1e-4
    for tensor_name in state.layout:
        torch.testing.assert_close(ragged[tensor_name], state[tensor_name], atol=close, rtol=close)


@named
def test_lengths_of_0_and_1_and_no_rows(name: str) -> None:
    for causal in (True, False):
        mixer = mixer_of(name, causal)
        for shape in ((2, 0), (0, 3), (2, 1)):
            assert whole(mixer, rows(*shape)).shape == (*shape, WIDTH)
    mixer = mixer_of(name)
    with torch.inference_mode():
        state = mixer.start(2, 4, torch.device("cpu"), torch.float64)
        assert mixer.extend(rows(2, 0), Span(0, 0, 0), state).shape == (2, 0, WIDTH)
        torch.testing.assert_close(mixer.extend(rows(2, 1), Span(0, 1, 1), state), whole(mixer, rows(2, 1)), atol=1e-13, rtol=0)


BYTES = {"ssru": lambda itemsize: 4 * WIDTH}
"""Of a row's state in a model whose numbers have so many bytes, as the docstrings say."""
DECAYING = {"ssru": {"gate.weight", "value.weight"}}


@named
def test_the_state_is_as_large_as_stated(name: str) -> None:
    mixer = mixer_of(name)
    for dtype in (torch.float32, torch.bfloat16):
        assert row_nbytes(mixer.state_layout(dtype), 7) == row_nbytes(mixer.state_layout(dtype), 7000) == BYTES[name](dtype.itemsize)


@named
@directions
def test_only_matrices_decay(name: str, causal: bool) -> None:
    mixer = mixer_of(name, causal)
    found = {
        f"{path}.{own}".lstrip(".") for path, module in mixer.named_modules() for own, _ in module.named_parameters(recurse=False) if decays(module, own)
    }
    assert {key.split(".", 2)[-1] if key.startswith("directions.") else key for key in found} == DECAYING[name]


@named
def test_compiles_as_one_graph(name: str) -> None:
    model = make_model((name,), torch.float32, d_model=WIDTH, encoder_layers=1, decoder_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for s, t in ((5, 4), (7, 6)):
        src, tgt = torch.randint(4, VOCAB, (3, s)), torch.randint(4, VOCAB, (3, t))
        src[0, -2:] = 0
        logits = compiled(src, tgt)[0]
        torch.testing.assert_close(logits, model(src, tgt)[0], atol=1e-5, rtol=1e-5)
        logits.sum().backward()
