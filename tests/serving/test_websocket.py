"""The WebSocket /stream: the protocol as JSON, on the same sessions, limits and keys as gRPC."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
import websockets
from http_served import http_served
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed, InvalidStatus

from cvmk.config.serve import ServeConfig
from cvmk.inference import Translator
from cvmk.serving import messages
from cvmk.serving.application import Application
from cvmk.serving.errors import ServiceError, Status
from cvmk.serving.json_messages import from_json, to_json
from cvmk.streaming import Retranslation, Stream
from cvmk.web.server import HttpServer

TOKEN = "0123456789abcdef"


@pytest.fixture
def config(serve_config: Callable[..., ServeConfig]) -> ServeConfig:
    return serve_config()


@pytest.fixture
def server(config: ServeConfig) -> Iterator[HttpServer]:
    with http_served(lambda: Application(config), web=True) as server:
        yield server


def talk(server: HttpServer, *sent: Any, wait: bool = True, **options: Any) -> tuple[list[dict[str, Any]], int]:
    """All that comes, where every revision is acknowledged, and the code with which the connection is closed."""

    async def run() -> tuple[list[dict[str, Any]], int]:
        found = []
        async with websockets.connect(f"ws{server.url.removeprefix('http')}/stream", subprotocols=["cvmk.v1"], **options) as socket:
            for message in sent:
                await socket.send(message if isinstance(message, str | bytes) else json.dumps(message))
            try:
                async with asyncio.timeout(10):
                    while wait:
                        found.append(json.loads(await socket.recv()))
            except ConnectionClosed:
                pass
        return found, socket.close_code or 0

    return asyncio.run(run())


def refusal(server: HttpServer, *sent: Any, **options: Any) -> tuple[str, str]:
    """Status and message of the error that ends a stream."""
    found, code = talk(server, *sent, **options)
    error = found[-1]["error"]
    assert code == 4000 + Status[error["status"]].number
    return error["status"], error["message"]


def test_a_stream(server: HttpServer, config: ServeConfig) -> None:
    """What is said is what a stream of the same model says."""
    text = "A man rides. Two horses ride a"
    with Stream(Translator(config.models["en-de"].path), Retranslation()) as stream:
        expected = [update.committed for update in (*stream.append(text), *stream.close()) if update.final]
    found, code = talk(server, {"open": {"source": "en", "target": "de"}}, {"append": {"seq": 1, "text": text}}, {"close": {}})
    assert found[0]["opened"]["model"] == "en-de" and len(found[0]["opened"]["session"]) == 16
    assert [update.get("committed_delta", "") for update in found if update.get("final")] == expected and code == 1000
    assert found[-1]["source_chars_read"] == len(text) and found[-1]["segment"] == 1 and found[-1]["segment_begin"] == 13


def test_replacing(server: HttpServer, config: ServeConfig) -> None:
    expected = Translator(config.models["en-de"].path).translate(["two horses"])[0].text
    replace = {"seq": 2, "from_char": 0, "text": "two horses", "segment": 0}
    found, _ = talk(server, {"open": {}}, {"append": {"seq": 1, "text": "a man "}}, {"replace": replace}, {"close": {}})
    assert found[-1]["committed_delta"] == expected
    late = {"seq": 2, "from_char": 0, "text": "x", "segment": 0}
    found, _ = talk(server, {"open": {}}, {"append": {"seq": 1, "text": "A man. Two"}}, {"replace": late}, {"close": {}})
    assert [update["refused"]["seq"] for update in found if "refused" in update] == [2]


@pytest.mark.parametrize(
    ("sent", "status", "words"),
    [
        (["{"], "INVALID_ARGUMENT", "JSON"),
        (["[]"], "INVALID_ARGUMENT", "JSON"),
        ([b"\x00"], "INVALID_ARGUMENT", "JSON"),
        (["[" * 100_000], "INVALID_ARGUMENT", "JSON"),
        ([{}], "FAILED_PRECONDITION", "first message must be open"),
        ([{"append": {"seq": 1}}], "FAILED_PRECONDITION", "first message must be open"),
        ([{"open": 1}], "INVALID_ARGUMENT", "open must be an object"),
        ([{"open": {"target": 1}}], "INVALID_ARGUMENT", "open.target must be"),
        ([{"open": {"target": "fr"}}], "NOT_FOUND", "fr"),
        ([{"open": {"priority": "top"}}], "INVALID_ARGUMENT", "open.priority must be one of"),
        ([{"open": {"credit": -1}}], "INVALID_ARGUMENT", "open.credit must be"),
        ([{"open": {"policy": {"wait_k": {"k": "a"}}}}], "INVALID_ARGUMENT", "open.policy.wait_k.k must be"),
        ([{"open": {}}, {"open": {}}], "FAILED_PRECONDITION", "once"),
        ([{"open": {}}, {"append": {"seq": 2, "text": "a"}}], "INVALID_ARGUMENT", "append.seq is 2"),
        ([{"open": {}}, {"append": {"seq": 1, "text": "a\0"}}], "INVALID_ARGUMENT", "append.text has a NUL"),
        ([{"open": {}}, {"append": {"seq": 1, "text": "\ud800"}}], "INVALID_ARGUMENT", "append.text is not UTF-8"),
        ([{"open": {}}, {"append": {"seq": 1, "text": "a"}, "close": {}}], "INVALID_ARGUMENT", "close cannot be beside append"),
        ([{"open": {}}, "rubbish"], "INVALID_ARGUMENT", "JSON"),
        ([{"open": {}}, {"ack_revision": 9}], "INVALID_ARGUMENT", "ack_revision"),
    ],
)
def test_wrong_messages(server: HttpServer, sent: list[Any], status: str, words: str) -> None:
    found = refusal(server, *sent)
    assert found[0] == status and words in found[1]


def test_a_message_that_is_too_long(config: ServeConfig) -> None:
    config = config.model_copy(update={"limits": config.limits.model_copy(update={"message_bytes": 1024})})
    with http_served(lambda: Application(config), web=True) as server:
        assert talk(server, {"open": {}}, "x" * 2000)[1] == 1009


def test_keys(config: ServeConfig, tmp_path: Path) -> None:
    """In the first frame or the header, never in the address."""
    (tmp_path / "keys").write_text(f"alice = {TOKEN}\n")
    config = config.model_copy(update={"security": config.security.model_copy(update={"keys": str(tmp_path / "keys")})})
    with http_served(lambda: Application(config), web=True) as server:
        assert refusal(server, {"open": {}})[0] == "UNAUTHENTICATED"
        assert refusal(server, {"open": {}, "token": 5})[0] == "UNAUTHENTICATED"
        assert refusal(server, {"open": {}, "token": "wrong"})[0] == "PERMISSION_DENIED"
        assert "opened" in talk(server, {"open": {}, "token": TOKEN}, {"close": {}})[0][0]
        assert "opened" in talk(server, {"open": {}}, {"close": {}}, additional_headers={"Authorization": f"Bearer {TOKEN}"})[0][0]


def test_pages_of_others_may_not(config: ServeConfig) -> None:
    with http_served(lambda: Application(config), web=True, server={"origins": ["https://friend.example"]}) as server:
        for origin in (server.url, "https://friend.example"):
            assert "opened" in talk(server, {"open": {}}, {"close": {}}, origin=origin)[0][0]
        for origin in ("https://other.example", "null", f"{server.url}.example"):
            with pytest.raises(InvalidStatus, match="403"):
                talk(server, origin=origin)


def test_sessions_are_counted(config: ServeConfig) -> None:
    config = config.model_copy(update={"limits": config.limits.model_copy(update={"sessions_per_client": 1})})

    async def run(server: HttpServer) -> None:
        url = f"ws{server.url.removeprefix('http')}/stream"
        async with websockets.connect(url) as first:
            await first.send('{"open": {}}')
            await first.recv()
            async with websockets.connect(url) as second:
                await second.send('{"open": {}}')
                error = json.loads(await second.recv())["error"]
                assert error["status"] == "RESOURCE_EXHAUSTED" and error["retry_after"] > 0
        async with asyncio.timeout(10):
            while True:  # the first one is over as soon as its connection is
                async with websockets.connect(url) as third:
                    await third.send('{"open": {}}')
                    if "opened" in json.loads(await third.recv()):
                        return

    with http_served(lambda: Application(config), web=True) as server:
        asyncio.run(run(server))


def test_a_reader_that_does_not_read(config: ServeConfig) -> None:
    """It is told so, or dropped; nobody else waits for it."""
    config = config.model_copy(update={"limits": config.limits.model_copy(update={"stuck_seconds": 0.5})})

    async def run(server: HttpServer) -> str:
        async with websockets.connect(f"ws{server.url.removeprefix('http')}/stream") as socket:
            await socket.send('{"open": {"policy": {"retranslation": {"mask": 0}}}}')
            for seq in range(1, 30):
                await socket.send(json.dumps({"append": {"seq": seq, "text": "two horses ride a man "}}))
                await asyncio.sleep(0.05)  # never acknowledging
            found = []
            with pytest.raises(ConnectionClosed):
                while True:
                    found.append(json.loads(await socket.recv()))
        return str(found[-1]["error"]["status"])

    with http_served(lambda: Application(config), web=True) as server:
        assert asyncio.run(run(server)) == "RESOURCE_EXHAUSTED"


def test_any_messages(server: HttpServer) -> None:
    """Whatever comes in whatever order: answers, or an error that says what was wrong with it; never one of the server's own."""
    random = Random(0)
    values: list[Any] = [
        None,
        True,
        -1,
        0,
        1,
        2,
        2**64,
        1.5,
        "",
        "a",
        "A man. Two ",
        "\ud800",
        "\0",
        "é" * 50,
        [],
        [1],
        {},
        {"text": "a"},
        {"seq": 1, "text": "A b. C"},
    ]
    names = ["open", "append", "replace", "end_segment", "close", "ack_revision", "token", "other"]
    fields = ["seq", "text", "from_char", "segment", "source", "target", "policy", "credit", "committed", "priority", "first_segment", "committed_pieces"]

    def message() -> Any:
        if random.random() < 0.1:
            return random.choice(["", "{", "[1]", "5", b"\xff", json.dumps(random.choice(values))])
        parts = random.sample(names, random.choice((1, 1, 1, 2)))
        return {
            name: {field: random.choice(values) for field in random.sample(fields, 2)} if random.random() < 0.6 else random.choice(values) for name in parts
        }

    ends = set()
    for _ in range(150):
        begin = [{"open": {}}] if random.random() < 0.7 else []
        found, code = talk(server, *begin, *(message() for _ in range(random.randrange(1, 5))), {"close": {}}, "the end")
        ends.add(found[-1]["error"]["status"] if "error" in found[-1] else code)
    assert "INTERNAL" not in ends and {"INVALID_ARGUMENT", "FAILED_PRECONDITION"} <= ends


def test_the_page_is_whole_and_strict(server: HttpServer) -> None:
    """Every file that it names is there; nothing is inline, and nothing is from elsewhere."""
    page = httpx.get(server.url)
    policy = page.headers["content-security-policy"]
    assert page.headers["content-type"].startswith("text/html") and "default-src 'none'" in policy and "unsafe" not in policy
    assert "style=" not in page.text and "onclick" not in page.text and "://" not in page.text
    for name in ("page.css", "page.js", "live.js", "icon.svg", "base.css", "theme.js", "theme-button.js", "kept.js"):
        answer = httpx.get(f"{server.url}/{name}")
        assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
        assert httpx.get(f"{server.url}/{name}", headers={"if-none-match": answer.headers["etag"]}).status_code == 304
    assert httpx.get(f"{server.url}/../config.py").status_code == 404


@given(st.text(), st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from(["low", "normal", "high"]))
@settings(max_examples=30)
def test_json_of_messages(text: str, number: int, yes: bool, priority: str) -> None:
    """What is written is read as it was."""
    data = {
        "open": {
            "committed": text,
            "credit": number,
            "partial_words": yes,
            "priority": priority,
            "committed_pieces": [number, 1],
            "policy": {"wait_k": {"k": 3}},
        }
    }
    message = from_json("StreamRequest", data)
    assert to_json(from_json("StreamRequest", to_json(message))) == to_json(message)
    assert message == messages.StreamRequest(
        open=messages.Open(
            committed=text.encode(), credit=number, partial_words=yes, priority=getattr(messages, f"PRIORITY_{priority.upper()}"), committed_pieces=[number, 1],
            policy=messages.Policy(wait_k=messages.WaitK(k=3)),
        )
    )  # fmt: skip


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=2), max_leaves=4),
    st.data(),
)
@settings(max_examples=200)
def test_json_that_is_none(value: Any, data: st.DataObject) -> None:
    """Any value in any field is a message, or an error that names the field."""
    part = data.draw(st.sampled_from(["open", "append", "replace", "ack_revision"]))
    field = data.draw(st.sampled_from(["source", "credit", "committed", "policy", "priority", "partial_words", "seq", "text", "from_char", "committed_pieces"]))
    try:
        from_json("StreamRequest", {part: value if part == "ack_revision" else {field: value}})
    except ServiceError as error:
        assert error.status is Status.INVALID_ARGUMENT and error.field.split("[")[0] in (part, f"{part}.{field}")
