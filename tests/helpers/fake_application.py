"""An application that translates by a rule of the test, for tests of what stands above it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cvmk.config.serve import LimitsConfig, SecurityConfig, ServeConfig, ServedModelConfig
from cvmk.serving.answers import Language, ModelInfo
from cvmk.serving.auth import Caller
from cvmk.serving.errors import ServiceError, Status, internal
from cvmk.serving.limits import Limits

PAIRS = (("en", "de"), ("de", "en"), ("zh", "en"))
GERMAN = frozenset("der die das und ist nicht ein eine wir sie guten tag".split())


@dataclass(frozen=True)
class Translated:
    text: str
    alternatives: list[str]
    language: Language | None = None
    score: float = 0.0
    queue_us: int = 1
    decode_us: int = 1
    model: str = "fake"


@dataclass(frozen=True)
class ServedLanguage:
    code: str
    name: str
    targets: list[str]


@dataclass
class FakeApplication:
    """`say` is the rule. `error` is raised in place of a translation, and `calls` has what was asked for. `gate` holds translations up while it is not set."""

    say: Callable[[str], str] = str.upper
    limits_config: LimitsConfig = field(default_factory=LimitsConfig)
    security: SecurityConfig = field(default_factory=SecurityConfig)
    error: BaseException | None = None
    calls: list[tuple[Caller, list[str], str, str, int]] = field(default_factory=list)
    cancelled: int = 0
    gate: asyncio.Event | None = None
    draining: bool = False

    def __post_init__(self) -> None:
        models = {f"{source}-{target}": ServedModelConfig(path=".", source=source, target=target) for source, target in PAIRS}
        self.config = ServeConfig(models=models, limits=self.limits_config, security=self.security)
        self.limits = Limits(self.limits_config)

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        yield

    async def translate(
        self, caller: Caller, texts: Sequence[str], *, source: str = "auto", target: str = "", alternatives: int = 0, **options: object
    ) -> list[Translated]:
        self.calls.append((caller, list(texts), source, target, alternatives))
        self.limits.check_search(alternatives=alternatives)
        self.limits.admit_request(caller, sum(map(len, texts)))
        if (source, target) not in PAIRS:
            raise ServiceError(Status.NOT_FOUND, f"no model translates from {source} to {target}", field="target")
        try:
            await (asyncio.sleep(0) if self.gate is None else self.gate.wait())
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return [Translated(self.say(text), [f"{self.say(text)} ({rank})" for rank in range(1, alternatives + 1)]) for text in texts]

    @contextlib.contextmanager
    def observed(self, method: str, headers: Mapping[str, str] | None = None) -> Iterator[None]:
        try:
            yield
        except ServiceError:
            raise
        except Exception:
            raise internal(method) from None

    def detect(self, text: str) -> list[Language]:
        words = text.lower().replace(".", " ").split()
        german = sum(word in GERMAN for word in words) / max(1, len(words))
        chinese = float(any("\u4e00" <= char <= "\u9fff" for char in text))
        found = [Language("en", 1 - max(german, chinese)), Language("de", german), Language("zh", chinese)]
        return sorted(found, key=lambda language: -language.probability)

    def languages(self) -> list[ServedLanguage]:
        names = {"en": "English", "de": "German", "zh": "Chinese"}
        return [ServedLanguage(source, names[source], [target]) for source, target in PAIRS]

    def models(self) -> list[ModelInfo]:
        return [ModelInfo(name, str(model.source), str(model.target), "1", "float32", 128) for name, model in self.config.models.items()]
