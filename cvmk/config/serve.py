"""serve.toml: what `cvmk serve` reads."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from cvmk.config.languages import language_tag
from cvmk.config.section import MAX_THREADS, Document, Section

PRIORITIES = ("low", "normal", "high")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ServerConfig(Section):
    host: str = Field("127.0.0.1", description="Address to listen at. Others than this machine reach only an address that says so, such as 0.0.0.0.")
    port: int = Field(50051, ge=0, le=65535, description="Port of the gRPC service; 0 takes a free one.")
    admin_port: int | None = Field(None, ge=0, le=65535, description="Port of the gRPC service Admin, on this machine only; without it there is none.")
    metrics_port: int | None = Field(None, ge=0, le=65535, description="Port of Prometheus' metrics; without it there is none.")
    http_port: int | None = Field(None, ge=0, le=65535, description="Port of the HTTP interface; without it there is none (`--web` takes 8080).")
    origins: list[str] = Field([], description="Other pages that may open streams by WebSocket, such as https://example.org; the page that is served may.")
    drain_seconds: float = Field(30.0, ge=0, le=3600, description="How long what runs may take to end when the server is told to (SIGTERM).")
    traces: bool = Field(False, description="Whether spans go to an OpenTelemetry collector, which OTEL_EXPORTER_OTLP_ENDPOINT names (extra `traces`).")
    log: str | None = Field(
        None,
        description="Folder for the service's events (events.jsonl, log.txt), which hold no text of clients; without it none are written.",
    )
    log_every: float = Field(60.0, ge=1, description="Seconds between two of these events.")
    threads: int = Field(0, ge=0, le=MAX_THREADS, description="CPU threads of every model that says nothing else; 0: all that the process may use.")


class LimitsConfig(Section):
    sessions: int = Field(64, ge=1, le=100_000, description="Streams that are open at once.")
    sessions_per_client: int = Field(16, ge=1, le=100_000, description="Of them, by one client (a key, or an address without one).")
    message_bytes: int = Field(262_144, ge=1024, le=2**30, description="Largest message.")
    text_bytes: int = Field(65_536, ge=16, le=2**30, description="Longest text of a request, and of an open sentence of a stream, in bytes of UTF-8.")
    texts: int = Field(128, ge=1, le=100_000, description="Texts of one request.")
    beam_size: int = Field(8, ge=1, le=1024, description="Largest beam that a request may ask for.")
    alternatives: int = Field(4, ge=0, le=64, description="Most further translations that a request may ask for.")
    waiting_tokens: int = Field(65_536, ge=64, description="Source pieces times beam size that wait for a model; what would be more is rejected.")
    waiting_tokens_per_client: int = Field(32_768, ge=64, description="Of them, of one client.")
    unread_tokens: int = Field(16_384, ge=64, description="Committed characters that a stream's reader may leave unread before its stream ends.")
    stuck_seconds: float = Field(30.0, gt=0, description="How long a stream's reader may leave committed text unread before its stream ends.")
    idle_seconds: float = Field(600.0, gt=0, description="How long a stream may be open without a request.")
    requests_per_minute: int = Field(0, ge=0, description="Requests of one client, streams' events not counted; 0: no limit.")
    characters_per_minute: int = Field(0, ge=0, description="Characters of one client's texts; 0: no limit.")
    events_per_second: int = Field(200, ge=1, description="Events of one stream; more are slowed down, not lost.")
    request_seconds: float = Field(30.0, gt=0, le=3600, description="Longest time of a request that brings no deadline of its own.")


class SecurityConfig(Section):
    certificate: str | None = Field(None, description="File of the server's TLS certificate (PEM, the chain behind it); without it there is no TLS.")
    private_key: str | None = Field(None, description="File of its private key (PEM).")
    client_authority: str | None = Field(None, description="File of certificates (PEM) of which a client's must be signed by one: mutual TLS.")
    keys: str | None = Field(None, description="File of clients' bearer tokens, `name = token` a line; without it nobody is asked for one.")
    admin_keys: str | None = Field(None, description="File of administrators' bearer tokens, likewise; the service Admin needs it.")

    @model_validator(mode="after")
    def _together(self) -> SecurityConfig:
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("certificate and private_key go together: give both or neither")
        if self.client_authority is not None and self.certificate is None:
            raise ValueError("client_authority needs certificate and private_key: TLS that knows clients knows the server too")
        return self


class ServedModelConfig(Section):
    path: str = Field(description="Folder of a model or of a run.")
    source: str | None = Field(None, description="Language that it reads; without it, what the model's folder says.")
    target: str | None = Field(None, description="Language that it writes, likewise.")
    compute_type: Literal["auto", "float32", "bfloat16", "int8", "int4"] = Field("auto", description="How it computes; auto: as the model is stored.")
    engine: Literal["auto", "native", "torch"] = Field("auto", description="The engine; auto: the first that can run the model.")
    device: str = Field("cpu", description='"cpu", "cuda", "cuda:N" or "auto".')
    threads: int = Field(0, ge=0, le=MAX_THREADS, description="CPU threads; 0: as `server.threads` says.")
    beam_size: int = Field(1, ge=1, le=64, description="Hypotheses of a search where a request says nothing else.")
    running_tokens: int = Field(512, ge=64, description="Source pieces times beam size that run at once: more bring little, and make steps slower.")

    @field_validator("source", "target")
    @classmethod
    def _language(cls, value: str | None) -> str | None:
        return None if value is None else language_tag(value)


class ServeConfig(Document):
    COMMAND: ClassVar[str] = "cvmk serve"
    FIRST: ClassVar[tuple[str, ...]] = ("server", "models")

    server: ServerConfig = Field(ServerConfig(), description="Where it listens.")
    models: dict[str, ServedModelConfig] = Field(description="The models, each a table [models.NAME].")
    limits: LimitsConfig = Field(LimitsConfig(), description="What clients may ask for.")
    security: SecurityConfig = Field(SecurityConfig(), description="Who may ask, and who can listen.")

    @field_validator("models")
    @classmethod
    def _names(cls, models: dict[str, ServedModelConfig]) -> dict[str, ServedModelConfig]:
        if not models:
            raise ValueError("at least one table [models.NAME] is needed")
        for name in models:
            if not _NAME.fullmatch(name):
                raise ValueError(f'{name!r} is no name of a model: letters, digits, ".", "_" and "-", at most 64')
        return models

    @model_validator(mode="after")
    def _admin(self) -> ServeConfig:
        if self.server.admin_port is not None and self.security.admin_keys is None:
            raise ValueError("server.admin_port needs security.admin_keys: administrators have tokens")
        return self
