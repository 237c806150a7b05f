"""Commands as they are printed: ready to be pasted into a shell, whatever is in the names."""

from __future__ import annotations

import os
import shlex


def command(*words: str | os.PathLike[str]) -> str:
    """`cvmk` with these words, quoted where a shell would take them apart."""
    return shlex.join(["cvmk", *(os.fspath(word) for word in words)])
