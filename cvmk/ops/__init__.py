"""The kernels' public face: attention, selective scan, quantised linears and distillation losses as PyTorch ops.

Every op runs on every device and under `torch.compile`; which backend takes a call is said by `explain`, and set by `use` or the
environment variable CVMK_BACKEND.
"""

from cvmk.ops._dispatch import Explanation, backends_report, explain, use
from cvmk.ops.attention import flash_attention

__all__ = ["Explanation", "backends_report", "explain", "flash_attention", "use"]
