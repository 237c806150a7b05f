"""The translation model of `cvmk.nn` put together from `nn.Transformer`, with the same weights and the same function."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cvmk.config.schema import ModelConfig
from cvmk.nn import CVMTransformer
from cvmk.nn.positions import sinusoidal_table
from cvmk.text.batching import Batch


class PlainTransformer(nn.Module):
    """`nn.Transformer`, pre-norm, with tied embeddings and sinusoidal positions; dropout stands where cvmk has it: behind embeddings and sublayers."""

    def __init__(self, config: ModelConfig, vocabulary: int) -> None:
        super().__init__()
        layers = {"num_encoder_layers": config.encoder_layers, "num_decoder_layers": config.decoder_layers, "dim_feedforward": config.ffn}
        self.body = nn.Transformer(config.d_model, config.heads, dropout=config.dropout, batch_first=True, norm_first=True, **layers)
        for layer in [*self.body.encoder.layers, *self.body.decoder.layers]:
            layer.self_attn.dropout, layer.dropout = 0.0, nn.Identity()
            if hasattr(layer, "multihead_attn"):
                layer.multihead_attn.dropout = 0.0
        self.words = nn.Parameter(torch.empty(vocabulary, config.d_model))
        self.scale, self.dropout = math.sqrt(config.d_model), nn.Dropout(config.dropout)
        self.register_buffer("table", sinusoidal_table(config.max_length, config.d_model).float())

    def embed(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self.dropout(F.embedding(ids, self.words) * self.scale + self.table[: ids.shape[1]])
        return embedded

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        """Logits [B, T, V]."""
        ahead = nn.Transformer.generate_square_subsequent_mask(tgt.shape[1])
        padding = src == 0
        out = self.body(
            self.embed(src), self.embed(tgt), tgt_mask=ahead, src_key_padding_mask=padding, memory_key_padding_mask=padding, tgt_is_causal=True
        )
        return F.linear(out, self.words)


def plain(model: CVMTransformer) -> PlainTransformer:
    """A copy of `model`."""
    copy = PlainTransformer(model.config, model.vocab_size)
    with torch.no_grad():
        for ours, theirs in pairs(model, copy):
            theirs.copy_(torch.cat([parameter.detach() for parameter in ours]))
    return copy.train(model.training)


def pairs(model: CVMTransformer, copy: PlainTransformer) -> Iterator[tuple[list[nn.Parameter], nn.Parameter]]:
    """Parameters of `model`, one above the other, and the parameter of `copy` that holds them."""
    yield [model.embeddings.source], copy.words
    modules = []
    for block, layer in zip(model.encoder.blocks, copy.body.encoder.layers, strict=True):
        modules += [([block.mixer_norm], layer.norm1), ([block.ffn_norm], layer.norm2), *_feed_forward(block, layer)]
        yield from _attention([block.mixer.qkv], block.mixer.out, layer.self_attn)
    for block, layer in zip(model.decoder.blocks, copy.body.decoder.layers, strict=True):
        modules += [([block.mixer_norm], layer.norm1), ([block.cross_norm], layer.norm2), ([block.ffn_norm], layer.norm3), *_feed_forward(block, layer)]
        yield from _attention([block.mixer.qkv], block.mixer.out, layer.self_attn)
        yield from _attention([block.cross.query, block.cross.key_value], block.cross.out, layer.multihead_attn)
    modules += [([model.encoder.norm], copy.body.encoder.norm), ([model.decoder.norm], copy.body.decoder.norm)]
    for ours, theirs in modules:
        yield [module.weight for module in ours], theirs.weight
        yield [module.bias for module in ours], theirs.bias


def _feed_forward(block: nn.Module, layer: nn.Module) -> list[tuple[list[nn.Module], nn.Module]]:
    return [([block.ffn.inner], layer.linear1), ([block.ffn.outer], layer.linear2)]


def _attention(inputs: list[nn.Module], out: nn.Module, layer: nn.MultiheadAttention) -> Iterator[tuple[list[nn.Parameter], nn.Parameter]]:
    yield [module.weight for module in inputs], layer.in_proj_weight
    yield [module.bias for module in inputs], layer.in_proj_bias
    yield [out.weight], layer.out_proj.weight
    yield [out.bias], layer.out_proj.bias


def drawn_batch(sentences: int, length: int, vocabulary: int) -> Batch:
    """Sentences of length - 4 to `length` tokens on both sides."""
    source, target = (torch.randint(length - 4, length + 1, (sentences,)) for _ in range(2))
    source[0] = target[0] = length
    ids = [torch.randint(4, vocabulary, (sentences, length)) for _ in range(3)]
    for tensor, lengths in zip(ids, (source, target, target), strict=True):
        tensor[torch.arange(length) >= lengths[:, None]] = 0
    return Batch(*ids, source, target, torch.arange(sentences), int(target.sum()))
