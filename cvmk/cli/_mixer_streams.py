"""Many streams at once: each sentence comes word by word, as to `cvmk.streaming.Stream`, and what all of them want translated is translated as one batch."""

from __future__ import annotations

from collections.abc import Sequence

from cvmk.inference import Translator
from cvmk.inference.options import SearchOptions
from cvmk.inference.translator import Translation, batches
from cvmk.streaming.core import Steps, StreamCore, Update, Wanted
from cvmk.streaming.policy import Policy
from cvmk.streaming.sentences import Sentences
from cvmk.validation.streaming import Shown, erasure

_TOKENS = 4096
_Asked = tuple[str, tuple[int, ...]]


class Batched:
    """Greedy translations of sources with pieces that they begin with. What was translated once is not translated again."""

    def __init__(self, translator: Translator) -> None:
        self.translator = translator
        self._found: dict[_Asked, Translation] = {}

    def __call__(self, wanted: Sequence[Wanted]) -> list[Translation]:
        asked: list[_Asked] = [(one.source, tuple(one.committed)) for one in wanted]
        new = [one for one in dict.fromkeys(asked) if one not in self._found]
        sources = [self.translator.encode(source) for source, _ in new]
        self._found.update({one: self.translator.decode([]) for one in new})  # of what is no text
        for batch in batches([len(source) for source in sources], _TOKENS):
            found = self.translator.engine.search([sources[i] for i in batch], SearchOptions(scores=False), [new[i][1] for i in batch])
            self._found.update({new[i]: self.translator.decode(hypotheses) for i, hypotheses in zip(batch, found, strict=True)})
        return [self._found[one] for one in asked]


def watched(batched: Batched, policy: Policy, texts: Sequence[str]) -> list[list[Shown]]:
    """What a reader sees of each sentence that comes word by word: at first, with every word, and at its end. It is one text, whatever sentences are in it."""
    cores = [StreamCore(lambda: batched.translator, policy, Sentences()) for _ in texts]
    shown = [[Shown(0, [])] for _ in texts]
    kept: list[dict[int, tuple[str, str]]] = [{} for _ in texts]
    words = [text.split() for text in texts]
    for at in range(max(map(len, words), default=0) + 1):
        running: dict[int, Steps] = {}
        for i, core in enumerate(cores):
            if at < len(words[i]):
                core.append(words[i][at] + " ")
            if at <= len(words[i]):
                running[i] = core.advance(end=at == len(words[i]))
        for i, update in _driven(batched, running):
            kept[i][update.segment] = kept[i].get(update.segment, ("", ""))[0] + update.committed, update.tentative
        for i in running:
            seen = " ".join(committed + tentative for _, (committed, tentative) in sorted(kept[i].items()))
            shown[i].append(Shown(min(at + 1, len(words[i])), seen.split()))
    return shown


def _driven(batched: Batched, running: dict[int, Steps]) -> list[tuple[int, Update]]:
    """The updates of streams, by their number, that each go on until nothing is due."""
    updates: list[tuple[int, Update]] = []
    answers: dict[int, Translation | None] = dict.fromkeys(running)
    while answers:
        wanted: dict[int, Wanted] = {}
        for i, answer in answers.items():
            step = _next(running[i], answer)
            while isinstance(step, Update):
                updates.append((i, step))
                step = _next(running[i], None)
            if step is not None:
                wanted[i] = step
        answers = dict(zip(wanted, batched([*wanted.values()]), strict=True))
    return updates


def _next(steps: Steps, answer: Translation | None) -> Wanted | Update | None:
    try:
        return steps.send(answer)
    except StopIteration:
        return None


def stability(sentences: Sequence[Sequence[Shown]]) -> dict[str, float]:
    """Of whole translations of every prefix (`watched`, where nothing is masked), as shares of their words: what stays when the `next` word comes, and what the
    translation of the `whole` sentence begins with. Signs at their ends are not there to be lost. 1 where nothing was said before the last word."""
    said = next_lost = whole_lost = 0
    for shown in sentences:
        prefixes = shown[1:-1]  # the last of them is the whole sentence, before its end is known
        said += sum(len(prefix.words) for prefix in prefixes[:-1])
        next_lost += erasure(prefixes)
        whole_lost += sum(erasure((prefix, prefixes[-1])) for prefix in prefixes[:-1])
    return {"next": 1 - next_lost / said, "whole": 1 - whole_lost / said} if said else {"next": 1.0, "whole": 1.0}
