"""Texts of every compression, told by their content, and what is no UTF-8 text, named as what it is."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from cvmk.errors import DataError
from cvmk.files import open_input, plain, read_bytes, read_json, read_text

TEXT = "".join(f"line {number} \u00e9\u3042\n" for number in range(5000)).encode()


def zstd(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)  # type: ignore[no-any-return]


COMPRESS = {"gzip": gzip.compress, "xz": lzma.compress, "bzip2": bz2.compress, "Zstandard": zstd}
SUFFIX = {"gzip": ".gz", "xz": ".xz", "bzip2": ".bz2", "Zstandard": ".zst"}
kinds = pytest.mark.parametrize("kind", COMPRESS)


def content(path: Path) -> bytes:
    with open_input(path) as file:
        return file.read()


@kinds
@pytest.mark.parametrize("name", ["right", "plain", "a.txt", "other"])
def test_compressed_by_content_whatever_the_name(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / {"right": f"a{SUFFIX[kind]}", "other": "a.gz" if kind != "gzip" else "a.xz"}.get(name, name)
    path.write_bytes(COMPRESS[kind](TEXT))
    assert content(path) == TEXT
    with open_input(path) as file:
        assert list(file) == TEXT.splitlines(keepends=True)


@kinds
def test_several_one_after_the_other(tmp_path: Path, kind: str) -> None:
    """`cat a.gz b.gz`, and what parallel compressors write."""
    (tmp_path / "a").write_bytes(COMPRESS[kind](TEXT) + COMPRESS[kind](b"") + COMPRESS[kind](b"end\n"))
    assert content(tmp_path / "a") == TEXT + b"end\n"


@kinds
def test_empty(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a").write_bytes(COMPRESS[kind](b""))
    assert content(tmp_path / "a") == b""
    (tmp_path / f"b{SUFFIX[kind]}").write_bytes(b"")
    assert content(tmp_path / f"b{SUFFIX[kind]}") == b""


@kinds
def test_truncated_or_corrupt(tmp_path: Path, kind: str) -> None:
    """Every cut of a small file, and random damage to a larger one: the text, or an error that names the file. Never less without a word."""
    path = tmp_path / "a.txt"
    whole = COMPRESS[kind](b"a few lines\nof text\n")
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        try:
            assert content(path) in (b"", whole[:size], b"a few lines\nof text\n")  # the last: what is cut is a checksum's padding
            assert size < 10 or content(path) != b""
        except DataError as error:
            assert f"{path} is a truncated or corrupt {kind} file" in str(error)
    draw, whole = random.Random(5), COMPRESS[kind](TEXT)
    for _ in range(0 if kind == "Zstandard" else 40):  # whose frames have no checksum by default
        damaged = bytearray(whole)
        damaged[draw.randrange(20, len(whole) - 12)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            assert content(path) == TEXT  # some bits mean nothing
        except DataError as error:
            assert f"{path} is a truncated or corrupt {kind} file" in str(error)


def test_zstandard_frames_of_other_writers(tmp_path: Path) -> None:
    module = pytest.importorskip("zstandard")
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"....."[:4]
    (tmp_path / "a").write_bytes(skipped + zstd(TEXT) + skipped + zstd(b"end\n"))
    assert content(tmp_path / "a") == TEXT + b"end\n"
    wide = module.ZstdCompressor(compression_params=module.ZstdCompressionParameters(window_log=28, enable_ldm=True)).compress(TEXT)
    (tmp_path / "b").write_bytes(wide)
    assert content(tmp_path / "b") == TEXT


def test_zstandard_without_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(zstd(TEXT))
    for module in ("compression", "compression.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=r"/a is compressed by Zstandard: reading it needs the package zstandard .*zstd -d"):
        content(tmp_path / "a")


def test_a_pipe_that_gives_byte_after_byte(tmp_path: Path) -> None:
    for kind in COMPRESS:
        data = COMPRESS[kind](b"one\ntwo\n")
        reading, writing = os.pipe()

        def feed(data: bytes = data, writing: int = writing) -> None:
            for value in data:
                os.write(writing, bytes([value]))
            os.close(writing)

        thread = threading.Thread(target=feed)
        with open(reading, "rb") as file:
            thread.start()
            assert plain(file, "pipe").read() == b"one\ntwo\n"
            thread.join()


def test_a_line_of_a_pipe_is_there_before_the_next(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with open(reading, "rb") as file, open(writing, "wb", buffering=0) as other:
        other.write(b"B\n")  # as bzip2 begins
        stream = plain(file, "pipe")
        assert stream.readline() == b"B\n"
        other.write(b"second\n")
        assert stream.readline() == b"second\n" and stream.fileno() == reading


def test_text_that_begins_like_a_compressed_file(tmp_path: Path) -> None:
    for text in (b"BZh is how bzip2 files begin\n", b"BZh9\n", b"B", b"PK is the end\n", b"\x1f", b"LZIQ"):
        (tmp_path / "a").write_bytes(text)
        assert content(tmp_path / "a") == text


def test_plain_text_may_have_any_name(tmp_path: Path) -> None:
    for name in ("a.gz", "a.xz", "a.bz2", "a.zst"):
        (tmp_path / name).write_bytes(TEXT)
        assert content(tmp_path / name) == TEXT
        for start in range(4):  # wherever the first block ends
            (tmp_path / name).write_bytes(b"x" * start + "\u3042".encode() * 5000)
            assert len(content(tmp_path / name)) == start + 15000
        (tmp_path / name).write_bytes(b"\x8f" + TEXT)
        with pytest.raises(DataError, match=rf"{name} is neither a \w+ file, as its name says, nor text"):
            content(tmp_path / name)


def test_archives_are_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", "text")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO(b""))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO(b""))
    for name, what in (("a.zip", "a zip archive"), ("a.tar.gz", "a tar archive"), ("a.tar", "a tar archive")):
        with pytest.raises(DataError, match=rf"{name} is {what}: unpack it"):
            content(tmp_path / name)


@pytest.mark.parametrize("outer", COMPRESS)
@pytest.mark.parametrize("inner", COMPRESS)
def test_compressed_twice_is_named(tmp_path: Path, inner: str, outer: str) -> None:
    (tmp_path / "a").write_bytes(COMPRESS[outer](COMPRESS[inner](TEXT)))
    with pytest.raises(DataError, match=f"a is compressed twice, {inner} inside of {outer}: decompress it once"):
        content(tmp_path / "a")


# -- encodings ---------------------------------------------------------------------------------------------------------------------
SENTENCES = {
    "de": "Zwei junge wei\u00dfe M\u00e4nner sind im Freien.\n",
    "ru": "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440.\n",
    "ja": "\u3053\u3093\u306b\u3061\u306f\u4e16\u754c\u3002\n\u4e00\u4e8c\u4e09\n",
    "ar": "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645\n",
    "emoji": "\U0001f469\u200d\U0001f467 ok \U0001f1e9\U0001f1ea\n",
}


@pytest.mark.parametrize("language", SENTENCES)
@pytest.mark.parametrize(
    ("encoding", "name"), [("utf-16", "UTF-16"), ("utf-32", "UTF-32"), ("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE")]
)
@pytest.mark.parametrize("compressed", [False, True])
def test_other_encodings_are_named(tmp_path: Path, language: str, encoding: str, name: str, compressed: bool) -> None:
    data = (SENTENCES[language] * 500).encode(encoding)
    (tmp_path / "a").write_bytes(gzip.compress(data) if compressed else data)
    with pytest.raises(DataError, match=rf"/a is {name} text: convert it to UTF-8, for example with `iconv -f {name} -t UTF-8`"):
        content(tmp_path / "a")


@pytest.mark.parametrize("mark", [b"\xfe\xff", b"\xff\xfe"])
def test_byte_orders_by_their_marks(tmp_path: Path, mark: bytes) -> None:
    (tmp_path / "a").write_bytes(mark + SENTENCES["de"].encode("utf-16-be" if mark == b"\xfe\xff" else "utf-16-le"))
    with pytest.raises(DataError, match="is UTF-16 text"):
        content(tmp_path / "a")


def test_utf8_is_not_taken_for_something_else(tmp_path: Path) -> None:
    for text in (*SENTENCES.values(), "a\0b\n", "\0\0\0", "caf\u00e9 \0 x\n" * 9, "", "\n", "\x04\x10\n"):
        (tmp_path / "a").write_bytes(text.encode())
        assert content(tmp_path / "a") == text.encode()
    for other in ("caf\u00e9 cr\u00e8me\n" * 20).encode("latin-1"), "\u041f\u0440\u0438 \u043c\n".encode("koi8-r"), SENTENCES["ja"].encode("shift-jis"):
        (tmp_path / "a").write_bytes(other)
        assert content(tmp_path / "a") == other  # its line is named by whoever decodes it


# -- whole texts and JSON -----------------------------------------------------------------------------------------------------------
def test_read_text(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for data in ("\ufeffx = 1\r\n".encode(), gzip.compress(b"x = 1\r\n")):
        path.write_bytes(data)
        assert read_text(path) == "x = 1\r\n"
    path.write_bytes(b"one\ntw\xff\n")
    with pytest.raises(DataError, match=r"/a is not valid UTF-8 \(line 2, byte 7 of the file\): convert it to UTF-8"):
        read_text(path)


def test_read_text_of_a_pipe() -> None:
    program = "from cvmk.files import read_text; print(repr(read_text('/dev/stdin')))"
    done = subprocess.run([sys.executable, "-c", program], input="\ufeffx = 1\n".encode(), capture_output=True, check=True)
    assert done.stdout == b"'x = 1\\n'\n"


def test_json_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n')
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_reading_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*nothing"):
        read_bytes(tmp_path / "nothing")
    for content in (b'{"a": ', b'"\xff"', b"[" * 100_000, b"1" * 10_000):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.json is not valid JSON"):
            read_json(tmp_path / "bad.json")
