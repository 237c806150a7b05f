"""The messages of realtime_translation.proto as classes, made at import from its compiled form: `messages.Open()`, `messages.method("TranslateStream")`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cvmk
from cvmk.errors import ConfigError

COMPILED = "realtime_translation.binpb"
PACKAGE = "cvmk.v1"
SERVICE, ADMIN = f"{PACKAGE}.RealtimeTranslation", f"{PACKAGE}.Admin"


def compiled() -> bytes:
    """The FileDescriptorSet that the build made. Raises ConfigError where it made none."""
    for folder in cvmk.__path__:  # an editable install keeps it beside the libraries
        path = Path(folder) / "serving" / COMPILED
        if path.is_file():
            return path.read_bytes()
    raise ConfigError("cvmk was built without the protocol of its service: install the Python package grpcio-tools, and install cvmk again")


def _load() -> tuple[Any, dict[str, Any]]:
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ImportError as error:
        raise ConfigError("the service needs grpcio and protobuf: pip install 'cvmk[serve]'") from error
    files = descriptor_pb2.FileDescriptorSet.FromString(compiled())
    pool = descriptor_pool.Default()  # where grpc's reflection looks
    for file in files.file:
        pool.Add(file)
    found = pool.FindFileByName(files.file[0].name)
    classes = {name: message_factory.GetMessageClass(descriptor) for name, descriptor in found.message_types_by_name.items()}
    return found, classes


FILE, _CLASSES = _load()


def __getattr__(name: str) -> Any:
    """A message's class, or the number of a value of an enumeration."""
    if name in _CLASSES:
        return _CLASSES[name]
    for enum in FILE.enum_types_by_name.values():
        if name in enum.values_by_name:
            return enum.values_by_name[name].number
    raise AttributeError(f"realtime_translation.proto has no {name}")


def services() -> dict[str, dict[str, Any]]:
    """Full name of each service to its methods: name to descriptor, which has input_type, output_type, client_streaming and server_streaming."""
    return {service.full_name: dict(service.methods_by_name) for service in FILE.services_by_name.values()}
