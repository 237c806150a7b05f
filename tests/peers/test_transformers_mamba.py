"""Our Mamba and Mamba-2 beside those of Hugging Face transformers (its own path in PyTorch, random weights): outputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cvmk.config.schema import ModelConfig
from cvmk.nn.mixers import Mixer, build_mixer
from cvmk.nn.positions import Span

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
WIDTH, HEADS = 32, 4


def language_model(name: str, bias: bool) -> Any:
    shared = {"vocab_size": 50, "hidden_size": WIDTH, "num_hidden_layers": 2, "expand": 2, "conv_kernel": 4, "use_bias": bias, "use_conv_bias": True}
    torch.manual_seed(0)
    if name == "mamba":
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**shared, state_size=16, time_step_rank=2))
    else:
        config = transformers.Mamba2Config(**shared, state_size=64, num_heads=HEADS, head_dim=2 * WIDTH // HEADS, n_groups=1, chunk_size=16)
        model = transformers.Mamba2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.double().eval()


def names(name: str) -> dict[str, str]:
    """Their parameters of a mixer by ours; those that differ."""
    shared = {"forwards.in_proj": "in_proj", "forwards.conv": "conv1d", "out": "out_proj", "forwards.A_log": "A_log", "forwards.D": "D"}
    own = {"forwards.scan_proj": "x_proj", "forwards.step_proj": "dt_proj"} if name == "mamba" else {"forwards.step_bias": "dt_bias", "forwards.norm": "norm"}
    return shared | own


def ours_of(name: str, theirs: Any, bias: bool) -> Mixer:
    mixer = build_mixer(name, ModelConfig(d_model=WIDTH, heads=HEADS, bias=bias, norm_eps=1e-5), causal=True).double()
    weights = {}
    for key, parameter in mixer.named_parameters():
        stem = next(mine for mine in names(name) if key.startswith(mine))
        weights[key] = theirs.get_parameter(names(name)[stem] + key.removeprefix(stem)).detach().view(parameter.shape)
    mixer.load_state_dict(weights)
    return mixer


class Replaced(torch.nn.Module):
    """Our mixer where theirs stood."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        mixed: Tensor = self.mixer(x, Span(0, x.shape[1], x.shape[1]), False)[0]
        return mixed


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_logits_and_gradients_are_theirs(name: str, bias: bool) -> None:
    """A language model of two layers, and the same one with our mixers in it; 37 tokens are chunks and a rest."""
    theirs, with_ours = language_model(name, bias), language_model(name, bias)
    for block in with_ours.backbone.layers:
        block.mixer = Replaced(ours_of(name, block.mixer, bias))
    ids = torch.randint(50, (3, 37), generator=torch.Generator().manual_seed(1))
    logits = [model(ids, use_cache=False).logits for model in (theirs, with_ours)]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-5)
    assert logits[0].std() > 0.05
    for found in logits:
        torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for layer, block in zip(theirs.backbone.layers, with_ours.backbone.layers, strict=True):
        for key, parameter in block.mixer.mixer.named_parameters():
            stem = next(mine for mine in names(name) if key.startswith(mine))
            want = layer.mixer.get_parameter(names(name)[stem] + key.removeprefix(stem)).grad
            torch.testing.assert_close(parameter.grad, want.view(parameter.shape), atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    torch.testing.assert_close(with_ours.backbone.embeddings.weight.grad, theirs.backbone.embeddings.weight.grad, atol=1e-5, rtol=1e-5)
