"""Who may ask: keys of a file that changes, and TLS on a real connection."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shutil
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import certificates
import grpc
import pytest
from certificates import Pair

from cvmk.config.serve import SecurityConfig
from cvmk.errors import DataError
from cvmk.serving import auth
from cvmk.serving.auth import Caller, Keys, address_of, bearer_token, server_credentials, ssl_context
from cvmk.serving.errors import ServiceError, Status

ALICE, BOB = "alice-0123456789abcdef", "bob/0123456789+abcdef=="


def key_file(folder: Path, text: str) -> Path:
    path = folder / "keys.txt"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    return path


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return key_file(tmp_path, f"# clients\n\nalice = {ALICE}\nbob={BOB}\n")


def refused(keys: Keys, token: str | None) -> Status:
    with pytest.raises(ServiceError) as error:
        keys.caller(token, "ipv4:127.0.0.1:1")
    assert not token or token not in str(error.value)
    return error.value.status


def test_a_token_tells_who_asks(keys: Path) -> None:
    known = Keys(str(keys))
    assert known.caller(ALICE, "peer") == Caller("key:alice") and known.caller(BOB, "peer") == Caller("key:bob")
    assert Keys(str(keys), admin=True).caller(BOB, "peer").admin
    for wrong in (ALICE[:-1], ALICE + "x", ALICE.upper(), "alice", "\udcff", "x" * 100_000):
        assert refused(known, wrong) is Status.PERMISSION_DENIED
    assert refused(known, None) is refused(known, "") is Status.UNAUTHENTICATED


def test_every_token_is_compared_in_constant_time(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known, compared = Keys(str(keys)), []
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda one, other: compared.append((one, other)) or one == other)
    for token in (ALICE, BOB, "another"):
        compared.clear()
        try:
            known.caller(token, "")
        except ServiceError:
            assert token == "another"
        digest = hashlib.sha256(token.encode()).digest()
        assert len(compared) == 2 and {len(one) for one, _ in compared} == {32} and {other for _, other in compared} == {digest}


def test_without_a_file_callers_are_addresses() -> None:
    nobody = Keys(None)
    assert nobody.caller(None, "ipv4:10.0.0.7:5000") == nobody.caller("any", "ipv4:10.0.0.7:6000") == Caller("peer:10.0.0.7")


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:127.0.0.1:50051", "127.0.0.1"),
        ("10.0.0.1", "10.0.0.1"),
        ("10.0.0.1:80", "10.0.0.1"),
        ("ipv6:%5B2001:db8::1%5D:50051", "2001:db8::/64"),
        ("ipv6:[2001:db8:0:0:ffff::2]:1", "2001:db8::/64"),
        ("2001:db8::3", "2001:db8::/64"),
        ("ipv6:[::ffff:10.0.0.1]:9", "10.0.0.1"),
        ("ipv6:[fe80::1%25eth0]:9", "fe80::/64"),
        ("unix:", "local"),
        ("unix:/run/x.sock", "local"),
        ("", "unknown"),
        ("testclient", "testclient"),
        ("y" * 1000, "y" * 64),
    ],
)
def test_addresses_without_ports(peer: str, address: str) -> None:
    assert address_of(peer) == address


def test_the_header() -> None:
    assert bearer_token(f"Bearer {ALICE}") == bearer_token(f" bearer  {ALICE} ") == ALICE and bearer_token(None) is bearer_token("") is None
    for wrong in (ALICE, "Basic abc", "Bearer", "Bearer  "):
        with pytest.raises(ServiceError) as error:
            bearer_token(wrong)
        assert error.value.status is Status.UNAUTHENTICATED and "abc" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no token"),
        ("# alice = abc\n", "has no token"),
        (f"alice = {ALICE}\n{ALICE}\nbob: {BOB}\n", "has wrong lines (2, 3): write `name = token`"),
        (f'alice = "{ALICE}"\n', "has wrong lines (1)"),
        (f"alice = {ALICE} {BOB}\n", "has wrong lines (1)"),
        (f"al ice = {ALICE}\n", "has wrong lines (1)"),
        (f"alice = {ALICE}\nbob = {ALICE}\n", "the token of line 2 to another name"),
        ("alice = " + "é" * 20, "has wrong lines (1)"),
        ("x\n" * 9, "(1, 2, 3, 4, 5 and 4 more)"),
        ("\0" * 50, "has wrong lines (1)"),
    ],
)
def test_a_wrong_file_is_named_by_lines_without_tokens(tmp_path: Path, text: str, said: str) -> None:
    path = key_file(tmp_path, text)
    with pytest.raises(DataError) as error:
        Keys(str(path))
    assert said in str(error.value) and str(path) in str(error.value) and ALICE not in str(error.value) and BOB not in str(error.value)
    assert error.value.__context__ is None


def test_a_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(DataError, match="cannot read"):
            Keys(str(path))


def test_a_changed_file_is_read_again_and_a_wrong_one_is_not(keys: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    known = Keys(str(keys), clock=lambda: now)
    new = "alice-2-0123456789abcdef"
    key_file(keys.parent, f"alice = {ALICE}\nalice = {new}\n")
    assert refused(known, new) is Status.PERMISSION_DENIED  # it looks once a second
    now = 1.5
    assert known.caller(new, "") == known.caller(ALICE, "") == Caller("key:alice")  # a token is replaced: both go for a while
    assert refused(known, BOB) is Status.PERMISSION_DENIED
    with caplog.at_level(logging.INFO):
        for text in (f"alice {ALICE}", "", None):
            if text is None:
                keys.unlink()
            else:
                key_file(keys.parent, text)
            caplog.clear()
            for _ in range(3):
                now += 2
                assert known.caller(new, "") == Caller("key:alice")
            assert len(caplog.records) == 1 and "the tokens from before stay" in caplog.text and ALICE not in caplog.text
    key_file(keys.parent, f"bob = {BOB}")
    known.reload()
    assert known.caller(BOB, "") == Caller("key:bob") and refused(known, ALICE) is Status.PERMISSION_DENIED
    keys.write_text("nonsense")
    with pytest.raises(DataError, match="wrong lines"):
        known.reload()
    assert known.caller(BOB, "") == Caller("key:bob")


@pytest.mark.skipif(os.name != "posix", reason="there are no modes")
def test_a_file_that_others_can_read_and_a_short_token_are_told(keys: Path, caplog: pytest.LogCaptureFixture) -> None:
    Keys(str(keys))
    assert not caplog.records
    keys.chmod(0o644)
    Keys(str(keys))
    assert "can be read or written by others (mode 644): chmod 600" in caplog.text and ALICE not in caplog.text
    caplog.clear()
    Keys(str(key_file(keys.parent, "alice = short\n")))
    assert "fewer than 16 characters (lines 1)" in caplog.text and "short" not in caplog.text


def test_no_token_is_in_a_repr(keys: Path) -> None:
    known = Keys(str(keys))
    shown = repr(known) + repr(vars(known)) + repr(known.caller(ALICE, ""))
    assert ALICE not in shown and BOB not in shown


# TLS


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    if shutil.which("openssl") is None:
        pytest.skip("the command openssl makes the certificates")
    folder = tmp_path_factory.mktemp("certificates")
    ours, other = certificates.authority(folder, "ours"), certificates.authority(folder, "other")
    return {
        "ours": ours,
        "other": other,
        "server": certificates.signed(folder, "server", ours),
        "renewed": certificates.signed(folder, "renewed", ours),
        "elsewhere": certificates.signed(folder, "elsewhere", ours, names="DNS:elsewhere.example"),
        "old": certificates.signed(folder, "old", ours, days=-1),
        "client": certificates.signed(folder, "client", ours, names="DNS:client"),
        "old_client": certificates.signed(folder, "old_client", ours, names="DNS:client", days=-1),
        "strange_client": certificates.signed(folder, "strange_client", other, names="DNS:client"),
    }


def security(server: Pair, authority: Pair | None = None) -> SecurityConfig:
    return SecurityConfig(
        certificate=str(server.certificate), private_key=str(server.key), client_authority=None if authority is None else str(authority.certificate)
    )


class Echo(grpc.GenericRpcHandler):
    def service(self, details: Any) -> Any:
        async def answer(request: bytes, context: Any) -> bytes:
            return request

        return grpc.unary_unary_rpc_method_handler(answer)


@asynccontextmanager
async def listening(config: SecurityConfig) -> AsyncIterator[int]:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Echo(),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(config))
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


async def ask(port: int, authority: Pair | None, client: Pair | None = None) -> str:
    """ "ok", or the status of a call from a client that trusts `authority`; None: of one without TLS."""
    target, options = f"localhost:{port}", [("grpc.use_local_subchannel_pool", 1)]
    if authority is None:
        channel = grpc.aio.insecure_channel(target, options)
    else:
        pair = {} if client is None else {"private_key": client.key.read_bytes(), "certificate_chain": client.certificate.read_bytes()}
        channel = grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(authority.certificate.read_bytes(), **pair), options)
    async with channel:
        try:
            return "ok" if await channel.unary_unary("/test/Echo")(b"x", timeout=5) == b"x" else "wrong"
        except grpc.aio.AioRpcError as error:
            return error.code().name


@pytest.mark.parametrize(
    ("server", "trusted", "answer"),
    [
        ("server", "ours", "ok"),
        ("server", "other", "UNAVAILABLE"),  # wrong authority
        ("server", None, "UNAVAILABLE"),  # no TLS
        ("old", "ours", "UNAVAILABLE"),  # expired
        ("elsewhere", "ours", "UNAVAILABLE"),  # wrong name
    ],
)
def test_tls(made: dict[str, Pair], server: str, trusted: str | None, answer: str) -> None:
    async def check() -> None:
        async with listening(security(made[server])) as port:
            assert await ask(port, None if trusted is None else made[trusted]) == answer

    asyncio.run(check())


def test_mutual_tls(made: dict[str, Pair]) -> None:
    async def check() -> None:
        async with listening(security(made["server"], made["ours"])) as port:
            for client, answer in ((None, "UNAVAILABLE"), ("old_client", "UNAVAILABLE"), ("strange_client", "UNAVAILABLE"), ("client", "ok")):
                assert await ask(port, made["ours"], None if client is None else made[client]) == answer, client

    asyncio.run(check())


def shake_hands(port: int, **versions: ssl.TLSVersion) -> str | None:
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    client.set_ciphers("ALL:@SECLEVEL=0")
    for name, version in versions.items():
        setattr(client, name, version)
    client.set_alpn_protocols(["h2", "http/1.1"])
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection, client.wrap_socket(connection) as wrapped:
        return wrapped.version()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_versions_before_1_2_are_refused(made: dict[str, Pair]) -> None:
    async def check() -> None:
        http = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0, ssl=ssl_context(security(made["server"])))
        async with listening(security(made["server"])) as port, http:
            for place in (port, http.sockets[0].getsockname()[1]):
                with pytest.raises(ssl.SSLError) as error:
                    await asyncio.to_thread(shake_hands, place, minimum_version=ssl.TLSVersion.TLSv1, maximum_version=ssl.TLSVersion.TLSv1_1)
                by_server = ("TLSV1_ALERT_PROTOCOL_VERSION", "UNEXPECTED_EOF_WHILE_READING")  # or it closes the connection, with some versions of OpenSSL
                assert error.value.reason in by_server or isinstance(error.value, ssl.SSLZeroReturnError)
                assert await asyncio.to_thread(shake_hands, place, maximum_version=ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
                assert await asyncio.to_thread(shake_hands, place) == "TLSv1.3"

    asyncio.run(check())


def certificate_of(port: int, authority: Pair, client: Pair | None = None) -> str:
    context = ssl.create_default_context(cafile=str(authority.certificate))
    context.set_alpn_protocols(["h2", "http/1.1"])
    if client is not None:
        context.load_cert_chain(client.certificate, client.key)
    with socket.create_connection(("localhost", port), timeout=5) as connection, context.wrap_socket(connection, server_hostname="localhost") as wrapped:
        wrapped.settimeout(5)
        if wrapped.version() == "TLSv1.3" and wrapped.selected_alpn_protocol() == "http/1.1":
            if not wrapped.recv(1):  # what is wrong with a client's certificate comes behind the handshake
                raise ConnectionError("the server has closed the connection")
        subject = wrapped.getpeercert()["subject"]  # type: ignore[index]
        return str(subject[0][0][1])  # type: ignore[index]


def test_mutual_tls_of_http(made: dict[str, Pair]) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"x")
        writer.close()

    async def check() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=ssl_context(security(made["server"], made["ours"]))) as server:
            port = server.sockets[0].getsockname()[1]
            assert await asyncio.to_thread(certificate_of, port, made["ours"], made["client"]) == "server"
            for client in (None, made["old_client"], made["strange_client"]):
                with pytest.raises((ssl.SSLError, ConnectionError)):
                    await asyncio.to_thread(certificate_of, port, made["ours"], client)

    asyncio.run(check())


def test_a_renewed_certificate_is_used_without_a_restart(
    made: dict[str, Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    used = Pair(tmp_path / "server.pem", tmp_path / "server.key")

    def put(pair: Pair) -> None:
        shutil.copy(pair.certificate, used.certificate)
        shutil.copy(pair.key, used.key)

    async def check() -> None:
        put(made["server"])
        now = 0.0
        original = auth._TlsFiles
        monkeypatch.setattr(auth, "_TlsFiles", lambda config: original(config, clock=lambda: now))

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"x")
            writer.close()

        http = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=ssl_context(security(used)))
        async with listening(security(used)) as port, http:
            ports = (port, http.sockets[0].getsockname()[1])

            async def shown() -> list[str]:
                return [await asyncio.to_thread(certificate_of, place, made["ours"]) for place in ports]

            assert await shown() == ["server", "server"]
            put(made["renewed"])
            now += 2
            assert await shown() == ["renewed", "renewed"]
            used.key.write_bytes(made["server"].key.read_bytes())  # another's key
            now += 2
            assert await shown() == ["renewed", "renewed"] and "the certificate from before stays" in caplog.text

    asyncio.run(check())


def test_files_that_cannot_be_used_are_named_before_the_server_starts(made: dict[str, Pair], tmp_path: Path) -> None:
    def file(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    good = made["server"]
    empty, binary = file("empty", b""), file("binary", bytes(range(256)))
    broken = file("broken", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    locked = file("locked", b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n")
    authority = made["ours"].certificate
    for certificate, key, client, said in (
        (tmp_path / "none", good.key, None, "security.certificate: cannot read"),
        (tmp_path, good.key, None, "security.certificate: cannot read"),
        (good.certificate, tmp_path / "none", None, "security.private_key: cannot read"),
        (good.certificate, good.key, tmp_path / "none", "security.client_authority: cannot read"),
        (empty, good.key, None, "security.certificate: " + str(empty) + " has no certificate in PEM form"),
        (binary, good.key, authority, "has no certificate in PEM form"),
        (good.certificate, good.certificate, None, "has no private key in PEM form"),
        (good.certificate, made["client"].key, None, "is not the key of"),
        (good.certificate, locked, None, "needs a passphrase"),
        (broken, good.key, None, "are no certificate and key"),
        (good.certificate, good.key, broken, "security.client_authority: " + str(broken) + " has no sound certificate"),
    ):
        config = SecurityConfig(certificate=str(certificate), private_key=str(key), client_authority=None if client is None else str(client))
        for make in (server_credentials, ssl_context):
            with pytest.raises(DataError) as error:
                make(config)
            assert said in str(error.value) and "\n" not in str(error.value)


def test_without_a_certificate_there_is_no_tls() -> None:
    assert server_credentials(SecurityConfig()) is None and ssl_context(SecurityConfig()) is None


def test_a_certificate_that_has_expired_is_told(made: dict[str, Pair], caplog: pytest.LogCaptureFixture) -> None:
    ssl_context(security(made["server"]))
    ssl_context(security(made["server"], made["ours"]))
    assert not caplog.records
    ssl_context(security(made["old"]))
    assert "certificate has expired: clients will refuse it" in caplog.text
