"""Whether a service answers and is well, asked by grpc.health.v1 as a load balancer asks: for containers' and other supervisors' checks."""

from __future__ import annotations

import ipaddress
import socket
import ssl
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cvmk.config.serve import SecurityConfig, ServeConfig
from cvmk.errors import DataError
from cvmk.files import explained

_SECONDS = 5.0


def check(config: ServeConfig, seconds: float = _SECONDS) -> None:
    """Ask the server that runs by this configuration on this machine. Raises DataError where it does not answer in time, or is not serving (it drains)."""
    host, port = _reached_by(config.server.host), config.server.port
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        with _channel(address, host, port, config.security, seconds) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=seconds)
    except grpc.RpcError as error:
        raise DataError(f"the service at {address} does not answer: {error.details() or error.code()}") from error
    except OSError as error:
        raise DataError(f"the service at {address} does not answer: {error.strerror or error}") from error
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise DataError(f"the service at {address} is {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}")


def _reached_by(host: str) -> str:
    """The address at which a server that listens at `host` is reached from its own machine."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    return {4: "127.0.0.1", 6: "::1"}[address.version] if address.is_unspecified else host


def _channel(address: str, host: str, port: int, security: SecurityConfig, seconds: float) -> grpc.Channel:
    """Over TLS the server's own certificate is what is trusted, whatever name it has; where clients need one, it is shown as the client's too."""
    if security.certificate is None or security.private_key is None:
        return grpc.insecure_channel(address)
    with explained(security.certificate, "read"):
        certificate = Path(security.certificate).read_bytes()
    key = None
    if security.client_authority is not None:
        with explained(security.private_key, "read"):
            key = Path(security.private_key).read_bytes()
    credentials = grpc.ssl_channel_credentials(certificate, key, certificate if key is not None else None)
    return grpc.secure_channel(address, credentials, [("grpc.ssl_target_name_override", _name(host, port, security.certificate, seconds))])


def _name(host: str, port: int, certificate: str, seconds: float) -> str:
    """A name of the certificate that the server shows, which must be `certificate` or signed by it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(certificate)
    with socket.create_connection((host, port), seconds) as plain, context.wrap_socket(plain) as connection:
        shown: Any = connection.getpeercert() or {}
    names = [value for kind, value in shown.get("subjectAltName", ()) if kind in ("DNS", "IP Address")]
    return names[0].replace("*", "check", 1) if names else host
