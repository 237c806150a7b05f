"""Tensors over the library's blocks behave as any other, and the blocks come back."""

from __future__ import annotations

import copy
import io
import os
import pickle
import threading

import pytest
import torch
from new_process import python
from torch import Tensor

from cvmk.ops import native
from cvmk.ops.native._memory import LARGE, empty

LIBRARY = native.library()
if LIBRARY is None:
    pytest.skip("the native library is not there", allow_module_level=True)
assert LIBRARY is not None
MIB = 2**20


def large(mib: int = 3) -> Tensor:
    return empty((mib, MIB // 4), torch.float32)


def run(code: str, **environment: str) -> str:
    head = "import torch\nfrom cvmk import _native\nfrom cvmk.ops.native._memory import empty\n"
    done = python(head + code, **environment)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


def test_a_block_is_used_again_when_its_last_view_is_gone() -> None:
    x = large(75)  # larger than whatever kernels leave behind
    place, part = x.data_ptr(), x[1]
    part.fill_(7)
    del x
    other = large(75)
    assert other.data_ptr() != place and (part == 7).all()
    del part
    assert large(75).data_ptr() == place
    before = LIBRARY.kept_bytes()
    held = large(45)  # the block is not more than twice as large
    assert held.data_ptr() == place and LIBRARY.kept_bytes() == before - 76 * MIB
    del held
    assert LIBRARY.kept_bytes() == before


def test_shape_type_and_alignment() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = empty((3, 5, MIB // 8 + 1), dtype)
        assert x.shape == (3, 5, MIB // 8 + 1) and x.dtype == dtype and x.is_contiguous() and x.data_ptr() % 64 == 0
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size()
        x.fill_(2)
        assert x.float().sum() == 2 * x.numel()
    assert empty((0, 5), torch.float32).shape == (0, 5)
    small = empty((LARGE // 4 - 1,), torch.float32)
    small.resize_(LARGE)  # an ordinary tensor


def test_copies_files_and_shared_memory() -> None:
    x = large().normal_()
    assert torch.equal(copy.deepcopy(x), x) and torch.equal(pickle.loads(pickle.dumps(x)), x)
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    assert torch.equal(torch.load(file), x)
    view = x.numpy()
    view[0, 0] = 5
    assert x[0, 0] == 5
    expected = x.clone()
    assert torch.equal(x.share_memory_(), expected) and x.is_shared()


def test_many_threads() -> None:
    wrong = []

    def work(number: int) -> None:
        for i in range(30):
            x = large(1 + (number + i) % 3)
            x.fill_(number)
            y = x[0]
            del x
            if not bool((y == number).all()):
                wrong.append((number, i))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_no_more_is_kept_than_the_limit() -> None:
    code = "x = [empty((n, 2**18), torch.float32) for n in (2, 4, 6, 8)]\nfor _ in range(4):\n    x.pop(0)\n    print(_native.kept_bytes() >> 20)"
    assert run(code).split() == ["2", "6", "12", "20"]
    assert run(code, CVMK_KEPT_MIB="9").split() == ["2", "6", "6", "8"]
    assert run(code, CVMK_KEPT_MIB="0").split() == ["0"] * 4


@pytest.mark.parametrize("value", ["much", "-1", "1.5", "²"])
def test_a_limit_that_is_no_number(value: str) -> None:
    done = python("from cvmk.cli import main; raise SystemExit(main(['doctor']))", CVMK_KEPT_MIB=value)
    assert done.returncode == 2 and done.stderr == f"cvmk: CVMK_KEPT_MIB is {value!r}: set it to a number of MiB, or unset it\n"


def test_the_system_may_take_kept_pages() -> None:
    """What waits for its next use is marked as free: of 64 MiB nothing else holds."""
    code = """
x = empty((64, 2**18), torch.float32).fill_(1)
del x
with open("/proc/self/smaps") as file:
    print(sum(int(line.split()[1]) for line in file if line.startswith("LazyFree")) >> 10)
"""
    if not os.path.exists("/proc/self/smaps") or "LazyFree" not in open("/proc/self/smaps").read():
        pytest.skip("the system does not tell which pages are marked as free")
    assert int(run(code)) == 64


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_after_a_fork() -> None:
    """Parent and child write to what were the same blocks, each for itself."""
    code = """
import os
torch.set_num_threads(1)  # OpenMP's threads do not outlive a fork
kept = empty((4, 2**18), torch.float32).fill_(1)
free = empty((4, 2**18), torch.float32).fill_(2)
del free
child = os.fork()
mine = empty((4, 2**18), torch.float32).fill_(3 if child else 4)
kept += 1 if child else 2
if child == 0:
    good = bool((mine == 4).all() and (kept == 3).all())
    os._exit(0 if good else 1)
status = os.waitpid(child, 0)[1]
print(status == 0 and bool((mine == 3).all() and (kept == 2).all()))
"""
    assert run(code).strip() == "True"


def test_tensors_that_live_until_the_end() -> None:
    code = """
import threading, time
x = [empty((4, 2**18), torch.float32) for _ in range(3)]
torch.keep_for_ever = x.pop()
threading.Thread(target=lambda y: time.sleep(60), args=(x.pop(),), daemon=True).start()
print(len(x))
"""
    assert run(code).strip() == "1"
