"""Certificates made by openssl, as people make them: an authority, and servers that it signed."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

KEY = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"


@dataclass(frozen=True)
class Pair:
    """A certificate with its chain, and its key."""

    cert: Path
    key: Path


def authority(directory: Path, name: str = "ca") -> Pair:
    """Make an authority of one's own."""
    pair = Pair(directory / f"{name}.pem", directory / f"{name}-key.pem")
    _openssl(
        f"req -x509 {KEY} -days 2 -subj /CN={name} -keyout {pair.key} -out {pair.cert}"
        " -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign"
    )
    return pair


def signed(directory: Path, by: Pair, name: str, *names: str) -> Pair:
    """Make a server's certificate, its authority's behind it, as services hand them out."""
    pair = Pair(directory / f"{name}.pem", directory / f"{name}-key.pem")
    request, options = directory / f"{name}.csr", directory / f"{name}.ext"
    options.write_text(f"subjectAltName={','.join(names)}\nbasicConstraints=critical,CA:FALSE\n")
    _openssl(f"req -new {KEY} -subj /CN={name} -keyout {pair.key} -out {request}")
    _openssl(
        f"x509 -req -in {request} -CA {by.cert} -CAkey {by.key} -CAcreateserial -days 2"
        f" -extfile {options} -out {pair.cert}"
    )
    pair.cert.write_text(pair.cert.read_text() + by.cert.read_text())
    return pair


def _openssl(arguments: str) -> None:
    subprocess.run(["openssl", *arguments.split()], check=True, capture_output=True)
