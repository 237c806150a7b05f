"""Our models in CTranslate2's format (https://github.com/OpenNMT/CTranslate2), with 8-bit weights as they are. Needs the package ctranslate2.

The pieces are called as our tokenizer calls them; a source ends with </s>, which CTranslate2 adds. The tables of positions end at model.max_length, as ours do.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

from cvmk.errors import ConfigError
from cvmk.formats.export_folder import export_folder
from cvmk.formats.folder import read_model_manifest
from cvmk.formats.manifest import Manifest
from cvmk.formats.torch_weights import load_model_folder
from cvmk.nn import CVMTransformer
from cvmk.nn.positions import sinusoidal_table

_ACTIVATIONS = {"relu": "RELU", "gelu": "GELU", "swiglu": "SWISH"}


def refusals(manifest: Manifest) -> list[str]:
    """Why CTranslate2 cannot represent a model, in sentences; empty where it can."""
    model, schemes, found = manifest.model, manifest.schemes, []
    others = sorted({*model.encoder_mixers, *model.decoder_mixers} - {"attention"})
    if others:
        found.append(f"it has the mixers {', '.join(others)}, and CTranslate2 has attention")
    if model.encoder_direction != "bidirectional":
        found.append("its encoder is causal, and CTranslate2's sees the whole source")
    if model.positions == "none":
        found.append("it has no positions, and CTranslate2 adds some")
    if model.kv_cache != "float":
        found.append('it keeps keys and values in bytes, and CTranslate2 keeps floats: set model.kv_cache in its config.json to "float"')
    stored = (schemes.default, *schemes.weights.values()) if schemes is not None else ()
    if any(scheme.type == "int4" for scheme in stored):
        found.append("it has 4-bit weights, which CTranslate2 does not have on a CPU: quantise with the scheme w8a8")
    if any(scheme.options.get("activations") == "static" for scheme in stored):
        found.append("its inputs are rounded by static scales, and CTranslate2 rounds by tokens: quantise with activations by tokens")
    return found


def export_ctranslate2(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Write the model of a folder in CTranslate2's format into the folder `out`, whole or not at all; a folder that stands there is replaced if it is
    such a model.

    Floating weights are written in float32; 8-bit ones stay what they are, with 1 / scale in the place of the scales. Raises ConfigError, with every reason,
    where CTranslate2 cannot represent the model or is not installed, DataError where the folder is not sound or `out` cannot be written.
    """
    if importlib.util.find_spec("ctranslate2") is None:
        raise ConfigError("the export to CTranslate2 needs the package ctranslate2: pip install 'cvmk[export]'")
    model, tokenizer, _ = load_model_folder(path)
    reasons = refusals(read_model_manifest(path)[1])
    smooth = sorted(name.removesuffix(".smooth_scale") for name in model.state_dict() if name.endswith(".smooth_scale"))
    if smooth:
        reasons.append(f"{smooth[0]} has a smoothing scale at run time, which CTranslate2 does not have: quantise with the method gptq or rtn")
    if reasons:
        raise ConfigError(f"{path} cannot be exported to CTranslate2: {'; '.join(reasons)}")
    spec = specification(model, tokenizer.pieces)
    with export_folder(out, "model.bin", "model of CTranslate2") as folder:
        spec.save(str(folder))


def specification(model: CVMTransformer, pieces: list[str]) -> Any:
    """The filled specification. Every array is a copy: CTranslate2 may change what it is given."""
    from ctranslate2.specs import common_spec, transformer_spec

    config = model.config
    rotary: dict[str, Any] = {}
    if config.positions == "rotary":
        rotary = {"rotary_dim": 0, "rotary_interleave": False, "rotary_base": config.rotary_base}
    common: dict[str, Any] = {
        "pre_norm": True,
        "activation": getattr(common_spec.Activation, _ACTIVATIONS[config.activation]),
        "ffn_glu": config.activation == "swiglu",
        "rms_norm": config.norm == "rmsnorm",
        "num_heads_kv": config.kv_heads if config.kv_heads not in (None, config.heads) else None,
        **rotary,
    }
    encoder = transformer_spec.TransformerEncoderSpec(config.encoder_layers, config.heads, **common)
    decoder = transformer_spec.TransformerDecoderSpec(config.decoder_layers, config.heads, **common)
    if rotary and hasattr(encoder, "position_encodings"):
        delattr(encoder, "position_encodings")
    spec = transformer_spec.TransformerSpec(encoder, decoder)
    spec.config.unk_token, spec.config.bos_token, spec.config.eos_token = "<unk>", "<s>", "</s>"
    spec.config.decoder_start_token, spec.config.add_source_bos, spec.config.add_source_eos = "<s>", False, True
    spec.config.layer_norm_epsilon = config.norm_eps
    weights = _Weights(model)
    weights.matrix(encoder.embeddings[0] if isinstance(encoder.embeddings, list) else encoder.embeddings, "embeddings.source")
    weights.matrix(decoder.embeddings, "embeddings.source" if config.tie_embeddings else "embeddings.target")
    weights.matrix(decoder.projection, "embeddings.source" if config.tie_embeddings else "embeddings.output")
    for side, name in ((encoder, "encoder"), (decoder, "decoder")):
        side.scale_embeddings = True
        if not rotary:
            side.position_encodings.encodings = sinusoidal_table(config.max_length, config.d_model).float().numpy()
        weights.norm(side.layer_norm, f"{name}.norm")
        for index, layer in enumerate(side.layer):
            weights.block(layer, f"{name}.blocks.{index}", name == "decoder", config.ffn if config.activation == "swiglu" else None)
    spec.register_source_vocabulary(list(pieces))
    spec.register_target_vocabulary(list(pieces))
    spec.validate()
    spec.optimize(quantization=None)
    return spec


class _Weights:
    """A model's tensors, put into layers of a specification."""

    def __init__(self, model: CVMTransformer) -> None:
        self._tensors = model.state_dict()

    def block(self, layer: Any, name: str, decoder: bool, gate: int | None) -> None:
        """`gate`: rows of the gate in `ffn.inner`, where it has one."""
        self.norm(layer.self_attention.layer_norm, f"{name}.mixer_norm")
        self.linear(layer.self_attention.linear[0], f"{name}.mixer.qkv")
        self.linear(layer.self_attention.linear[1], f"{name}.mixer.out")
        if decoder:
            self.norm(layer.attention.layer_norm, f"{name}.cross_norm")
            for index, part in enumerate(("query", "key_value", "out")):
                self.linear(layer.attention.linear[index], f"{name}.cross.{part}")
        self.norm(layer.ffn.layer_norm, f"{name}.ffn_norm")
        self.linear(layer.ffn.linear_0, f"{name}.ffn.inner", slice(None, gate))
        if gate is not None:
            self.linear(layer.ffn.linear_0_noact, f"{name}.ffn.inner", slice(gate, None))
        self.linear(layer.ffn.linear_1, f"{name}.ffn.outer")

    def norm(self, to: Any, name: str) -> None:
        to.gamma = self._floats(f"{name}.weight")
        if f"{name}.bias" in self._tensors:
            to.beta = self._floats(f"{name}.bias")

    def linear(self, to: Any, name: str, rows: slice = slice(None)) -> None:
        self.matrix(to, f"{name}.weight", rows)
        if f"{name}.bias" in self._tensors:
            to.bias = self._floats(f"{name}.bias")[rows].copy()

    def matrix(self, to: Any, name: str, rows: slice = slice(None)) -> None:
        if f"{name}.values" not in self._tensors:
            to.weight = self._floats(name)[rows].copy()
            return
        to.weight = self._tensors[f"{name}.values"].cpu().numpy()[rows].copy()
        to.weight_scale = (1.0 / self._tensors[f"{name}.scales"].cpu().numpy()[rows]).astype("float32")

    def _floats(self, name: str) -> Any:
        return self._tensors[name].detach().to("cpu", torch.float32).numpy().copy()
