"""One interface for every tokenizer: text to piece ids and back, without loss."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from cvmk.errors import DataError
from cvmk.files import write_json

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


def write_description(folder: str | os.PathLike[str], kind: str, vocabulary: int, **more: Any) -> None:
    """Write `tokenizer.json`, which names the kind and is written after everything that it refers to."""
    write_json(Path(folder) / DESCRIPTION, {"format": FORMAT, "kind": kind, "vocabulary": vocabulary, **more})


def corrupt(path: str | os.PathLike[str], reason: str) -> DataError:
    return DataError(f"{os.fspath(path)} is corrupt or truncated ({reason}): restore it from a copy or train the tokenizer again")
