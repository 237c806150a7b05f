"""Tensors of a safetensors file, mapped into memory and checked, without torch and, as long as nobody asks for arrays, without numpy.

The file is: length of the header (8 bytes, little-endian), header (JSON: name -> dtype, shape, data_offsets; and `__metadata__`), data. The
offsets count from the end of the header, and the tensors fill the data without gaps, so a truncated file is told by its size.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvmk.errors import DataError
from cvmk.files import explained

if TYPE_CHECKING:
    import numpy as np

REMEDY = "restore it or save the model again"
_HEADER_LIMIT = 100_000_000  # bytes; the format's own
_DIMENSIONS_LIMIT, _SIZE_LIMIT = 64, 2**63  # of a shape; numpy's
_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}  # fmt: skip
"""The file's name of a dtype, and everybody else's."""
_ITEMSIZE = {code: 1 if code == "BOOL" else int(code.lstrip("BFIU")) // 8 for code in _DTYPES}
_BITS = {"bfloat16": "uint16"}
"""What numpy has in the place of a dtype that it lacks."""


class RawTensor:
    """A tensor in memory, most often of a mapped file: its dtype and shape, and as `buffer` its bytes, contiguous and aligned, without a copy where a file
    has them so.

    Made of an array, or of a buffer and the shape.
    """

    def __init__(self, dtype: str, buffer: np.ndarray | memoryview, shape: Sequence[int] | None = None) -> None:
        self.dtype, self.buffer, self.shape = dtype, buffer, tuple(buffer.shape or () if shape is None else shape)

    @functools.cached_property
    def data(self) -> np.ndarray:
        """The values, read-only where they are a file's, in numpy's dtype, but bfloat16, which numpy lacks: its bits in uint16."""
        import numpy as np  # it takes long to import, and megabytes: the native engine does without

        if isinstance(self.buffer, np.ndarray):
            return self.buffer
        dtype = np.dtype(_BITS.get(self.dtype, self.dtype))
        return np.frombuffer(self.buffer, dtype).reshape(self.shape) if self.buffer.nbytes else np.empty(self.shape, dtype)

    @property
    def is_float(self) -> bool:
        return "float" in self.dtype

    def float32(self) -> np.ndarray:
        """The values as float32, a copy where they are stored otherwise."""
        import numpy as np

        if self.dtype == "bfloat16":
            return (self.data.astype(np.uint32) << 16).view(np.float32)
        return self.data.astype(np.float32, copy=False)


def read_tensors(file: Path, checksum: str | None = None, remedy: str = REMEDY) -> dict[str, RawTensor]:
    """The tensors of a safetensors file by name. Raises DataError, with the remedy, where it is missing, corrupt or not of that sha256.

    The file stays mapped while a tensor lives; it must be replaced, never rewritten in place.
    """
    if not file.is_file():
        raise DataError(f"{file} is missing: {remedy}")
    with explained(file, "read"), open(file, "rb") as opened:
        data = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(opened.fileno()).st_size else b"")
    try:
        tensors = _parse(data)
    except _Corrupt as error:
        raise DataError(f"{file} is truncated or corrupt ({error}): {remedy}") from error
    if checksum is not None and hashlib.sha256(data).hexdigest() != checksum:
        raise DataError(f"{file} is corrupt (its checksum is not the one in the manifest): {remedy}")
    return tensors


def let_go(tensors: Iterable[RawTensor]) -> None:
    """Take the pages of mapped files out of this process's memory; what is read again comes back by itself, most often from the system's cache."""
    owners = {id(owner): owner for tensor in tensors if isinstance(owner := getattr(tensor.buffer, "obj", None), mmap.mmap)}
    for owner in owners.values() if hasattr(mmap, "MADV_DONTNEED") else ():
        owner.madvise(mmap.MADV_DONTNEED)


class _Corrupt(ValueError):
    """What is wrong with a file."""


def _parse(data: memoryview) -> dict[str, RawTensor]:
    header, body = _header(data)
    entries = sorted((_entry(name, value) for name, value in header.items() if name != "__metadata__"), key=lambda entry: entry[3:])
    tensors, end = {}, 0
    for name, code, shape, begin, stop in entries:
        if begin != end:
            raise _Corrupt(f"the tensor {name} begins at byte {begin} of the data and not at {end}")
        if stop - begin != math.prod(shape) * _ITEMSIZE[code]:
            raise _Corrupt(f"the tensor {name} has {stop - begin} bytes, which is not the size of its shape {list(shape)}")
        if stop > len(body):
            raise _Corrupt(f"the tensor {name} ends at byte {stop} of the data, which has {len(body)}")
        aligned = (len(data) - len(body) + begin) % _ITEMSIZE[code] == 0  # the library's writer sees to it, the format does not
        tensors[name] = RawTensor(_DTYPES[code], body[begin:stop] if aligned else memoryview(bytes(body[begin:stop])), shape)
        end = stop
    if end != len(body):
        raise _Corrupt(f"its tensors fill {end} bytes and the data has {len(body)}")
    return tensors


def _header(data: memoryview) -> tuple[dict[str, Any], memoryview]:
    """The header's content, and the data behind it."""
    if len(data) < 8:
        raise _Corrupt(f"it has {len(data)} bytes")
    length = int.from_bytes(data[:8], "little")
    if length > min(len(data) - 8, _HEADER_LIMIT):
        raise _Corrupt("its header is cut off, or it is no safetensors file")
    try:
        header = json.loads(data[8 : 8 + length].tobytes().decode(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _Corrupt(f"its header is no valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise _Corrupt("its header is no JSON object")
    return header, data[8 + length :]


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands in it twice")
    return found


def _entry(name: str, value: Any) -> tuple[str, str, tuple[int, ...], int, int]:
    """Name, dtype, shape, beginning and end of a tensor."""
    try:
        code, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        numbers = (*shape, begin, end)
    except (TypeError, KeyError, ValueError) as error:
        raise _Corrupt(f"its header does not describe the tensor {name}") from error
    if not isinstance(code, str) or code not in _DTYPES:
        raise _Corrupt(f"the tensor {name} has the unknown dtype {code!r}")
    if not all(type(number) is int and number >= 0 for number in numbers) or end < begin:
        raise _Corrupt(f"its header does not describe the tensor {name}")
    if len(shape) > _DIMENSIONS_LIMIT or math.prod(filter(None, shape)) * _ITEMSIZE[code] >= _SIZE_LIMIT:
        raise _Corrupt(f"the tensor {name} has a shape that no memory holds")
    return name, code, shape, begin, end
