"""The matrices of a CVMTransformer that can be quantised, what each of them reads, and where a scale of its inputs can go.

A scale s [K] of the inputs of a linear layer, x W^T = (x / s) (W diag(s))^T, costs nothing at run time where the layer before gives x / s:
    a norm: its weight and bias are divided by s; all readers of its output share the scale;
    the values of an attention, before its `out`: their rows in `qkv` or `key_value` are divided by s (heads that share values share the scale);
    the rows of `ffn.inner` before `ffn.outer`, where the activation is homogeneous in them: all of them for relu, the rows `up` for swiglu.
Behind gelu there is no such place, and a matrix that is embedding and output layer at once cannot be scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cvmk.nn import CVMTransformer
from cvmk.nn.mixers.attention import SelfAttention

Kind = Literal["embeddings", "output", "mixer", "cross", "ffn"]


@dataclass(frozen=True)
class Site:
    """A matrix [N, K]: the name of its weight, what it is, and the module whose inputs it multiplies (None: only its rows are looked up).

    `looked_up` says whether rows are looked up in it; `source_side` whether its inputs are positions of the source.
    """

    name: str
    kind: Kind
    module: str | None
    looked_up: bool = False
    source_side: bool = False


@dataclass(frozen=True)
class Fold:
    """Where a scale of the inputs of `readers` (names of weights) goes: into a norm, or into the rows [first, first + count) of a linear layer.

    `channels` [K] says which of the scale's numbers each input has.
    """

    readers: tuple[str, ...]
    norm: str | None
    linear: str | None
    first: int
    count: int
    channels: tuple[int, ...]

    def spread(self, scale: Tensor) -> Tensor:
        """One number a channel [count] -> one an input [K]."""
        return scale[torch.tensor(self.channels)]

    def gathered(self, values: Tensor) -> Tensor:
        """One number an input [K] -> the largest of each channel [count]."""
        return values.new_full((self.count,), -torch.inf).scatter_reduce(0, torch.tensor(self.channels), values, "amax")


def sites(model: CVMTransformer) -> list[Site]:
    """Every matrix that can be quantised, in the order of the model."""
    tied = model.embeddings.output is None
    found = [Site("embeddings.source", "embeddings", "embeddings.projection" if tied else None, looked_up=True)]
    if not tied:
        found += [Site("embeddings.target", "embeddings", None, looked_up=True), Site("embeddings.output", "output", "embeddings.projection")]
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        part = name.split(".")[3]
        kind: Kind = "cross" if part == "cross" else "ffn" if part == "ffn" else "mixer"
        found.append(Site(f"{name}.weight", kind, name, source_side=name.startswith("encoder.") or name.endswith("cross.key_value")))
    return found


def folds(model: CVMTransformer) -> list[Fold]:
    """Where scales of inputs can go, the norms first."""
    width, identity = model.config.d_model, tuple(range(model.config.d_model))
    found, later = [], []
    for side in ("encoder", "decoder"):
        for index, block in enumerate(getattr(model, side).blocks):
            at = f"{side}.blocks.{index}"
            if isinstance(block.mixer, SelfAttention):
                found.append(Fold((f"{at}.mixer.qkv.weight",), f"{at}.mixer_norm", None, 0, width, identity))
                later.append(_values(f"{at}.mixer", "qkv", block.mixer.heads, block.mixer.heads.q_width + block.mixer.heads.kv_width))
            if side == "decoder":
                found.append(Fold((f"{at}.cross.query.weight",), f"{at}.cross_norm", None, 0, width, identity))
                later.append(_values(f"{at}.cross", "key_value", block.cross.heads, block.cross.heads.kv_width))
            found.append(Fold((f"{at}.ffn.inner.weight",), f"{at}.ffn_norm", None, 0, width, identity))
            if model.config.activation in ("relu", "swiglu"):
                ffn = model.config.ffn
                first = ffn if model.config.activation == "swiglu" else 0
                later.append(Fold((f"{at}.ffn.outer.weight",), None, f"{at}.ffn.inner", first, ffn, tuple(range(ffn))))
    readers = tuple(f"decoder.blocks.{index}.cross.key_value.weight" for index in range(len(model.decoder.blocks)))
    found.append(Fold(readers, "encoder.norm", None, 0, width, identity))
    if model.embeddings.output is not None:
        found.append(Fold(("embeddings.output",), "decoder.norm", None, 0, width, identity))
    return found + later


def matrix(model: CVMTransformer, name: str) -> Tensor:
    """The floating weight of that name."""
    return model.get_parameter(name).detach()


@torch.no_grad()
def apply(model: CVMTransformer, fold: Fold, scale: Tensor) -> None:
    """Divide the inputs of the fold's readers by `scale` [count], in the layer before, and multiply their weights; the model computes what it did."""
    spread = fold.spread(scale)
    if fold.norm is not None:
        for vector in model.get_submodule(fold.norm).parameters():  # weight, and bias where it has one
            vector.div_(scale.to(vector.dtype))
    else:
        for parameter in model.get_submodule(fold.linear or "").parameters():
            rows = parameter[fold.first : fold.first + fold.count]
            rows.div_((scale if rows.dim() == 1 else scale[:, None]).to(rows.dtype))
    for name in fold.readers:
        weight = model.get_parameter(name)
        weight.mul_(spread.to(weight.dtype))


def check_group(chosen: Sequence[Site], model: CVMTransformer, group: int) -> str | None:
    """Why groups of that size do not fit a model, in a sentence; None where they do."""
    for site in chosen:
        columns = matrix(model, site.name).shape[1]
        if columns % group:
            return f"{site.name} has {columns} inputs, which groups of {group} do not divide"
    return None


def _values(at: str, linear: str, heads: object, first: int) -> Fold:
    """The values of an attention before its `out`."""
    size, kv_heads, count = heads.size, heads.kv_heads, heads.kv_width  # type: ignore[attr-defined]
    shared = heads.q_width // count  # type: ignore[attr-defined]
    channels = tuple(head // shared * size + column for head in range(kv_heads * shared) for column in range(size))
    return Fold((f"{at}.out.weight",), None, f"{at}.{linear}", first, count, channels)
