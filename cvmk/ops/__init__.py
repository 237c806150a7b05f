"""The kernels' public face: attention, selective scan, quantised linears and distillation losses as PyTorch ops.

Every op runs on every device and under `torch.compile`; which backend takes a call is said by `explain`, and set by `use` or the
environment variable CVMK_BACKEND.
"""

from cvmk.ops._backend import use
from cvmk.ops._explain import Explanation, backends_report, explain
from cvmk.ops._measured import UnmeasuredBackendWarning
from cvmk.ops.adamw import adamw
from cvmk.ops.attention import flash_attention
from cvmk.ops.attention_distill import attention_kl, flash_attention_distill
from cvmk.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from cvmk.ops.embed import embed
from cvmk.ops.fused_linear import fused_linear
from cvmk.ops.int4_linear import int4_linear
from cvmk.ops.int8_linear import int8_linear
from cvmk.ops.kd_loss import kd_loss
from cvmk.ops.linear_kd_loss import linear_kd_loss
from cvmk.ops.quantize import QuantizedWeight, quantize_int4, quantize_int8
from cvmk.ops.residual_norm import residual_norm
from cvmk.ops.selective_scan import selective_scan, selective_state_update
from cvmk.ops.sketch import CVMSketch

__all__ = [
    "CVMSketch",
    "Explanation",
    "QuantizedWeight",
    "UnmeasuredBackendWarning",
    "adamw",
    "attention_kl",
    "backends_report",
    "causal_conv1d",
    "causal_conv1d_update",
    "embed",
    "explain",
    "flash_attention",
    "flash_attention_distill",
    "fused_linear",
    "int4_linear",
    "int8_linear",
    "kd_loss",
    "linear_kd_loss",
    "quantize_int4",
    "quantize_int8",
    "residual_norm",
    "selective_scan",
    "selective_state_update",
    "use",
]
