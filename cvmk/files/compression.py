"""Compressed files, told by their first bytes and not by their names."""

from __future__ import annotations

import codecs
import io
import zlib
from collections.abc import Callable
from pathlib import PurePath
from typing import Any, BinaryIO, NamedTuple, Protocol

from cvmk.errors import DataError

_BLOCK = 1 << 16


class _Format(NamedTuple):
    """`open` gives an object whose read1 and close are those of a stream of what its argument decompresses to."""

    name: str
    magic: bytes
    suffix: str
    open: Callable[[BinaryIO, str], Any]


def _gzip(stream: BinaryIO, name: str) -> Any:
    import gzip

    return gzip.GzipFile(fileobj=stream, mode="rb")


def _xz(stream: BinaryIO, name: str) -> Any:
    try:
        import lzma
    except ImportError as error:
        raise _lacks("xz", "xz -d", "a Python that was built with liblzma", name) from error
    return lzma.LZMAFile(stream)


def _bzip2(stream: BinaryIO, name: str) -> Any:
    try:
        import bz2
    except ImportError as error:
        raise _lacks("bzip2", "bzip2 -d", "a Python that was built with libbz2", name) from error
    return bz2.BZ2File(stream)


def _zstd(stream: BinaryIO, name: str) -> Any:
    try:
        from compression.zstd import ZstdDecompressor  # Python 3.14

        return _Frames(stream, ZstdDecompressor)
    except ImportError:
        pass
    try:
        import zstandard
    except ImportError as error:
        raise _lacks("Zstandard", "zstd -d", 'the package zstandard ("pip install zstandard")', name) from error
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    return _Frames(stream, lambda: decompressor.decompressobj())


_FORMATS = (
    _Format("gzip", b"\x1f\x8b\x08", ".gz", _gzip),
    _Format("xz", b"\xfd7zXZ\0", ".xz", _xz),
    _Format("bzip2", b"BZh", ".bz2", _bzip2),
    _Format("Zstandard", b"\x28\xb5\x2f\xfd", ".zst", _zstd),
    _Format("Zstandard", b"\x50\x2a\x4d\x18", ".zst", _zstd),  # a frame to be skipped comes first, as pzstd writes it
)
_BZIP2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")  # after "BZh" and the level: text may begin with "BZh" too
_ARCHIVES = (
    ("a zip archive", b"PK\x03\x04"),
    ("an empty zip archive", b"PK\x05\x06"),
    ("a 7z archive", b"7z\xbc\xaf\x27\x1c"),
    ("a RAR archive", b"Rar!\x1a\x07"),
    ("compressed by compress", b"\x1f\x9d"),
    ("compressed by lz4", b"\x04\x22\x4d\x18"),
    ("compressed by lzip", b"LZIP"),
)
_TAR, _TAR_AT = b"ustar", 257
_LONGEST = max(len(magic) for magic in (*(f.magic for f in _FORMATS), *(magic for _, magic in _ARCHIVES), b"BZh91AY&SY"))


def decompressed(stream: BinaryIO, name: str, *, close: bool = False) -> io.BufferedReader:
    """What `stream` holds: itself, or what its bytes decompress to where they begin as those of gzip, xz, bzip2 or Zstandard.

    With `close`, closing the result closes `stream`. Raises DataError, naming `name`, for an archive, a missing module, and, on
    reading, for a truncated or corrupt file.
    """
    whole = _buffered(stream, close)
    head = whole.peek(_LONGEST)
    found = next((known for known in _FORMATS if _begins(head, known)), None)
    if found is None:
        _refuse_archives(head, name)
        _refuse_misnamed(head, name)
        return whole
    reader: io.BufferedReader = io.BufferedReader(_Decompressed(whole, found.open(whole, name), found.name, name, close), _BLOCK)
    head = reader.peek(_TAR_AT + len(_TAR))
    _refuse_archives(head, name)
    inner = next((known.name for known in _FORMATS if _begins(head, known)), None)
    if inner is not None:
        raise DataError(f"{name} is compressed twice, {inner} inside of {found.name}: decompress it once")
    return reader


def _buffered(stream: BinaryIO, close: bool) -> io.BufferedReader:
    """`stream` with as many bytes to peek at as a magic number has, where it begins as one does and is not shorter."""
    start = b""
    if isinstance(stream, io.BufferedReader):
        head = stream.peek(_LONGEST)
        if len(head) >= _LONGEST or not any(known.magic.startswith(head[: len(known.magic)]) for known in _FORMATS):
            return stream
        start = stream.read(_LONGEST)  # a pipe has given only its first bytes so far
    return io.BufferedReader(_Chained(start, stream, close))


def _begins(head: bytes, known: _Format) -> bool:
    return head.startswith(known.magic) and (known.name != "bzip2" or head[4:10] in _BZIP2_BLOCKS)


def _refuse_archives(head: bytes, name: str) -> None:
    what = next((what for what, magic in _ARCHIVES if head.startswith(magic)), "a tar archive" if head[_TAR_AT:].startswith(_TAR) else None)
    if what is not None:
        raise DataError(f"{name} is {what}: unpack it, and name the text itself")


def _refuse_misnamed(head: bytes, name: str) -> None:
    """Raise DataError for a file that is neither what its name says nor text: a damaged download is better told here than as an invalid line."""
    suffix = PurePath(name).suffix
    known = next((known for known in _FORMATS if known.suffix == suffix), None)
    if known is None:
        return
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is neither a {known.name} file, as its name says, nor text: copy or download it again") from error


def _lacks(what: str, tool: str, need: str, name: str) -> DataError:
    return DataError(f"{name} is compressed by {what}: reading it needs {need}, or decompress it with `{tool}`")


class _Decompressed(io.RawIOBase):
    """A decompressor's output; its errors name the file, and `fileno` is that of the file below, so that one can wait for it."""

    def __init__(self, below: io.BufferedReader, source: Any, kind: str, name: str, close: bool) -> None:
        self._below, self._source, self._kind, self._name, self._close = below, source, kind, name, close

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._below.fileno()

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._source.read1(len(buffer))
        except (EOFError, zlib.error) as error:
            raise self._corrupt(error) from error
        except OSError as error:
            if error.errno is not None:
                raise
            raise self._corrupt(error) from error
        except Exception as error:  # lzma.LZMAError, and what the two Zstandard modules raise: their modules may be absent
            if type(error).__name__ not in ("LZMAError", "ZstdError"):
                raise
            raise self._corrupt(error) from error
        buffer[: len(data)] = data
        return len(data)

    def _corrupt(self, error: Exception) -> DataError:
        return DataError(f"{self._name} is a truncated or corrupt {self._kind} file ({error}): copy or download it again")

    def close(self) -> None:
        if not self.closed:
            self._source.close()
            if self._close:
                self._below.close()
        super().close()


class _Chained(io.RawIOBase):
    """Some bytes, then what follows them in a stream, which is closed with this one if `close`."""

    def __init__(self, start: bytes, rest: BinaryIO, close: bool) -> None:
        self._start, self._rest, self._close = start, rest, close

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._rest.fileno()

    def readinto(self, buffer: Any) -> int:
        data = self._start[: len(buffer)]
        self._start = self._start[len(data) :]
        data = data or self._rest.read1(len(buffer))  # type: ignore[attr-defined]
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if self._close:
            self._rest.close()
        super().close()


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes) -> bytes: ...


class _Frames:
    """Frames of Zstandard, one after the other, by a new decompressor each; a frame that ends early is an EOFError."""

    def __init__(self, stream: BinaryIO, new: Callable[[], _Decompressor]) -> None:
        self._stream, self._new = stream, new
        self._decompressor: _Decompressor | None = None
        self._ready = memoryview(b"")
        self._unused = b""

    def read1(self, size: int) -> bytes:
        while not self._ready:
            data = self._unused or self._stream.read1(_BLOCK)  # type: ignore[attr-defined]
            self._unused = b""
            if not data:
                if self._decompressor is not None:
                    raise EOFError("it ends in the middle of a frame")
                return b""
            if self._decompressor is None:
                self._decompressor = self._new()
            self._ready = memoryview(self._decompressor.decompress(data))
            if self._decompressor.eof:
                self._unused, self._decompressor = self._decompressor.unused_data, None
        data, self._ready = bytes(self._ready[:size]), self._ready[size:]
        return data

    def close(self) -> None:
        self._ready = memoryview(b"")
