"""LibreTranslate's contract over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import html
import json
import logging
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from certificates import authority, signed
from fake_application import FakeApplication
from http_served import http_served
from hypothesis import given
from hypothesis.errors import Unsatisfiable

from cvmk.config.serve import LimitsConfig, SecurityConfig, ServeConfig, ServerConfig
from cvmk.errors import ConfigError
from cvmk.inference import Translator
from cvmk.serving.application import Application
from cvmk.serving.auth import Keys, ssl_context
from cvmk.serving.errors import ServiceError, Status
from cvmk.serving.http import http_app
from cvmk.serving.http_server import serve_http

TOKEN = "0123456789abcdef"
Call = Callable[..., httpx.Response]


@pytest.fixture
def fake() -> FakeApplication:
    return FakeApplication()


@pytest.fixture
def keys(tmp_path: Path) -> str:
    (tmp_path / "keys").write_text(f"alice = {TOKEN}\n")
    (tmp_path / "keys").chmod(0o600)
    return str(tmp_path / "keys")


def call(fake: FakeApplication, method: str, path: str, **options: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(http_app(fake, Keys(fake.security.keys), fake.limits), client=("192.0.2.7", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return await client.request(method, path, **options)

    return asyncio.run(run())


def translate(fake: FakeApplication, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    return call(fake, "POST", "/translate", json={"source": "en", "target": "de"} | fields, headers=headers)


def error(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    assert response.headers["access-control-allow-origin" if "origin" in response.request.headers else "content-type"] in ("*", "application/json")
    assert list(response.json()) == ["error"]
    return str(response.json()["error"])


def test_a_text(fake: FakeApplication) -> None:
    assert translate(fake, q="hello you").json() == {"translatedText": "HELLO YOU"}


def test_a_list_is_translated_at_once(fake: FakeApplication) -> None:
    assert translate(fake, q=["hello", "", "you"]).json() == {"translatedText": ["HELLO", "", "YOU"]}
    assert [texts for _, texts, *_ in fake.calls] == [["hello", "", "you"]]


@pytest.mark.parametrize("way", ["data", "files"])
def test_form_data_is_as_json(fake: FakeApplication, way: str) -> None:
    fields = {"q": "hello\r\nyou — 你好 & co", "source": "en", "target": "de", "alternatives": "1", "format": "text"}
    form = fields if way == "data" else {name: (None, value) for name, value in fields.items()}
    assert call(fake, "POST", "/translate", **{way: form}).json() == {
        "translatedText": "HELLO\nYOU — 你好 & CO", "alternatives": ["HELLO\nYOU — 你好 & CO (1)"],
    }  # fmt: skip


def test_a_field_of_a_form_several_times_is_a_list(fake: FakeApplication) -> None:
    assert call(fake, "POST", "/translate", data={"q": ["a", "b"], "source": "en", "target": "de"}).json() == {"translatedText": ["A", "B"]}


def test_alternatives(fake: FakeApplication) -> None:
    assert translate(fake, q="a", alternatives=2).json() == {"translatedText": "A", "alternatives": ["A (1)", "A (2)"]}
    assert translate(fake, q=["a", "b"], alternatives=1).json() == {"translatedText": ["A", "B"], "alternatives": [["A (1)"], ["B (1)"]]}


def test_the_source_is_found(fake: FakeApplication) -> None:
    """Each text's by itself, but short ones by all of the request; what is in the target language stays."""
    assert translate(fake, q="guten tag", source="auto", target="en").json() == {
        "translatedText": "GUTEN TAG", "detectedLanguage": {"confidence": 100.0, "language": "de"},
    }  # fmt: skip
    german, english = "das ist der und die und das ist nicht die", "this is an english text of some forty characters"
    answer = translate(fake, q=[german, english, "tag"], source="auto", target="en").json()
    assert answer["translatedText"] == [german.upper(), english, "TAG" if answer["detectedLanguage"][2]["language"] == "de" else "tag"]
    assert [found["language"] for found in answer["detectedLanguage"]][:2] == ["de", "en"]
    assert {source for _, _, source, *_ in fake.calls} == {"de"}


def test_html_is_kept_whole(fake: FakeApplication) -> None:
    document = '<p class="x">Hello <b>you</b>.</p>\n<script>hello()</script>'
    assert translate(fake, q=document, format="html").json() == {"translatedText": '<p class="x">HELLO <b>YOU</b>.</p>\n<script>hello()</script>'}
    assert len(fake.calls) == 1
    assert translate(fake, q=["<i>hello</i> you", "c"], format="html", alternatives=1).json()["alternatives"] == [["<i>HELLO</i> YOU (1)"], ["C (1)"]]
    assert translate(fake, q="<p>guten tag</p>", format="html", source="auto", target="en").json()["detectedLanguage"]["language"] == "de"


def test_languages(fake: FakeApplication) -> None:
    assert call(fake, "GET", "/languages").json()[0] == {"code": "en", "name": "English", "targets": ["de"]}


def test_detect(fake: FakeApplication) -> None:
    answer = call(fake, "POST", "/detect", data={"q": "guten tag"}).json()
    confidences = [found["confidence"] for found in answer]
    assert answer[0] == {"confidence": 100.0, "language": "de"} and confidences == sorted(confidences, reverse=True)


def test_settings_and_health(fake: FakeApplication, keys: str) -> None:
    settings = call(fake, "GET", "/frontend/settings").json()
    assert (settings["charLimit"], settings["keyRequired"], settings["supportedFilesFormat"]) == (65_536, False, [])
    assert settings["language"]["source"]["code"] == "auto" and settings["language"]["target"] == {"code": "de", "name": "German"}
    assert call(FakeApplication(security=SecurityConfig(keys=keys)), "GET", "/frontend/settings").json()["apiKeys"] is True
    assert call(fake, "GET", "/health").json() == {"status": "ok"}
    fake.draining = True
    assert "ending" in error(call(fake, "GET", "/health"), 503)


def test_what_is_not_offered(fake: FakeApplication) -> None:
    for method, path in (("POST", "/translate_file"), ("GET", "/download_file/x/y"), ("POST", "/suggest")):
        assert "here" in error(call(fake, method, path), 403)
    error(call(fake, "GET", "/translate"), 405)
    error(call(fake, "GET", "/nothing"), 404)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "q is missing"),
        ({"q": ""}, "q is empty"),
        ({"q": []}, "q is empty"),
        ({"q": None}, "q is missing"),
        ({"q": 5}, "q must be"),
        ({"q": {"a": 1}}, "q must be"),
        ({"q": ["a", 5]}, r"q[1] must be"),
        ({"q": "a\0b"}, "q has a NUL"),
        ({"q": "\ud800"}, "q is not UTF-8"),
        ({"q": ["a", "\udfff"]}, "q[1] is not UTF-8"),
        ({"q": "a" * 65_537}, "q is longer"),
        ({"q": ["a"] * 129}, "q has 129 texts"),
        ({"q": "a", "source": 1}, "source must be"),
        ({"q": "a", "source": ""}, "source is empty"),
        ({"q": "a", "source": None}, "source is missing"),
        ({"q": "a", "source": "xx-none"}, "source"),
        ({"q": "a", "source": "fr"}, "source 'fr'"),
        ({"q": "a", "target": ["de"]}, "target must be"),
        ({"q": "a", "target": "english"}, "target"),
        ({"q": "a", "target": "fr", "source": "auto"}, "target 'fr'"),
        ({"q": "a", "target": "zh"}, "no model translates"),
        ({"q": "a", "format": "pdf"}, "format must be"),
        ({"q": "a", "format": 1}, "format must be"),
        ({"q": "a", "alternatives": -1}, "alternatives must be"),
        ({"q": "a", "alternatives": 99}, "alternatives must be"),
        ({"q": "a", "alternatives": "1"}, "alternatives must be"),
        ({"q": "a", "alternatives": True}, "alternatives must be"),
        ({"q": "a", "alternatives": 1.5}, "alternatives must be"),
        ({"q": "a", "api_key": 7}, "api_key must be"),
    ],
)  # fmt: skip
def test_wrong_fields_are_named(fake: FakeApplication, fields: dict[str, Any], field: str) -> None:
    body = {"source": "en", "target": "de"} | fields
    assert error(call(fake, "POST", "/translate", content=json.dumps(body), headers={"content-type": "application/json"}), 400).startswith(field)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b'"q"', b"\xff", b"[" * 100_000, b'{"q": ' + b"1" * 5000 + b"}", b'{"q": NaN}', b"null"])
def test_what_is_no_json(fake: FakeApplication, content: bytes) -> None:
    error(call(fake, "POST", "/translate", content=content, headers={"content-type": "application/json"}), 400)


def test_other_bodies(fake: FakeApplication) -> None:
    error(call(fake, "POST", "/translate", content=b"q=a", headers={"content-type": "text/plain"}), 415)
    error(call(fake, "POST", "/translate"), 400)
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert error(call(fake, "POST", "/translate", content=b"q=%ff&source=en&target=de", headers=form), 400).startswith("q is not UTF-8")
    assert "1000 fields" in error(call(fake, "POST", "/translate", content=b"a=1&" * 1001, headers=form), 400)
    multipart = {"content-type": "multipart/form-data; boundary=x"}
    for content in (b"", b"--x\r\n", b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n", b"rubbish"):
        error(call(fake, "POST", "/translate", content=content, headers=multipart), 400)
    error(call(fake, "POST", "/translate", content=b"a", headers={"content-type": "multipart/form-data"}), 400)
    assert "files" in error(call(fake, "POST", "/translate", files={"q": ("a.txt", b"hello")}), 400)


def test_a_body_is_not_read_beyond_its_limit() -> None:
    fake = FakeApplication(limits_config=LimitsConfig(message_bytes=1024))
    assert "1024" in error(translate(fake, q="a" * 2000), 413)
    read = 0

    async def endless() -> Any:
        nonlocal read
        while True:
            read += 1
            yield b" " * 100

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": await anext(parts), "more_body": True}

    parts, sent = endless(), list[Any]()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/translate", "headers": [(b"content-type", b"application/json")], "query_string": b"", "client": None}
    asyncio.run(http_app(fake, Keys(None), fake.limits)(scope, receive, send))
    assert sent[0]["status"] == 413 and read < 13


def test_keys(keys: str) -> None:
    fake = FakeApplication(security=SecurityConfig(keys=keys))
    assert "token" in error(translate(fake, q="a"), 400)
    assert "not known" in error(translate(fake, q="a", api_key="wrong"), 403)
    error(translate(fake, q="a", headers={"authorization": "Basic x"}), 400)
    assert translate(fake, q="a", api_key=TOKEN).status_code == 200
    assert translate(fake, q="a", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    error(call(fake, "POST", f"/detect?api_key={TOKEN}", json={"q": "a"}), 400)  # no secrets in addresses
    assert {caller.id for caller, *_ in fake.calls} == {"key:alice"}


def test_forwarded_addresses_are_not_believed(fake: FakeApplication) -> None:
    translate(fake, q="a", headers={"x-forwarded-for": "203.0.113.9", "forwarded": "for=203.0.113.9", "x-real-ip": "203.0.113.9"})
    assert fake.calls[0][0].id == "peer:192.0.2.7"


def test_too_much_is_slowed_down() -> None:
    fake = FakeApplication(limits_config=LimitsConfig(requests_per_minute=2))

    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(http_app(fake, Keys(None), fake.limits)), base_url="http://service") as client:
            return [await client.post("/detect" if turn % 2 else "/translate", json={"q": "a", "source": "en", "target": "de"}) for turn in range(4)]

    responses = asyncio.run(run())
    assert [response.status_code for response in responses] == [200, 200, 429, 429]
    assert error(responses[2], 429).startswith("Slowdown: ") and 1 <= int(responses[2].headers["retry-after"]) <= 60


@pytest.mark.parametrize(
    ("status", "code"),
    [(Status.UNAVAILABLE, 503), (Status.DEADLINE_EXCEEDED, 504), (Status.ABORTED, 409), (Status.NOT_FOUND, 400), (Status.RESOURCE_EXHAUSTED, 429)],
)
def test_errors_of_the_application(fake: FakeApplication, status: Status, code: int) -> None:
    fake.error = ServiceError(status, "that is so", retry_after=2.5)
    response = translate(fake, q="a")
    assert error(response, code).endswith("that is so") and response.headers["retry-after"] == "3"


def test_nobody_is_told_what_went_wrong_inside(fake: FakeApplication, caplog: pytest.LogCaptureFixture) -> None:
    fake.error = RuntimeError("the secret of /etc")
    with caplog.at_level(logging.ERROR):
        response = translate(fake, q="a", headers={"origin": "https://example.org"})
    told = error(response, 500)
    assert "secret" not in response.text and response.headers["access-control-allow-origin"] == "*"
    assert told.split()[-1] in caplog.text and "the secret of /etc" in caplog.text


def test_cors(fake: FakeApplication) -> None:
    asked = {"origin": "https://example.org", "access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    response = call(fake, "OPTIONS", "/translate", headers=asked)
    assert response.status_code == 200 and response.headers["access-control-allow-origin"] == "*"
    assert translate(fake, q="a", headers={"origin": "https://example.org"}).headers["access-control-allow-origin"] == "*"


def test_who_goes_is_not_translated_for(fake: FakeApplication) -> None:
    """The translation is cancelled when the connection is."""

    async def run() -> None:
        fake.gate = asyncio.Event()
        body = json.dumps({"q": "a", "source": "en", "target": "de"}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        gone = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/translate", "headers": headers, "query_string": b"", "client": None}
        task = asyncio.create_task(http_app(fake, Keys(None), fake.limits)(scope, receive, send))
        while not fake.calls:
            await asyncio.sleep(0)
        assert not task.done()
        gone.set()
        await asyncio.wait_for(task, 5)

    asyncio.run(run())
    assert fake.cancelled == 1


# -- a real server, and clients that nobody here wrote


def test_libretranslatepy(keys: str) -> None:
    from libretranslatepy import LibreTranslateAPI

    with http_served(lambda: FakeApplication(security=SecurityConfig(keys=keys))) as server:
        client = LibreTranslateAPI(server.url, TOKEN)
        assert client.translate("hello — you & me\nnow", "en", "de") == "HELLO — YOU & ME\nNOW"
        assert client.detect("guten tag")[0] == {"confidence": 100.0, "language": "de"}
        assert {language["code"]: language["targets"] for language in client.languages()}["en"] == ["de"]
        with pytest.raises(urllib.error.HTTPError, match="403"):
            LibreTranslateAPI(server.url, "wrong").translate("hello")


def test_tls(tmp_path: Path) -> None:
    ours = authority(tmp_path, "authority")
    pair = signed(tmp_path, "server", ours)
    context = ssl_context(SecurityConfig(certificate=str(pair.certificate), private_key=str(pair.key)))
    with http_served(FakeApplication, ssl=context) as server:
        assert server.url.startswith("https://")
        trusting = ssl.create_default_context(cafile=str(ours.certificate))
        assert httpx.get(f"{server.url}/health", verify=trusting).json() == {"status": "ok"}


def test_a_port_that_is_taken() -> None:
    with http_served(FakeApplication) as server, pytest.raises(ConfigError, match=r"server\.http_port"):
        fake = FakeApplication()
        asyncio.run(serve_http(fake, Keys(None), fake.limits, ServerConfig(http_port=server.port)))


def test_stop_ends_what_runs() -> None:
    """A request that is still being translated when the time is up is ended."""

    async def run() -> float:
        fake = FakeApplication(gate=asyncio.Event())
        server = await serve_http(fake, Keys(None), fake.limits, ServerConfig(http_port=0))
        async with httpx.AsyncClient() as client:
            request = asyncio.create_task(client.post(f"{server.url}/translate", json={"q": "a", "source": "en", "target": "de"}))
            while not fake.calls:
                await asyncio.sleep(0.01)
            begin = time.monotonic()
            await server.stop(0.2)
            passed = time.monotonic() - begin
            with pytest.raises(httpx.HTTPError):
                (await request).raise_for_status()
        assert fake.cancelled == 1
        return passed

    assert asyncio.run(run()) < 3


def test_connections_without_a_request_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one whose request never gets whole; what is asked on another one goes on."""
    monkeypatch.setattr("cvmk.web.server._IDLE_SECONDS", 0.2)
    with http_served(FakeApplication) as server:
        begin = time.monotonic()
        for sent in (b"", b"POST /translate HTTP/1.1\r\nHost: a\r\nX-"):
            with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
                connection.sendall(sent)
                assert connection.recv(100) == b""
        assert 0.3 < time.monotonic() - begin < 3
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_nothing_imports_torch() -> None:
    code = "import cvmk.serving.http_server, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_description_is_kept_to() -> None:
    """What schemathesis makes up from the description, right and wrong, is answered as described."""
    import schemathesis
    from hypothesis import HealthCheck, settings

    fake = FakeApplication(limits_config=LimitsConfig(text_bytes=512, texts=8))
    schema = schemathesis.openapi.from_asgi("/openapi.json", http_app(fake, Keys(None), fake.limits))
    schema.validate()
    seen = set()
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in schemathesis.GenerationMode:

            @settings(max_examples=25, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                response = case.call()
                case.validate_response(response)
                seen.add((case.operation.path, response.status_code))

            with contextlib.suppress(Unsatisfiable):
                check()
    assert {("/translate", 200), ("/translate", 400), ("/detect", 200), ("/detect", 400), ("/health", 200), ("/translate_file", 403)} <= seen


# -- over models


def test_over_models(serve_config: Callable[..., ServeConfig]) -> None:
    """What comes over HTTP is what the Translator says of each sentence, with what stood between them."""
    config = serve_config((("en", "de"), ("de", "en")), model={"max_length": 80})
    english, german = (Translator(config.models[name].path) for name in ("en-de", "de-en"))

    def said(translator: Translator, *sentences: str) -> list[str]:
        return [found.text for found in translator.translate(list(sentences))]

    applications: list[Application] = []

    def make() -> Application:
        applications.append(Application(config))
        return applications[0]

    with http_served(make) as server:

        def ask(**fields: Any) -> Any:
            return httpx.post(f"{server.url}/translate", json={"source": "en", "target": "de"} | fields).raise_for_status().json()

        man, horses = said(english, "A man rides.", "Two horses")
        assert ask(q="A man rides. Two horses\n\n A man rides.") == {"translatedText": f"{man} {horses}\n\n {man}"}
        assert ask(q=["Two horses", "", " "]) == {"translatedText": [horses, "", " "]}
        page = ask(q="<h1>Two horses</h1><script>A man rides.</script>", format="html")["translatedText"]
        assert page == f"<h1>{html.escape(horses, quote=False)}</h1><script>A man rides.</script>"
        best = english.translate(["Two horses"], beam_size=3, n_best=3)[0].hypotheses
        assert ask(q="Two horses", alternatives=2) == {
            "translatedText": best[0].text, "alternatives": [text for text in dict.fromkeys(one.text for one in best) if text != best[0].text],
        }  # fmt: skip
        text = "die Männer reiten auf ihren Pferden durch die Stadt"
        assert ask(q=text, source="auto", target="en")["translatedText"] == said(german, text)[0]
        assert ask(q=text, source="auto", target="de") == {"translatedText": text, "detectedLanguage": {"confidence": 100.0, "language": "de"}}
        assert ask(q="Two horses", source="en-GB", target="de-AT")["translatedText"] == horses
        assert ask(q="Zwei Pferde", source="de-AT", target="de")["translatedText"] == "Zwei Pferde"
        long = ask(q="horses " * 200)["translatedText"]  # more than the model reads at a time
        assert len(long) > len(horses)
        assert httpx.get(f"{server.url}/languages").json() == [
            {"code": "de", "name": "German", "targets": ["en"]}, {"code": "en", "name": "English", "targets": ["de"]},
        ]  # fmt: skip
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
        refused = httpx.post(f"{server.url}/translate", json={"q": "a", "source": "en", "target": "fr"})
        assert refused.status_code == 400 and "fr" in refused.json()["error"]
        numbers = applications[0].metrics.exposition()[0].decode()
        assert 'method="/translate",status="OK"' in numbers and 'method="/translate",status="NOT_FOUND"' in numbers
