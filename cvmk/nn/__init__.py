"""Modules made of ops: mixers, blocks and the translation model."""

from cvmk.nn.cache import DecoderState, Memory
from cvmk.nn.mixers import MIXERS
from cvmk.nn.outputs import AttentionMap, AttentionMaps, HiddenStates
from cvmk.nn.transformer import CVMTransformer, count_parameters

__all__ = ["MIXERS", "AttentionMap", "AttentionMaps", "CVMTransformer", "DecoderState", "HiddenStates", "Memory", "count_parameters"]
