"""`[model]`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cvmk.config.section import Section

Mixer = Literal[
    "attention",
    "hyena",
    "mamba",
    "mamba2",
    "retnet",
    "rwkv",
    "ssru",
]
KvCache = Literal["float", "int8"]
LETTERS: dict[str, Mixer] = {
    "A": "attention",
    "H": "hyena",
    "M": "mamba",
    "2": "mamba2",
    "R": "retnet",
    "W": "rwkv",
    "S": "ssru",
}
"""The mixers' letters in a short pattern: `encoder_mixers = "SSSA"`."""
_KEY = ", ".join(f"{letter} {name}" for letter, name in LETTERS.items())


def _spelled_out(pattern: Any) -> Any:
    """The names that the letters of a short pattern stand for; what is no string as it is. Raises ValueError for an unknown letter and for none."""
    if not isinstance(pattern, str):
        return pattern
    unknown = sorted({*pattern} - {*LETTERS})
    if unknown or not pattern:
        wrong = f"{pattern!r} has no letter" if not pattern else f"{pattern!r} has the letter{'s' * (len(unknown) > 1)} {', '.join(map(repr, unknown))}"
        raise ValueError(f"{wrong}; the letters of mixers are {_KEY} (names stand in a list)")
    return [LETTERS[letter] for letter in pattern]


class ModelConfig(Section):
    d_model: int = Field(256, ge=8, le=65536, description="Width of the residual stream.")
    ffn: int = Field(1024, ge=8, le=262144, description="Width of the feed-forward layers.")
    heads: int = Field(4, ge=1, description="Attention heads.")
    kv_heads: int | None = Field(None, ge=1, description="Key and value heads (grouped-query attention); default: as many as heads.")
    encoder_layers: int = Field(4, ge=1, le=256, description="Encoder blocks.")
    decoder_layers: int = Field(4, ge=1, le=256, description="Decoder blocks.")
    encoder_mixers: list[Mixer] = Field(
        ["attention"], min_length=1, description=f"Mixers of the encoder blocks, repeated in this order to fill them, or their letters in one string: {_KEY}."
    )
    decoder_mixers: list[Mixer] = Field(
        ["attention"], min_length=1,
        description="Self-mixers of the decoder blocks, as encoder_mixers; cross-attention is always attention.",
    )
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="Normalisation before each sublayer and at the end of each stack.")
    norm_eps: float = Field(1e-5, gt=0, description="Epsilon of the normalisation.")
    encoder_direction: Literal["bidirectional", "causal"] = Field(
        "bidirectional",
        description="Whether a source position sees the whole source or, causal, only what stands before it, so that a source can grow word by word.",
    )
    positions: Literal["sinusoidal", "rotary", "none"] = Field(
        "sinusoidal", description="Absolute sinusoidal positions, rotary ones in self-attention, or none, for mixers that see the order by themselves."
    )
    rotary_base: float = Field(10000.0, gt=1, description="Base of the rotary frequencies.")
    activation: Literal["relu", "gelu", "swiglu"] = Field("relu", description="Feed-forward activation.")
    bias: bool = Field(True, description="Biases in the linear layers.")
    tie_embeddings: bool = Field(True, description="One matrix for source embeddings, target embeddings and output.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout of embeddings and sublayer outputs.")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of attention weights.")
    kv_cache: KvCache = Field(
        "float",
        description="How a decoder's attention keeps keys and values while it decodes: as floats, or in bytes, each head's of a position with a scale "
        "of its own. Training is the same.",
    )
    max_length: int = Field(512, ge=8, le=65536, description="Longest source or target in tokens.")

    @field_validator("encoder_mixers", "decoder_mixers", mode="before")
    @classmethod
    def _pattern(cls, value: Any) -> Any:
        return _spelled_out(value)

    @model_validator(mode="after")
    def _sizes_fit(self) -> ModelConfig:
        if self.d_model % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide d_model ({self.d_model})")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads ({self.kv_heads}) must divide heads ({self.heads})")
        if self.positions == "rotary" and (self.d_model // self.heads) % 2:
            raise ValueError("rotary positions need an even head size (d_model / heads)")
        return self
