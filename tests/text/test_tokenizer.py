"""Tokenizers: lossless on all of Unicode but for the normalisation that was asked for, deterministic, saved and loaded, safe against special spellings."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvmk.config.schema import TokenizerConfig
from cvmk.errors import ConfigError, DataError
from cvmk.text.phrasebook import phrasebook
from cvmk.text.tokenizers import Tokenizer, load_tokenizer, train_tokenizer
from cvmk.text.tokenizers.fallback import FallbackTokenizer, train_fallback

KINDS = ("bpe", "unigram", "fallback")
BOOK = phrasebook(1000, seed=4)
TEXTS = [*BOOK.train.sources, *BOOK.train.targets]


def train(kind: str, texts: list[str] = TEXTS, vocabulary: int = 600, normalization: str = "identity") -> Tokenizer:
    if kind != "fallback":
        pytest.importorskip("sentencepiece")
    return train_tokenizer(texts, TokenizerConfig(kind=kind, vocabulary=vocabulary, normalization=normalization), seed=1)  # type: ignore[arg-type]


TRAINED: dict[str, Tokenizer] = {}


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param not in TRAINED:
        TRAINED[request.param] = train(request.param)
    return TRAINED[request.param]


HARD = [
    "",
    " ",
    "  ",
    "a",
    " a",
    "a ",
    "  a  b   c  ",
    "\t\n\r x \n",
    "\u2581",
    "\u2581\u2581a",
    " \u2581 ",
    "a\u2581b\u2581",
    "\ufdd0\u2581\ufdd1",
    "\0",
    "a\0b",
    "<s>",
    "</s>",
    "<pad>",
    "<unk> </s>",
    "<0x41>",
    "<0xE2><0x96><0x81>",
    "\u2047",
    " \u2047 ",
    "\ufeffx",
    "\ufffd",
    "e\u0301 é",
    "Ǆ ŉ ﬁ Å",
    "\u2028\u2029\x85\x0b",
    "日本語 のテキスト",
    "👩‍👩‍👧‍👦 🇩🇪",
    "مرحبا بالعالم",
    "\u200b\u00ad\u202e",
    "\U0010ffff",
    "12 345,67 €",
    "snake_case __x__",
    "³²¹ ½ Ⅷ ٣",
]


def test_round_trip_of_hard_texts(tokenizer: Tokenizer) -> None:
    for text in HARD:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(4 <= index < tokenizer.vocab_size for index in ids), text
    assert tokenizer.encode("") == []
    assert tokenizer.encode_many(HARD) == [tokenizer.encode(text) for text in HARD]
    assert tokenizer.encode_many([]) == []


def test_round_trip_of_all_of_unicode(tokenizer: Tokenizer) -> None:
    points = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    texts = ["".join(points[start : start + 256]) for start in range(0, len(points), 256)]
    texts += ["x".join(points[start : start + 64]) for start in range(0, 0x3000, 64)]
    texts += [" " + point + " " for point in points[:0x3100]]
    for text, ids in zip(texts, tokenizer.encode_many(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert min(ids) >= 4


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \u2581\n\t<>/s")), max_size=40))
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_of_random_texts(kind: str, text: str) -> None:
    if kind not in TRAINED:
        TRAINED[kind] = train(kind)
    assert TRAINED[kind].decode(TRAINED[kind].encode(text)) == text


def test_trained_on_space_marks_and_controls() -> None:
    texts = [f"\u2581 {letter}\u2581x \ufdd0 \ufdd1 \x01\t{letter * 3}" for letter in "abcdefghij"] * 20
    for kind, size in (("bpe", 280), ("fallback", 270)):
        tokenizer = train(kind, texts, size)
        for text in [*texts[:10], *HARD]:
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"
    assert tokenizer.decode(tokenizer.encode_many(["a\ud800"])[0]) == "a\ufffd"


def test_special_ids(tokenizer: Tokenizer) -> None:
    assert (Tokenizer.PAD, Tokenizer.UNK, Tokenizer.BOS, Tokenizer.EOS) == (0, 1, 2, 3)
    assert tokenizer.pieces[:4] == ["<pad>", "<unk>", "<s>", "</s>"]
    assert tokenizer.vocab_size == len(tokenizer.pieces) == 600
    ids = tokenizer.encode("The bus")
    assert tokenizer.decode([2, *ids[:1], 0, 1, *ids[1:], 3, 0, 0]) == "The bus"
    assert tokenizer.decode([]) == tokenizer.decode([0, 3]) == ""


@pytest.mark.parametrize("wrong", [-1, 600, 10**9])
def test_ids_outside_the_vocabulary(tokenizer: Tokenizer, wrong: int) -> None:
    with pytest.raises(ValueError, match=f"{wrong} is outside the vocabulary of 600"):
        tokenizer.decode([5, wrong])


def test_any_sequence_of_ids_decodes_to_a_string(tokenizer: Tokenizer) -> None:
    draw = random.Random(3)
    for _ in range(300):
        text = tokenizer.decode([draw.randrange(600) for _ in range(draw.randrange(12))])
        text.encode()


def test_training_is_deterministic_and_compresses(tokenizer: Tokenizer) -> None:
    again = train(tokenizer.kind)
    assert again.fingerprint == tokenizer.fingerprint and again.pieces == tokenizer.pieces
    assert train(tokenizer.kind, TEXTS[:1500], 500).fingerprint != tokenizer.fingerprint
    text = " ".join(BOOK.valid.targets)
    assert len(tokenizer.encode(text)) < 0.5 * len(text.encode())


def test_training_does_not_depend_on_the_hash_seed() -> None:
    program = (
        "from cvmk.text.phrasebook import phrasebook; from cvmk.text.tokenizers.fallback import train_fallback; "
        "b = phrasebook(1000, 4); print(train_fallback(b.train.targets, 400).fingerprint, b.valid.sources[7])"
    )
    root = Path(__file__).parents[2]
    outputs = []
    for seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": seed, "PATH": ""}
        outputs.append(subprocess.run([sys.executable, "-c", program], env=environment, cwd=root, capture_output=True, check=True).stdout)
    assert outputs[0] and outputs[0] == outputs[1]


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = load_tokenizer(tmp_path / "new" / "folder")
    assert (loaded.kind, loaded.fingerprint, loaded.pieces) == (tokenizer.kind, tokenizer.fingerprint, tokenizer.pieces)
    assert loaded.encode_many(HARD) == tokenizer.encode_many(HARD)
    assert all(path.name.startswith("tokenizer.") for path in (tmp_path / "new" / "folder").iterdir())


def test_damaged_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    tokenizer.save(tmp_path / "good")
    for path in (tmp_path / "good").iterdir():
        whole = path.read_bytes()
        for number, damaged in enumerate((None, b"", whole[: len(whole) // 2], whole[:-2], b"\xff" + whole[1:], b"[]", b"{}")):
            folder = tmp_path / f"{path.name}-{number}"
            shutil.copytree(tmp_path / "good", folder)
            (folder / path.name).unlink() if damaged is None else (folder / path.name).write_bytes(damaged)
            with pytest.raises(DataError, match=path.name.replace(".", r"\.")):
                load_tokenizer(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "wordpiece"},
        {"kind": 7},
        {"format": 99},
        {"vocabulary": 5},
        {"merges": None},
        {"merges": ["4 5 6"]},
        {"merges": [[4, 5]]},
        {"merges": ["4 9999"]},
        {"merges": ["0 5"]},
        {"normalization": "nfkd"},
        {"normalization": None},
    ],
)
def test_unsound_descriptions(tmp_path: Path, change: dict[str, object]) -> None:
    description = {"format": 1, "kind": "fallback", "vocabulary": 261, "merges": ["101 102"]} | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_vocabulary_too_large_names_the_largest(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.vocabulary = 60000 is too large for the training text: set it to (\d+) or less") as caught:
        train(kind, TEXTS[:300], 60_000)
    largest = int(str(caught.value).split("set it to ")[1].split()[0])
    assert train(kind, TEXTS[:300], largest).vocab_size == largest
    with pytest.raises(ConfigError):
        train(kind, TEXTS[:300], largest + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_vocabulary_too_small_and_no_text(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.vocabulary = 100 is too small"):
        train(kind, TEXTS, 100)
    for nothing in ([], ["", "  "]):
        with pytest.raises(DataError, match="no text to train"):
            train(kind, nothing)


def test_fallback_against_a_plain_implementation() -> None:
    """The merges that a slow, direct implementation of BPE learns, and encoding by applying them one after the other."""
    texts = [text.lower() for text in TEXTS[:200]] + ["aaaa aaaaa banana"] * 3
    tokenizer = train_fallback(texts, 330)
    words = Counter(tuple(bytes([value]) for value in word.encode()) for text in texts for word in split(text))
    merges: list[tuple[bytes, bytes]] = []
    while len(merges) < 70:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = Counter({tuple(joined(word, best)): count for word, count in words.items()})
    learned = [(tokenizer._bytes[left], tokenizer._bytes[right]) for left, right in tokenizer.merges]
    assert learned == merges
    for text in [*TEXTS[200:240], "aaaaaaa banana bananas"]:
        expected = []
        for word in split(text):
            pieces = [bytes([value]) for value in word.encode()]
            for merge in merges:
                pieces = joined(pieces, merge)
            expected += pieces
        assert [tokenizer._bytes[index] for index in tokenizer.encode(text)] == expected


def split(text: str) -> list[str]:
    """Words of letters, digits or signs, each with the one space before it (texts here have single spaces only)."""
    words: list[str] = []
    last = ""
    for character in " " + text:
        kind = "letter" if character.isalpha() else "digit" if character.isdigit() else "sign"
        if character == " " or not words or (words[-1] != " " and kind != last):
            words.append(character)
        else:
            words[-1] += character
        last = kind
    return words


def joined(word, pair):  # type: ignore[no-untyped-def]
    result = []
    fresh = False
    for piece in word:
        if result and (result[-1], piece) == pair and not fresh:
            result[-1] += piece
            fresh = True
        else:
            result.append(piece)
            fresh = False
    return result


def test_long_words_are_fast() -> None:
    tokenizer = train_fallback(TEXTS, 500)
    text = "e" * 200_000
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_without_sentencepiece(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    for kind in ("bpe", "unigram"):
        with pytest.raises(ConfigError, match=r'needs the package sentencepiece.*tokenizer\.kind = "fallback"'):
            train_tokenizer(TEXTS, TokenizerConfig(kind=kind, vocabulary=600))  # type: ignore[arg-type]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"format": 1, "kind": "bpe", "vocabulary": 600}))
    with pytest.raises(ConfigError, match="needs the package sentencepiece"):
        load_tokenizer(tmp_path)
    assert isinstance(train_tokenizer(TEXTS, TokenizerConfig(kind="fallback", vocabulary=600)), FallbackTokenizer)


def test_text_needs_no_torch() -> None:
    modules = "cvmk.text.corpus, cvmk.text.cache, cvmk.text.tokenizers, cvmk.text.tokenizers.fallback, cvmk.text.phrasebook"
    program = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=True)
