"""Reading parallel text: every form, every kind of bad line and bad file."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cvmk.config.schema import CorpusConfig, DataConfig
from cvmk.errors import DataError
from cvmk.text.corpus import ParallelCorpus, read_corpus

ALIGNED = CorpusConfig(source="a.en", target="a.de")
TSV = CorpusConfig(tsv="a.tsv")
JSONL = CorpusConfig(jsonl="a.jsonl")


def read(folder: Path, corpus: CorpusConfig, on_bad_line: str = "error", training: bool = True, **more: str) -> ParallelCorpus:
    data = DataConfig(folder=str(folder), train=corpus, valid=corpus, on_bad_line=on_bad_line, **more)  # type: ignore[arg-type]
    return read_corpus(corpus, data, "data.train", training)


def write(folder: Path, **files: bytes) -> None:
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)


def test_aligned_files(tmp_path: Path) -> None:
    write(tmp_path, a__en=b"One.\r\n  two \nthree", a__de="Eins.\nzwei\ndreißig\n".encode())
    corpus = read(tmp_path, ALIGNED)
    assert corpus.sources == ["One.", "two", "three"]
    assert corpus.targets == ["Eins.", "zwei", "dreißig"]
    assert (corpus.report.read, corpus.report.kept, corpus.report.skipped) == (3, 3, 0)
    assert corpus.where(2) == f"{tmp_path}/a.en:3"


def test_gzip_tsv_and_jsonl_give_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.en.gz").write_bytes(gzip.compress(b"one\ntwo\n"))
    (tmp_path / "a.de.gz").write_bytes(gzip.compress(b"eins\nzwei\n"))
    write(tmp_path, a__tsv=b"one\teins\ntwo\tzwei\n", a__jsonl=b'{"source": "one", "target": "eins", "x": 1}\n{"target":"zwei","source":"two"}\n')
    for corpus in (CorpusConfig(source="a.en.gz", target="a.de.gz"), TSV, JSONL):
        result = read(tmp_path, corpus)
        assert list(zip(result.sources, result.targets, strict=True)) == [("one", "eins"), ("two", "zwei")]


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    odd = "a\u2028b\x0bc\x85d\x0ce\u2029f\x1cg\rh"
    write(tmp_path, a__en=odd.encode() + b"\nsecond\n", a__de=b"x\ny\n")
    assert read(tmp_path, ALIGNED).sources == [odd, "second"]


def test_byte_order_marks_are_removed_wherever_they_stand(tmp_path: Path) -> None:
    mark = "\ufeff"
    write(tmp_path, a__en=f"{mark}one\n{mark}two\n{mark} three\nfo{mark}ur\n".encode(), a__de=f"{mark}eins\nzwei {mark}\ndrei\nvier\n".encode())
    assert read(tmp_path, ALIGNED).sources == ["one", "two", "three", "four"]
    assert read(tmp_path, ALIGNED).targets == ["eins", "zwei", "drei", "vier"]
    write(tmp_path, a__tsv=f"one\t{mark}eins\n".encode(), a__jsonl=f'{mark}{{"source": "one", "target": "\\ufeffeins"}}\n'.encode())
    assert read(tmp_path, TSV).targets == read(tmp_path, JSONL).targets == ["eins"]
    write(tmp_path, a__en=f"one\n{mark}\n".encode(), a__de=b"eins\nzwei\n")
    assert read(tmp_path, ALIGNED, "skip").report.problems == {"empty line": 1}


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_by_content(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    write(tmp_path, a__en=compress(b"one\n") + compress(b"two\n"), a__de=b"eins\nzwei\n", a__tsv=compress(b"one\teins\n"))
    assert read(tmp_path, ALIGNED).sources == ["one", "two"]
    assert read(tmp_path, TSV).targets == ["eins"]


@pytest.mark.parametrize("on_bad_line", ["error", "skip"])
def test_other_encodings_are_named_and_not_skipped(tmp_path: Path, on_bad_line: str) -> None:
    for encoding, name in (("utf-16", "UTF-16"), ("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE"), ("utf-32", "UTF-32")):
        write(tmp_path, a__en="one\ntwo\n".encode(encoding), a__de=b"eins\nzwei\n")
        with pytest.raises(DataError, match=rf"a\.en is {name} text: convert it to UTF-8"):
            read(tmp_path, ALIGNED, on_bad_line)


def test_unequal_line_counts_name_both_files_and_counts(tmp_path: Path) -> None:
    write(tmp_path, a__en=b"1\n2\n3\n", a__de=b"1\n2\n3\n4\n5\n")
    for on_bad_line in ("error", "skip"):
        with pytest.raises(DataError, match=r"a\.en has 3 lines and .*a\.de has 5"):
            read(tmp_path, ALIGNED, on_bad_line)


BAD_LINES = [
    (ALIGNED, {"a__en": b"ok\nb\xffd\nok\n", "a__de": b"1\n2\n3\n"}, "a.en:2: invalid UTF-8"),
    (ALIGNED, {"a__en": b"ok\nx\nok\n", "a__de": b"1\n\xed\xa0\x80\n3\n"}, "a.de:2: invalid UTF-8"),
    (ALIGNED, {"a__en": b"ok\n\nok\n", "a__de": b"1\n2\n3\n"}, "a.en:2: empty line"),
    (ALIGNED, {"a__en": b"ok\nx\nok\n", "a__de": "1\n \u3000\t\r\n3\n".encode()}, "a.de:2: empty line"),
    (ALIGNED, {"a__en": b"ok\n\nok\n", "a__de": b"1\n\n3\n"}, "a.en:2: empty line"),
    (ALIGNED, {"a__en": b"ok\na\0b\nok\n", "a__de": b"1\n2\n3\n"}, "a.en:2: NUL character"),
    (TSV, {"a__tsv": b"a\tb\nc\nd\te\n"}, "a.tsv:2: 1 tab-separated field instead of 2"),
    (TSV, {"a__tsv": b"a\tb\nc\td\te\nd\te\n"}, "a.tsv:2: 3 tab-separated fields instead of 2"),
    (TSV, {"a__tsv": b"a\tb\n\nd\te\n"}, "a.tsv:2: empty line"),
    (TSV, {"a__tsv": b"a\tb\nc\t \nd\te\n"}, "a.tsv:2: empty line"),
    *(
        (JSONL, {"a__jsonl": b'{"source":"a","target":"b"}\n' + line + b'\n{"source":"c","target":"d"}\n'}, f"a.jsonl:2: {what}")
        for line, what in (
            (b"{", "not JSON"),
            (b"[" * 100_000, "not JSON"),
            (b'["a","b"]', "not a JSON object"),
            (b'{"source":"a"}', 'no key "target"'),
            (b'{"source":"a","target":7}', 'the value of "target" is not a string'),
            (b'{"source":"a","target":null}', 'the value of "target" is not a string'),
            (b'{"source":"\\ud800","target":"b"}', "invalid Unicode (a lone surrogate)"),
            (b'{"source":"a\\nb","target":"b"}', "line break inside a sentence"),
            (b'{"source":"  ","target":"b"}', "empty line"),
            (b'{"source":"a\\u0000","target":"b"}', "NUL character"),
            (b'{"source":"\xff","target":"b"}', "invalid UTF-8"),
            (b"", "empty line"),
        )
    ),
]


@pytest.mark.parametrize(("corpus", "files", "problem"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_line(tmp_path: Path, corpus: CorpusConfig, files: dict[str, bytes], problem: str) -> None:
    write(tmp_path, **files)
    with pytest.raises(DataError) as caught:
        read(tmp_path, corpus)
    assert str(caught.value).startswith(f"{tmp_path}/{problem}; ")
    assert "data.on_bad_line" in str(caught.value)
    for training in (True, False):
        result = read(tmp_path, corpus, "skip", training)
        assert len(result.sources) == len(result.targets) == 2
        assert list(result.lines) == [1, 3]
        assert (result.report.read, result.report.kept, result.report.problems.total()) == (3, 2, 1)
        assert result.report.examples == [f"{tmp_path}/{problem}"]
        assert "1 skipped" in result.report.describe("data.train")


def test_report_counts_by_kind_and_keeps_few_examples(tmp_path: Path) -> None:
    write(tmp_path, a__en=b"ok\n" + b"\n" * 8 + b"\xff\n", a__de=b"1\n" * 10)
    report = read(tmp_path, ALIGNED, "skip").report
    assert dict(report.problems) == {"empty line": 8, "invalid UTF-8": 1}
    assert len(report.examples) == 5


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, a__tsv=b"only one\n\n")
    with pytest.raises(DataError, match=r"data\.train has no usable pair left"):
        read(tmp_path, TSV, "skip")


def test_other_json_keys(tmp_path: Path) -> None:
    write(tmp_path, a__jsonl=json.dumps({"en": "a", "de": "ä"}).encode())
    assert read(tmp_path, JSONL, jsonl_source="en", jsonl_target="de").targets == ["ä"]


@pytest.mark.parametrize("on_bad_line", ["error", "skip"])
def test_bad_files(tmp_path: Path, on_bad_line: str) -> None:
    with pytest.raises(DataError, match=r"cannot read .*a\.en: No such file"):
        read(tmp_path, ALIGNED, on_bad_line)
    write(tmp_path, a__en=b"", a__de=b"")
    with pytest.raises(DataError, match=r"a\.en is empty"):
        read(tmp_path, ALIGNED, on_bad_line)
    whole = gzip.compress(os.urandom(1000).hex().encode() + b"\n")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for content in (whole[:-9], whole[: len(whole) // 2], b"\x8f text\n", bytes(flipped)):
        (tmp_path / "a.tsv.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.tsv\.gz"):
            read(tmp_path, CorpusConfig(tsv="a.tsv.gz"), on_bad_line)
    (tmp_path / "folder.tsv").mkdir()
    with pytest.raises(DataError, match=r"cannot read .*folder\.tsv"):
        read(tmp_path, CorpusConfig(tsv="folder.tsv"), on_bad_line)


def test_multi30k(multi30k: Path) -> None:
    corpus = read(multi30k, CorpusConfig(source="train.en.gz", target="train.de.gz"))
    assert len(corpus) == 29_000
    assert corpus.sources[0] == "Two young, White males are outside near many bushes."
    assert corpus.targets[0] == "Zwei junge weiße Männer sind im Freien in der Nähe vieler Büsche."
    assert len(read(multi30k, CorpusConfig(source="val.en.gz", target="val.de.gz"), training=False)) == 1014
