"""What a study measures of one model's quality: translations of a test set, of what noise makes of it, of sentences joined and cut, and of streams."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import Any

_WAIT = 3
_SIGNS = ".,;:!?\"'()[]-–—"


# -- noise, the same whenever it is made ---------------------------------------------------------------------------------------
def without_some_words(text: str, at: int) -> str:
    """Every word is left out with a chance of 0.1, but not all."""
    draw, words = random.Random(f"drop {at}"), text.split()
    return " ".join([word for word in words if draw.random() >= 0.1] or words[:1])


def swapped(text: str, at: int) -> str:
    """Two neighbours change places, once for every ten words."""
    draw, words = random.Random(f"swap {at}"), text.split()
    for _ in range(-(-len(words) // 10) if len(words) > 1 else 0):
        i = draw.randrange(len(words) - 1)
        words[i], words[i + 1] = words[i + 1], words[i]
    return " ".join(words)


def as_recognised(text: str, at: int) -> str:
    """Without capitals and punctuation, as speech recognition gives it."""
    return " ".join("".join(" " if sign in _SIGNS else sign for sign in text.lower()).split())


NOISES: dict[str, Callable[[str, int], str]] = {"words dropped": without_some_words, "neighbours swapped": swapped, "no case, no punctuation": as_recognised}
JOINED = (2, 4, 8)
CUTS = {"first half": (1, 2), "first three quarters": (3, 4)}
"""The share of its words that is left of a source."""


def joined(texts: Sequence[str], count: int) -> list[str]:
    """Each `count` sentences in one; a rest that is shorter is left out, unless it is all."""
    whole = len(texts) // count * count or len(texts)
    return [" ".join(texts[i : i + count]) for i in range(0, whole, count)]


def cut(text: str, share: tuple[int, int]) -> str:
    """The first words of a text, rounded up."""
    words = text.split()
    return " ".join(words[: -(-len(words) * share[0] // share[1])])


# -- scores --------------------------------------------------------------------------------------------------------------------
def said_of(said: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """How good what was said is, whatever is missing: BLEU without its brevity penalty; and how long it is as a share of the references."""
    from cvmk.validation.metrics import measure

    bleu = measure("bleu", said, references)
    sums = bleu.statistics.sum(axis=0)
    length, wanted = sums[:2].tolist()
    sums[1] = 0  # nothing is too short for references of no length
    return {"bleu": float(bleu.combine(sums)), "length": length / wanted if wanted else 0.0}


def kept(earlier: Sequence[str], later: Sequence[str]) -> float:
    """The share of the earlier translations' words with which the later ones begin, not counting punctuation at the ends of both; 1 where nothing was said."""
    pairs = [[text.rstrip(_SIGNS + " ").split() for text in pair] for pair in zip(earlier, later, strict=True)]
    said = sum(len(before) for before, _ in pairs)
    return sum(len(commonprefix([before, after])) for before, after in pairs) / said if said else 1.0


def of_text(model: Path, sources: Sequence[str], references: Sequence[str], streams: int, threads: int | None) -> dict[str, Any]:
    """Of greedy translations: BLEU of the sources that noise or length changes; of those that are cut what `said_of` and `kept` say; of `streams` of them,
    word by word, LAAL and BLEU of wait-3, the normalised erasure of translating anew with each word, and how stable translations of prefixes are."""
    from cvmk.cli._mixer_streams import Batched, stability, watched
    from cvmk.inference import Translator
    from cvmk.streaming import Retranslation, WaitK
    from cvmk.validation.metrics import score
    from cvmk.validation.streaming import final_delays, latency, normalized_erasure

    translator = Translator(model, threads=threads)

    def said(texts: Sequence[str]) -> list[str]:
        return [one.text for one in translator.translate(texts, on_long="truncate", scores=False)]

    hypotheses = said(sources)
    noisy = {"as they are": score("bleu", hypotheses, references).value}
    for name, noise in NOISES.items():
        noisy[name] = score("bleu", said([noise(text, at) for at, text in enumerate(sources)]), references).value
    for count in JOINED:
        noisy[f"{count} joined"] = score("bleu", said(joined(sources, count)), joined(references, count)).value
    cuts = {"whole": {**said_of(hypotheses, references), "kept": 1.0}}
    for name, share in CUTS.items():
        begun = said([cut(text, share) for text in sources])
        cuts[name] = {**said_of(begun, references), "kept": kept(begun, hypotheses)}
    few, wanted, batched = sources[:streams], references[:streams], Batched(translator)
    waiting = watched(batched, WaitK(_WAIT), few)
    lags = [latency(final_delays(shown), len(text.split()), len(ref.split())).laal for shown, text, ref in zip(waiting, few, wanted, strict=True)]
    return {
        "hypotheses": hypotheses,
        "noisy": noisy,
        "cuts": cuts,
        "laal": statistics.fmean(lags),
        "wait_bleu": score("bleu", [" ".join(shown[-1].words) for shown in waiting], wanted).value,
        "erasure": normalized_erasure(watched(batched, Retranslation(), few)),
        "stability": stability(watched(batched, Retranslation(mask=0), few)),
    }
