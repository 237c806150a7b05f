"""Small models in evaluation mode whose biases and norms are not at their neutral initial values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from cvmk.config.schema import ModelConfig
from cvmk.nn import CVMTransformer

VOCAB = 23
SMALL = {"d_model": 16, "ffn": 24, "heads": 4, "encoder_layers": 2, "decoder_layers": 2, "max_length": 32}

Make = Callable[..., CVMTransformer]


def make_model(mixers: Sequence[str] = ("attention",), dtype: torch.dtype = torch.float64, **options: Any) -> CVMTransformer:
    """A model of SMALL and these options, with these mixers on both sides, which need only be registered."""
    torch.manual_seed(0)
    config = ModelConfig(**{**SMALL, **options}).model_copy(update={"encoder_mixers": [*mixers], "decoder_mixers": [*mixers]})
    model = CVMTransformer(config, VOCAB).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)
