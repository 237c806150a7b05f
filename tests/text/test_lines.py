"""Lines of text: what is dropped from them and what is kept."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import pytest

from cvmk.errors import DataError
from cvmk.text.lines import decode_line, one_line, text_lines, trimmed

ODD = "\u00ab\u00a0O\u00f9  est\u202f? \u3000\u00bb \u2028 \x0b \u200b end"


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(f"{ODD}\r\n\nlast".encode())
    assert list(text_lines(tmp_path / "a")) == [f"{ODD}\r".encode(), b"", b"last"]
    assert list(text_lines("a pipe", io.BytesIO(b"one\ntwo\n"))) == [b"one", b"two"]
    (tmp_path / "a").write_bytes(gzip.compress(b""))
    for path in (tmp_path / "a", tmp_path / "nothing"):
        with pytest.raises(DataError, match=path.name):
            list(text_lines(path))


def test_white_space_inside_a_sentence_is_kept() -> None:
    assert trimmed(f" \ufeff \u00a0{ODD}\u3000\t\r") == ODD == decode_line(ODD.encode()) == one_line(ODD)
    assert decode_line("\ufeffa\ufeffb ".encode()) == "ab "
    assert one_line("a\nb\r\nc") == "a b  c"
    with pytest.raises(UnicodeDecodeError):
        decode_line(b"\xff")
