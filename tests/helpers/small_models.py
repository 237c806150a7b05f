"""Models of random weights and a tokenizer for them; conftest files take the fixtures from here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from cvmk.config.schema import ModelConfig, TokenizerConfig
from cvmk.nn import CVMTransformer
from cvmk.text.tokenizers import Tokenizer, train_tokenizer

SMALL = {"d_model": 16, "ffn": 32, "heads": 2, "encoder_layers": 2, "decoder_layers": 2, "max_length": 40}


class WordTokenizer(Tokenizer):
    """w4 w5 ... are pieces 4, 5, ...; other words are unknown. Enough of a tokenizer for a model of random weights."""

    kind = "words"

    def __init__(self, size: int) -> None:
        self.pieces = [*self.SPECIAL_PIECES, *(f"w{index}" for index in range(4, size))]
        self._ids = {piece: index for index, piece in enumerate(self.pieces) if index >= 4}

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(" ".join(self.pieces).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return [self._ids.get(word, self.UNK) for word in text.split()]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(self.pieces[index] for index in ids if index >= 4)

    def save(self, folder: object) -> None:
        (Path(str(folder)) / "tokenizer.json").write_text(json.dumps({"size": len(self.pieces)}))


@pytest.fixture
def make_model() -> Callable[..., CVMTransformer]:
    def make(vocabulary: int = 30, seed: int = 0, sharpness: float = 1.0, **options: object) -> CVMTransformer:
        """A model of random weights, its logits multiplied by `sharpness`, that ends sentences now and then."""
        torch.manual_seed(seed)
        model = CVMTransformer(ModelConfig(**{**SMALL, "tie_embeddings": False, **options}), vocabulary).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
            if model.embeddings.output is not None:
                model.embeddings.output.mul_(sharpness)
        return model

    return make


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["a man rides a horse", "two horses ride a man"] * 20, TokenizerConfig(kind="fallback", vocabulary=270))


@pytest.fixture
def words() -> type[WordTokenizer]:
    return WordTokenizer
