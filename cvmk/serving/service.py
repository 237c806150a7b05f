"""The gRPC services of realtime_translation.proto, over an Application."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from cvmk.errors import ConfigError
from cvmk.serving import messages
from cvmk.serving.answers import Language, ModelInfo, Translated
from cvmk.serving.application import Application
from cvmk.serving.auth import Caller, Keys, bearer_token
from cvmk.serving.errors import ServiceError, Status, internal, invalid
from cvmk.serving.events import Opening
from cvmk.serving.outbox import SessionUpdate
from cvmk.serving.sessions import LiveSession
from cvmk.serving.tasks import in_pieces
from cvmk.streaming import LocalAgreement, Policy, Retranslation, WaitK

_CODES = {code.value[0]: code for code in grpc.StatusCode}
_PRIORITIES = ("normal", "low", "normal", "high")  # by the numbers of Priority
_MOST_SECONDS = 3600
_PIECE = 128
"""Translations that are made into messages before the event loop turns to others."""
FIRST_SECONDS = 10.0
"""In which a stream's first request has to come."""
_LAST_WORDS = 0.25
"""Seconds in which a stream that has failed may still say what was committed."""
Context = Any  # grpc.aio.ServicerContext, whose type parameters say nothing here
Method = Callable[[Any, Caller, Context], Awaitable[Any]]


class TranslationService:
    """`cvmk.v1.RealtimeTranslation`. Messages come as bytes and are parsed here: what is no message is INVALID_ARGUMENT."""

    NAME = messages.SERVICE

    def __init__(self, application: Application, keys: Keys) -> None:
        self._application, self._keys = application, keys

    def handler(self) -> grpc.GenericRpcHandler:
        unary: dict[str, Method] = {
            "Translate": self._translate, "Detect": self._detect, "ListModels": self._list_models, "GetStats": self._get_stats,
        }  # fmt: skip
        return _handler(self._application, self.NAME, unary, {"TranslateStream": self.stream}, self._keys)

    async def _translate(self, request: Any, caller: Caller, context: Context) -> Any:
        application = self._application
        texts = application.limits.check_texts("texts", request.texts)
        found = await application.translate(
            caller, texts, source=request.source, target=request.target, model=request.model, beam_size=request.beam_size,
            alternatives=request.alternatives, priority=_priority("priority", request.priority), timeout=context.time_remaining(),
        )  # fmt: skip
        response = messages.TranslateResponse(model=found[0].model)
        async for one in in_pieces(found, _PIECE):
            response.translations.append(_translated(one))
        return response

    async def _detect(self, request: Any, caller: Caller, context: Context) -> Any:
        texts = self._application.limits.check_texts("texts", request.texts)
        self._application.limits.admit_request(caller, sum(map(len, texts)))
        ranked = [self._application.detect(text) for text in texts]
        return messages.DetectResponse(detections=[messages.Detection(languages=map(_language, one)) for one in ranked])

    async def _list_models(self, request: Any, caller: Caller, context: Context) -> Any:
        return messages.ListModelsResponse(models=map(_model, self._application.models()))

    async def _get_stats(self, request: Any, caller: Caller, context: Context) -> Any:
        return messages.GetStatsResponse(**vars(self._application.stats()))

    async def stream(self, requests: AsyncIterator[Any], caller: Caller, write: Callable[[Any], Awaitable[None]]) -> None:
        """A stream of StreamRequests and StreamResponses, whatever brings and takes them. Raises ServiceError."""
        try:
            async with asyncio.timeout(FIRST_SECONDS):
                first = await anext(requests, None)
        except TimeoutError:
            raise ServiceError(Status.DEADLINE_EXCEEDED, f"nothing came for {FIRST_SECONDS:g} seconds: send open") from None
        if first is None or first.WhichOneof("event") != "open":
            raise ServiceError(Status.FAILED_PRECONDITION, "the first message must be open", field="open")
        async with self._application.open(caller, self._opening(first.open)) as session:
            writer = asyncio.create_task(self._write(session, write))
            session.on_failure = lambda: asyncio.get_running_loop().call_later(_LAST_WORDS, writer.cancel)  # it may wait for a reader that does not read
            reader = asyncio.create_task(self._read(requests, session, caller))
            try:
                await asyncio.wait({writer})
                if session.error is not None:
                    raise session.error
                await writer
            finally:
                session.on_failure = _nothing
                for task in (reader, writer):
                    task.cancel()
                await asyncio.gather(reader, writer, return_exceptions=True)

    async def _write(self, session: LiveSession, write: Callable[[Any], Awaitable[None]]) -> None:
        await write(messages.StreamResponse(opened=messages.Opened(session=session.name, model=session.model, target=session.target)))
        while (update := await session.next()) is not None:
            await write(_response(update))

    async def _read(self, requests: AsyncIterator[Any], session: LiveSession, caller: Caller) -> None:
        """Bring what comes into the session; it never waits for what goes out."""
        pace = self._application.limits.pace()
        try:
            async for request in requests:
                await asyncio.sleep(pace.delay())
                self._event(request, session, caller)
                await session.room()
            with contextlib.suppress(ServiceError):  # it may have been closed
                session.close()
        except ServiceError as error:
            session.fail(error)
        except Exception:
            session.fail(internal("a stream's reader"))

    def _event(self, request: Any, session: LiveSession, caller: Caller) -> None:
        session.acknowledge(request.ack_revision)
        kind = request.WhichOneof("event")
        if kind in ("append", "replace"):
            event = getattr(request, kind)
            text = self._application.limits.check_text(f"{kind}.text", event.text)
            self._application.limits.admit_request(caller, len(text), requests=0)
            if kind == "append":
                session.append(event.seq, text)
            else:
                session.replace(event.seq, event.from_char, text, event.segment if event.HasField("segment") else None)
        elif kind == "end_segment":
            session.end_segment()
        elif kind == "close":
            session.close()
        elif kind == "open":
            raise ServiceError(Status.FAILED_PRECONDITION, "open comes once: open another stream", field="open")

    def _opening(self, open: Any) -> Opening:
        return Opening(
            open.source or "auto", open.target, open.model, _policy(open.policy), _priority("open.priority", open.priority), open.credit, open.session,
            open.first_segment, self._application.limits.check_text("open.committed", open.committed), tuple(open.committed_pieces),
            open.beam_size, open.partial_words,
        )  # fmt: skip


class AdminService:
    """`cvmk.v1.Admin`. `on_drain` is called with the seconds that are left to what runs, when the server is to end."""

    NAME = messages.ADMIN

    def __init__(self, application: Application, keys: Keys, on_drain: Callable[[float | None], None]) -> None:
        self._application, self._keys, self._on_drain = application, keys, on_drain

    def handler(self) -> grpc.GenericRpcHandler:
        return _handler(self._application, self.NAME, {"Load": self._load, "Unload": self._unload, "Drain": self._drain}, {}, self._keys, admin=True)

    async def _load(self, request: Any, caller: Caller, context: Context) -> Any:
        return messages.LoadResponse(model=_model(await self._application.load(request.model, request.path)))

    async def _unload(self, request: Any, caller: Caller, context: Context) -> Any:
        await self._application.unload(request.model)
        return messages.UnloadResponse()

    async def _drain(self, request: Any, caller: Caller, context: Context) -> Any:
        if request.seconds > _MOST_SECONDS:
            raise invalid("seconds", f"is {request.seconds}, and may be at most {_MOST_SECONDS}")
        self._on_drain(float(request.seconds) or None)
        return messages.DrainResponse()


# -- calls: who asks, what it is, and how errors are told ---------------------------------------------------------------------------------
def _handler(
    application: Application, name: str, unary: dict[str, Method], streams: dict[str, Any], keys: Keys, admin: bool = False
) -> grpc.GenericRpcHandler:
    handlers: dict[str, grpc.RpcMethodHandler] = {}
    inputs = {method: descriptor.input_type.name for method, descriptor in messages.services()[name].items()}

    def unary_call(method: str, function: Method) -> Any:
        async def call(data: bytes, context: Context) -> Any:
            try:
                with application.observed(method, _headers(application, context)):
                    return await function(_parsed(inputs[method], data), _caller(context, keys, admin), context)
            except ServiceError as error:
                await _abort(context, error)

        return call

    def stream_call(method: str, function: Any) -> Any:
        async def call(requests: AsyncIterator[bytes], context: Context) -> None:
            try:
                with application.observed(method, _headers(application, context)):
                    await function(_each_parsed(requests), _caller(context, keys, admin), context.write)
            except ServiceError as error:
                await _abort(context, error)

        return call

    for method, function in unary.items():
        handlers[method] = grpc.unary_unary_rpc_method_handler(unary_call(method, function), response_serializer=_serialized)
    for method, function in streams.items():
        handlers[method] = grpc.stream_stream_rpc_method_handler(stream_call(method, function), response_serializer=_serialized)
    return grpc.method_handlers_generic_handler(name, handlers)


async def _each_parsed(requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for data in requests:
        yield _parsed("StreamRequest", data)


def _headers(application: Application, context: Context) -> dict[str, str] | None:
    """What traces want to know of a call."""
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)} if application.traces.active else None


async def _abort(context: Context, trouble: ServiceError) -> None:
    """An error as a status."""
    trailing = [("field", trouble.field)] if trouble.field else []
    if trouble.retry_after is not None:
        trailing.append(("retry-after-ms", str(math.ceil(1000 * trouble.retry_after))))
    await context.abort(_CODES[trouble.status.number], str(trouble), tuple(trailing))


def _caller(context: Context, keys: Keys, admin: bool) -> Caller:
    sent = dict(context.invocation_metadata() or ())
    value = sent.get("authorization")
    caller = keys.caller(bearer_token(value.decode("latin-1") if isinstance(value, bytes) else value), context.peer())
    if admin and not caller.admin:
        raise ServiceError(Status.PERMISSION_DENIED, "this is for administrators")
    return caller


def _parsed(message: str, data: bytes) -> Any:
    try:
        return getattr(messages, message).FromString(data)
    except DecodeError:
        raise ServiceError(Status.INVALID_ARGUMENT, f"the message is no {message}") from None


def _serialized(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def _nothing() -> None:
    pass


# -- messages -------------------------------------------------------------------------------------------------------------------------------
def _priority(field: str, number: int) -> str:
    if not 0 <= number < len(_PRIORITIES):
        raise invalid(field, f"is {number}, and the priorities are 1 to {len(_PRIORITIES) - 1}")
    return _PRIORITIES[number]


def _policy(policy: Any) -> Policy:
    kind = policy.WhichOneof("policy") or "retranslation"
    given = {field.name: value for field, value in getattr(policy, kind).ListFields()}
    makers: dict[str, type[Policy]] = {"retranslation": Retranslation, "local_agreement": LocalAgreement, "wait_k": WaitK}
    try:
        return makers[kind](**given)
    except ConfigError as error:
        raise invalid(f"open.policy.{kind}", str(error)) from error


def _language(language: Language) -> Any:
    return messages.Language(code=language.code, probability=language.probability)


def _model(info: ModelInfo) -> Any:
    return messages.Model(**vars(info))


def _translated(found: Translated) -> Any:
    timing = messages.Timing(queue_us=found.queue_us, decode_us=found.decode_us)
    language = None if found.language is None else _language(found.language)
    alternatives = [text.encode() for text in found.alternatives]
    return messages.TranslatedText(text=found.text.encode(), alternatives=alternatives, language=language, score=found.score, timing=timing)


def _response(update: SessionUpdate) -> Any:
    refused = None if update.refused is None else messages.Refused(seq=update.refused.seq, reason=update.refused.reason)
    return messages.StreamResponse(
        segment=update.segment, revision=update.revision, committed_delta=update.committed.encode(), tentative=update.tentative.encode(),
        deleted_chars=update.deleted, source_chars_read=update.source_read, language=None if update.language is None else _language(update.language),
        timing=messages.Timing(queue_us=update.queue_us, decode_us=update.decode_us), final=update.final, seq_read=update.seq_read,
        segment_begin=update.segment_begin, refused=refused, committed_pieces=update.pieces,
    )  # fmt: skip
