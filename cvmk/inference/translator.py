"""Translator: texts in, texts out, whatever engine does the work."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from cvmk.config.section import MAX_THREADS
from cvmk.errors import ConfigError, DataError
from cvmk.formats import load_model_tokenizer, read_model_manifest
from cvmk.inference import engines
from cvmk.inference.engine import Engine
from cvmk.inference.engines import EngineAnswer
from cvmk.inference.options import Hypothesis, SearchOptions, checked_number
from cvmk.text.lines import trimmed
from cvmk.text.tokenizers import Tokenizer

if TYPE_CHECKING:
    from cvmk.inference.session import Session
    from cvmk.nn import CVMTransformer

OnLong = Literal["error", "truncate"]
_log = logging.getLogger(__name__)


class TooLongError(DataError):
    """A text has more pieces than the model can read; `index` is its place among the texts, from 0."""

    def __init__(self, index: int, name: str, reason: str) -> None:
        super().__init__(f"{name} {reason}: split it into sentences, or allow truncation")
        self.index, self.reason = index, reason


@dataclass(frozen=True)
class TranslationHypothesis:
    """One candidate translation: text, score (sum(log p) / length ** length_penalty, EOS counted), and piece ids.

    For `scores` (of each piece and EOS) and `alignment` see `Hypothesis`.
    """

    text: str
    score: float
    tokens: list[int]
    scores: Sequence[float] = field(default=(), compare=False)
    alignment: Sequence[Sequence[float]] = field(default=(), compare=False)


@dataclass(frozen=True)
class Translation:
    """The translation of one text. `hypotheses` holds the n best, best first; text, score and tokens are the best one's.

    `truncated` says that the source was cut to what the model can read; `source` holds its piece ids as `Translator.translate` read them.
    """

    text: str
    score: float
    tokens: list[int]
    hypotheses: list[TranslationHypothesis] = field(default_factory=list)
    truncated: bool = False
    source: Sequence[int] = field(default=(), compare=False)


class Translator:
    """Translates with the model in a folder (or a run's folder).

    device is "cpu", "cuda", "cuda:<number>" or "auto". compute_type is "auto" (as the weights are stored), "float32", "bfloat16" ("bf16") or, on a
    CPU, "int8" or "int4"; weights become that when they are loaded. engine names the one to use, "native" or "torch", where it should not be
    the first that can run the model (see `explain`). threads is how many threads of the CPU it has, at least 1; None: all that the process may use. Raises
    ConfigError for others, and DataError for a folder that holds no sound model. `info` is the model's config.json.
    """

    def __init__(
        self, path: str | os.PathLike[str], device: str = "cpu", compute_type: str = "auto", *, engine: str = "auto", threads: int | None = None
    ) -> None:
        if threads is not None:
            threads = int(checked_number("threads", threads, 1, MAX_THREADS))
        for name, value in (("device", device), ("compute_type", compute_type), ("engine", engine)):
            if not isinstance(value, str):
                raise ConfigError(f"{name} is {value!r}, and must be a name")
        folder, manifest, self.info = read_model_manifest(path)
        self.tokenizer = load_model_tokenizer(folder, manifest)
        chosen, self.engine = engines.build(folder, manifest, device, compute_type, engine, threads)
        self._explain: Callable[[], list[EngineAnswer]] = lambda: engines.explain(manifest, device, compute_type, chosen)

    @classmethod
    def from_model(cls, model: CVMTransformer, tokenizer: Tokenizer, device: str | None = None, compute_type: str | None = None) -> Translator:
        """A translator over a model in memory. Without device and compute_type it uses the model as it is, without a
        copy, so later changes of the weights count; a model in training mode is put back into it after each call."""
        from cvmk.inference.torch_engine import TorchEngine

        return cls.from_engine(TorchEngine(model, device, compute_type), tokenizer)

    @classmethod
    def of_weights(cls, model: CVMTransformer, tokenizer: Tokenizer) -> Translator:
        """A translator with the weights that a model has now, on the first engine that can run it."""
        name, engine = engines.of_model(model)
        translator = cls.from_engine(engine, tokenizer)
        translator._explain = lambda: [EngineAnswer(name, (), True)]
        return translator

    @classmethod
    def from_engine(cls, engine: Engine, tokenizer: Tokenizer) -> Translator:
        """A translator over any engine."""
        translator = cls.__new__(cls)
        translator.engine, translator.tokenizer, translator.info = engine, tokenizer, {}
        translator._explain = lambda: [EngineAnswer(type(engine).__name__, (), True)]
        return translator

    def __reduce__(self) -> Any:
        raise TypeError("a Translator cannot be pickled or copied: make another one of the model's folder where it is needed")

    def explain(self) -> list[EngineAnswer]:
        """Every engine, the preferred one first, with the reasons why it cannot run this model, and which one does. A translator that was
        given its engine knows that one only."""
        return self._explain()

    def translate(
        self,
        texts: Sequence[str],
        *,
        beam_size: int = 1,
        length_penalty: float = 1.0,
        n_best: int = 1,
        no_repeat_ngram: int = 0,
        max_length_a: float = 2.0,
        max_length_b: int = 20,
        min_length: int = 1,
        repetition_penalty: float = 1.0,
        suppressed: Sequence[int] = (),
        patience: float = 1.0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        prefix_bias: float = 0.0,
        shortlist: bool = False,
        scores: bool = True,
        alignments: bool = False,
        prefixes: Sequence[str] | None = None,
        max_batch_tokens: int = 4096,
        on_long: OnLong = "error",
    ) -> list[Translation]:
        """The translation of each text, in order. White space around a text is dropped, as from the training text; a text
        without anything else has the empty translation.

        For the options of the search see `SearchOptions`. `prefixes` has one text for each of `texts`, with which all its hypotheses
        begin ("" for none), or by which they are biased where prefix_bias is above 0; white space around it is dropped too.
        max_batch_tokens bounds source pieces (padding included) times beam_size of what is translated at once; it changes speed and memory,
        not results. A text of more pieces than the model can read is a
        TooLongError (a DataError) that names it by its number, counted from 1, or with on_long="truncate" loses its end, with a warning. Raises
        ConfigError for an option out of range and a prefix that is too long.
        """
        texts = _strings("text", texts)
        options = SearchOptions(
            beam_size, n_best, length_penalty, no_repeat_ngram, max_length_a, max_length_b, min_length, repetition_penalty, suppressed,
            patience, temperature, top_k, top_p, seed, prefix_bias, shortlist, scores, alignments,
        )  # fmt: skip
        max_batch_tokens = int(checked_number("max_batch_tokens", max_batch_tokens, 1))
        if on_long not in ("error", "truncate"):
            raise ConfigError(f'on_long is {on_long!r}, and must be "error" or "truncate"')
        sources, cut = self._sources(texts, on_long)
        begun = None if prefixes is None else self._prefixes(prefixes, len(texts))
        found: list[list[Hypothesis]] = [[Hypothesis()] for _ in texts]
        for batch in batches([len(source) for source in sources], max_batch_tokens // beam_size):
            given = () if begun is None else ([begun[index] for index in batch],)
            for index, hypotheses in zip(batch, self.engine.search([sources[index] for index in batch], options, *given), strict=True):
                found[index] = hypotheses
        return [self._translation(hypotheses, index in cut, source) for index, (hypotheses, source) in enumerate(zip(found, sources, strict=True))]

    def session(self, **options: Any) -> Session:
        """A `Session`: a source that grows, and a translation whose beginning stays. `options` are those of `SearchOptions`."""
        from cvmk.inference.session import Session

        return Session(self, **options)

    def encode(self, text: str) -> list[int]:
        """Piece ids of a text; white space around it is dropped. Raises DataError for one that is longer than the model reads."""
        found, _ = self._sources(_strings("text", [text]), "error")
        return found[0]

    def decode(self, hypotheses: Sequence[Hypothesis]) -> Translation:
        """What an engine found for a text; nothing is the empty translation."""
        return self._translation(list(hypotheses) or [Hypothesis()], False)

    def _sources(self, texts: Sequence[str], on_long: OnLong) -> tuple[list[list[int]], set[int]]:
        """Piece ids of each text, [] for one without content; and the indices of those that were cut."""
        longest = self.engine.max_length - 1
        sources = self.tokenizer.encode_many([trimmed(text) for text in texts])
        cut = set()
        for index, source in enumerate(sources):
            if len(source) <= longest:
                continue
            name = f"text {index + 1} of {len(texts)}"
            reason = f"has {len(source)} pieces and the model reads at most {longest} (model.max_length = {longest + 1})"
            if on_long == "error":
                raise TooLongError(index, name, reason)
            _log.warning("%s %s: its end is left out", name, reason)
            sources[index] = source[:longest]
            cut.add(index)
        return sources, cut

    def _prefixes(self, prefixes: Sequence[str], count: int) -> list[list[int]]:
        """Piece ids of each prefix."""
        if isinstance(prefixes, str) or len(prefixes := _strings("prefix", prefixes)) != count:
            raise ConfigError(f"prefixes must be a list of {count} strings, one for each text")
        found = self.tokenizer.encode_many([trimmed(prefix) for prefix in prefixes])
        longest = self.engine.max_length - 1
        for index, prefix in enumerate(found):
            if len(prefix) > longest:
                reason = f"has {len(prefix)} pieces and the model writes at most {longest} (model.max_length = {longest + 1})"
                raise ConfigError(f"prefix {index + 1} of {count} {reason}: shorten it")
        return found

    def _translation(self, hypotheses: list[Hypothesis], truncated: bool, source: Sequence[int] = ()) -> Translation:
        decoded = [TranslationHypothesis(self.tokenizer.decode(h.tokens), h.score, h.tokens, h.scores, h.alignment) for h in hypotheses]
        best = decoded[0]
        return Translation(best.text, best.score, best.tokens, decoded, truncated, source)


def _strings(what: str, values: Iterable[str]) -> list[str]:
    """What was given as a list of strings. Raises TypeError for anything else, so that one text is not taken for its letters."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"a list of strings is asked for, one a {what}, and {type(values).__name__} was given")
    found = list(values)
    for index, value in enumerate(found):
        if not isinstance(value, str):
            raise TypeError(f"{what} {index + 1} of {len(found)} is no string but {type(value).__name__}")
    return found


def batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar lengths, the longest first; a batch has at most max_tokens positions (its end sign and
    padding included), or one text. Texts of length 0 are left out."""
    batch: list[int] = []
    for index in sorted((index for index, length in enumerate(lengths) if length), key=lambda index: (-lengths[index], index)):
        if batch and (len(batch) + 1) * (lengths[batch[0]] + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
