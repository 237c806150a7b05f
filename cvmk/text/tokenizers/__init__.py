"""Tokenizers: text to piece ids and back, trained or loaded by the kind that a configuration or a folder names."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from cvmk.errors import ConfigError, DataError
from cvmk.files import read_json
from cvmk.text.tokenizers.base import DESCRIPTION, FORMATS, Tokenizer, corrupt

if TYPE_CHECKING:
    from cvmk.config.data import TokenizerConfig

__all__ = ["Tokenizer", "load_tokenizer", "train_tokenizer"]


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig, seed: int = 0) -> Tokenizer:
    """Train a tokenizer on `texts` as the configuration says; the same texts in the same order give the same one.

    Raises ConfigError where the vocabulary does not suit the data or sentencepiece is not installed, and DataError
    where there is no text.
    """
    if config.kind == "fallback":
        from cvmk.text.tokenizers.fallback import train_fallback

        return train_fallback(texts, config.vocabulary, seed, config.normalization)
    _require_sentencepiece(f'tokenizer.kind = "{config.kind}"')
    from cvmk.text.tokenizers.sentencepiece import train_sentencepiece

    return train_sentencepiece(texts, config, seed)


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that `save` wrote into `folder`. Raises DataError for missing, truncated or corrupt files."""
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise DataError(f"{path} does not exist: name a folder that holds a tokenizer written by cvmk")
    description = read_json(path)
    if not isinstance(description, dict) or "kind" not in description:
        raise corrupt(path, "it names no tokenizer kind")
    if description.get("format") not in FORMATS:
        raise DataError(
            f"{path} has format {description.get('format')!r} and this cvmk reads formats {FORMATS[0]} to {FORMATS[-1]}: use the cvmk version that wrote it"
        )
    kind = description["kind"]
    if kind == "fallback":
        from cvmk.text.tokenizers.fallback import FallbackTokenizer

        return FallbackTokenizer.load(folder, description)
    if kind in ("bpe", "unigram"):
        _require_sentencepiece(f"the tokenizer in {os.fspath(folder)}")
        from cvmk.text.tokenizers.sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer.load(folder, description)
    raise corrupt(path, f"tokenizer kind {kind!r} is unknown")


def _require_sentencepiece(user: str) -> None:
    """Raise ConfigError, naming `user`, where the package sentencepiece cannot be imported."""
    try:
        import sentencepiece  # noqa: F401
    except ImportError as error:
        raise ConfigError(f'{user} needs the package sentencepiece: run "pip install sentencepiece", or train with tokenizer.kind = "fallback"') from error
