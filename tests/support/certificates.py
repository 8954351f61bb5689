"""Certificates for the tests of TLS, made by the `openssl` command."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def make_certificate(folder: Path, name: str, *, address: str) -> Path:
    """`<name>.pem`, which signs itself and is valid for one IP address; its key is `<name>.key`."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificates")
    subprocess.run(
        ["openssl", "req", "-x509", "-nodes", "-days", "2", "-subj", f"/CN={name}",
         "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-addext", f"subjectAltName=IP:{address}",
         "-keyout", f"{name}.key", "-out", f"{name}.pem"],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    return folder / f"{name}.pem"


def tls_options(certificate: Path, *, port: int) -> tuple[str, ...]:
    """Options of redis-server that open a TLS port beside the plain one."""
    key = certificate.with_suffix(".key")
    return (
        *("--tls-port", str(port), "--tls-auth-clients", "no"),
        *("--tls-ca-cert-file", str(certificate), "--tls-cert-file", str(certificate)),
        *("--tls-key-file", str(key)),
    )
