"""What the mixers of `two_directions` have in common: steps, padding, both directions, lengths of 0 and 1, bytes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixer_models import VOCAB, Make
from torch import Tensor

from cvmk.config.schema import ModelConfig
from cvmk.errors import ConfigError
from cvmk.nn import CVMTransformer
from cvmk.nn.mixers import Mixer, build_mixer
from cvmk.nn.mixers.two_directions import DirectedMixer, Direction, turned
from cvmk.nn.positions import Span
from cvmk.nn.state import row_nbytes

WIDTH, HEADS, ROOM = 32, 4, 96
BYTES = {
    "hyena": (6 * WIDTH * 4, 16 * WIDTH),
    "mamba": (64 * 16 * 4 + 64 * 3 * 4, 0),
    "mamba2": (64 * 64 * 4 + (64 + 128) * 3 * 4, 0),
    "retnet": (HEADS * 8 * 16 * 4, 0),
    "rwkv": (HEADS * 8 * 8 * 4 + WIDTH * 4, 0),
}
"""Of a row's state in float32: what it has at once, and what each position adds."""
mixers = pytest.mark.parametrize("name", BYTES)


def mixer_of(name: str, causal: bool = True, dtype: torch.dtype = torch.float64, **options: Any) -> Mixer:
    torch.manual_seed(3)
    made = build_mixer(name, ModelConfig(**{"d_model": WIDTH, "heads": HEADS, "max_length": ROOM, **options}), causal).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made.to(dtype)


def inputs(rows: int, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, count, WIDTH, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)


def whole(mixer: Mixer, x: Tensor, lengths: Tensor | None = None) -> Tensor:
    return mixer(x, Span(0, x.shape[1], x.shape[1], lengths), False)[0]


@pytest.mark.parametrize("lengths", [None, torch.tensor([11, 0, 4])], ids=["whole", "padded"])
def test_a_direction_of_its_own_is_that_of_turned_rows(lengths: Tensor | None) -> None:
    """Mamba's convolution and scan run from the end themselves."""
    mixer, x = mixer_of("mamba", causal=False), inputs(3, 11)
    assert isinstance(mixer, DirectedMixer) and mixer.backwards is not None
    span = Span(0, 11, 11, lengths)
    found, want = mixer.backwards.from_the_end(x, span), Direction.from_the_end(mixer.backwards, x, span)
    real = torch.ones(3, 11, dtype=torch.bool) if lengths is None else span.real(x.device)
    assert real is not None
    torch.testing.assert_close(found[real], want[real], atol=1e-13, rtol=0)


# -- steps ------------------------------------------------------------------------------------------------------------------------
@mixers
@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [(torch.float64, False, 1e-12), (torch.float32, False, 3e-6), (torch.bfloat16, False, 2**-6), (torch.float32, True, 2**-6)],
    ids=str,
)
def test_steps_equal_the_parallel_form(name: str, dtype: torch.dtype, autocast: bool, tolerance: float) -> None:
    """80 positions are several chunks of every mixer; the tolerance is of the largest result."""
    mixer, x = mixer_of(name, dtype=dtype), inputs(2, 80, dtype)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = whole(mixer, x)
        assert expected.dtype == (torch.bfloat16 if autocast else dtype)
        state = mixer.start(2, 80, x.device, dtype)
        found = torch.cat([mixer.extend(x[:, t : t + 1], Span(t, 1, t + 1), state) for t in range(80)], dim=1)
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@mixers
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 2**-6)], ids=str)
def test_a_long_text_and_then_steps_of_rows_that_differ(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """A prompt of 70, 0 and 33 positions, right-padded, then steps at three places."""
    mixer, x, lengths = mixer_of(name, dtype=dtype), inputs(3, 90, dtype), torch.tensor([70, 0, 33])
    with torch.inference_mode():
        expected = whole(mixer, x)
        state = mixer.start(3, ROOM, x.device, dtype)
        prompt = x[:, :72].clone()
        prompt[torch.arange(72) >= lengths[:, None]] = 7.0
        found = [mixer.extend(prompt, Span(0, 72, 72, lengths), state)]
        rows = torch.arange(3)[:, None]
        for step in range(15):
            at = lengths + step
            found.append(mixer.extend(x[rows, at[:, None]], Span(at, 1, int(at.max()) + 1), state))
    for row, length in enumerate(lengths.tolist()):
        got = torch.cat((found[0][row, :length], *(step[row] for step in found[1:])))
        assert float((got - expected[row, : length + 15]).abs().max()) <= tolerance * float(expected.abs().max())


# -- padding and other rows -------------------------------------------------------------------------------------------------------
@mixers
@pytest.mark.parametrize("causal", [False, True])
def test_a_row_depends_on_neither_its_padding_nor_other_rows(name: str, causal: bool) -> None:
    mixer, x, lengths = mixer_of(name, causal), inputs(4, 21), torch.tensor([21, 5, 0, 1])
    padding = torch.arange(21) >= lengths[:, None]
    with torch.inference_mode():
        expected = whole(mixer, x, lengths)
        other = whole(mixer, torch.where(padding[..., None], 1e3 * x.flip(0), x), lengths)
        assert expected.isfinite().all() and torch.equal(other[~padding], expected[~padding])
        for row, length in enumerate(lengths.tolist()):
            alone = whole(mixer, x[row : row + 1, :length])
            torch.testing.assert_close(expected[row, :length], alone[0], atol=1e-12, rtol=0)


@mixers
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_do_not_come_from_padding(name: str, causal: bool) -> None:
    mixer, x, lengths = mixer_of(name, causal), inputs(3, 9).requires_grad_(), torch.tensor([9, 4, 0])
    real = torch.arange(9) < lengths[:, None]
    (whole(mixer, x, lengths) * real[..., None]).square().sum().backward()
    together = {key: parameter.grad.clone() for key, parameter in mixer.named_parameters() if parameter.grad is not None}
    assert x.grad is not None and not x.grad[~real].any() and x.grad[real].abs().sum(-1).gt(0).all()
    mixer.zero_grad()
    sum(whole(mixer, x.detach()[row : row + 1, :length]).square().sum() for row, length in enumerate((9, 4))).backward()
    for key, parameter in mixer.named_parameters():
        torch.testing.assert_close(together[key], parameter.grad, atol=1e-10, rtol=1e-10)


@mixers
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("rows", "count"), [(2, 0), (0, 3), (2, 1)])
def test_short_and_empty(name: str, causal: bool, rows: int, count: int) -> None:
    mixer, x = mixer_of(name, causal), inputs(rows, count).requires_grad_()
    for lengths in (None, torch.zeros(rows, dtype=torch.long)):
        found = whole(mixer, x, lengths)
        assert found.shape == x.shape and found.isfinite().all()
        found.sum().backward()
        if causal:
            with torch.inference_mode():
                state = mixer.start(rows, 4, x.device, x.dtype)
                before = {key: state[key].clone() for key, entry in state.layout.items() if entry.axis is None}
                extended = mixer.extend(x, Span(0, count, count, lengths), state)
                if lengths is None:
                    torch.testing.assert_close(extended, found.detach(), atol=1e-12, rtol=0)
                if count == 0 or lengths is not None:
                    assert all(torch.equal(state[key], tensor) for key, tensor in before.items())


# -- both directions --------------------------------------------------------------------------------------------------------------
@mixers
def test_a_bidirectional_mixer_is_two_causal_ones_of_half_the_width(name: str) -> None:
    mixer, x, lengths = mixer_of(name, causal=False), inputs(2, 7), torch.tensor([7, 4])
    with torch.inference_mode():
        found, span = whole(mixer, x, lengths), Span(0, 7, 7)
        for row, length in enumerate(lengths.tolist()):
            own, alone = x[row : row + 1, :length], Span(0, length, length)
            parts = mixer.forwards(own, alone), mixer.backwards(own.flip(1), alone).flip(1)
            torch.testing.assert_close(found[row, :length], mixer.out(torch.cat(parts, dim=-1))[0], atol=1e-12, rtol=0)
        changed = x.clone()
        changed[0, 6] += 1
        assert ((whole(mixer, changed) - whole(mixer, x))[0].abs().sum(-1) > 1e-9).all()  # every position sees the last one
        assert not torch.equal(mixer.forwards(x, span), mixer.backwards(x, span))  # and they have parameters of their own
    matrices = [sum(p.numel() for m in made.modules() if isinstance(m, torch.nn.Linear) for p in [m.weight]) for made in (mixer, mixer_of(name))]
    assert matrices[0] == matrices[1]


def test_rows_are_turned_where_they_end() -> None:
    x = torch.arange(10).view(2, 5, 1)
    assert turned(x, torch.tensor([3, 0]))[..., 0].tolist() == [[2, 1, 0, 3, 4], [5, 6, 7, 8, 9]]
    assert turned(x, None)[0, :, 0].tolist() == [4, 3, 2, 1, 0]


# -- states -----------------------------------------------------------------------------------------------------------------------
@mixers
def test_bytes_of_a_row_are_those_that_the_docs_state(name: str) -> None:
    mixer, (fixed, each) = mixer_of(name, dtype=torch.float32), BYTES[name]
    for positions in (0, 1, 50):
        assert row_nbytes(mixer.state_layout(torch.float32), positions) == fixed + positions * each
    assert row_nbytes(mixer.state_layout(torch.float64), 9) == 2 * (fixed + 9 * each)


@mixers
def test_an_odd_width_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.d_model is 9.*encoder_direction"):
        mixer_of(name, causal=False, d_model=9, heads=1)


# -- in a model -------------------------------------------------------------------------------------------------------------------
def learn(model: CVMTransformer, steps: int) -> list[float]:
    """Losses of a few steps of copying a batch."""
    generator = torch.Generator().manual_seed(5)
    src = torch.randint(4, VOCAB, (8, 6), generator=generator)
    src[:4, 4:] = 0
    tgt = torch.cat((torch.full((8, 1), 2), src), dim=1)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=5e-3), []
    for _ in range(steps):
        logits = model(src, tgt[:, :-1])[0]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tgt[:, 1:].flatten(), ignore_index=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@mixers
def test_a_model_learns(make: Make, name: str) -> None:
    losses = learn(make(mixers=(name,), dtype=torch.float32, positions="none", dropout=0.0).train(), 60)
    assert losses[-1] < 0.5 * losses[0]
