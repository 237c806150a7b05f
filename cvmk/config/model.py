"""`[model]`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cvmk.config.section import Section

Mixer = Literal["attention"]


class ModelConfig(Section):
    d_model: int = Field(256, ge=8, le=65536, description="Width of the residual stream.")
    ffn: int = Field(1024, ge=8, le=262144, description="Width of the feed-forward layers.")
    heads: int = Field(4, ge=1, description="Attention heads.")
    kv_heads: int | None = Field(None, ge=1, description="Key and value heads (grouped-query attention); default: as many as heads.")
    encoder_layers: int = Field(4, ge=1, le=256, description="Encoder blocks.")
    decoder_layers: int = Field(4, ge=1, le=256, description="Decoder blocks.")
    encoder_mixers: list[Mixer] = Field(["attention"], min_length=1, description="Mixers of the encoder blocks, repeated in this order to fill them.")
    decoder_mixers: list[Mixer] = Field(
        ["attention"], min_length=1,
        description="Self-mixers of the decoder blocks, repeated in this order to fill them; cross-attention is always attention.",
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
    max_length: int = Field(512, ge=8, le=65536, description="Longest source or target in tokens.")

    @model_validator(mode="after")
    def _sizes_fit(self) -> ModelConfig:
        if self.d_model % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide d_model ({self.d_model})")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads ({self.kv_heads}) must divide heads ({self.heads})")
        if self.positions == "rotary" and (self.d_model // self.heads) % 2:
            raise ValueError("rotary positions need an even head size (d_model / heads)")
        return self
