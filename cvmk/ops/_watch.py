"""Who could be watching a call: tracers, modes, transforms, profilers. Where nobody is, it may go straight to its implementation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import _C

_compiling, _modes, _function_modes, transforms, _profiled, _traced = (
    torch.compiler.is_dynamo_compiling,  # whatever else traces has a mode, or tensors that are not plain
    _C._len_torch_dispatch_stack,
    _C._len_torch_function_stack,
    _C._functorch.peek_interpreter_stack,
    torch.autograd._profiler_enabled,
    _C._get_tracing_state,
)
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter
grad_enabled, autocast_enabled = torch.is_grad_enabled, _C._is_any_autocast_enabled


def unobserved(tensors: Sequence[torch.Tensor | None]) -> bool | None:
    """None, or, where a call may go straight to the implementation, whether gradients are on and a tensor asks for one.

    Going straight saves the dispatcher's time (half of a small op's), and is for where nobody would miss a call there: no graph is being
    traced, no mode, transform or profiler is active, and the tensors are plain ones on the CPU, with their numbers in memory as they are
    (not negated by a bit).
    """
    if _compiling() or _modes() or _function_modes() or transforms() is not None or _profiled() or _traced() is not None:
        return None
    asks, recorded = False, grad_enabled()
    for tensor in tensors:
        if tensor is not None:
            kind = type(tensor)
            if (kind is not _Tensor and kind is not _Parameter) or not tensor.is_cpu or tensor.is_neg():
                return None
            if recorded and tensor.requires_grad:
                asks = True
    return asks
