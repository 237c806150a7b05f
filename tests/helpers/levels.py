"""The instruction-set levels of the native kernels that this processor has, the highest last."""

from __future__ import annotations

from cvmk.ops import native

LEVELS = () if native.library() is None else native.LEVELS[: native.LEVELS.index(native.isa_level()) + 1]
