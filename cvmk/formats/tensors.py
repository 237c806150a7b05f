"""Tensors of a safetensors file, mapped into memory and checked, without torch.

The file is: length of the header (8 bytes, little-endian), header (JSON: name -> dtype, shape, data_offsets; and `__metadata__`), data. The
offsets count from the end of the header, and the tensors fill the data without gaps, so a truncated file is told by its size.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvmk.errors import DataError
from cvmk.files import explained

if TYPE_CHECKING:
    import numpy as np  # it takes long to import: only where a file is read

REMEDY = "restore it or save the model again"
_HEADER_LIMIT = 100_000_000  # bytes; the format's own
_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}  # fmt: skip
"""The file's name of a dtype, and everybody else's."""


@dataclass(frozen=True)
class RawTensor:
    """A tensor in a mapped file. `data` is read-only, of the tensor's shape, and in numpy's dtype, but bfloat16, which numpy lacks: its bits in uint16."""

    dtype: str
    data: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

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
    import numpy as np

    if not file.is_file():
        raise DataError(f"{file} is missing: {remedy}")
    with explained(file, "read"):
        data = np.memmap(file, dtype=np.uint8, mode="r") if file.stat().st_size else np.empty(0, dtype=np.uint8)
    try:
        tensors = _parse(data)
    except (ValueError, OverflowError) as error:  # numpy refuses shapes that the format allows
        raise DataError(f"{file} is truncated or corrupt ({error}): {remedy}") from error
    if checksum is not None and hashlib.sha256(data.data).hexdigest() != checksum:
        raise DataError(f"{file} is corrupt (its checksum is not the one in the manifest): {remedy}")
    return tensors


class _Corrupt(ValueError):
    """What is wrong with a file."""


def _parse(data: np.ndarray) -> dict[str, RawTensor]:
    import numpy as np

    header, body = _header(data)
    entries = sorted((_entry(name, value) for name, value in header.items() if name != "__metadata__"), key=lambda entry: entry[3:])
    tensors, end = {}, 0
    for name, code, shape, begin, stop in entries:
        if begin != end:
            raise _Corrupt(f"the tensor {name} begins at byte {begin} of the data and not at {end}")
        name_of_dtype = _DTYPES[code]
        dtype = np.dtype("uint16" if name_of_dtype == "bfloat16" else name_of_dtype)
        if stop - begin != math.prod(shape) * dtype.itemsize:
            raise _Corrupt(f"the tensor {name} has {stop - begin} bytes, which is not the size of its shape {list(shape)}")
        if stop > len(body):
            raise _Corrupt(f"the tensor {name} ends at byte {stop} of the data, which has {len(body)}")
        tensors[name] = RawTensor(name_of_dtype, np.ndarray(shape, dtype, body, offset=begin) if stop > begin else np.empty(shape, dtype))
        end = stop
    if end != len(body):
        raise _Corrupt(f"its tensors fill {end} bytes and the data has {len(body)}")
    return tensors


def _header(data: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """The header's content, and the data behind it."""
    if len(data) < 8:
        raise _Corrupt(f"it has {len(data)} bytes")
    length = int.from_bytes(data[:8].tobytes(), "little")
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
    return name, code, shape, begin, end
