"""How Mamba and Mamba-2 begin, what decays, and the dual scan. That they are the published models: tests/peers/test_transformers_mamba.py."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cvmk.config.schema import ModelConfig
from cvmk.nn import decays
from cvmk.nn.mixers import build_mixer
from cvmk.nn.mixers.mamba2 import dual_scan

CONFIG = ModelConfig(d_model=64, heads=4)


def test_mamba_begins_as_in_the_paper() -> None:
    torch.manual_seed(0)
    mixer = build_mixer("mamba", ModelConfig(d_model=512), causal=True).forwards
    torch.testing.assert_close(-mixer.A_log.exp(), -torch.arange(1.0, 17).repeat(1024, 1))
    assert (mixer.D == 1).all() and mixer.rank == 32
    steps = F.softplus(mixer.step_proj.bias)
    assert steps.min() >= 0.999e-3 and steps.max() <= 0.1001
    quarters = steps.log10().add(3).mul(2).floor().clamp(0, 3).long().bincount()  # of the logarithms' range
    assert quarters.min() > 200 and abs(mixer.step_proj.weight).max() <= 32**-0.5


def test_mamba2_begins_as_in_the_papers_code() -> None:
    torch.manual_seed(0)
    mixer = build_mixer("mamba2", ModelConfig(d_model=1024, heads=256, kv_heads=256), causal=True).forwards
    A, steps = mixer.A_log.exp(), F.softplus(mixer.step_bias)
    assert A.min() >= 1 and A.max() <= 16 and 7.5 < A.mean() < 9.5
    assert steps.min() >= 0.999e-3 and steps.max() <= 0.1001 and (mixer.D == 1).all()


@pytest.mark.parametrize(("name", "own"), [("mamba", {"scan_proj.weight", "step_proj.weight"}), ("mamba2", set())])
@pytest.mark.parametrize("causal", [True, False])
def test_only_matrices_and_filters_decay(name: str, own: set[str], causal: bool) -> None:
    mixer = build_mixer(name, CONFIG, causal)
    found = {f"{path}.{key}" for path, module in mixer.named_modules() for key, _ in module.named_parameters(recurse=False) if decays(module, key)}
    sides = ("forwards",) if causal else ("forwards", "backwards")
    assert found == {"out.weight", *(f"{side}.{key}" for side in sides for key in ("in_proj.weight", "conv.weight", *own))}


def test_the_dual_scan_is_the_recurrence() -> None:
    """Over several chunks, from a state, with decays from none to all; gradients too."""
    g = torch.Generator().manual_seed(0)
    drive, B, C = (torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_() for shape in ((2, 150, 3, 5), (2, 150, 7), (2, 150, 7)))
    decay = -torch.rand(2, 150, 3, generator=g, dtype=torch.float64).mul(12).sub(6).exp()
    decay[:, 70] = -800.0
    state, found = torch.randn(2, 3, 5, 7, generator=g, dtype=torch.float64), []
    leaves = [drive, decay.requires_grad_(), B, C, state.requires_grad_()]
    at: torch.Tensor = state
    for t in range(150):
        at = decay[:, t, :, None, None].exp() * at + drive[:, t, :, :, None] * B[:, t, None, None]
        found.append((at * C[:, t, None, None]).sum(-1))
    got, want = dual_scan(drive, decay, B, C, state), (torch.stack(found, 1), at)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-11)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in want]
    for one, other in zip(torch.autograd.grad(got, leaves, weights), torch.autograd.grad(want, leaves, weights), strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)
