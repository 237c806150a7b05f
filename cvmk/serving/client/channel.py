"""The connection to a server: its address, TLS, the caller's token, and what errors mean."""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from cvmk.errors import ConfigError, DataError
from cvmk.files import explained
from cvmk.serving import messages
from cvmk.serving.client.retry import Deadline, Retry
from cvmk.serving.errors import ServiceError, Status

DEFAULT_ADDRESS = "127.0.0.1:50051"
_ADDRESS = re.compile(r"(?P<host>\[[0-9a-fA-F:.%]+\]|[^\s:/\[\]]+):(?P<port>[0-9]{1,5})")
_SPREAD = '{"loadBalancingConfig": [{"round_robin": {}}]}'
"""Of several servers another one for every call and stream, among those that answer."""
_TOKEN = re.compile(r"[\x21-\x7e]+")
_STATUS = {status.number: status for status in Status}
_UNREACHED = re.compile(r"failed to connect|connections to all backends failing|errors resolving|DNS resolution|name resolution")
_REASONS = (
    ("CERTIFICATE_VERIFY_FAILED", "its certificate is not signed by an authority that is trusted here"),
    ("Hostname Verification", "its certificate is of another name: give that as the server's name"),
    ("WRONG_VERSION_NUMBER", "it speaks without TLS"),
    ("Socket closed", "it closed the connection: it may want TLS, or a certificate of the client"),
)
"""What gRPC says of a connection that there is none of, and what that means; else the last words of it."""
_WRITE_FAILED = re.compile(r"Internal error from Core|Failed .?execute_batch")
"""What grpc.aio says, instead of the call's status, of a message that was written when the call had ended."""
_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.use_local_subchannel_pool", 1),  # how long one client has waited for a server is nothing to another
    ("grpc.initial_reconnect_backoff_ms", 50),  # `Retry` says when to try again
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_receive_message_length", -1),
    ("grpc.primary_user_agent", "cvmk"),
)


@dataclass(frozen=True)
class Tls:
    """Files of PEM. `authority` has the certificates that the server's must be signed by (without it, those that the machine trusts); `certificate` and
    `private_key` are the client's own, where the server asks for them; `server_name` is the name in the server's certificate, where it is not the address."""

    authority: str | None = None
    certificate: str | None = None
    private_key: str | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.private_key is None):
            raise ConfigError("certificate and private_key go together: give both or neither")


class NoServerError(ServiceError):
    """No server answers at the address, or (`there`) one does that cannot be talked with."""

    exit_code = DataError.exit_code

    def __init__(self, address: str, reason: str, there: bool) -> None:
        said = f"there is no connection to the server at {address}: {reason}" if there else f"no server answers at {address} ({reason})"
        super().__init__(Status.UNAVAILABLE, said)
        self.address, self.there = address, there


class Connection:
    """A channel that is opened with the first call, in the event loop of whoever makes it."""

    def __init__(self, address: str, token: str | None, tls: Tls | None, retry: Retry) -> None:
        self._target = _target(address)
        if tls is not None and self._target != address and tls.server_name is None:
            raise ConfigError("several addresses and TLS need the name that is in all the servers' certificates: give server_name")
        if token is not None and not _TOKEN.fullmatch(token):
            raise ConfigError("the token is empty or has characters that tokens do not have: letters, digits and marks of ASCII, without spaces")
        self.address, self.retry = address, retry
        self._metadata = (("authorization", f"Bearer {token}"),) if token is not None else ()
        self._credentials = None if tls is None else _credentials(tls)
        self._server_name = tls.server_name if tls is not None else None
        self._channel: grpc.aio.Channel | None = None
        self.closed = False
        self.sleepers: set[asyncio.Event] = set()
        """Of streams that wait for their user, and for this to be closed."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.address!r})"

    async def unary(self, name: str, request: Any, timeout: float | None) -> Any:
        """The answer to `request`, with as many tries as `retry` and the time allow. Raises ServiceError."""
        deadline, failures = Deadline(timeout), 0
        call = self._method(name, "unary_unary")
        while True:
            try:
                return await call(request, timeout=deadline.left(), metadata=self._metadata)
            except grpc.aio.AioRpcError as error:
                failed = self.explained(error)
            except asyncio.CancelledError:
                failed = self.cut()
            failures += 1
            await self.retry.pause(failures, failed, deadline)

    def converse(self, name: str, timeout: float | None) -> Any:
        """A call with streams in both directions."""
        return self._method(name, "stream_stream")(timeout=timeout, metadata=self._metadata)

    async def close(self) -> None:
        channel, self._channel, self.closed = self._channel, None, True
        for event in self.sleepers:
            event.set()
        if channel is not None:
            await channel.close()

    def explained(self, error: grpc.aio.AioRpcError) -> ServiceError:
        """What a failed call is for the caller."""
        status, details = _STATUS.get(error.code().value[0], Status.INTERNAL), error.details() or error.code().value[1]
        if status is Status.UNAVAILABLE and _UNREACHED.search(details):
            meant = next((meaning for words, meaning in _REASONS if words in details), None)
            return NoServerError(self.address, meant or details.rsplit(": ", 1)[-1].strip(" .]"), meant is not None)
        if status is Status.INTERNAL and _WRITE_FAILED.match(details):
            return self._broken()
        if status is Status.CANCELLED:  # not by us
            return ServiceError(Status.UNAVAILABLE, f"the server at {self.address} has more to do than it can refuse in words: try again later")
        trailing = dict(error.trailing_metadata() or ())
        return ServiceError(status, details, field=str(trailing.get("field", "")), retry_after=_seconds(trailing.get("retry-after-ms")))

    def cut(self) -> ServiceError:
        """What it means that a call was cancelled; raises CancelledError where the caller did that."""
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError
        return self._broken()

    def _broken(self) -> ServiceError:
        return ServiceError(Status.UNAVAILABLE, f"the server at {self.address} broke off")

    def _method(self, name: str, kind: str) -> Callable[..., Any]:
        method = messages.services()[messages.SERVICE][name]
        answer = getattr(messages, method.output_type.name)
        serializer = getattr(messages, method.input_type.name).SerializeToString
        return getattr(self._open(), kind)(f"/{messages.SERVICE}/{name}", request_serializer=serializer, response_deserializer=answer.FromString)  # type: ignore[no-any-return]

    def _open(self) -> grpc.aio.Channel:
        if self.closed:
            raise RuntimeError("the client is closed: make another one")
        if self._channel is None:
            options = list(_OPTIONS)
            if self._target != self.address:
                options += [("grpc.service_config", _SPREAD), ("grpc.default_authority", self.address.partition(",")[0])]
            if self._server_name is not None:
                options.append(("grpc.ssl_target_name_override", self._server_name))
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(self._target, options)
            else:
                self._channel = grpc.aio.secure_channel(self._target, self._credentials, options)
        return self._channel


def _target(address: str) -> str:
    """What gRPC calls an address, or several."""
    parts = address.split(",")
    found = [_ADDRESS.fullmatch(part) for part in parts]
    if not all(one and 0 < int(one["port"]) < 65536 for one in found):
        raise ConfigError(f"{address!r} is no address of a server: give HOST:PORT, such as {DEFAULT_ADDRESS}")
    if len(parts) == 1:
        return address
    try:
        versions = {ipaddress.ip_address(one["host"].strip("[]")).version for one in found if one}
    except ValueError:
        versions = set()
    if len(versions) != 1:
        raise ConfigError(f"{address!r}: several addresses are all numbers, of IPv4 or of IPv6 (a single name may stand for several)")
    return f"ipv{versions.pop()}:{address}"


def _credentials(tls: Tls) -> grpc.ChannelCredentials:
    """Raises DataError for a file that cannot be read, ConfigError for one that is no PEM."""
    parts = [_pem(name, getattr(tls, name)) for name in ("authority", "private_key", "certificate")]
    return grpc.ssl_channel_credentials(*parts)


def _pem(name: str, path: str | None) -> bytes | None:
    if path is None:
        return None
    with explained(path, "read"):
        data = Path(path).read_bytes()
    if b"-----BEGIN " not in data:
        raise ConfigError(f"{name}: {path} is no PEM file: it has no line that starts with -----BEGIN")
    return data


def _seconds(milliseconds: Any) -> float | None:
    try:
        return None if milliseconds is None else max(0.0, int(milliseconds) / 1000)
    except ValueError:
        return None
