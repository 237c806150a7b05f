"""Compression: round to nearest, SmoothQuant, GPTQ, AWQ, and the gate that says what they cost."""

from __future__ import annotations

from cvmk.quantization.awq import clipped
from cvmk.quantization.calibration import InputStatistics, collect, read_pairs
from cvmk.quantization.gptq import gptq
from cvmk.quantization.model import LayerReport, Quantized, quantize_model
from cvmk.quantization.quantize import GateFailure, Recover, quantize
from cvmk.quantization.recipe import Recipe
from cvmk.quantization.rounding import Grid

__all__ = ["GateFailure", "Grid", "InputStatistics", "LayerReport", "Quantized", "Recipe", "Recover", "clipped", "collect", "gptq", "quantize",
           "quantize_model", "read_pairs"]  # fmt: skip
