"""Normalisation: the rules, and that every kind of tokenizer obeys and keeps the one that it was trained with."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvmk.config import TokenizerConfig
from cvmk.text.phrasebook import phrasebook
from cvmk.text.tokenizers import Tokenizer, load_tokenizer, train_tokenizer
from cvmk.text.tokenizers.normalization import RULES

KINDS = ("bpe", "unigram", "fallback")
COMPOSED = [
    "\u00c9t\u00e9 \u00e0 la plage, na\u00efve \u00e2me",
    "Vi\u1ec7t Nam \u0111\u1eb9p qu\u00e1",
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5",
    "\u304c\u304e\u3050 \u30d1\u30d4\u30d7",
    "M\u00e4rz, Stra\u00dfe, \u00fcber",
]
ODD = "\u00ab\u00a0O\u00f9  est\u202f?\u3000\u00bb \ufb01 \uff21 \u00bd \u2581 \ufeff \x01 a\tb \uff5e \u200bx"
TEXTS = [*COMPOSED * 20, *phrasebook(1000, 4).train.targets[:400]]
SURROGATES = st.text(st.characters(exclude_categories=[]), max_size=30)


def train(kind: str, normalization: str) -> Tokenizer:
    if kind != "fallback":
        pytest.importorskip("sentencepiece")
    config = TokenizerConfig(kind=kind, vocabulary=440, normalization=normalization)  # type: ignore[arg-type]
    return train_tokenizer(TEXTS, config)


TOKENIZERS: dict[tuple[str, str], Tokenizer] = {}


def tokenizer(kind: str, normalization: str) -> Tokenizer:
    if (kind, normalization) not in TOKENIZERS:
        TOKENIZERS[kind, normalization] = train(kind, normalization)
    return TOKENIZERS[kind, normalization]


everywhere = pytest.mark.parametrize(("kind", "rule"), [(kind, rule) for kind in KINDS for rule in RULES])


def test_nmt_nfkc_is_the_rule_of_sentencepiece() -> None:
    """Over all characters that both know: SentencePiece has another version of Unicode than Python."""
    sentencepiece = pytest.importorskip("sentencepiece")
    options = {"add_dummy_prefix": False, "escape_whitespaces": False, "remove_extra_whitespaces": False}
    normalizer = sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc", **options)
    for point in range(1, 0x110000):
        character = chr(point)
        if unicodedata.category(character) not in ("Cs", "Cn"):
            assert RULES["nmt_nfkc"](f"x {character} y") == normalizer.normalize(f"x {character} y"), hex(point)
    for text in [*COMPOSED, *(unicodedata.normalize("NFD", text) for text in COMPOSED), ODD]:
        assert RULES["nmt_nfkc"](text) == normalizer.normalize(text)


@settings(max_examples=300, deadline=None)
@given(text=SURROGATES)
def test_normalised_text_stays_as_it_is(text: str) -> None:
    for rule in RULES.values():
        assert rule(rule(text)) == rule(text)


@everywhere
def test_decoding_gives_the_normalised_text(kind: str, rule: str) -> None:
    found = tokenizer(kind, rule)
    texts = [*COMPOSED, *(unicodedata.normalize("NFD", text) for text in COMPOSED), ODD, "", " ", "\x01", "\u0301", "a\ud800\u0301"]
    for text in texts:
        assert found.decode(found.encode(text)) == found.normalized(text)
    assert found.encode_many(texts) == [found.encode(text) for text in texts]
    assert (found.normalized(ODD) == ODD) == (rule != "nmt_nfkc"), "nfc keeps no-break and ideographic spaces"


@everywhere
def test_decomposed_text_is_the_same_text(kind: str, rule: str) -> None:
    found = tokenizer(kind, rule)
    for text in COMPOSED:
        same = found.encode(unicodedata.normalize("NFD", text)) == found.encode(text)
        assert same == (rule != "identity")


@everywhere
def test_trained_on_decomposed_text(kind: str, rule: str) -> None:
    if kind != "fallback":
        pytest.importorskip("sentencepiece")
    config = TokenizerConfig(kind=kind, vocabulary=440, normalization=rule)  # type: ignore[arg-type]
    decomposed = train_tokenizer([unicodedata.normalize("NFD", text) for text in TEXTS], config)
    assert (decomposed.fingerprint == tokenizer(kind, rule).fingerprint) == (rule != "identity")


@everywhere
def test_the_rule_is_stored(kind: str, rule: str, tmp_path: Path) -> None:
    found = tokenizer(kind, rule)
    found.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.normalization, loaded.fingerprint) == (rule, found.fingerprint)
    assert loaded.encode(ODD) == found.encode(ODD)
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    assert (description["format"], description["normalization"]) == (2, rule)


def test_the_rule_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    tokenizer("fallback", "nfc").save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"nfc"', '"nmt_nfkc"'))
    assert load_tokenizer(tmp_path).fingerprint != tokenizer("fallback", "nfc").fingerprint


@pytest.mark.parametrize(
    ("kind", "vocabulary", "fingerprint"),
    [
        ("fallback", 280, "e7b557cd665a360c2f57063411e63661851433cb95e0b3b78cbc1e1129f8d666"),
        ("bpe", 290, "8202802ad6cd7f6be5a7d125bea14b1f9525935b836a19f851fb13dec3f18e4c"),
    ],
)
def test_tokenizers_from_before(kind: str, vocabulary: int, fingerprint: str, tmp_path: Path) -> None:
    """Format 1 had no normalization: such tokenizers load as they were, and models know them by the same fingerprint."""
    config = TokenizerConfig(kind=kind, vocabulary=vocabulary, normalization="identity")  # type: ignore[arg-type]
    found = train_tokenizer(["a man rides a horse", "two dogs"] * 20, config)
    assert found.fingerprint == fingerprint
    found.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    description = json.loads(path.read_text()) | {"format": 1}
    del description["normalization"]
    path.write_text(json.dumps(description))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.normalization, loaded.fingerprint) == ("identity", fingerprint)
    assert loaded.decode(loaded.encode("e\u0301")) == "e\u0301"
