"""RWKV-6's time mixing against the paper's recurrence, written here for one row and one position at a time in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cvmk.config.schema import ModelConfig
from cvmk.errors import ConfigError
from cvmk.nn import decays
from cvmk.nn.mixers import build_mixer
from cvmk.nn.mixers.rwkv import RWKV, wkv
from cvmk.nn.positions import Span


def mixer_of(causal: bool = True, **options: object) -> RWKV:
    torch.manual_seed(1)
    made = build_mixer("rwkv", ModelConfig(**{"d_model": 16, "heads": 2, "max_length": 256, **options}), causal).double().eval()
    assert isinstance(made, RWKV)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def recurrence(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One head: r, k and w [T, Dk], v [T, Dv], u [Dk], state [Dk, Dv]; w is the decay itself."""
    rows = []
    for t in range(len(r)):
        product = torch.outer(k[t], v[t])
        rows.append(r[t] @ (state + torch.diag(u) @ product))
        state = torch.diag(w[t]) @ state + product
    return torch.stack(rows), state


def law(mixer: RWKV, x: Tensor) -> Tensor:
    """One row x [T, d] of a causal mixer of two heads of 8 channels; i is 0 to 4 for r, k, v, g and d."""
    p = mixer.forwards
    before = torch.cat((torch.zeros_like(x[:1]), x[:-1]))
    shifted = x + (before - x) * p.mix_first
    mixed = []
    for i in range(5):
        down = p.mix_down.view(5, -1, 16)[i]
        lora = p.mix[i] + torch.tanh(shifted @ down.T) @ p.mix_up[i].T
        mixed.append(x + (before - x) * lora)
    r, k, v = (y @ layer.weight.T for y, layer in zip(mixed, (p.receptance, p.key, p.value), strict=False))
    gate = mixed[3] @ p.gate.weight.T
    w = torch.exp(-torch.exp(p.decay + torch.tanh(mixed[4] @ p.decay_down.T) @ p.decay_up.T))
    heads = []
    for at in (slice(0, 8), slice(8, 16)):
        y, _ = recurrence(r[:, at], k[:, at], v[:, at], w[:, at], p.bonus[at], torch.zeros(8, 8, dtype=x.dtype))
        y = (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, unbiased=False, keepdim=True) + 64e-5)
        heads.append(y * p.norm.weight[at] + p.norm.bias[at])
    return (gate * torch.sigmoid(gate) * torch.cat(heads, dim=-1)) @ mixer.out.weight.T + mixer.out.bias


def test_the_parallel_form_is_the_recurrence_of_the_paper() -> None:
    """50 positions: six chunk borders are crossed, and the last chunk is not full."""
    mixer, x = mixer_of(), torch.randn(2, 50, 16, dtype=torch.float64)
    with torch.no_grad():
        found = mixer(x, Span(0, 50, 50), False)[0]
        for row in range(2):
            torch.testing.assert_close(found[row], law(mixer, x[row]), atol=1e-11, rtol=1e-11)


def test_gradients_are_those_of_the_recurrence() -> None:
    mixer, x = mixer_of(), torch.randn(1, 37, 16, dtype=torch.float64, requires_grad=True)
    seed, inputs = torch.randn(37, 16, dtype=torch.float64), [x, *mixer.parameters()]
    found = torch.autograd.grad((mixer(x, Span(0, 37, 37), False)[0][0] * seed).sum(), inputs)
    expected = torch.autograd.grad((law(mixer, x[0]) * seed).sum(), inputs)
    for a, b in zip(found, expected, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def parts(count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """r, k, v, log decays, bonus and state of one row, two heads of 2 and 3 channels."""
    torch.manual_seed(0)
    r, k, w = (torch.randn(1, 2, count, 2, dtype=dtype) for _ in range(3))
    v, u, state = torch.randn(1, 2, count, 3, dtype=dtype), torch.randn(2, 2, dtype=dtype), torch.randn(1, 2, 2, 3, dtype=dtype)
    return [r, k, v, -w.exp(), u, state]


@pytest.mark.parametrize("count", [1, 3, 18])
def test_gradcheck(count: int) -> None:
    assert torch.autograd.gradcheck(wkv, [x.requires_grad_() for x in parts(count)])


def check_against_the_recurrence(found: tuple[Tensor, Tensor], given: list[Tensor], tolerance: float) -> None:
    r, k, v, log_decay, u, state = (x.double() for x in given)
    for head in range(2):
        expected, last = recurrence(r[0, head], k[0, head], v[0, head], log_decay[0, head].exp(), u[head], state[0, head])
        for a, b in ((found[0][0, head], expected), (found[1][0, head], last)):
            assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


@pytest.mark.parametrize("kind", ["none", "slow", "sudden", "forget"])
def test_float32_is_enough_for_every_decay(kind: str) -> None:
    """No decay at all, thousands of slow ones, single ones of e^-3000 between slow ones, and decays that are 0."""
    given = parts(600, torch.float32)
    log_decay = {"none": 0.0, "slow": -1e-4, "sudden": -1e-3, "forget": -4.8e8}[kind] * torch.ones_like(given[3])
    if kind == "sudden":
        log_decay[:, :, ::5] = -3000.0
    given[3] = log_decay
    found = wkv(*given)
    check_against_the_recurrence(found, given, 3e-6)
    given = [x.requires_grad_() for x in given]
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(wkv(*given)[0].sum(), given))


def test_a_decay_beyond_every_number_forgets_and_has_finite_gradients() -> None:
    mixer = mixer_of().float()
    with torch.no_grad():
        mixer.forwards.decay.fill_(200.0)  # exp(200) is infinite in float32
    x = torch.randn(1, 20, 16, requires_grad=True)
    mixed = mixer(x, Span(0, 20, 20), False)[0]
    mixed.square().sum().backward()
    assert mixed.isfinite().all() and x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in mixer.parameters())


def test_initial_values_are_the_published_ones() -> None:
    torch.manual_seed(0)
    made = build_mixer("rwkv", ModelConfig(d_model=256, heads=4), causal=True)
    p = made.forwards.requires_grad_(False)
    assert p.mix_down.shape == (5 * 32, 256) and p.decay_down.shape == (64, 256) and not p.mix_down.any() and not p.decay_down.any()
    assert 0 < float(p.mix_up.abs().max()) <= 0.01 and float(p.decay[0]) == -6 and float(p.decay[-1]) == pytest.approx(-1)
    assert float(p.mix_first[0]) == 1 and p.mix_first.diff().lt(0).all() and p.norm.weight.eq(1).all()
    decay = torch.exp(-torch.exp(p.decay))
    assert 0.997 < float(decay[0]) < 0.998 and 0.69 < float(decay[-1]) < 0.70


def test_only_the_large_matrices_decay() -> None:
    mixer = mixer_of(causal=False)
    found = {f"{prefix}.{name}" for prefix, module in mixer.named_modules() for name, _ in module.named_parameters(recurse=False) if decays(module, name)}
    layers = ("receptance", "key", "value", "gate")
    assert found == {"out.weight", *(f"{side}.{layer}.weight" for side in ("forwards", "backwards") for layer in layers)}


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match=r"model\.d_model is 9, and must be even"):
        mixer_of(causal=False, d_model=9, heads=3)
    halves = mixer_of(causal=False, d_model=12, heads=3).forwards, mixer_of(causal=False, d_model=16, heads=4).forwards
    assert [(half.heads, half.size) for half in halves] == [(3, 2), (2, 4)]
