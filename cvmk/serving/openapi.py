"""The HTTP interface in OpenAPI 3.1."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import cvmk
from cvmk.config.serve import ServeConfig

if TYPE_CHECKING:
    from cvmk.serving.answers import ServedLanguage


def description(config: ServeConfig, languages: Iterable[ServedLanguage]) -> dict[str, Any]:
    """The description, with the limits and languages of this server."""
    limits = config.limits
    text = {"type": "string", "pattern": r"^[^\x00]+$", "maxLength": limits.text_bytes}
    texts = {"type": "array", "items": text, "minItems": 1, "maxItems": limits.texts}
    texts_in_json = texts | {"items": text | {"pattern": r"^[^\x00]*$"}}
    key = {"type": "string", "description": "A client's key, where the server asks for one; it may also come as a bearer token."}
    translation: dict[str, Any] = {
        "type": "object",
        "required": ["q", "source", "target"],
        "properties": {
            "q": {"anyOf": [text, texts], "description": "What to translate: a text, or several."},
            "source": {"type": "string", "description": 'Code of its language, or "auto".'},
            "target": {"type": "string", "description": "Code of the language to translate to."},
            "format": {"enum": ["text", "html"], "default": "text", "description": "HTML is translated between its tags."},
            "alternatives": {"type": "integer", "minimum": 0, "maximum": limits.alternatives, "default": 0, "description": "Further translations."},
            "api_key": key,
        },
        "anyOf": [{"properties": {"source": {"enum": [language.code, "auto"]}, "target": {"enum": list(language.targets)}}} for language in languages],
    }
    in_json = translation | {"properties": translation["properties"] | {"q": {"anyOf": [text, texts_in_json], "description": "A text, or several."}}}
    detection = {"type": "object", "required": ["q"], "properties": {"q": text, "api_key": key}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "cvmk",
            "version": cvmk.__version__,
            "description": "Translation, as LibreTranslate's clients ask for it. Fields that are not known are ignored.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": {
            "/translate": {"post": _post("translate", "Translates a text or several", translation, _TRANSLATED, _WORK | _FAILURES, in_json)},
            "/detect": {"post": _post("detect", "Says which of the served languages a text is in, the likeliest first", detection, _DETECTED, _WORK)},
            "/languages": {"get": _get("languages", "The languages that are served, and what each can be translated to", _LANGUAGES)},
            "/frontend/settings": {"get": _get("settings", "Limits, and what is asked of clients", _SETTINGS)},
            "/health": {"get": _get("health", "Whether work is taken", _HEALTH, {"503": "Not now: no model is ready, or the server is ending."})},
            "/translate_file": {"post": _refused("translate_file")},
        },
        "components": {
            "schemas": {"Error": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}},
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


_WORK = {
    "400": "A field is missing, wrong or over a limit; or a key is needed.",
    "403": "The key is not known.",
    "413": "The body is too long.",
    "415": "The body is neither JSON nor form data.",
    "429": 'Too much was asked for; begins with "Slowdown:".',
    "500": "An error of the server, with the number that its log has for it.",
    "503": "The server is ending.",
    "504": "It took too long.",
}
_FAILURES = {"409": "The translation failed; others go on."}
_STRINGS = {"type": "array", "items": {"type": "string"}}
_CONFIDENCE = {"type": "number", "minimum": 0, "maximum": 100}
_LANGUAGE = {"type": "object", "required": ["confidence", "language"], "properties": {"confidence": _CONFIDENCE, "language": {"type": "string"}}}
_DETECTED = {"type": "array", "items": _LANGUAGE}
_TRANSLATED = {
    "type": "object",
    "required": ["translatedText"],
    "description": "For several texts every field is a list.",
    "properties": {
        "translatedText": {"anyOf": [{"type": "string"}, _STRINGS]},
        "detectedLanguage": {"anyOf": [_LANGUAGE, {"type": "array", "items": _LANGUAGE}], "description": 'Where the source is "auto".'},
        "alternatives": {"anyOf": [_STRINGS, {"type": "array", "items": _STRINGS}], "description": "Where some were asked for."},
    },
    "additionalProperties": False,
}
_LANGUAGES = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["code", "name", "targets"],
        "properties": {"code": {"type": "string"}, "name": {"type": "string"}, "targets": _STRINGS},
        "additionalProperties": False,
    },
}
_NAMED = {"type": "object", "required": ["code", "name"], "properties": {"code": {"type": "string"}, "name": {"type": "string"}}}
_SETTINGS = {
    "type": "object",
    "required": ["apiKeys", "charLimit", "keyRequired", "language", "supportedFilesFormat"],
    "properties": {
        "apiKeys": {"type": "boolean"},
        "charLimit": {"type": "integer", "description": "Bytes of a text in UTF-8."},
        "filesTranslation": {"type": "boolean"},
        "frontendTimeout": {"type": "integer"},
        "keyRequired": {"type": "boolean"},
        "language": {"type": "object", "required": ["source", "target"], "properties": {"source": _NAMED, "target": _NAMED}},
        "suggestions": {"type": "boolean"},
        "supportedFilesFormat": _STRINGS,
    },
}
_HEALTH = {"type": "object", "required": ["status"], "properties": {"status": {"const": "ok"}}}


def _answers(schema: dict[str, Any], errors: dict[str, str]) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    wrong: dict[str, Any] = {code: {"description": text, "content": error} for code, text in errors.items()}
    for code in wrong.keys() & {"429", "503"}:
        wrong[code]["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}}
    return {"200": {"description": "The answer.", "content": {"application/json": {"schema": schema}}}} | wrong


def _post(
    name: str, summary: str, form: dict[str, Any], answer: dict[str, Any], errors: dict[str, str], in_json: dict[str, Any] | None = None
) -> dict[str, Any]:
    content = {"application/json": in_json or form, "application/x-www-form-urlencoded": form, "multipart/form-data": form}
    return {
        "operationId": name,
        "summary": summary,
        "security": [{}, {"bearer": []}],
        "requestBody": {"required": True, "content": {kind: {"schema": body} for kind, body in content.items()}},
        "responses": _answers(answer, errors),
    }


def _get(name: str, summary: str, answer: dict[str, Any], errors: dict[str, str] | None = None) -> dict[str, Any]:
    return {"operationId": name, "summary": summary, "responses": _answers(answer, errors or {})}


def _refused(name: str) -> dict[str, Any]:
    answers = _answers({}, {"403": "Files are not translated here."})
    del answers["200"]
    return {"operationId": name, "summary": "Not offered; send a file's text to /translate", "responses": answers}
