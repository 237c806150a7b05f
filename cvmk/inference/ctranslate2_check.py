"""A model beside its export to CTranslate2: the same sentences, greedily, piece by piece."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from cvmk.formats import load_model_folder
from cvmk.inference.options import SearchOptions
from cvmk.inference.translator import Translator
from cvmk.nn import CVMTransformer
from cvmk.text.lines import trimmed
from cvmk.text.tokenizers import Tokenizer


def compare(model: str | os.PathLike[str], exported: str | os.PathLike[str], texts: Sequence[str]) -> dict[str, Any]:
    """Translate with both engines: sentences, how many have identical pieces, the largest difference of their log-probabilities and its 99th percentile
    (of those that ended by themselves; by the model, since a search leaves out of the sum what may not be said), and the sentences (lines from 1) that differ,
    with both translations."""
    import ctranslate2

    ours, whole = Translator(model), load_model_folder(model)[0]
    theirs = ctranslate2.Translator(os.fspath(exported), device="cpu", compute_type="default")
    pieces, options = ours.tokenizer.pieces, SearchOptions(length_penalty=0.0)
    number = {piece: index for index, piece in enumerate(pieces)}
    never = {"suppress_sequences": [["<s>"], ["<pad>"]], "disable_unk": True}
    found = ours.translate(list(texts), length_penalty=0.0, on_long="truncate")
    longest = ours.engine.max_length
    apart: list[float] = []
    differing: list[dict[str, Any]] = []
    identical = 0
    for line, (text, one) in enumerate(zip(texts, found, strict=True), 1):
        source = ours.tokenizer.encode(trimmed(text))[: longest - 1]
        limit = options.limit(len(source), longest)
        lengths = {"max_decoding_length": limit, "min_decoding_length": 1}
        named = [[pieces[index] for index in source]]
        (other,) = theirs.translate_batch(named, beam_size=1, **lengths, **never)
        said = [number[piece] for piece in other.hypotheses[0]]
        if said == one.tokens:
            identical += 1
            if len(said) + 1 < limit:  # beyond it the end is not the model's own
                (scored,) = theirs.score_batch(named, other.hypotheses)
                apart.append(abs(sum(scored.log_probs) - _log_probability(whole, source, said)))
        else:
            differing.append({"line": line, "source": text, "ours": one.text, "theirs": ours.tokenizer.decode(said)})
    apart.sort()
    return {
        "sentences": len(texts),
        "identical": identical,
        "largest": apart[-1] if apart else None,
        "percentile_99": apart[min(len(apart) - 1, int(0.99 * len(apart)))] if apart else None,
        "differing": differing,
    }


def _log_probability(model: CVMTransformer, source: Sequence[int], target: Sequence[int]) -> float:
    """log p(target and its end | source) of piece ids without special ones."""
    import torch

    said = torch.tensor([*target, Tokenizer.EOS])
    with torch.no_grad():
        logits = model(torch.tensor([[*source, Tokenizer.EOS]]), torch.tensor([[Tokenizer.BOS, *target]]))[0][0]
    return float(logits.double().log_softmax(-1)[torch.arange(len(said)), said].sum())
