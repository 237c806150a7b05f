"""What runs and model folders of earlier versions rely on: names and shapes of weights, and every number of a training step within rounding.

The model's formula is written out here as it was when those runs were made (norm, sublayer, dropout, sum, one after the other). Dropout's masks
are those of its seeds, which are drawn in the order in which the formula comes to them.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cvmk import ops
from cvmk.config.schema import ModelConfig
from cvmk.nn import CVMTransformer
from cvmk.ops.reference._dropout import kept_rows

TINY: dict[str, Any] = {"d_model": 8, "ffn": 12, "heads": 2, "kv_heads": 1, "encoder_layers": 1, "decoder_layers": 1}
WITH_BIAS = {
    "embeddings.source": (9, 8),
    "encoder.blocks.0.mixer_norm.weight": (8,),
    "encoder.blocks.0.mixer_norm.bias": (8,),
    "encoder.blocks.0.mixer.qkv.weight": (16, 8),
    "encoder.blocks.0.mixer.qkv.bias": (16,),
    "encoder.blocks.0.mixer.out.weight": (8, 8),
    "encoder.blocks.0.mixer.out.bias": (8,),
    "encoder.blocks.0.ffn_norm.weight": (8,),
    "encoder.blocks.0.ffn_norm.bias": (8,),
    "encoder.blocks.0.ffn.inner.weight": (12, 8),
    "encoder.blocks.0.ffn.inner.bias": (12,),
    "encoder.blocks.0.ffn.outer.weight": (8, 12),
    "encoder.blocks.0.ffn.outer.bias": (8,),
    "encoder.norm.weight": (8,),
    "encoder.norm.bias": (8,),
    "decoder.blocks.0.mixer_norm.weight": (8,),
    "decoder.blocks.0.mixer_norm.bias": (8,),
    "decoder.blocks.0.mixer.qkv.weight": (16, 8),
    "decoder.blocks.0.mixer.qkv.bias": (16,),
    "decoder.blocks.0.mixer.out.weight": (8, 8),
    "decoder.blocks.0.mixer.out.bias": (8,),
    "decoder.blocks.0.cross_norm.weight": (8,),
    "decoder.blocks.0.cross_norm.bias": (8,),
    "decoder.blocks.0.cross.query.weight": (8, 8),
    "decoder.blocks.0.cross.query.bias": (8,),
    "decoder.blocks.0.cross.key_value.weight": (8, 8),
    "decoder.blocks.0.cross.key_value.bias": (8,),
    "decoder.blocks.0.cross.out.weight": (8, 8),
    "decoder.blocks.0.cross.out.bias": (8,),
    "decoder.blocks.0.ffn_norm.weight": (8,),
    "decoder.blocks.0.ffn_norm.bias": (8,),
    "decoder.blocks.0.ffn.inner.weight": (12, 8),
    "decoder.blocks.0.ffn.inner.bias": (12,),
    "decoder.blocks.0.ffn.outer.weight": (8, 12),
    "decoder.blocks.0.ffn.outer.bias": (8,),
    "decoder.norm.weight": (8,),
    "decoder.norm.bias": (8,),
}


def test_names_shapes_and_order_of_weights() -> None:
    """The order too: an optimiser's state is saved by it."""
    model = CVMTransformer(ModelConfig(**TINY), 9)
    assert [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()] == [*WITH_BIAS.items()]
    assert [name for name, _ in model.named_parameters()] == [*WITH_BIAS]
    untied = CVMTransformer(ModelConfig(**TINY, tie_embeddings=False, bias=False, norm="rmsnorm", positions="rotary"), 9)
    names = ["embeddings.source", "embeddings.target", "embeddings.output", *(name for name in WITH_BIAS if name.endswith("weight"))]
    assert [*untied.state_dict()] == names == [name for name, _ in untied.named_parameters()]


@pytest.mark.parametrize("tied", [True, False])
def test_initial_weights_are_those_of_the_seed(tied: bool) -> None:
    config = ModelConfig(**{**TINY, "decoder_layers": 2, "activation": "swiglu"}, tie_embeddings=tied)
    torch.manual_seed(3)
    found = CVMTransformer(config, 9).state_dict()
    torch.manual_seed(3)
    expected = {f"embeddings.{name}": torch.empty(9, 8).normal_(std=8**-0.5) for name in (["source"] if tied else ["source", "target", "output"])}
    stacks = {"encoder": (1, 2, ("mixer.qkv", "mixer.out", "ffn.inner", "ffn.outer"))}
    stacks["decoder"] = (2, 3, ("mixer.qkv", "mixer.out", "cross.query", "cross.key_value", "cross.out", "ffn.inner", "ffn.outer"))
    rows = {"mixer.qkv": (8, 4, 4), "cross.key_value": (4, 4), "ffn.inner": (12, 12)}
    for stack, (layers, additions, names) in stacks.items():
        for layer in range(layers):
            for name in names:
                weight = nn.Linear(12 if name == "ffn.outer" else 8, sum(rows.get(name, (8,)))).weight.detach()
                for part in weight.split(list(rows.get(name, (8,)))):
                    nn.init.xavier_uniform_(part)
                expected[f"{stack}.blocks.{layer}.{name}.weight"] = weight * (layers * additions) ** -0.5 if name.endswith((".out", ".outer")) else weight
    for name, tensor in found.items():
        if name in expected:
            assert torch.equal(tensor, expected.pop(name)), name
        else:
            assert (tensor == (1 if name.endswith("norm.weight") else 0)).all(), name
    assert not expected


# -- the formula as it was ------------------------------------------------------------------------------------------------------
def angles(length: int, width: int, base: float) -> Tensor:
    """float64 [length, width / 2]: p * base^(-2i / width)."""
    frequencies = torch.exp(torch.arange(0, width, 2, dtype=torch.float64) * (-math.log(base) / width))
    return torch.arange(length, dtype=torch.float64)[:, None] * frequencies


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Formula:
    """The forward pass over a model's own weights, without its blocks."""

    def __init__(self, model: CVMTransformer) -> None:
        self.model, self.config = model, model.config

    def drop(self, x: Tensor) -> Tensor:
        p, n = self.config.dropout, x.shape[-1]
        if p == 0 or not self.model.training:
            return x
        seed = torch.randint(-(2**31), 2**31, (2,))
        keep = kept_rows(seed, p, x.numel() // n, n)
        assert keep is not None
        return x * keep.view(x.shape) / (1 - p)

    def attend(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, causal: bool) -> Tensor:
        size = self.config.d_model // self.config.heads
        q, k, v = (x.unflatten(-1, (-1, size)).transpose(1, 2) if x.dim() == 3 else x for x in (q, k, v))
        dropout = self.config.attention_dropout if self.model.training else 0.0
        mixed = ops.flash_attention(q, k, v, causal=causal, key_lengths=lengths, scale=size**-0.5, dropout_p=dropout)
        assert isinstance(mixed, Tensor)
        return F.linear(mixed.transpose(1, 2).flatten(2), layer.out.weight, layer.out.bias)

    def itself(self, mixer: Any, x: Tensor, lengths: Tensor | None, causal: bool) -> Tensor:
        size, config = self.config.d_model // self.config.heads, self.config
        widths = (config.d_model, (config.kv_heads or config.heads) * size, (config.kv_heads or config.heads) * size)
        q, k, v = (part.unflatten(-1, (-1, size)).transpose(1, 2) for part in F.linear(x, mixer.qkv.weight, mixer.qkv.bias).split(widths, dim=-1))
        if config.positions == "rotary":
            angle = angles(x.shape[1], size, config.rotary_base)
            q, k = (turned(part, angle.cos().float(), angle.sin().float()) for part in (q, k))
        return self.attend(mixer, q, k, v, lengths, causal)

    def feed(self, ffn: Any, x: Tensor) -> Tensor:
        inner = F.linear(x, ffn.inner.weight, ffn.inner.bias)
        if self.config.activation == "swiglu":
            gate, up = inner.chunk(2, dim=-1)
            inner = F.silu(gate) * up
        else:
            inner = F.relu(inner) if self.config.activation == "relu" else F.gelu(inner)
        return F.linear(inner, ffn.outer.weight, ffn.outer.bias)

    def embed(self, matrix: Tensor, ids: Tensor) -> Tensor:
        x = F.embedding(ids, matrix) * self.config.d_model**0.5
        if self.config.positions == "sinusoidal":
            angle = angles(ids.shape[1], self.config.d_model, 10000.0)
            x = x + torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).float()
        return self.drop(x)

    def __call__(self, src: Tensor, tgt: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the blocks' outputs."""
        model, found = self.model, []
        lengths = (src != 0).sum(dim=1)
        x = self.embed(model.embeddings.source, src)
        for block in model.encoder.blocks:
            x = x + self.drop(self.itself(block.mixer, block.mixer_norm(x), lengths, False))
            x = x + self.drop(self.feed(block.ffn, block.ffn_norm(x)))
            found.append(x)
        memory = model.encoder.norm(x)
        target, output = (getattr(model.embeddings, name) for name in ("target", "output"))
        x = self.embed(model.embeddings.source if target is None else target, tgt)
        for block in model.decoder.blocks:
            x = x + self.drop(self.itself(block.mixer, block.mixer_norm(x), None, True))
            k, v = F.linear(memory, block.cross.key_value.weight, block.cross.key_value.bias).chunk(2, dim=-1)
            q = F.linear(block.cross_norm(x), block.cross.query.weight, block.cross.query.bias)
            x = x + self.drop(self.attend(block.cross, q, k, v, lengths, False))
            x = x + self.drop(self.feed(block.ffn, block.ffn_norm(x)))
            found.append(x)
        return F.linear(model.decoder.norm(x), model.embeddings.source if output is None else output), found


def trained(model: CVMTransformer, forward: Any, autocast: bool) -> dict[str, Tensor]:
    """The loss, the hidden states and the gradients of a step of training."""
    torch.manual_seed(11)
    src, tgt = torch.randint(4, 30, (5, 9)), torch.randint(4, 30, (5, 7))
    src[1, 5:] = tgt[2, 3:] = src[3, :] = 0
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, hidden = forward(src, tgt)
    wide = torch.promote_types(model.embeddings.source.dtype, torch.float32)
    loss = F.cross_entropy(logits.to(wide).flatten(0, 1), tgt.flatten()) + sum((x.to(wide).square().mean() for x in hidden), torch.zeros(()))
    loss.backward()
    states = {f"hidden {i}": x.detach() for i, x in enumerate(hidden)}
    return {"loss": loss.detach(), **states, **{name: x.grad for name, x in model.named_parameters() if x.grad is not None}}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize(
    "options",
    [
        {"attention_dropout": 0.1},
        {"norm": "rmsnorm", "positions": "rotary", "activation": "swiglu", "kv_heads": 2, "bias": False},
        {"tie_embeddings": False, "activation": "gelu", "dropout": 0.0},
    ],
    ids=str,
)
def test_a_training_step_is_that_of_the_formula(options: dict[str, Any], autocast: bool) -> None:
    """Two baselines: at most 3 times as far from the formula in float64 as the formula is in the step's own types, and four roundings."""
    torch.manual_seed(5)
    sizes: dict[str, Any] = {"d_model": 32, "ffn": 48, "heads": 4, "encoder_layers": 2, "decoder_layers": 3, "max_length": 16, "dropout": 0.2}
    if autocast:  # the slope of relu jumps, and roundings of 2^-8 move elements across
        sizes["activation"] = "gelu"
    model = CVMTransformer(ModelConfig(**{**sizes, **options}), 30)
    twin, law = copy.deepcopy(model), copy.deepcopy(model).double()

    def forward(src: Tensor, tgt: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits, hidden, _ = model(src, tgt, return_hidden=True)
        return logits, [*hidden.encoder, *hidden.decoder]

    found, before, exact = trained(model, forward, autocast), trained(twin, Formula(twin), autocast), trained(law, Formula(law), False)
    assert found.keys() == before.keys() == exact.keys()
    eps = torch.finfo(torch.bfloat16 if autocast else torch.float32).eps
    for name, want in exact.items():
        assert found[name].dtype == before[name].dtype and found[name].shape == want.shape, name
        errors = [(x[name].double() - want).abs().max().item() for x in (found, before)]
        assert errors[0] <= 3 * errors[1] + 4 * eps * max(want.abs().max().item(), 1e-2), (name, errors, want.abs().max())
