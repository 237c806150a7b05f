"""One interface for every tokenizer: text to piece ids and back, without loss."""

from __future__ import annotations

import functools
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from cvmk.errors import DataError
from cvmk.files import write_json
from cvmk.text.tokenizers.normalization import IDENTITY, RULES

FORMAT = 2
FORMATS = (1, 2)  # that are read; 1 has no normalization
DESCRIPTION = "tokenizer.json"


class Tokenizer(ABC):
    """Text to piece ids and back.

    `decode(encode(text)) == normalized(text)` for every string; where `normalization` is "identity", that is the text itself, but for
    lone surrogates. The first four ids are special; text never encodes to them, not even text that spells them ("</s>"). Instances
    are read-only: threads may share them.
    """

    PAD: ClassVar[int] = 0
    UNK: ClassVar[int] = 1
    BOS: ClassVar[int] = 2
    EOS: ClassVar[int] = 3
    SPECIAL_PIECES: ClassVar[tuple[str, ...]] = ("<pad>", "<unk>", "<s>", "</s>")

    kind: str
    pieces: list[str]
    normalization: str = IDENTITY
    """The rule of `normalization.RULES` that text goes through first."""

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hexadecimal sha256 of everything that decides the ids; equal for tokenizers that are interchangeable."""
        digest = hashlib.sha256(self.kind.encode())
        for part in self._identity():
            data = part.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        if self.normalization != IDENTITY:
            digest.update(self.normalization.encode())
        return digest.hexdigest()

    def _identity(self) -> Iterable[str]:
        return self.pieces

    def normalized(self, text: str) -> str:
        """`text` as it becomes pieces. A lone surrogate, which no file can hold, becomes U+FFFD."""
        return RULES[self.normalization](without_surrogates(text))

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


def write_description(folder: str | os.PathLike[str], tokenizer: Tokenizer, **more: Any) -> None:
    """Write `tokenizer.json`, which names the kind and is written after everything that it refers to."""
    own = {"format": FORMAT, "kind": tokenizer.kind, "vocabulary": tokenizer.vocab_size, "normalization": tokenizer.normalization}
    write_json(Path(folder) / DESCRIPTION, {**own, **more})


def read_normalization(folder: str | os.PathLike[str], description: dict[str, object]) -> str:
    """The rule that a parsed `tokenizer.json` names. Raises DataError where it is unknown."""
    name = description.get("normalization", IDENTITY)
    if not isinstance(name, str) or name not in RULES:
        raise corrupt(Path(folder) / DESCRIPTION, f"normalization {name!r} is unknown")
    return name


def corrupt(path: str | os.PathLike[str], reason: str) -> DataError:
    return DataError(f"{os.fspath(path)} is corrupt or truncated ({reason}): restore it from a copy or train the tokenizer again")
