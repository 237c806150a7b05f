"""Scalars for TensorBoard, in its file format, which is short: nothing to install where a model is trained.

A file is a sequence of records (TFRecord: length, its checksum, data, its checksum), each an `Event` of tensorflow/core/util/event.proto. Checksums are CRC-32C
(Castagnoli), rotated by 15 bits and shifted by a constant.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from cvmk.files import explained

_DOUBLE, _VARINT, _BYTES, _FLOAT = 1, 0, 2, 5
_CHECKSUM_SHIFT = 0xA282EAD8


class ScalarWriter:
    """A new file of scalars in `folder`; the folder may hold those of earlier starts. Raises DataError where it cannot be written."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        with explained(folder, "write"):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "xb")
        self._write(time.time(), 0, _bytes(3, b"brain.Event:2"))

    def add(self, step: int, values: Mapping[str, float], moment: float) -> None:
        """The scalars of one step; `moment` in seconds since the epoch."""
        summary = b"".join(_bytes(1, _bytes(1, name.encode()) + _key(2, _FLOAT) + struct.pack("<f", _float32(value))) for name, value in values.items())
        self._write(moment, step, _bytes(5, summary))

    def restart(self, step: int, moment: float) -> None:
        """What was written of this step and later ones, in whatever file of the folder, counts no more."""
        started = _key(1, _VARINT) + _varint(1)
        self._write(moment, step, _bytes(7, started))

    def flush(self) -> None:
        with explained(self._path, "write"):
            self._file.flush()

    def close(self) -> None:
        with explained(self._path, "write"):
            self._file.close()

    def _write(self, moment: float, step: int, what: bytes) -> None:
        event = _key(1, _DOUBLE) + struct.pack("<d", moment) + _key(2, _VARINT) + _varint(step) + what
        length = struct.pack("<Q", len(event))
        with explained(self._path, "write"):
            self._file.write(length + _checksum(length) + event + _checksum(event))


def _float32(value: float) -> float:
    """A number that fits."""
    try:
        struct.pack("<f", value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")
    return value


def _key(field: int, kind: int) -> bytes:
    return _varint(field << 3 | kind)


def _bytes(field: int, data: bytes) -> bytes:
    return _key(field, _BYTES) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _table() -> tuple[int, ...]:
    found = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        found.append(value)
    return tuple(found)


_TABLE = _table()


def _checksum(data: bytes) -> bytes:
    table, crc = _TABLE, 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + _CHECKSUM_SHIFT) & 0xFFFFFFFF)
