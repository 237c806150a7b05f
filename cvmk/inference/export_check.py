"""A model beside its export to another engine: the same sentences, greedily, piece by piece."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

from cvmk.formats import load_model_folder
from cvmk.inference.options import SearchOptions
from cvmk.inference.translator import Translator
from cvmk.text.lines import trimmed
from cvmk.text.tokenizers import Tokenizer


class Runner(Protocol):
    """An engine as the comparison sees it; sources and targets are piece ids without special ones."""

    def greedy(self, source: Sequence[int], limit: int) -> list[int]:
        """The most probable next piece again and again, to EOS or `limit` pieces. Special pieces are never said, and EOS is not the first."""
        ...

    def log_probability(self, source: Sequence[int], target: Sequence[int]) -> float:
        """log p(target and EOS | source), by the model: of all pieces."""
        ...


class FolderRunner:
    """A model of ours, its floats in float32, as exports compute: the first engine that can run it says the pieces, and PyTorch's gives the
    log-probabilities."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.translator, self._model = Translator(path, compute_type="float32"), load_model_folder(path)[0].float()

    def greedy(self, source: Sequence[int], limit: int) -> list[int]:
        options = SearchOptions(length_penalty=0.0, max_length_a=0.0, max_length_b=limit)
        return self.translator.engine.search([source], options)[0][0].tokens

    def log_probability(self, source: Sequence[int], target: Sequence[int]) -> float:
        import torch

        said = torch.tensor([*target, Tokenizer.EOS])
        with torch.no_grad():
            logits = self._model(torch.tensor([[*source, Tokenizer.EOS]]), torch.tensor([[Tokenizer.BOS, *target]]))[0][0]
        return float(logits.double().log_softmax(-1)[torch.arange(len(said)), said].sum())


def compare(model: str | os.PathLike[str], theirs: Runner, texts: Sequence[str]) -> dict[str, Any]:
    """Translate with both engines: sentences, how many have identical pieces, the largest difference of their log-probabilities and its 99th percentile
    (of those that ended by themselves; by the model, since a search leaves out of the sum what may not be said), and the sentences (lines from 1) that differ,
    with both translations. Texts without any content are left out."""
    ours, options = FolderRunner(model), SearchOptions()
    tokenizer, longest = ours.translator.tokenizer, ours.translator.engine.max_length
    apart: list[float] = []
    differing: list[dict[str, Any]] = []
    sentences = identical = 0
    for line, text in enumerate(texts, 1):
        source = tokenizer.encode(trimmed(text))[: longest - 1]
        if not source:
            continue
        sentences += 1
        limit = options.limit(len(source), longest)
        one, other = ours.greedy(source, limit), theirs.greedy(source, limit)
        if one == other:
            identical += 1
            if len(one) + 1 < limit:  # beyond it the end is not the model's own
                apart.append(abs(theirs.log_probability(source, one) - ours.log_probability(source, one)))
        else:
            differing.append({"line": line, "source": text, "ours": tokenizer.decode(one), "theirs": tokenizer.decode(other)})
    apart.sort()
    return {
        "sentences": sentences,
        "identical": identical,
        "largest": apart[-1] if apart else None,
        "percentile_99": apart[min(len(apart) - 1, int(0.99 * len(apart)))] if apart else None,
        "differing": differing,
    }
