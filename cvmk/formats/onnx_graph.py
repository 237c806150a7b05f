"""The graphs of a CVMTransformer in ONNX, made node by node: the encoder, and the decoder's next positions. Imports the package onnx, not torch.

encoder    source int64 [batch, source], pieces and EOS, padded with pad_id on the right
        -> lengths int64 [batch]; encoded [batch, source, d_model]; of each decoder block cross.<i>.keys and cross.<i>.values
           [batch, kv_heads, source, head_size]
decoder    tokens int64 [batch, target], BOS first; lengths and cross.<i>... of the encoder; past.<i>.keys and past.<i>.values
           [batch, kv_heads, past, head_size], past = 0 at the beginning
        -> logits [batch, target, vocabulary]; present.<i>.keys and present.<i>.values [batch, kv_heads, past + target, head_size]

Every row of a decoder's batch stands at the same position; rows may be padded on the right, since no position sees a later one. Numbers are float32. What
a position must not see gets the lowest float, and the values of padding are zeroed, so that a row without a source attends to nothing, as in
`ops.flash_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from onnx import TensorProto

from cvmk.config.model import ModelConfig
from cvmk.formats.onnx_nodes import Graph
from cvmk.formats.onnx_weights import Codes, Weight, product, rows

_LOWEST = np.finfo(np.float32).min


def encoder_graph(
    config: ModelConfig, pad_id: int, tensors: Mapping[str, Weight], tables: Mapping[str, np.ndarray], looked_up: Mapping[str, Codes] | None = None
) -> Graph:
    """`tensors` are a model's weights by name (`formats.folder`), `tables` those of its positions: "sinusoidal" [length, d], "cos" and "sin"
    [length, head_size / 2]. `looked_up` are embeddings to look up in the place of those of the same names, which then only multiply."""
    graph = _Layers("encoder", config, tensors, tables, looked_up)
    source = graph.input("source", TensorProto.INT64, ("batch", "source"))
    length = graph.dimension(source, 1)
    lengths = graph.op("ReduceSum", graph.op("Cast", graph.op("Not", graph.op("Equal", source, graph.number(pad_id))), to=TensorProto.INT64),
                       graph.numbers(1), keepdims=0, outputs=("lengths",))  # fmt: skip
    steps = graph.range(length)
    real = graph.op("Less", steps, graph.op("Unsqueeze", lengths, graph.numbers(1)))
    if config.encoder_direction == "causal":
        bias = graph.bias(graph.op("LessOrEqual", steps, graph.op("Unsqueeze", steps, graph.numbers(1))))
    else:
        bias = graph.bias(graph.op("Unsqueeze", real, graph.numbers(*graph.key_axes)))
    kept = graph.op("Unsqueeze", graph.op("Cast", real, to=TensorProto.FLOAT), graph.numbers(1, 3))
    x = graph.embed("embeddings.source", source, None, length)
    for index in range(config.encoder_layers):
        name = f"encoder.blocks.{index}"
        queries, keys, values = graph.own_heads(graph.norm(x, f"{name}.mixer_norm"), f"{name}.mixer")
        x = graph.add(x, graph.linear(graph.attend(queries, keys, graph.op("Mul", values, kept), bias, f"{name}.mixer"), f"{name}.mixer.out"))
        x = graph.add(x, graph.feed_forward(graph.norm(x, f"{name}.ffn_norm"), f"{name}.ffn"))
    encoded = graph.norm(x, "encoder.norm", "encoded")
    graph.output(lengths, TensorProto.INT64, ("batch",))
    graph.output(encoded, TensorProto.FLOAT, ("batch", "source", config.d_model))
    for index in range(config.decoder_layers):
        name = f"decoder.blocks.{index}.cross"
        sides = graph.op("Split", graph.linear(encoded, f"{name}.key_value"), graph.numbers(graph.kv_width, graph.kv_width), axis=2, count=2)
        graph.output(graph.heads(sides[0], graph.kv_heads, f"cross.{index}.keys"), TensorProto.FLOAT, graph.cache("source"))
        values = graph.op("Mul", graph.heads(sides[1], graph.kv_heads), kept, outputs=(f"cross.{index}.values",))
        graph.output(values, TensorProto.FLOAT, graph.cache("source"))
    return graph


def decoder_graph(
    config: ModelConfig, vocab_size: int, tensors: Mapping[str, Weight], tables: Mapping[str, np.ndarray], looked_up: Mapping[str, Codes] | None = None
) -> Graph:
    """As `encoder_graph`."""
    graph = _Layers("decoder", config, tensors, tables, looked_up)
    tokens = graph.input("tokens", TensorProto.INT64, ("batch", "target"))
    lengths = graph.input("lengths", TensorProto.INT64, ("batch",))
    layers = range(config.decoder_layers)
    kinds = ("keys", "values")
    cross = [[graph.input(f"cross.{index}.{kind}", TensorProto.FLOAT, graph.cache("source")) for kind in kinds] for index in layers]
    past = [[graph.input(f"past.{index}.{kind}", TensorProto.FLOAT, graph.cache("past")) for kind in kinds] for index in layers]
    start, count = graph.dimension(past[0][0], 2), graph.dimension(tokens, 1)
    end = graph.op("Add", start, count)
    seen = graph.op("LessOrEqual", graph.range(end), graph.op("Unsqueeze", graph.range(end, start), graph.numbers(1)))
    own_bias = graph.bias(seen)
    steps = graph.range(graph.dimension(cross[0][0], 2))
    real = graph.op("Less", steps, graph.op("Unsqueeze", lengths, graph.numbers(1)))
    cross_bias = graph.bias(graph.op("Unsqueeze", real, graph.numbers(*graph.key_axes)))
    x = graph.embed("embeddings.source" if config.tie_embeddings else "embeddings.target", tokens, start, end)
    for index in layers:
        name = f"decoder.blocks.{index}"
        queries, *new = graph.own_heads(graph.norm(x, f"{name}.mixer_norm"), f"{name}.mixer")
        keys, values = (
            graph.op("Concat", before, after, axis=2, outputs=(f"present.{index}.{kind}",)) for kind, before, after in zip(kinds, past[index], new, strict=True)
        )
        x = graph.add(x, graph.linear(graph.attend(queries, keys, values, own_bias, f"{name}.mixer"), f"{name}.mixer.out"))
        queries = graph.grouped(graph.heads(graph.linear(graph.norm(x, f"{name}.cross_norm"), f"{name}.cross.query"), config.heads))
        keys, values = cross[index]
        x = graph.add(x, graph.linear(graph.attend(queries, keys, values, cross_bias, f"{name}.cross"), f"{name}.cross.out"))
        x = graph.add(x, graph.feed_forward(graph.norm(x, f"{name}.ffn_norm"), f"{name}.ffn"))
    logits = graph.logits(graph.norm(x, "decoder.norm"))
    graph.output(logits, TensorProto.FLOAT, ("batch", "target", vocab_size))
    for index in layers:
        for kind in kinds:
            graph.output(f"present.{index}.{kind}", TensorProto.FLOAT, graph.cache("past + target"))
    return graph


class _Layers(Graph):
    """The layers of a CVMTransformer."""

    def __init__(
        self, name: str, config: ModelConfig, tensors: Mapping[str, Weight], tables: Mapping[str, np.ndarray], looked_up: Mapping[str, Codes] | None
    ) -> None:
        super().__init__(name)
        self._config, self._tensors, self._tables, self._looked_up = config, tensors, tables, looked_up or {}
        self.head_size, self.kv_heads = config.d_model // config.heads, config.kv_heads or config.heads
        self.kv_width, self.groups = self.kv_heads * self.head_size, config.heads // self.kv_heads
        self._angles: list[str] = []

    @property
    def key_axes(self) -> tuple[int, ...]:
        """Where a mask [batch, keys] gets axes to fit the scores."""
        return (1, 2) if self.groups == 1 else (1, 2, 3)

    def cache(self, length: str) -> tuple[str | int, ...]:
        """The shape of keys and values."""
        return "batch", self.kv_heads, length, self.head_size

    # -- embeddings, norms, linear layers ------------------------------------------------------------------------------------------
    def embed(self, matrix: str, ids: str, start: str | None, end: str) -> str:
        """ids [batch, T] at the positions of `range` -> [batch, T, d]; the angles of `rotate` are those of these positions from now on."""
        found = rows(self, ids, matrix, self._looked_up.get(matrix, self._weight(matrix)))
        x = self.op("Mul", found, self.number(math.sqrt(self._config.d_model)))
        steps = self.range(end, start) if self._tables else ""  # looked up, so that the runtime refuses those beyond the table
        cut = {name: self.op("Gather", self.constant(f"positions.{name}", table), steps) for name, table in self._tables.items()}
        self._angles = [cut[name] for name in ("cos", "sin") if name in cut]
        return self.add(x, cut["sinusoidal"]) if "sinusoidal" in cut else str(x)

    def add(self, x: str, y: str) -> str:
        return str(self.op("Add", x, y))

    def norm(self, x: str, name: str, output: str | None = None) -> str:
        """x [..., d]. RMSNorm is no operation of this opset."""
        scale, outputs = self._vector(f"{name}.weight"), [output] if output else ()
        if self._config.norm == "layernorm":
            return str(self.op("LayerNormalization", x, scale, self._vector(f"{name}.bias"), axis=-1, epsilon=self._config.norm_eps, outputs=outputs))
        square = self.op("ReduceMean", self.op("Pow", x, self.number(2.0)), axes=[-1], keepdims=1)
        size = self.op("Sqrt", self.op("Add", square, self.number(self._config.norm_eps)))
        return str(self.op("Mul", self.op("Div", x, size), scale, outputs=outputs))

    def linear(self, x: str, name: str) -> str:
        """x [..., K] -> [..., N]."""
        y = product(self, x, f"{name}.weight", self._weight(f"{name}.weight"))
        return self.add(y, self._vector(f"{name}.bias")) if self._config.bias else y

    def logits(self, x: str) -> str:
        name = "embeddings.source" if self._config.tie_embeddings else "embeddings.output"
        return product(self, x, name, self._weight(name), output="logits", shared=self._config.tie_embeddings and not self._looked_up)

    def feed_forward(self, x: str, name: str) -> str:
        x = self.linear(x, f"{name}.inner")
        match self._config.activation:
            case "relu":
                x = self.op("Relu", x)
            case "gelu":
                part = self.op("Add", self.op("Erf", self.op("Div", x, self.number(math.sqrt(2)))), self.number(1.0))
                x = self.op("Mul", self.op("Mul", x, part), self.number(0.5))
            case "swiglu":
                width = self._config.ffn
                gate, up = self.op("Split", x, self.numbers(width, width), axis=2, count=2)
                x = self.op("Mul", self.op("Mul", gate, self.op("Sigmoid", gate)), up)
        return self.linear(x, f"{name}.outer")

    def _weight(self, name: str) -> Weight:
        """A tensor of the model."""
        self.used.add(name)
        return self._tensors[name]

    def _vector(self, name: str) -> str:
        vector = self._weight(name)
        assert not isinstance(vector, Codes)
        return self.constant(name, vector)

    # -- attention -------------------------------------------------------------------------------------------------------------------
    def own_heads(self, x: str, name: str) -> tuple[str, str, str]:
        """Queries, keys and values of self-attention, turned where positions are rotary."""
        widths = self.numbers(self._config.d_model, self.kv_width, self.kv_width)
        q, k, v = self.op("Split", self.linear(x, f"{name}.qkv"), widths, axis=2, count=3)
        queries, keys = self.rotate(self.heads(q, self._config.heads)), self.rotate(self.heads(k, self.kv_heads))
        return self.grouped(queries), keys, self.heads(v, self.kv_heads)

    def heads(self, x: str, heads: int, output: str | None = None) -> str:
        """[batch, T, heads * D] -> [batch, heads, T, D]."""
        apart = self.op("Reshape", x, self.numbers(0, 0, heads, self.head_size))
        return str(self.op("Transpose", apart, perm=[0, 2, 1, 3], outputs=[output] if output else ()))

    def grouped(self, queries: str) -> str:
        """Queries [batch, heads, T, D] -> [batch, kv_heads, groups, T, D] where heads share keys."""
        return queries if self.groups == 1 else str(self.op("Reshape", queries, self.numbers(0, self.kv_heads, self.groups, -1, self.head_size)))

    def rotate(self, x: str) -> str:
        """x [batch, heads, T, D], the pairs (x_i, x_{i + D/2}) turned."""
        if not self._angles:
            return x
        cos, sin = self._angles
        half = self.head_size // 2
        first, second = self.op("Split", x, self.numbers(half, half), axis=3, count=2)
        parts = [self.op("Sub", self.op("Mul", first, cos), self.op("Mul", second, sin)), self.add(self.op("Mul", second, cos), self.op("Mul", first, sin))]
        return str(self.op("Concat", *parts, axis=3))

    def bias(self, seen: str) -> str:
        """What is added to scores: 0 where a key is seen."""
        return str(self.op("Where", seen, self.number(0.0), self.constant("lowest", np.array(_LOWEST, np.float32))))

    def attend(self, queries: str, keys: str, values: str, bias: str, name: str) -> str:
        """Grouped queries [batch, ..., T, D] over keys and values [batch, kv_heads, S, D] -> [batch, T, d]; the bias is broadcast to [batch, ..., T, S]."""
        if self.groups > 1:
            keys, values = (self.op("Unsqueeze", side, self.numbers(2)) for side in (keys, values))
        scaled = self.op("Mul", queries, self.number(self.head_size**-0.5))
        turned = self.op("Transpose", keys, perm=[0, 1, 3, 2] if self.groups == 1 else [0, 1, 2, 4, 3])
        scores = self.add(self.op("MatMul", scaled, turned, name=f"{name}.scores"), bias)
        mixed = self.op("MatMul", self.op("Softmax", scores, axis=-1), values, name=f"{name}.mixed")
        if self.groups > 1:
            mixed = self.op("Reshape", mixed, self.numbers(0, self._config.heads, -1, self.head_size))
        return str(self.op("Reshape", self.op("Transpose", mixed, perm=[0, 2, 1, 3]), self.numbers(0, 0, self._config.d_model)))


def attention_products(config: ModelConfig) -> list[str]:
    """The names of the products of two activations, which have no weight."""
    places = [f"encoder.blocks.{index}.mixer" for index in range(config.encoder_layers)]
    places += [f"decoder.blocks.{index}.{part}" for index in range(config.decoder_layers) for part in ("mixer", "cross")]
    return [f"{place}.{part}" for place in places for part in ("scores", "mixed")]
