"""Small models of random weights in folders, floating or quantised, for what is exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cvmk.formats import save_model_folder
from cvmk.quantization import Recipe, quantize_model
from cvmk.text.tokenizers import Tokenizer

PAIRS = [([4, 5, 6], [7, 8]), ([9, 10], [11])]
"""To calibrate with."""


def save(folder: Path, make_model: Callable[..., Any], tokenizer: Tokenizer, recipe: Recipe | None = None, **options: Any) -> Path:
    model = make_model(tokenizer.vocab_size, **{"d_model": 64, "ffn": 128, "heads": 4, "seed": 3, "sharpness": 2.0, **options})
    if recipe is not None:
        model = quantize_model(model, recipe, PAIRS).build()
    save_model_folder(folder, model, tokenizer, "card")
    return folder
