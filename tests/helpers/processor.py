"""What tests ask about the processor that they run on."""

from __future__ import annotations

from pathlib import Path

_INFO = Path("/proc/cpuinfo")
AMD = _INFO.is_file() and "AuthenticAMD" in _INFO.read_text(encoding="ascii", errors="replace")
