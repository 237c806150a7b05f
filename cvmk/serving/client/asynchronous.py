"""The client of the service for programs on asyncio."""

from __future__ import annotations

from typing import Any, Self, Unpack, overload

from cvmk.serving import messages
from cvmk.serving.answers import Language, ModelInfo, Stats, Translated
from cvmk.serving.client.channel import DEFAULT_ADDRESS, Connection, Tls
from cvmk.serving.client.requests import TimeoutOptions, TranslateOptions, count, policy, priority, utf8
from cvmk.serving.client.retry import Retry
from cvmk.serving.client.stream import AsyncLiveStream
from cvmk.streaming import Policy

_UNSET: Any = object()


class AsyncClient:
    """Talks with a server of `cvmk serve`.

        async with AsyncClient("127.0.0.1:50051") as client:
            print((await client.translate("We need a table.", target="de")).text)

    address  HOST:PORT, or several of numbers, divided by commas: another one for every call and stream, and in the place of one that does not answer.
    token    a bearer token, where the server asks for one. It is shown nowhere.
    tls      `Tls()` for a server whose certificate the machine trusts, else with files; without it nothing is encrypted.
    timeout  seconds for a call and all its tries, where the call says nothing else; None for no limit. Streams have none of their own.
    retry    how often and when a call that failed is tried again.

    Raises ConfigError for an address, a token or files that are none. Methods raise ServiceError: NoServerError where no server answers, else with the
    server's status. One event loop may use a client.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        token: str | None = None,
        tls: Tls | None = None,
        timeout: float | None = 30.0,
        retry: Retry | None = None,
    ) -> None:
        self._connection = Connection(address, token, tls, retry or Retry())
        self._timeout = timeout

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._connection.address!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends what is under way."""
        await self._connection.close()

    @overload
    async def translate(self, texts: str, **options: Unpack[TranslateOptions]) -> Translated: ...

    @overload
    async def translate(self, texts: list[str] | tuple[str, ...], **options: Unpack[TranslateOptions]) -> list[Translated]: ...

    async def translate(
        self,
        texts: str | list[str] | tuple[str, ...],
        *,
        source: str = "auto",
        target: str = "",
        model: str = "",
        beam_size: int = 0,
        alternatives: int = 0,
        priority: str = "normal",
        timeout: float | None = _UNSET,
    ) -> Translated | list[Translated]:
        """The translation of a text, or of each of a list. `target` may be left out where one is served, `model` where any will do; beam_size 0 is the
        model's own; `alternatives` is how many further translations are wanted; `priority` is "low", "normal" or "high"."""
        request = messages.TranslateRequest(
            texts=_texts(texts), source=source, target=target, model=model, beam_size=count("beam_size", beam_size),
            alternatives=count("alternatives", alternatives), priority=_priority(priority),
        )  # fmt: skip
        answer = await self._call("Translate", request, timeout)
        found = [_translated(each, answer.model) for each in answer.translations]
        return found[0] if isinstance(texts, str) else found

    @overload
    async def detect(self, texts: str, **options: Unpack[TimeoutOptions]) -> list[Language]: ...

    @overload
    async def detect(self, texts: list[str] | tuple[str, ...], **options: Unpack[TimeoutOptions]) -> list[list[Language]]: ...

    async def detect(self, texts: str | list[str] | tuple[str, ...], *, timeout: float | None = _UNSET) -> list[Language] | list[list[Language]]:
        """The served languages that a text, or each of a list, may be in, the most probable first."""
        answer = await self._call("Detect", messages.DetectRequest(texts=_texts(texts)), timeout)
        found = [[_language(each) for each in detection.languages] for detection in answer.detections]
        return found[0] if isinstance(texts, str) else found

    async def models(self, *, timeout: float | None = _UNSET) -> list[ModelInfo]:
        """What is served."""
        answer = await self._call("ListModels", messages.ListModelsRequest(), timeout)
        return [ModelInfo(**_fields(model)) for model in answer.models]

    async def stats(self, *, timeout: float | None = _UNSET) -> Stats:
        """What the server does now, and has done."""
        return Stats(**_fields(await self._call("GetStats", messages.GetStatsRequest(), timeout)))

    def stream(
        self,
        *,
        source: str = "auto",
        target: str = "",
        model: str = "",
        policy: Policy | str | None = None,
        beam_size: int = 0,
        priority: str = "normal",
        partial_words: bool = False,
        credit: int = 0,
        session: str = "",
        timeout: float | None = None,
    ) -> AsyncLiveStream:
        """A text that grows; to be entered by `async with`.

        policy         of `cvmk.streaming`, or its name ("retranslation", the default, "local-agreement", "wait-k").
        partial_words  whether a last word that no space follows is translated too.
        credit         revisions that may be under way before they are taken; 0: as many as the server likes.
        session        a name for the server's logs.
        timeout        seconds for the whole stream.
        """
        opening = messages.Open(
            source=source, target=target, model=model, policy=_policy(policy), priority=_priority(priority), credit=count("credit", credit),
            session=session, beam_size=count("beam_size", beam_size), partial_words=partial_words,
        )  # fmt: skip
        return AsyncLiveStream(self._connection, opening, timeout)

    async def _call(self, name: str, request: Any, timeout: float | None) -> Any:
        return await self._connection.unary(name, request, self._timeout if timeout is _UNSET else timeout)


_policy, _priority = policy, priority  # which are names of arguments, too


def _texts(texts: str | list[str] | tuple[str, ...]) -> list[bytes]:
    return [utf8(texts, "texts")] if isinstance(texts, str | bytes) else [utf8(text, f"texts[{index}]") for index, text in enumerate(texts)]


def _translated(found: Any, model: str) -> Translated:
    language = _language(found.language) if found.language.code else None
    text, alternatives = found.text.decode(errors="replace"), [other.decode(errors="replace") for other in found.alternatives]
    return Translated(text, alternatives, language, found.score, found.timing.queue_us, found.timing.decode_us, model)


def _language(found: Any) -> Language:
    return Language(found.code, found.probability)


def _fields(message: Any) -> dict[str, Any]:
    """The fields of a message by name. Those that a newer server may add are none of ours."""
    return {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
