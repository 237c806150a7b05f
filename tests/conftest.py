from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["PYTHONSAFEPATH"] = "1"  # processes that tests start use the installed package, not the sources in the working directory
os.environ["TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING"] = "1"  # what PyTorch only warns of outside of CI
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported: without a GPU its kernels run on CPU tensors


@pytest.fixture(autouse=True)
def gradients_stay_on() -> Iterator[None]:
    """A check of torch's own (opcheck) that fails half-way leaves gradients off; hundreds of later tests would fail with it."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_grad_enabled(True)


@pytest.fixture
def devices() -> Iterator[None]:
    """A writer that fails these tests as root has put files in the place of the machine's devices, which are made again."""
    kept = {name: (os.lstat(name), os.readlink(name) if os.path.islink(name) else None) for name in ("/dev/null", "/dev/full", "/dev/stdout")}
    yield
    for name, (before, link) in kept.items():
        if stat.S_IFMT(os.lstat(name).st_mode) == stat.S_IFMT(before.st_mode):
            continue
        os.unlink(name)
        if link is None:
            os.mknod(name, before.st_mode, before.st_rdev)
            os.chmod(name, stat.S_IMODE(before.st_mode))
        else:
            os.symlink(link, name)
