"""Which parameters decay: what modules declare, and for a model the matrices of its linear layers."""

from __future__ import annotations

import torch
from torch import nn

from cvmk.config.schema import ModelConfig
from cvmk.nn import CVMTransformer, decays


class Recurrence(nn.Module):
    """Two matrices and a vector, of which one matrix decays."""

    decayed = ("kernel",)

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.rates, self.weight = (nn.Parameter(torch.zeros(2, 2)) for _ in range(3))


def test_a_module_declares_what_decays() -> None:
    recurrence = Recurrence()
    assert {name for name, _ in recurrence.named_parameters() if decays(recurrence, name)} == {"kernel"}


def test_of_others_only_the_weight_of_linear_layers_does() -> None:
    linear = nn.Linear(2, 2)
    assert decays(linear, "weight") and not decays(linear, "bias")
    for module in (nn.LayerNorm(2), nn.Embedding(2, 2), nn.Conv1d(2, 2, 1)):
        assert not any(decays(module, name) for name, _ in module.named_parameters())


def test_what_decays_in_a_model() -> None:
    for tied in (True, False):
        model = CVMTransformer(ModelConfig(d_model=8, ffn=8, heads=2, encoder_layers=1, decoder_layers=1, tie_embeddings=tied), 9)
        found = {f"{prefix}.{name}" for prefix, module in model.named_modules() for name, _ in module.named_parameters(recurse=False) if decays(module, name)}
        layers = {"encoder": ("mixer.qkv", "mixer.out", "ffn.inner", "ffn.outer")}
        layers["decoder"] = (*layers["encoder"], "cross.query", "cross.key_value", "cross.out")
        assert found == {f"{stack}.blocks.0.{name}.weight" for stack, names in layers.items() for name in names}
