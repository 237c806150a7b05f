"""The tokenised cache: contents, limits, reuse, damage."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from cvmk.config.schema import CorpusConfig, DataConfig
from cvmk.errors import DataError
from cvmk.text.cache import tokenized
from cvmk.text.corpus import CorpusReport, ParallelCorpus, read_corpus
from cvmk.text.phrasebook import phrasebook
from cvmk.text.tokenizers.fallback import FallbackTokenizer, train_fallback

CORPUS = phrasebook(1000, seed=2).train
TOKENIZER = train_fallback(CORPUS.sources + CORPUS.targets, 400)


def small(*pairs: tuple[str, str]) -> ParallelCorpus:
    return ParallelCorpus([source for source, _ in pairs], [target for _, target in pairs], "data.train", CorpusReport(), "a.tsv", range(10, 10 + len(pairs)))


class Counting(FallbackTokenizer):
    """Counts the texts that it encodes."""

    def __init__(self) -> None:
        super().__init__(TOKENIZER.merges)
        self.texts = 0

    def encode(self, text: str) -> list[int]:
        self.texts += 1
        return super().encode(text)


def test_contents(tmp_path: Path) -> None:
    result = tokenized(CORPUS, TOKENIZER, tmp_path / "cache", 256)
    assert len(result) == 1000 and result.report.skipped == 0
    assert result.lengths.dtype == np.int32 and result.lengths.shape == (1000, 2)
    for index in (0, 1, 500, 999):
        source, target = result[index]
        assert source.dtype == target.dtype == np.int32
        assert source.tolist() == TOKENIZER.encode(CORPUS.sources[index])
        assert target.tolist() == TOKENIZER.encode(CORPUS.targets[index])
        assert result.lengths[index].tolist() == [len(source), len(target)]
    for index in (-1, 1000):
        with pytest.raises(IndexError):
            result[index]


def test_large_ids_survive(tmp_path: Path) -> None:
    class Large(FallbackTokenizer):
        vocab_size = 70_000  # type: ignore[assignment]

        def encode(self, text: str) -> list[int]:
            return [69_999, len(text)]

    assert tokenized(small(("ab", "c")), Large([]), tmp_path, 9)[0][0].tolist() == [69_999, 2]


def test_reuse_and_keys(tmp_path: Path) -> None:
    counting = Counting()
    corpus = small(("one", "eins"), ("two", "zwei"))
    tokenized(corpus, counting, tmp_path, 256)
    assert counting.texts == 4
    tokenized(corpus, counting, tmp_path, 256)
    assert counting.texts == 4, "a second run reads the cache"
    others = [
        (small(("one", "eins"), ("two", "zwo")), 256, 0.0, "error"),
        (small(("one two", "eins"), ("", "zwei")), 256, 0.0, "error"),
        (corpus, 255, 0.0, "error"),
        (corpus, 256, 3.0, "error"),
        (corpus, 256, 0.0, "skip"),
    ]
    for count, (other, limit, ratio, handling) in enumerate(others, 2):
        tokenized(other, counting, tmp_path, limit, ratio, handling)  # type: ignore[arg-type]
        assert len(list(tmp_path.iterdir())) == count
    other_tokenizer = train_fallback(CORPUS.sources, 300)
    assert tokenized(corpus, other_tokenizer, tmp_path, 256)[0][1].tolist() == other_tokenizer.encode("eins")


def test_damaged_cache_is_rebuilt(tmp_path: Path) -> None:
    expected = tokenized(CORPUS, TOKENIZER, tmp_path, 256)
    ids = [expected[index][1].tolist() for index in range(1000)]
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    wrong_header = bytearray(whole)
    wrong_header[20] ^= 0x80
    cut = [b"", whole[:10], whole[:-1], whole[: len(whole) // 2]]
    for damaged in (*cut, whole + b"x", bytes(flipped), bytes(wrong_header), b"\0" * len(whole), os.urandom(500)):
        path.unlink()
        path.write_bytes(damaged)
        result = tokenized(CORPUS, TOKENIZER, tmp_path, 256)
        assert [result[index][1].tolist() for index in range(1000)] == ids
        assert path.read_bytes() == whole


LONG = small(("one", "eins"), ("word " * 30, "wort"), ("a", "Donaudampfschifffahrtsgesellschaft " * 3), ("two", "zwei"))


def test_over_long_pairs_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.tsv:11: over-long pair .*data\.max_tokens_per_sentence"):
        tokenized(LONG, TOKENIZER, tmp_path, 20)
    with pytest.raises(DataError, match=r"a\.tsv:11: over-long pair by ratio .*data\.max_length_ratio"):
        tokenized(LONG, TOKENIZER, tmp_path, 1000, 5.0)
    assert not list(tmp_path.iterdir())


def test_over_long_pairs_are_skipped_with_a_count(tmp_path: Path) -> None:
    for _ in range(2):  # made, then read from the cache
        result = tokenized(LONG, TOKENIZER, tmp_path, 40, 5.0, "skip")
        assert result.rows.tolist() == [0, 3]
        assert result[1][1].tolist() == TOKENIZER.encode("zwei")
        assert (result.report.read, result.report.kept) == (4, 2)
        assert result.report.problems.total() == 2 and len(result.report.examples) == 2
        assert result.report.examples[0].startswith("a.tsv:11: over-long")
    with pytest.raises(DataError, match="no pair within"):
        tokenized(LONG, TOKENIZER, tmp_path, 1, 0.0, "skip")


def test_limits_are_inclusive(tmp_path: Path) -> None:
    longest = len(TOKENIZER.encode(LONG.sources[1]))
    assert len(tokenized(small(("word " * 30, "wort")), TOKENIZER, tmp_path, longest)) == 1
    with pytest.raises(DataError):
        tokenized(small(("word " * 30, "wort")), TOKENIZER, tmp_path, longest - 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match="cannot write"):
        tokenized(CORPUS, TOKENIZER, tmp_path / "cache", 256)


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        tokenized(CORPUS, TOKENIZER, tmp_path / "cache", 256)


def test_multi30k(multi30k: Path, tmp_path: Path) -> None:
    files = CorpusConfig(source="val.en.gz", target="val.de.gz")
    corpus = read_corpus(files, DataConfig(folder=str(multi30k), train=files, valid=files), "data.valid", training=False)
    result = tokenized(corpus, TOKENIZER, tmp_path, 1000)
    assert all(TOKENIZER.decode(result[index][1]) == corpus.targets[index] for index in range(len(corpus)))
