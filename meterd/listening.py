"""Where the HTTP API listens: a port, a port with TLS, or a Unix socket.

The rule: nobody gets in who could not have been let in a moment before. A certificate is read as a
pair into a context of its own first, so that a half that does not fit never serves; a socket file
is closed to everybody while it is made, and opened to its group afterwards.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import stat
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from meterd.config import Address
from meterd.errors import ConfigurationError, Mistake

SOCKET_MODE = 0o660


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """A certificate with its chain, and its key: two PEM files."""

    cert: Path
    key: Path


class Certificate:
    """What the server shows to whoever connects; connections that are open keep what they saw."""

    def __init__(self, files: CertificateFiles) -> None:
        self.files = files
        self.context = _context_of(files)

    def reload(self, files: CertificateFiles) -> None:
        """Show another one from the next connection on. Raises `ConfigurationError`.

        Whatever is wrong with the files, the one before stays.
        """
        _context_of(files)
        _load(self.context, files)
        self.files = files


def _context_of(files: CertificateFiles) -> ssl.SSLContext:
    """Make a server's context of a pair of files. Raises `ConfigurationError`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    _load(context, files)
    return context


def _load(context: ssl.SSLContext, files: CertificateFiles) -> None:
    for key, path in (("tls_cert_file", files.cert), ("tls_key_file", files.key)):
        try:
            path.read_bytes()
        except OSError as error:
            raise _mistake(key, f"cannot read {path}: {error.strerror}") from None
    try:
        # A key with a password would stop the start to ask for it.
        context.load_cert_chain(files.cert, files.key, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", "") or ""
        if "MISMATCH" in reason:
            raise _mistake(
                "tls_key_file", f"{files.key} is not the key of {files.cert}; name its own"
            ) from None
        raise _mistake(
            "tls_cert_file",
            f"{files.cert} and {files.key} cannot be used: write a certificate with its chain and"
            " a key without a password, both as PEM",
        ) from None


def _mistake(key: str, message: str) -> ConfigurationError:
    return ConfigurationError([Mistake(f"http.{key}", message)])


async def listen_on(
    runner: web.AppRunner, listen: Address, certificate: Certificate | None
) -> None:
    """Take calls there until the runner's cleanup. Raises `ConfigurationError`."""
    try:
        if listen.path:
            await web.SockSite(runner, _socket_at(Path(listen.path))).start()
            return
        context = None if certificate is None else certificate.context
        await web.TCPSite(runner, listen.host, listen.port, ssl_context=context).start()
    except OSError as error:
        why = f"cannot listen on {listen}: {error.strerror or error}"
        raise ConfigurationError([Mistake("http.listen", why)]) from None


def leave(listen: Address) -> None:
    """Take the socket file away, once nobody is served any more."""
    if listen.path:
        with contextlib.suppress(OSError):
            Path(listen.path).unlink()


def _socket_at(path: Path) -> socket.socket:
    """Open a socket that only its owner and his group can connect to. Raises `OSError`."""
    _clear(path)
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        before = os.umask(0o177)
        try:
            opened.bind(str(path))
        finally:
            os.umask(before)
        path.chmod(SOCKET_MODE)
        opened.setblocking(False)
    except OSError:
        opened.close()
        raise
    return opened


def _clear(path: Path) -> None:
    """Take away the socket of a daemon that was killed; never one that somebody still serves."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise OSError(errno.EEXIST, "there is a file of another kind; name another path")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise OSError(errno.EADDRINUSE, "another program serves this socket")
