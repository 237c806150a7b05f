"""How far behind its source a translation is, and how much of it is taken back, from what a reader saw.

d_i, the delay of target word i of y, is how much of the source x (its words, or milliseconds) had been there when the word was said for good; gamma is target
words for a unit of source; tau is the first word that was said with all of the source there.

    AL    1/tau sum_{i <= tau} d_i - (i - 1) / gamma,  gamma = |y*| / |x| by the reference y*     Ma et al. 2019, STACL
    LAAL  AL with gamma = max(|y|, |y*|) / |x|: words too many gain nothing                       Papi et al. 2022
    AP    sum_i d_i / (|x| |y|)                                                                   Cho and Esipova 2016
    DAL   1/|y| sum_i g_i - (i - 1) / gamma,  g_1 = d_1,  g_i = max(d_i, g_{i-1} + 1 / gamma),  gamma = |y| / |x|    Cherry and Foster 2019
    NE    words taken back over all revisions, over |y|                                           Arivazhagan et al. 2020

A translation that is revised says a word for good with the first revision after which all words up to it stay (the same paper).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os.path import commonprefix


@dataclass(frozen=True)
class Shown:
    """What a reader saw at one time: the words of the translation, with `read` units of the source there."""

    read: float
    words: Sequence[str]


@dataclass(frozen=True)
class Latency:
    """AL, LAAL and DAL in units of the source, AP between 0 and 1."""

    al: float
    laal: float
    ap: float
    dal: float


def final_delays(shown: Iterable[Shown]) -> list[float]:
    """How much of the source was there when each word of the last translation was said for good. `shown` goes by time."""
    delays: list[float] = []
    words: list[str] = []
    for now in shown:
        kept = _common(words, now.words)
        words = list(now.words)
        delays = delays[:kept] + [now.read] * (len(words) - kept)
    return delays


def first_delays(shown: Iterable[Shown]) -> list[float]:
    """How much of the source was there when a reader first saw a word at each place of the last translation, whatever word it was."""
    delays: list[float] = []
    last = 0
    for now in shown:
        last = len(now.words)
        delays += [now.read] * (last - len(delays))
    return delays[:last]


def latency(delays: Sequence[float], source: float, reference: int | None = None) -> Latency:
    """Of one sentence: the delay of every word, the length of the source in the same units, and how many words its reference has (None: as many as were said).

    All are 0 for a translation or a source of no length. Raises ValueError for delays that fall, or that are not between 0 and the length of the source.
    """
    if any(not 0 <= d <= source for d in delays) or any(after < before for before, after in zip(delays, delays[1:], strict=False)):
        raise ValueError(f"delays must rise within the source's length of {source:g}, and are {', '.join(f'{d:g}' for d in delays[:12])}")
    said = len(delays)
    if not said or not source:
        return Latency(0.0, 0.0, 0.0, 0.0)
    wanted = said if reference is None else reference
    step, g = source / said, -source / said
    lagging = 0.0
    for i, d in enumerate(delays):
        g = max(d, g + step)
        lagging += g - i * step
    return Latency(
        al=_average_lagging(delays, source, wanted / source),
        laal=_average_lagging(delays, source, max(said, wanted) / source),
        ap=sum(delays) / (source * said),
        dal=lagging / said,
    )


def erasure(shown: Iterable[Shown]) -> int:
    """Words that were taken back: of each revision, those behind what it begins with as the one before."""
    erased, words = 0, list[str]()
    for now in shown:
        erased += len(words) - _common(words, now.words)
        words = list(now.words)
    return erased


def normalized_erasure(sentences: Iterable[Sequence[Shown]]) -> float:
    """Of what readers saw of one or more sentences: `erasure` over the words of the last translations, both summed; 0 where there are no words."""
    erased = words = 0
    for shown in sentences:
        erased += erasure(shown)
        words += len(shown[-1].words) if shown else 0
    return erased / words if words else 0.0


def _average_lagging(delays: Sequence[float], source: float, gamma: float) -> float:
    if gamma == 0:
        return 0.0
    tau = next((i for i, d in enumerate(delays, 1) if d >= source), len(delays))
    return sum(d - i / gamma for i, d in enumerate(delays[:tau])) / tau


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    return len(commonprefix([list(a), list(b)]))
