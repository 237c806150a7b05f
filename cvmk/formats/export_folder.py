"""The folder that an export becomes: whole or not at all, and never in the place of something else."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from cvmk.errors import DataError
from cvmk.files import explained, sync_folder


@contextlib.contextmanager
def export_folder(out: str | os.PathLike[str], mark: str, kind: str) -> Iterator[Path]:
    """An empty folder to write into, which becomes `out` where the block ends without an error, and is gone where it does not.

    A folder that stands at `out` is replaced where it is empty or holds the file `mark`, as all of this `kind` do. Raises DataError where something else
    stands there, or it cannot be written.
    """
    out = Path(out)
    with explained(out, "write"):
        if out.exists() and not (out.is_dir() and ((out / mark).exists() or not any(out.iterdir()))):
            raise DataError(f"cannot write {out}: there is something that is no {kind}; name another folder")
        out = Path(os.path.realpath(out))
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(f".{out.name}.{os.getpid()}-{secrets.token_hex(4)}")
        temporary.mkdir()
        try:
            yield temporary
            if out.exists():
                shutil.rmtree(out)
            os.rename(temporary, out)
            sync_folder(out.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
