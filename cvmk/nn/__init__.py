"""Modules made of ops: mixers, blocks and the translation model."""

from cvmk.nn.cache import DecoderState, EncoderState
from cvmk.nn.linear import Linear
from cvmk.nn.memory import Memory
from cvmk.nn.mixers import MIXERS
from cvmk.nn.outputs import AttentionMap, AttentionMaps, HiddenStates, Unprojected
from cvmk.nn.parameters import count_parameters, decays, projection_rows
from cvmk.nn.quantize_module import Int4Linear, Int8Linear, quantize_module
from cvmk.nn.quantized_linear import QuantizedLinear
from cvmk.nn.quantized_table import QuantizedTable
from cvmk.nn.transformer import CVMTransformer

__all__ = [
    "MIXERS",
    "AttentionMap",
    "AttentionMaps",
    "CVMTransformer",
    "DecoderState",
    "EncoderState",
    "HiddenStates",
    "Int4Linear",
    "Int8Linear",
    "Linear",
    "Memory",
    "QuantizedLinear",
    "QuantizedTable",
    "Unprojected",
    "count_parameters",
    "decays",
    "projection_rows",
    "quantize_module",
]
