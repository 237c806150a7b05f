"""The files of a page, with headers that let it load nothing from elsewhere, and nobody else frame it or read it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_SHARED = Path(__file__).parent / "shared"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def page_routes(folder: Path) -> tuple[Route, ...]:
    """The files in `folder`, index.html at "/", and what all pages share beside them."""
    files = {path.name: path for place in (_SHARED, folder) for path in sorted(place.iterdir()) if path.suffix in _TYPES}
    return tuple(Route("/" if name == "index.html" else f"/{name}", _file(path), methods=["GET"]) for name, path in files.items())


def _file(path: Path) -> Any:
    data = path.read_bytes()
    tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    headers = HEADERS | {"ETag": tag}

    async def answer(request: Request) -> Response:
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(data, media_type=_TYPES[path.suffix], headers=headers)

    return answer
