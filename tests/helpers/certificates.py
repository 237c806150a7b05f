"""Certificates for tests, made when they are needed by the command openssl."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Pair:
    certificate: Path
    key: Path


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def key_in(path: Path) -> Path:
    _openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", path)
    path.chmod(0o600)
    return path


def authority(folder: Path, name: str) -> Pair:
    """A certificate that signs others."""
    pair = Pair(folder / f"{name}.pem", key_in(folder / f"{name}.key"))
    _openssl(
        "req", "-x509", "-new", "-key", pair.key, "-out", pair.certificate, "-days", 30, "-subj", f"/CN={name}", "-addext", "keyUsage=critical,keyCertSign"
    )
    return pair


def signed(folder: Path, name: str, by: Pair, *, names: str = "DNS:localhost,IP:127.0.0.1", days: int = 30) -> Pair:
    """A certificate for `names`, signed by an authority; one of negative `days` has expired."""
    pair, request, extensions = Pair(folder / f"{name}.pem", key_in(folder / f"{name}.key")), folder / f"{name}.csr", folder / f"{name}.ext"
    extensions.write_text(f"subjectAltName={names}\n", encoding="ascii")
    _openssl("req", "-new", "-key", pair.key, "-out", request, "-subj", f"/CN={name}")
    signer = ("-CA", by.certificate, "-CAkey", by.key, "-CAcreateserial")
    _openssl("x509", "-req", "-in", request, *signer, "-out", pair.certificate, "-days", days, "-extfile", extensions)
    return pair
