"""The service over HTTP, as LibreTranslate's clients speak it: /translate, /detect, /languages, /frontend/settings, /health.

The contract is that of LibreTranslate (github.com/LibreTranslate/LibreTranslate, libretranslate/app.py): bodies are JSON or form data, errors are
`{"error": sentence}`. Beyond it, a key may also come as `Authorization: Bearer`, /openapi.json describes the interface, a list's texts are translated
at once, and nobody is told what went wrong inside.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from cvmk.serving.auth import Caller, Keys, bearer_token
from cvmk.serving.errors import ServiceError, Status, invalid
from cvmk.serving.limits import Limits
from cvmk.serving.openapi import description
from cvmk.serving.whole_texts import translate_whole

if TYPE_CHECKING:
    from cvmk.serving.application import Application

_T = TypeVar("_T")
_CODES = {Status.UNAUTHENTICATED: 400, Status.NOT_FOUND: 400}
"""What LibreTranslate answers, where it is not what `Status.http` says: no key, and a language or pair that is not served."""
_FORM_FIELDS = 1000
_NO_FILES = "files are not translated here: send their text to /translate"
_NO_SUGGESTIONS = "suggestions are not taken here"


def http_app(application: Application, keys: Keys, limits: Limits, routes: tuple[BaseRoute, ...] = ()) -> Starlette:
    """The interface as an ASGI application; `routes` are served beside it (`web.web_routes`)."""
    interface = _Interface(application, keys, limits)
    own = (
        Route("/translate", interface.answering(interface.translate), methods=["POST"]),
        Route("/detect", interface.answering(interface.detect), methods=["POST"]),
        Route("/languages", interface.answering(interface.languages), methods=["GET"]),
        Route("/frontend/settings", interface.answering(interface.settings), methods=["GET"]),
        Route("/health", interface.answering(interface.health), methods=["GET"]),
        Route("/openapi.json", interface.answering(interface.openapi), methods=["GET"]),
        Route("/translate_file", interface.answering(_refusing(_NO_FILES)), methods=["POST"]),
        Route("/download_file/{name:path}", interface.answering(_refusing(_NO_FILES)), methods=["GET"]),
        Route("/suggest", interface.answering(_refusing(_NO_SUGGESTIONS)), methods=["POST"]),
    )
    open_to_all = Middleware(
        CORSMiddleware, allow_origins=["*"], allow_methods=["GET", "POST"], allow_headers=["Authorization", "Content-Type"], expose_headers=["Retry-After"]
    )
    app = Starlette(routes=[*own, *routes], middleware=[open_to_all], exception_handlers={HTTPException: _http_exception})
    app.router.redirect_slashes = False
    return app


class _Interface:
    def __init__(self, application: Application, keys: Keys, limits: Limits) -> None:
        self._application, self._keys, self._limits = application, keys, limits

    def answering(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint that is counted, and whose errors are answers."""

        async def answer(request: Request) -> Response:
            try:
                with self._application.observed(request.scope["path"], dict(request.headers)):
                    return await endpoint(request)
            except ServiceError as error:
                return error_response(error)

        return answer

    # -- LibreTranslate's ---------------------------------------------------------------------------------------------------------------
    async def translate(self, request: Request) -> Response:
        body = await self._body(request)
        caller = self._caller(request, body)
        texts, is_list = body.texts("q"), body.is_list("q")
        texts = self._limits.check_texts("q", texts) if is_list else [self._limits.check_text("q", texts[0])]
        source, target, form = body.text("source"), body.text("target"), body.text("format", "text")
        alternatives = body.number("alternatives", 0)
        if form not in ("text", "html"):
            raise invalid("format", "must be text or html")
        work = translate_whole(self._application, caller, texts, source=source, target=target, is_html=form == "html", alternatives=alternatives)
        found = await _while_connected(request, work)
        answer: dict[str, list[Any]] = {"translatedText": [whole.text for whole in found]}
        if source == "auto":
            answer["detectedLanguage"] = [{"confidence": _percent(whole.source.probability), "language": whole.source.code} for whole in found]
        if alternatives:
            answer["alternatives"] = [whole.alternatives for whole in found]
        return JSONResponse(answer if is_list else {name: values[0] for name, values in answer.items()})

    async def detect(self, request: Request) -> Response:
        body = await self._body(request)
        caller = self._caller(request, body)
        text = self._limits.check_text("q", body.text("q"))
        self._limits.admit_request(caller, len(text))
        found = self._application.detect(text)
        return JSONResponse([{"confidence": _percent(language.probability), "language": language.code} for language in found])

    async def languages(self, request: Request) -> Response:
        served = self._application.languages()
        return JSONResponse([{"code": language.code, "name": language.name, "targets": list(language.targets)} for language in served])

    async def settings(self, request: Request) -> Response:
        config = self._application.config
        served = self._application.languages()
        first = next((language for language in served if language.targets), None)
        names = {language.code: language.name for language in served}
        chosen = {"source": {"code": "auto", "name": "Auto Detect"}, "target": {"code": "", "name": ""}}
        if first is not None:
            chosen["target"] = {"code": first.targets[0], "name": names.get(first.targets[0], first.targets[0])}
        return JSONResponse(
            {
                "apiKeys": config.security.keys is not None,
                "charLimit": config.limits.text_bytes,
                "filesTranslation": False,
                "frontendTimeout": 500,
                "keyRequired": config.security.keys is not None,
                "language": chosen,
                "suggestions": False,
                "supportedFilesFormat": [],
            }
        )

    # -- beyond it ----------------------------------------------------------------------------------------------------------------------
    async def health(self, request: Request) -> Response:
        if self._application.draining:
            raise ServiceError(Status.UNAVAILABLE, "the server is ending, and takes no new work")
        if not any(model.state == "ready" for model in self._application.models()):
            raise ServiceError(Status.UNAVAILABLE, "no model is ready yet", retry_after=1.0)
        return JSONResponse({"status": "ok"})

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(description(self._application.config, self._application.languages()))

    # -- what requests have -------------------------------------------------------------------------------------------------------------
    async def _body(self, request: Request) -> _Fields:
        most = self._limits.config.message_bytes
        try:
            async with asyncio.timeout(self._limits.config.request_seconds):
                return await _fields(request.headers, await _read(request, most))
        except TimeoutError:
            raise ServiceError(Status.DEADLINE_EXCEEDED, "the body did not come in time") from None
        except ClientDisconnect:
            raise ServiceError(Status.CANCELLED, "the client has gone") from None

    def _caller(self, request: Request, body: _Fields) -> Caller:
        token = bearer_token(request.headers.get("authorization")) or body.text("api_key", "") or None
        return self._keys.caller(token, request.client.host if request.client else "")


def error_response(error: ServiceError) -> Response:
    """LibreTranslate's form of an error."""
    message, headers = str(error), {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if error.status is Status.RESOURCE_EXHAUSTED:
        message = f"Slowdown: {message}"
        headers.setdefault("Retry-After", "60")
    code = error.code if isinstance(error, _BodyError) else _CODES.get(error.status, error.status.http)
    return JSONResponse({"error": message}, code, headers)


class _BodyError(ServiceError):
    """A body that is not read, with HTTP's own code for why."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(Status.INVALID_ARGUMENT, message)
        self.code = code


async def _http_exception(request: Request, error: Exception) -> Response:
    """No such path or method."""
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


def _refusing(reason: str) -> Callable[[Request], Awaitable[Response]]:
    async def refuse(request: Request) -> Response:
        raise ServiceError(Status.PERMISSION_DENIED, reason)

    return refuse


def _percent(probability: float) -> float:
    return round(100 * probability, 1)


async def _while_connected(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """What the work gives. It is cancelled when the client goes: ServiceError CANCELLED."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ServiceError(Status.CANCELLED, "the client has gone")
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# -- bodies -------------------------------------------------------------------------------------------------------------------------------
class _Fields:
    """The fields of a body. What is wrong with one is a ServiceError that names it."""

    def __init__(self, values: Mapping[str, object], is_form: bool) -> None:
        self._values, self._is_form = values, is_form

    def is_list(self, name: str) -> bool:
        return isinstance(self._values.get(name), list)

    def texts(self, name: str) -> list[str]:
        """A list, or one text as a list of one; a text by itself may not be empty."""
        values = self._values.get(name)
        if not isinstance(values, list):
            return [self.text(name)]
        for place, value in enumerate(values):
            if not isinstance(value, str):
                raise invalid(f"{name}[{place}]", "must be a string")
            if self._is_form and not value:
                raise invalid(f"{name}[{place}]", "is empty")  # as one that comes alone
        return values

    def text(self, name: str, default: str | None = None) -> str:
        value = self._values.get(name)
        if value in (None, "") and default is not None:
            return default
        if value is None or value == "":
            raise invalid(name, "is missing" if value is None else "is empty")
        if not isinstance(value, str):
            raise invalid(name, "must be a string")
        return value

    def number(self, name: str, default: int) -> int:
        value = self._values.get(name)
        if value is None or (self._is_form and value == ""):
            return default
        if self._is_form and isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
            return int(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # JSON has one kind of numbers
        if not isinstance(value, int) or isinstance(value, bool):
            raise invalid(name, "must be a whole number")
        return value


async def _read(request: Request, most: int) -> bytes:
    """The body, which is not read on once it is too long."""
    declared = request.headers.get("content-length", "")
    data = bytearray()
    if not (declared.isdigit() and int(declared) > most):
        async for part in request.stream():
            data += part
            if len(data) > most:
                break
        else:
            return bytes(data)
    raise _BodyError(413, f"the body is longer than {most} bytes: send it in parts")


async def _fields(headers: Headers, data: bytes) -> _Fields:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return _Fields(_json(data), is_form=False)
    if kind == "application/x-www-form-urlencoded" or (not kind and not data):
        try:
            return _form(parse_qsl(data.decode("utf-8", "surrogateescape"), keep_blank_values=True, errors="surrogateescape", max_num_fields=_FORM_FIELDS))
        except ValueError:
            raise ServiceError(Status.INVALID_ARGUMENT, f"the form has more than {_FORM_FIELDS} fields") from None
    if kind == "multipart/form-data":
        try:
            return _form((await MultiPartParser(headers, _once(data), max_files=0, max_fields=_FORM_FIELDS, max_part_size=len(data) + 1).parse()).multi_items())
        except (MultiPartException, KeyError, ValueError):
            raise ServiceError(Status.INVALID_ARGUMENT, "the body is no form data without files") from None
    raise _BodyError(415, "the body must be application/json, application/x-www-form-urlencoded or multipart/form-data")


def _json(data: bytes) -> dict[str, object]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise ServiceError(Status.INVALID_ARGUMENT, "the body is no JSON") from None
    if not isinstance(values, dict):
        raise ServiceError(Status.INVALID_ARGUMENT, "the body must be a JSON object")
    return values


def _form(items: list[tuple[str, Any]]) -> _Fields:
    """Fields of a form; a `q` that comes several times is a list."""
    values: dict[str, Any] = {}
    for name, value in items:
        text = value.replace("\r\n", "\n") if isinstance(value, str) else value
        if name == "q" and name in values:
            values[name] = [*(values[name] if isinstance(values[name], list) else [values[name]]), text]
        else:
            values.setdefault(name, text)
    return _Fields(values, is_form=True)


async def _once(data: bytes) -> AsyncGenerator[bytes, None]:
    yield data
