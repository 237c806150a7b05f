"""One interface for every tokenizer: text to piece ids and back, without loss."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from cvmk.config.schema import TokenizerConfig
from cvmk.errors import ConfigError, DataError
from cvmk.files import read_json, write_json

FORMAT = 1
DESCRIPTION = "tokenizer.json"


class Tokenizer(ABC):
    """Text to piece ids and back.

    `decode(encode(text)) == text` for every string of Unicode scalar values (a lone surrogate, which no file can
    hold, becomes U+FFFD). The first four ids are special; text never encodes to them, not even text that spells
    them ("</s>"). Instances are read-only: threads may share them.
    """

    PAD: ClassVar[int] = 0
    UNK: ClassVar[int] = 1
    BOS: ClassVar[int] = 2
    EOS: ClassVar[int] = 3
    SPECIAL_PIECES: ClassVar[tuple[str, ...]] = ("<pad>", "<unk>", "<s>", "</s>")

    kind: str
    pieces: list[str]

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @property
    def fingerprint(self) -> str:
        """Hexadecimal sha256 of everything that decides the ids; equal for tokenizers that are interchangeable."""
        digest = hashlib.sha256(self.kind.encode())
        for part in self._identity():
            data = part.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()

    def _identity(self) -> Iterable[str]:
        return self.pieces

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Piece ids of one text, without special ids; [] for the empty text."""

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Piece ids of many texts, each as `encode` gives them."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of piece ids. Special ids are ignored; bytes that are not UTF-8 become U+FFFD.

        Raises ValueError for an id outside [0, vocab_size).
        """

    @abstractmethod
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer.*` into `folder`, for `load_tokenizer`."""

    def _text_ids(self, ids: Iterable[int]) -> list[int]:
        """`ids` as integers without the special ones, checked."""
        size = self.vocab_size
        kept = []
        for value in ids:
            index = int(value)
            if not 0 <= index < size:
                raise ValueError(f"token id {index} is outside the vocabulary of {size} pieces")
            if index >= len(self.SPECIAL_PIECES):
                kept.append(index)
        return kept


def without_surrogates(text: str) -> str:
    """`text` with each lone surrogate replaced by U+FFFD, so that it can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in text)
    return text


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig, seed: int = 0) -> Tokenizer:
    """Train a tokenizer on `texts` as the configuration says; the same texts in the same order give the same one.

    Raises ConfigError where the vocabulary does not suit the data or sentencepiece is not installed, and DataError
    where there is no text.
    """
    if config.kind == "fallback":
        from cvmk.text.fallback_tokenizer import train_fallback

        return train_fallback(texts, config.vocabulary, seed)
    require_sentencepiece(f'tokenizer.kind = "{config.kind}"')
    from cvmk.text.sentencepiece_tokenizer import train_sentencepiece

    return train_sentencepiece(texts, config, seed)


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that `save` wrote into `folder`. Raises DataError for missing, truncated or corrupt files."""
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise DataError(f"{path} does not exist: name a folder that holds a tokenizer written by cvmk")
    description = read_json(path)
    if not isinstance(description, dict) or "kind" not in description:
        raise corrupt(path, "it names no tokenizer kind")
    if description.get("format") != FORMAT:
        raise DataError(f"{path} has format {description.get('format')!r} and this cvmk reads format {FORMAT}: use the cvmk version that wrote it")
    kind = description["kind"]
    if kind == "fallback":
        from cvmk.text.fallback_tokenizer import FallbackTokenizer

        return FallbackTokenizer.load(folder, description)
    if kind in ("bpe", "unigram"):
        require_sentencepiece(f"the tokenizer in {os.fspath(folder)}")
        from cvmk.text.sentencepiece_tokenizer import SentencePieceTokenizer

        return SentencePieceTokenizer.load(folder, description)
    raise corrupt(path, f"tokenizer kind {kind!r} is unknown")


def write_description(folder: str | os.PathLike[str], kind: str, vocabulary: int, **more: Any) -> None:
    """Write `tokenizer.json`, which names the kind and is written after everything that it refers to."""
    write_json(Path(folder) / DESCRIPTION, {"format": FORMAT, "kind": kind, "vocabulary": vocabulary, **more})


def corrupt(path: str | os.PathLike[str], reason: str) -> DataError:
    return DataError(f"{os.fspath(path)} is corrupt or truncated ({reason}): restore it from a copy or train the tokenizer again")


def require_sentencepiece(user: str) -> None:
    """Raise ConfigError, naming `user`, where the package sentencepiece cannot be imported."""
    try:
        import sentencepiece  # noqa: F401
    except ImportError as error:
        raise ConfigError(f'{user} needs the package sentencepiece: run "pip install sentencepiece", or train with tokenizer.kind = "fallback"') from error
