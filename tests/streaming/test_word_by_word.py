"""Sentences that are fed a word at a time, every 300 ms of a clock that nobody waits for: a reader sees what an offline scorer makes of the prefixes."""

from __future__ import annotations

import random
from typing import Any

import pytest

from cvmk.inference import Translator
from cvmk.streaming import Retranslation, Stream
from cvmk.validation.scripts import written_words
from cvmk.validation.streaming import Shown, final_delays, latency, normalized_erasure

WORDS = "a man rides two horses horse ride the big small red and of man's x".split()
ENDS = " .!?…。！？｡؟۔।"
STEP = 300.0


def words_of(text: str) -> list[str]:
    return [text[begin:end] for begin, end in written_words(text)]


def watched(translator: Translator, words: list[str]) -> tuple[list[Shown], str]:
    """What a reader of a stream sees, with the milliseconds of source that were there, and the text at the end."""
    stream, seen, committed = Stream(translator, Retranslation(mask=0)), list[Shown](), ""
    for number, word in enumerate(words, 1):
        last = number == len(words)
        for update in stream.append(f"{word} ") + (stream.close() if last else []):
            assert (committed + update.committed).startswith(committed) and update.final == bool(update.committed)
            committed += update.committed
            seen.append(Shown(STEP * number, words_of(committed + update.tentative)))
    return seen, committed


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.exhaustive)])
def test_a_reader_sees_what_an_offline_scorer_makes_of_the_prefixes(make_model: Any, tokenizer: Any, count: int) -> None:
    generator = random.Random(count)
    translator = Translator.of_weights(make_model(tokenizer.vocab_size, sharpness=3.0, seed=2, max_length=80), tokenizer)
    sentences = [[generator.choice(WORDS) for _ in range(generator.randint(1, 9))] for _ in range(count)]
    prefixes = [" ".join(words[: length + 1]) for words in sentences for length in range(len(words))]
    offline = iter([found.text for found in translator.translate(prefixes)])
    expected, seen = list[list[Shown]](), list[list[Shown]]()
    changed = 0
    for words in sentences:
        texts = [next(offline) for _ in words]
        shown = [Shown(STEP * number, words_of(text.rstrip(ENDS))) for number, text in enumerate(texts, 1)]
        shown.append(Shown(STEP * len(words), words_of(texts[-1])))
        now, final = watched(translator, words)
        assert final == texts[-1]
        changed += sum(before.words != after.words for before, after in zip(shown, shown[1:], strict=False))
        expected.append(shown)
        seen.append(now)
        delays = final_delays(now)
        assert delays == final_delays(shown)
        for reference in (None, len(words)):
            ours, theirs = (latency(final_delays(one), STEP * len(words), reference) for one in (now, shown))
            assert ours.laal == pytest.approx(theirs.laal, abs=1e-9) and ours == theirs
    assert normalized_erasure(seen) == pytest.approx(normalized_erasure(expected), abs=1e-9) and normalized_erasure(seen) > 0.1
    assert changed > count  # revisions there are
