"""Linear layers: the activation inside, initial weights, and the output layer that owns no matrix."""

from __future__ import annotations

import copy
import math
from typing import get_args

import pytest
import torch

from cvmk.config.schema import ModelConfig
from cvmk.nn import CVMTransformer, Linear
from cvmk.nn.linear import Activation, TiedLinear, activate, scale_residual_outputs
from cvmk.ops.quantize import ACTIVATIONS


def by_hand(x: float, activation: str) -> float:
    sigmoid = 1 / (1 + math.exp(-x))
    return {"relu": max(x, 0.0), "gelu": 0.5 * x * (1 + math.erf(x / math.sqrt(2))), "silu": x * sigmoid}[activation]


@pytest.mark.parametrize("activation", [None, *get_args(Activation)])
def test_the_activation_is_inside(activation: Activation | None) -> None:
    torch.manual_seed(0)
    layer = Linear(5, 6).double()
    layer.bias.data.normal_()
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        y = (x[..., None, :] * layer.weight).sum(-1) + layer.bias
        found = layer(x) if activation is None else layer(x, activation)
    expected = y
    if activation == "swiglu":
        expected = y[..., :3].clone().apply_(lambda value: by_hand(value, "silu")) * y[..., 3:]
    elif activation is not None:
        expected = y.clone().apply_(lambda value: by_hand(value, activation))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_activations_are_those_of_the_quantised_linears() -> None:
    assert get_args(Activation) == ACTIVATIONS
    with pytest.raises(ValueError, match="activation is 'tanh'.*relu, gelu, silu, swiglu"):
        activate(torch.zeros(2), "tanh")  # type: ignore[arg-type]


def test_each_stacked_projection_has_its_own_initial_bound() -> None:
    torch.manual_seed(0)
    layer = Linear(100, (300, 20), scale=0.5)
    assert layer.weight.shape == (320, 100) and not layer.bias.any()
    for part, rows in zip(layer.weight.split([300, 20]), (300, 20), strict=True):
        bound = 0.5 * math.sqrt(6 / (100 + rows))
        assert 0.95 * bound < part.abs().max().item() <= bound
    assert Linear(4, 3, bias=False).bias is None


def test_only_marked_layers_are_scaled() -> None:
    torch.manual_seed(0)
    layers = torch.nn.ModuleDict({"out": Linear(4, 4), "added": Linear(4, 4, residual_output=True), "also": Linear(4, 4, residual_output=True)})
    before = copy.deepcopy(layers)
    scale_residual_outputs(layers)
    assert torch.equal(layers["out"].weight, before["out"].weight)
    for name in ("added", "also"):
        torch.testing.assert_close(layers[name].weight, before[name].weight / math.sqrt(2))


def test_blocks_mark_what_they_add_to_the_residual_stream() -> None:
    model = CVMTransformer(ModelConfig(d_model=8, ffn=8, heads=2, encoder_layers=1, decoder_layers=1), 9)
    marked = {name for name, module in model.named_modules() if isinstance(module, Linear) and module.residual_output}
    stacks = {"encoder": ("mixer.out", "ffn.outer"), "decoder": ("mixer.out", "cross.out", "ffn.outer")}
    assert marked == {f"{stack}.blocks.0.{name}" for stack, names in stacks.items() for name in names}


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_layer_reads_the_present_matrix_of_its_owner(tied: bool) -> None:
    torch.manual_seed(0)
    model = CVMTransformer(ModelConfig(d_model=8, ffn=8, heads=2, encoder_layers=1, decoder_layers=1, tie_embeddings=tied), 9)
    layer, hidden = model.embeddings.projection, torch.randn(3, 8)
    assert isinstance(layer, TiedLinear) and not list(layer.parameters()) and not layer.state_dict()
    name = "source" if tied else "output"
    matrix = getattr(model.embeddings, name)
    assert torch.equal(layer(hidden), hidden @ matrix.T) and layer.weight is matrix
    twin = copy.deepcopy(model)
    with torch.no_grad():
        matrix.zero_()
    assert not layer(hidden).any() and twin.embeddings.projection(hidden).any()
    model.load_state_dict(twin.state_dict())
    assert torch.equal(layer(hidden), twin.embeddings.projection(hidden))
    setattr(model.embeddings, name, torch.nn.Parameter(torch.ones(9, 8)))
    torch.testing.assert_close(layer(hidden), hidden.sum(-1, keepdim=True).expand(3, 9))
    layer(hidden).sum().backward()
    assert getattr(model.embeddings, name).grad is not None
    assert model.bfloat16().embeddings.logits(hidden.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("activation", [None, *get_args(Activation)])
def test_training_is_one_operation_and_gives_what_pytorch_gives(activation: Activation | None) -> None:
    """Forward and backward pass under autocast: no rounded copy of the weight, and a gradient of it that is not rounded."""
    torch.manual_seed(0)
    layer, x = Linear(40, 24), torch.randn(7, 3, 40)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x, activation) if activation is not None else layer(x)
        assert found.grad_fn is not None and type(found.grad_fn.next_functions[0][0]).__name__ == "fused_linear_backward"
    assert found.dtype == torch.bfloat16
    with torch.no_grad():
        wide = activate(torch.nn.functional.linear(x, layer.weight, layer.bias), activation)
    torch.testing.assert_close(found.float(), wide, rtol=2e-2, atol=2e-2)
    found.float().square().sum().backward()
    assert layer.weight.grad is not None
    got = layer.weight.grad.clone()
    layer.zero_grad()
    activate(torch.nn.functional.linear(x, layer.weight, layer.bias), activation).square().sum().backward()
    torch.testing.assert_close(got, layer.weight.grad, rtol=0.05, atol=0.05 * layer.weight.grad.abs().max().item())
    assert got.dtype == torch.float32


def test_decoding_calls_pytorch_itself() -> None:
    """A step of decoding multiplies a few rows: nothing may stand between."""
    layer, x = Linear(8, 6), torch.randn(2, 8)
    with torch.no_grad():
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
