"""Who asks: bearer tokens of a file, and TLS that hides them on the way.

A token is in no repr, log line, exception or metric; what is kept of it is its SHA-256.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import re
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

from cvmk.config.serve import SecurityConfig
from cvmk.errors import ConfigError, DataError
from cvmk.files import explained, read_bytes
from cvmk.serving.errors import ServiceError, Status

if TYPE_CHECKING:
    import grpc

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{1,1024}={0,8}")  # RFC 6750, section 2.1
_SHORT = 16  # characters; a token of fewer can be guessed
_NAMED = 5  # wrong lines that a message names
_REMEDY = "write `name = token` with a name of letters, digits and . _ @ -, and a token of letters, digits and . _ ~ + / - without quotes"


@dataclass(frozen=True)
class Caller:
    """Who asks; what limits and fairness go by."""

    id: str
    """"key:NAME" with a token, else "peer:ADDRESS". It is never a label of a metric."""
    admin: bool = False


def address_of(peer: str) -> str:
    """What tells one client from another in gRPC's name of a peer ("ipv4:127.0.0.1:50051", "ipv6:%5B::1%5D:50051", "unix:") or in a plain address.

    The port is left out, and of an IPv6 address everything behind the 64 bits that one customer of a network has for themselves.
    """
    scheme, _, rest = peer.partition(":")
    host = unquote(rest) if scheme in ("ipv4", "ipv6") else peer
    if match := re.fullmatch(r"\[(.*)\]:\d+|([^:]*):\d+", host):
        host = match[1] or match[2] or ""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return "local" if scheme.startswith("unix") else host[:64] or "unknown"
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return str(ipaddress.IPv6Network((address, 64), strict=False))
        address = address.ipv4_mapped
    return str(address)


def bearer_token(authorization: str | None) -> str | None:
    """The token of a header `authorization: Bearer TOKEN`; None without the header. Raises ServiceError UNAUTHENTICATED for another kind of it."""
    if authorization is None or not authorization.strip():
        return None
    scheme, _, token = authorization.strip().partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise ServiceError(Status.UNAUTHENTICATED, "authorization must be `Bearer TOKEN`", field="authorization")
    return token.strip()


class Keys:
    """Bearer tokens of a file of `name = token` lines; `#` begins a comment, and a name may stand in several lines, so that a token can be replaced.

    path   of the file; None asks nobody for a token, and callers are told apart by their addresses.
    admin  whether its callers are administrators.
    every  seconds between two looks at whether the file has changed.
    clock  seconds; for tests.

    Raises DataError where the file cannot be read, has a wrong line, or no token. A file that is wrong when it is read again changes nothing: the tokens
    before stay, and the log says why.
    """

    def __init__(self, path: str | None, *, admin: bool = False, every: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._admin, self._every, self._clock = path, admin, every, clock
        self._callers: list[tuple[bytes, Caller]] = []
        self._seen = _stamp(path)
        self._look_at = clock() + every
        if path is not None:
            self._callers = self._read(path)

    def __repr__(self) -> str:
        return f"Keys({self._path!r}, {len(self._callers)} tokens)"

    def caller(self, token: str | None, peer: str) -> Caller:
        """Who holds `token`; `peer` is the address that a caller goes by where nobody needs one.

        Raises ServiceError: UNAUTHENTICATED where a token is needed and there is none, PERMISSION_DENIED for one that is not in the file. The time does not
        depend on which token of the file it is, or how much of one it has.
        """
        if self._path is None:
            return Caller(f"peer:{address_of(peer)}")
        if self._clock() >= self._look_at:
            self._look()
        if not token:
            raise ServiceError(Status.UNAUTHENTICATED, "a bearer token is needed: send it as `authorization: Bearer TOKEN`", field="authorization")
        digest, found = _digest(token), None
        for known, caller in self._callers:
            if hmac.compare_digest(known, digest):
                found = caller  # no early exit
        if found is None:
            raise ServiceError(Status.PERMISSION_DENIED, "the token is not known here", field="authorization")
        return found

    def reload(self) -> None:
        """Read the file again, as SIGHUP asks for. Raises DataError, and keeps the tokens that there were."""
        if self._path is not None:
            self._seen = _stamp(self._path)
            self._callers = self._read(self._path)

    def _look(self) -> None:
        self._look_at = self._clock() + self._every
        if _stamp(self._path) == self._seen:
            return
        try:
            self.reload()
        except DataError as error:
            _LOG.error("%s; the tokens from before stay", error)
        else:
            _LOG.info("%s has changed: it has %d tokens now", self._path, len(self._callers))

    def _read(self, path: str) -> list[tuple[bytes, Caller]]:
        callers: dict[bytes, Caller] = {}
        wrong, short = [], []
        for number, line in enumerate(read_bytes(path).removeprefix(b"\xef\xbb\xbf").decode("ascii", "replace").splitlines(), 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            name, _, token = (part.strip() for part in line.partition("="))
            if not _NAME.fullmatch(name) or not _TOKEN.fullmatch(token):
                wrong.append(number)
                continue
            caller = Caller(f"key:{name}", self._admin)
            if callers.setdefault(_digest(token), caller) != caller:
                raise DataError(f"{path} gives the token of line {number} to another name as well: give every name tokens of its own")
            if len(token) < _SHORT:
                short.append(number)
        if wrong:
            raise DataError(f"{path} has wrong lines ({_numbers(wrong)}): {_REMEDY}")
        if not callers:
            raise DataError(f"{path} has no token: {_REMEDY}")
        if short:
            _LOG.warning("%s has tokens of fewer than %d characters (lines %s), which can be guessed", path, _SHORT, _numbers(short))
        _warn_of_mode(path)
        return list(callers.items())


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _numbers(lines: list[int]) -> str:
    return ", ".join(map(str, lines[:_NAMED])) + (f" and {len(lines) - _NAMED} more" if len(lines) > _NAMED else "")


def _stamp(path: str | None) -> tuple[int, ...] | None:
    """What changes when the file does; None where there is none."""
    try:
        status = os.stat(path or "")
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino, status.st_dev


def _warn_of_mode(path: str) -> None:
    with explained(path, "read"):
        mode = os.stat(path).st_mode
    if os.name == "posix" and mode & 0o026:
        _LOG.warning("%s can be read or written by others (mode %03o): chmod 600", path, mode & 0o777)


def server_credentials(security: SecurityConfig) -> grpc.ServerCredentials | None:
    """TLS for grpc.aio, of version 1.2 or later, and mutual where `client_authority` is given; None where there is no certificate.

    Files that are replaced (a renewed certificate) are used from the next connection on; wrong ones change nothing, and the log says why.
    Raises DataError where a file is missing, unreadable or no PEM, or the key is another certificate's.
    """
    if security.certificate is None:
        return None
    try:
        import grpc
    except ImportError as error:
        raise ConfigError("the service needs grpcio and protobuf: pip install 'cvmk[serve]'") from error
    files = _TlsFiles(security)

    def configuration(tls: _Tls) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(tls.key, tls.chain)], root_certificates=tls.authority)

    def renewed() -> grpc.ServerCertificateConfiguration | None:  # called for every connection
        return configuration(tls) if (tls := files.renewed()) else None

    return grpc.dynamic_ssl_server_credentials(configuration(files.tls), renewed, require_client_authentication=security.client_authority is not None)


def ssl_context(security: SecurityConfig) -> ssl.SSLContext | None:
    """TLS for HTTP (`uvicorn.Config(ssl_context_factory=lambda *_: context)`), as `server_credentials` has it, with the same errors."""
    if security.certificate is None:
        return None
    files = _TlsFiles(security)

    def renewed(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:  # called for every connection
        files.renewed()
        connection.context = files.tls.context

    files.tls.context.sni_callback = renewed
    return files.tls.context


class _Tls(NamedTuple):
    key: bytes
    chain: bytes
    authority: bytes | None
    context: ssl.SSLContext


class _TlsFiles:
    """The files of TLS as they are, checked, and read again where they have changed."""

    def __init__(self, security: SecurityConfig, every: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        assert security.certificate is not None and security.private_key is not None  # the schema sees to it
        self._certificate, self._key, self._authority = security.certificate, security.private_key, security.client_authority
        self._every, self._clock = every, clock
        self._seen, self._look_at = self._stamps(), clock() + every
        self.tls = self._read()

    def renewed(self) -> _Tls | None:
        """`tls`, where it is not what it was at the last call."""
        if self._clock() < self._look_at:
            return None
        self._look_at = self._clock() + self._every
        if (stamps := self._stamps()) == self._seen:
            return None
        self._seen = stamps
        try:
            self.tls = self._read()
        except DataError as error:
            _LOG.error("%s; the certificate from before stays", error)
            return None
        _LOG.info("%s has changed: it is used from now on", self._certificate)
        return self.tls

    def _stamps(self) -> tuple[object, ...]:
        return tuple(_stamp(path) for path in (self._certificate, self._key, self._authority) if path is not None)

    def _read(self) -> _Tls:
        chain = _pem(self._certificate, "security.certificate", "CERTIFICATE")
        key = _pem(self._key, "security.private_key", "PRIVATE KEY")
        authority = None if self._authority is None else _pem(self._authority, "security.client_authority", "CERTIFICATE")
        if b"ENCRYPTED" in key:
            raise DataError(f"security.private_key: {self._key} needs a passphrase: store the key without one, readable to the server alone")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(self._certificate, self._key, password="")
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise DataError(f"security.private_key: {self._key} is not the key of {self._certificate}: name two that belong together") from None
            raise DataError(f"security.certificate: {self._certificate} and {self._key} are no certificate and key ({error.reason}): make them again") from None
        except OSError as error:  # replaced meanwhile
            raise DataError(f"cannot read {self._certificate} and {self._key}: {error.strerror}") from None
        if authority is not None:
            try:
                context.load_verify_locations(cadata=authority.decode("ascii", "replace"))
            except ssl.SSLError as error:
                raise DataError(f"security.client_authority: {self._authority} has no sound certificate ({error.reason}): make it again") from None
            context.verify_mode = ssl.CERT_REQUIRED
        _warn_of_mode(self._key)
        _warn_of_dates(self._certificate, chain, context)
        return _Tls(key, chain, authority, context)


def _pem(path: str, key: str, kind: str) -> bytes:
    try:
        data = read_bytes(path)
    except DataError as error:
        raise DataError(f"{key}: {error}") from None
    if not re.search(rb"-----BEGIN [A-Z0-9 ]*" + kind.encode() + rb"-----", data):
        raise DataError(f"{key}: {path} has no {kind.lower()} in PEM form (-----BEGIN …{kind}-----): convert it with openssl")
    return data


def _warn_of_dates(path: str, chain: bytes, context: ssl.SSLContext) -> None:
    """Say so where the certificate has expired or is not yet valid: a handshake in memory with a client that trusts it tells."""
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname = False
    trusting.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    trusting.load_verify_locations(cadata=chain.decode("ascii", "replace"))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client, server = trusting.wrap_bio(to_client, to_server), context.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLCertVerificationError as error:
            if error.verify_code in (9, 10):  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED
                _LOG.warning("%s: the %s: clients will refuse it", path, error.verify_message)
        except ssl.SSLError:
            return
