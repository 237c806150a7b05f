"""The transformer again, sentence by sentence in NumPy float64, written from the papers and the documented weight names only."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


class OracleTransformer:
    """Reads a CVMTransformer's state dict (as NumPy arrays) and a ModelConfig; works on one unpadded sentence at a time."""

    def __init__(self, weights: dict[str, np.ndarray], config: Any) -> None:
        self.w, self.c = weights, config
        self.head = config.d_model // config.heads
        self.hkv = config.kv_heads or config.heads

    def linear(self, name: str, x: np.ndarray, rows: slice = slice(None)) -> np.ndarray:
        y = x @ self.w[f"{name}.weight"][rows].T
        return y + self.w[f"{name}.bias"][rows] if f"{name}.bias" in self.w else y

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        if self.c.norm == "rmsnorm":
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.c.norm_eps) * self.w[f"{name}.weight"]
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.c.norm_eps) * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def rotate(self, x: np.ndarray) -> np.ndarray:
        if self.c.positions != "rotary":
            return x
        out, half = np.empty_like(x), self.head // 2
        for p in range(len(x)):
            for i in range(half):
                angle = p * self.c.rotary_base ** (-2 * i / self.head)
                z = complex(x[p, i], x[p, i + half]) * complex(math.cos(angle), math.sin(angle))
                out[p, i], out[p, i + half] = z.real, z.imag
        return out

    def attention(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool, own: bool) -> tuple[np.ndarray, np.ndarray]:
        """Heads side by side [Tq, d], and the weights [H, Tq, Tk]."""
        out, maps, size = np.zeros((len(q), self.c.heads * self.head)), np.zeros((self.c.heads, len(q), len(k))), self.head
        for h in range(self.c.heads):
            g = h // (self.c.heads // self.hkv)
            qh, kh, vh = q[:, h * size : (h + 1) * size], k[:, g * size : (g + 1) * size], v[:, g * size : (g + 1) * size]
            if own:
                qh, kh = self.rotate(qh), self.rotate(kh)
            for i in range(len(q)):
                seen = i + 1 if causal else len(k)
                scores = np.array([qh[i] @ kh[j] for j in range(seen)]) / math.sqrt(size)
                if seen:
                    weights = np.exp(scores - scores.max())
                    maps[h, i, :seen] = weights / weights.sum()
                    out[i, h * size : (h + 1) * size] = maps[h, i, :seen] @ vh[:seen]
        return out, maps

    def ffn(self, name: str, x: np.ndarray) -> np.ndarray:
        inner = self.linear(f"{name}.inner", x)
        if self.c.activation == "swiglu":
            gate, up = inner[:, : self.c.ffn], inner[:, self.c.ffn :]
            inner = gate / (1 + np.exp(-gate)) * up
        elif self.c.activation == "gelu":
            inner = inner * np.vectorize(lambda z: 0.5 * (1 + math.erf(z / math.sqrt(2))))(inner)
        else:
            inner = np.maximum(inner, 0)
        return self.linear(f"{name}.outer", inner)

    def embed(self, matrix: np.ndarray, ids: list[int]) -> np.ndarray:
        d = self.c.d_model
        x = matrix[ids].reshape(len(ids), d) * math.sqrt(d)
        if self.c.positions == "sinusoidal":
            for p in range(len(ids)):
                for i in range(d):
                    angle = p / 10000 ** ((i - i % 2) / d)
                    x[p, i] += math.cos(angle) if i % 2 else math.sin(angle)
        return x

    def self_attention(self, name: str, x: np.ndarray, causal: bool) -> tuple[np.ndarray, np.ndarray]:
        q_width, kv_width = self.c.heads * self.head, self.hkv * self.head
        q = self.linear(f"{name}.qkv", x, slice(0, q_width))
        k = self.linear(f"{name}.qkv", x, slice(q_width, q_width + kv_width))
        v = self.linear(f"{name}.qkv", x, slice(q_width + kv_width, None))
        out, maps = self.attention(q, k, v, causal, own=True)
        return self.linear(f"{name}.out", out), maps

    def __call__(self, src: list[int], tgt: list[int]) -> dict[str, Any]:
        """Logits [T, V], the blocks' outputs, and the attention weights."""
        found: dict[str, Any] = {"encoder": [], "decoder": [], "encoder_maps": [], "decoder_maps": [], "cross_maps": []}
        tied = "embeddings.target" not in self.w
        x = self.embed(self.w["embeddings.source"], src)
        for i in range(self.c.encoder_layers):
            b = f"encoder.blocks.{i}"
            mixed, maps = self.self_attention(f"{b}.mixer", self.norm(f"{b}.mixer_norm", x), causal=False)
            x = x + mixed
            x = x + self.ffn(f"{b}.ffn", self.norm(f"{b}.ffn_norm", x))
            found["encoder"].append(x)
            found["encoder_maps"].append(maps)
        memory = self.norm("encoder.norm", x)
        y = self.embed(self.w["embeddings.source" if tied else "embeddings.target"], tgt)
        for i in range(self.c.decoder_layers):
            b = f"decoder.blocks.{i}"
            mixed, maps = self.self_attention(f"{b}.mixer", self.norm(f"{b}.mixer_norm", y), causal=True)
            y = y + mixed
            q = self.linear(f"{b}.cross.query", self.norm(f"{b}.cross_norm", y))
            kv_width = self.hkv * self.head
            k = self.linear(f"{b}.cross.key_value", memory, slice(0, kv_width))
            v = self.linear(f"{b}.cross.key_value", memory, slice(kv_width, None))
            mixed, cross = self.attention(q, k, v, causal=False, own=False)
            y = y + self.linear(f"{b}.cross.out", mixed)
            y = y + self.ffn(f"{b}.ffn", self.norm(f"{b}.ffn_norm", y))
            found["decoder"].append(y)
            found["decoder_maps"].append(maps)
            found["cross_maps"].append(cross)
        found["logits"] = self.norm("decoder.norm", y) @ self.w["embeddings.source" if tied else "embeddings.output"].T
        return found
