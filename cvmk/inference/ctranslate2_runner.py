"""An export to CTranslate2 as an `export_check.Runner`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any


class CTranslate2Runner:
    """The model in a folder; `pieces` are the tokenizer's, as the export has them."""

    def __init__(self, folder: str | os.PathLike[str], pieces: Sequence[str]) -> None:
        import ctranslate2

        self._engine: Any = ctranslate2.Translator(os.fspath(folder), device="cpu", compute_type="default")
        self._pieces = pieces
        self._numbers = {piece: index for index, piece in enumerate(pieces)}

    def greedy(self, source: Sequence[int], limit: int) -> list[int]:
        never = {"suppress_sequences": [["<s>"], ["<pad>"]], "disable_unk": True}
        (found,) = self._engine.translate_batch([self._named(source)], beam_size=1, max_decoding_length=limit, min_decoding_length=1, **never)
        return [self._numbers[piece] for piece in found.hypotheses[0]]

    def log_probability(self, source: Sequence[int], target: Sequence[int]) -> float:
        (scored,) = self._engine.score_batch([self._named(source)], [self._named(target)])
        return float(sum(scored.log_probs))

    def _named(self, ids: Sequence[int]) -> list[str]:
        return [self._pieces[index] for index in ids]
