"""Clipping and a step of every optimiser, beside AdamW over flat memory and PyTorch's own fused one, for a model of examples/multi30k and a wider one.

Gradients are there already. Rows of memory: what each keeps between steps. What sam and asam cost is a second pass over the batches, which is no matter of
an optimiser: they are not here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_study import PEAKS, state_bytes

from cvmk.config import OptimizerConfig
from cvmk.config.schema import ModelConfig
from cvmk.nn import CVMTransformer
from cvmk.training.optimizers import Optimizer, build_optimizer

V = 8000
SIZES = {
    "d128 4+4": {"d_model": 128, "ffn": 256, "heads": 4, "encoder_layers": 4, "decoder_layers": 4},
    "d256 3+3": {"d_model": 256, "ffn": 1024, "heads": 4, "encoder_layers": 3, "decoder_layers": 3},
}


def model(size: str) -> CVMTransformer:
    torch.manual_seed(1)
    return CVMTransformer(ModelConfig(**SIZES[size]), V)


def stepper(made: CVMTransformer, optimizer: Optimizer) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(2)
    gradients = [torch.randn(parameter.shape, generator=generator) for parameter in made.parameters()]

    def step() -> None:
        for parameter, gradient in zip(made.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.train()
        optimizer.clip(1e9)  # a norm that is not reached
        optimizer.step(lambda: pytest.fail("these look once"))

    return step


def named(size: str, name: str) -> tuple[CVMTransformer, Optimizer]:
    made = model(size)
    return made, build_optimizer(OptimizerConfig(name=name, learning_rate=1e-6), [made])


@pytest.mark.parametrize("size", SIZES)
def test_optimizers(compare: Any, size: str) -> None:
    theirs = model(size)
    peers = {"PyTorch's AdamW": stepper(theirs, Optimizer(torch.optim.AdamW(theirs.parameters(), lr=1e-6, fused=True)))}
    peers |= {name: stepper(*named(size, name)) for name in PEAKS if name != "adamw"}
    compare(stepper(*named(size, "adamw")), peers, case=f"optimiser step {size}")


@pytest.mark.parametrize("size", SIZES)
def test_memory_of_optimizers(record_row: Any, size: str) -> None:
    kept = {}
    for name in PEAKS:
        made, optimizer = named(size, name)
        stepper(made, optimizer)()
        optimizer.eval()
        kept[name] = state_bytes(optimizer.state_dict()) / 1e6
    record_row({"case": f"optimiser state {size}, {sum(parameter.numel() for parameter in model(size).parameters()) / 1e6:.1f} M weights", "megabytes": kept})
