"""What a study measures of one model: translations of a test set, of what noise makes of it and of sentences joined; of streams; and what a step costs."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cvmk.config.model import ModelConfig

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


def joined(texts: Sequence[str], count: int) -> list[str]:
    """Each `count` sentences in one; a rest that is shorter is left out, unless it is all."""
    whole = len(texts) // count * count or len(texts)
    return [" ".join(texts[i : i + count]) for i in range(0, whole, count)]


# -- translations --------------------------------------------------------------------------------------------------------------
def of_text(model: Path, sources: Sequence[str], references: Sequence[str], streams: int) -> dict[str, Any]:
    """Greedy translations of the sources, BLEU of those that noise or length changes, and of `streams` of them word by word: LAAL and BLEU of wait-3, and
    the normalised erasure of translating anew with each word."""
    from cvmk.inference import Translator
    from cvmk.streaming import Retranslation, WaitK
    from cvmk.validation.metrics import score
    from cvmk.validation.streaming import final_delays, latency, normalized_erasure

    translator = Translator(model)

    def said(texts: Sequence[str]) -> list[str]:
        return [one.text for one in translator.translate(texts, on_long="truncate")]

    hypotheses = said(sources)
    noisy = {"as they are": score("bleu", hypotheses, references).value}
    for name, noise in NOISES.items():
        noisy[name] = score("bleu", said([noise(text, at) for at, text in enumerate(sources)]), references).value
    for count in JOINED:
        noisy[f"{count} joined"] = score("bleu", said(joined(sources, count)), joined(references, count)).value
    few, wanted = sources[:streams], references[:streams]
    waiting = [_watched(translator, WaitK(_WAIT), text) for text in few]
    lags = [latency(final_delays(shown), len(text.split()), len(ref.split())).laal for shown, text, ref in zip(waiting, few, wanted, strict=True)]
    return {
        "hypotheses": hypotheses,
        "noisy": noisy,
        "laal": statistics.fmean(lags),
        "wait_bleu": score("bleu", [" ".join(shown[-1].words) for shown in waiting], wanted).value,
        "erasure": normalized_erasure([_watched(translator, Retranslation(), text) for text in few]),
    }


def _watched(translator: Any, policy: Any, text: str) -> list[Any]:
    """What a reader sees of one sentence that comes word by word, as one segment whatever is in it."""
    from cvmk.streaming import Stream
    from cvmk.validation.streaming import Shown

    shown = [Shown(0, [])]
    kept: dict[int, tuple[str, str]] = {}
    words = text.split()

    def see(updates: Sequence[Any], read: int) -> None:
        for update in updates:
            kept[update.segment] = kept.get(update.segment, ("", ""))[0] + update.committed, update.tentative
        shown.append(Shown(read, "".join(" ".join(("", committed + tentative)) for _, (committed, tentative) in sorted(kept.items())).split()))

    with Stream(translator, policy) as stream:
        for at, word in enumerate(words, 1):
            see(stream.append(word + " "), at)
        see(stream.close(), len(words))
    return shown


# -- costs ---------------------------------------------------------------------------------------------------------------------
def costs(config: ModelConfig, lengths: Sequence[int], steps: int) -> dict[str, dict[str, float]]:
    """By length of a source of random tokens: the median milliseconds of a step of decoding, one sentence in float32 by PyTorch's engine, and the bytes of
    its state when it has said as many tokens. The weights are random: a step costs what it costs."""
    import torch

    from cvmk.nn import CVMTransformer

    longest = 2 * max(lengths) + steps
    model = CVMTransformer(config.model_copy(update={"max_length": longest}), 1000).eval()
    found = {}
    for length in lengths:
        with torch.inference_mode():
            state = model.start(model.encode(torch.randint(4, 1000, (1, length))), length + steps)
            model.extend(torch.randint(4, 1000, (1, length)), state)
            times = []
            for _ in range(steps):
                start = time.perf_counter()
                model.step(torch.full((1,), 5), state)
                times.append(time.perf_counter() - start)
        found[str(length)] = {"milliseconds": 1e3 * statistics.median(times), "bytes": model.decoder_state_bytes(length, length)}
    return found
