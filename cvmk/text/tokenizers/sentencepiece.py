"""BPE and unigram tokenizers by SentencePiece (Kudo & Richardson 2018), set up to lose nothing.

Byte fallback keeps every character of the text as it is after `tokenizer.normalization`, which is not left to SentencePiece: it has no NFC, and
every kind of tokenizer is to do the same. One exception is left in SentencePiece: it writes a
space as U+2581 inside pieces, so a real U+2581 would be decoded to a space; such characters are spelt in bytes here.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import sentencepiece

from cvmk.errors import ConfigError, DataError
from cvmk.files import read_bytes, write_bytes
from cvmk.text.tokenizers.base import Tokenizer, corrupt, read_normalization, without_surrogates, write_description
from cvmk.text.tokenizers.normalization import IDENTITY, RULES

if TYPE_CHECKING:
    from cvmk.config.data import TokenizerConfig

MODEL = "tokenizer.model"
TRAINING_SENTENCES = 2_000_000  # more do not improve a vocabulary; beyond it a seeded sample is taken
TRAINING_THREADS = 4  # part of the result's last digits (sums of floats), so never taken from the machine
SPACE_MARK = "\u2581"


class SentencePieceTokenizer(Tokenizer):
    """A trained SentencePiece model; `kind` is "bpe" or "unigram"."""

    def __init__(self, model: bytes, kind: str, normalization: str = IDENTITY) -> None:
        self.kind, self.normalization = kind, normalization
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        size = self._processor.get_piece_size()
        self.pieces = [self._processor.id_to_piece(index) for index in range(size)]
        if tuple(self.pieces[:4]) != self.SPECIAL_PIECES:
            raise ValueError(f"the first pieces are {self.pieces[:4]}, not {list(self.SPECIAL_PIECES)}")
        self._bytes = [self._processor.piece_to_id(f"<0x{value:02X}>") for value in range(256)]
        if self.UNK in self._bytes:
            raise ValueError("the model has no byte pieces")
        self._stand_in = next(character for character in _noncharacters() if character not in set("".join(self.pieces)))

    def _identity(self) -> Iterator[str]:
        for index, piece in enumerate(self.pieces):
            yield piece
            yield repr(self._processor.get_score(index))

    def encode(self, text: str) -> list[int]:
        text = self.normalized(text)
        if SPACE_MARK in text:
            return self._encode_space_marks(text)
        ids: list[int] = self._processor.encode(text)
        return ids

    def _encode_space_marks(self, text: str) -> list[int]:
        """Encode with a stand-in character that the text lacks and the model spells in bytes, then put U+2581's bytes there."""
        stand_in = self._stand_in
        if stand_in in text:
            taken = set(text).union(*self.pieces)
            stand_in = next(character for character in _noncharacters() if character not in taken)
        spelt = [self._bytes[value] for value in stand_in.encode()]
        mark = [self._bytes[value] for value in SPACE_MARK.encode()]
        ids = self._processor.encode(text.replace(SPACE_MARK, stand_in))
        result: list[int] = []
        position = 0
        while position < len(ids):
            if ids[position] == spelt[0] and ids[position : position + len(spelt)] == spelt:
                result += mark
                position += len(spelt)
            else:
                result.append(ids[position])
                position += 1
        return result

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._processor.decode(self._text_ids(ids))
        return text

    def save(self, folder: str | os.PathLike[str]) -> None:
        write_bytes(Path(folder) / MODEL, self._model)
        write_description(folder, self, sha256=hashlib.sha256(self._model).hexdigest())

    @classmethod
    def load(cls, folder: str | os.PathLike[str], description: dict[str, object]) -> SentencePieceTokenizer:
        """The model in `folder`. Raises DataError where it is missing or is not the one that `description` names."""
        path = Path(folder) / MODEL
        model = read_bytes(path)
        if hashlib.sha256(model).hexdigest() != description.get("sha256"):
            raise corrupt(path, "its checksum is not the one in tokenizer.json")
        try:
            return _of(model, str(description["kind"]), read_normalization(folder, description))
        except (RuntimeError, ValueError) as error:
            raise corrupt(path, str(error)) from error


@functools.lru_cache(maxsize=4)
def _of(model: bytes, kind: str, normalization: str) -> SentencePieceTokenizer:
    """One for all models that have it: the next version of a model has the tokenizer of the last as a rule, and to make one takes as long as all else."""
    return SentencePieceTokenizer(model, kind, normalization)


def _noncharacters() -> Iterator[str]:
    """Code points that no proper text has (Unicode noncharacters), then the private planes."""
    yield from map(chr, range(0xFDD0, 0xFDF0))
    yield from map(chr, range(0xF0000, 0x10FFFE))


def train_sentencepiece(texts: Iterable[str], config: TokenizerConfig, seed: int) -> SentencePieceTokenizer:
    """Train a model on `texts`; `seed` chooses the sample where there are more than `TRAINING_SENTENCES`.

    Raises ConfigError, naming the key and the nearest possible value, where the vocabulary does not suit the data.
    """
    sentences = [RULES[config.normalization](without_surrogates(text)) for text in texts if text.strip()]
    if not sentences:
        raise DataError("there is no text to train a tokenizer on: check the training corpus")
    if len(sentences) > TRAINING_SENTENCES:
        chosen = random.Random(seed).sample(range(len(sentences)), TRAINING_SENTENCES)
        sentences = [sentences[index] for index in sorted(chosen)]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=config.kind,
            vocab_size=config.vocabulary,
            character_coverage=config.character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            pad_id=Tokenizer.PAD,
            unk_id=Tokenizer.UNK,
            bos_id=Tokenizer.BOS,
            eos_id=Tokenizer.EOS,
            pad_piece=Tokenizer.SPECIAL_PIECES[Tokenizer.PAD],
            unk_piece=Tokenizer.SPECIAL_PIECES[Tokenizer.UNK],
            bos_piece=Tokenizer.SPECIAL_PIECES[Tokenizer.BOS],
            eos_piece=Tokenizer.SPECIAL_PIECES[Tokenizer.EOS],
            max_sentence_length=1 << 20,
            num_threads=TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explained(str(error), config) from error
    return SentencePieceTokenizer(model.getvalue(), config.kind, config.normalization)


def _explained(message: str, config: TokenizerConfig) -> ConfigError:
    """SentencePiece's refusal in terms of the configuration."""
    if found := re.search(r"too high \((\d+)\).*<= (\d+)", message):
        return ConfigError(f"tokenizer.vocabulary = {config.vocabulary} is too large for the training text: set it to {found[2]} or less")
    if found := re.search(r"required_chars\. (\d+) vs (\d+)", message):
        return ConfigError(
            f"tokenizer.vocabulary = {config.vocabulary} is too small for the characters of the training text: "
            f"set it to more than {found[2]}, or lower tokenizer.character_coverage"
        )
    return ConfigError(f"SentencePiece could not train tokenizer.kind = {config.kind!r} with tokenizer.vocabulary = {config.vocabulary}: {message.strip()}")
