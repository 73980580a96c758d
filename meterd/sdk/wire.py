"""The way to meterd: where it is, and one connection to it for programs that wait.

The rule kept here: a token goes over TLS, over a Unix socket, to this machine, or where its owner
said that the network is his own; never through a proxy, and after no redirect. All that is asked of
meterd may be asked again (events have ids, holds have keys), so that a connection that was kept and
has died meanwhile is simply opened anew.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import http.client
import ipaddress
import re
import secrets
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from meterd.sdk.failures import BadUsage

BODY_BYTES_MAX = 8 * 1024 * 1024  # The answer to a full batch of which every event was rejected.
RETRY_AFTER_MAX_S = 300
UNIX = "unix:"
WEBHOOK_PREFIX = "whsec_"
_TOKEN = re.compile(r"[!-~]{1,4096}\Z", re.ASCII)
_URL = re.compile(r"[!-~]{1,512}\Z", re.ASCII)
_SECONDS = re.compile(r"[0-9]{1,9}\Z", re.ASCII)
_FAILURES = (http.client.HTTPException, OSError, ValueError)


@dataclass(frozen=True, slots=True)
class Place:
    """Where meterd is, and the token that it wants.

    url      "http://127.0.0.1:8787", "https://meterd.example", or "unix:/run/meterd/http.sock".
    token    its bearer token; "": it has none.
    trusted  send a token over plain http to another machine: the network between is its owner's.
    tls      for an authority of one's own; None: the system's.
    secret   the key that each request is signed with (Standard Webhooks), such as "whsec_…"; "":
             none is.
    """

    url: str
    token: str = field(default="", repr=False)
    trusted: bool = False
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    secret: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.url, str) or not isinstance(self.token, str):
            raise BadUsage("url and token are texts")
        if self.token and _TOKEN.match(self.token) is None:
            raise BadUsage("the token has characters that no token has; is it the whole line?")
        if self.secret and not self._key:
            raise BadUsage("secret: write whsec_ and base64 behind it, as meterd's configuration")
        if self.url.startswith(UNIX):
            if not self.socket_path.startswith("/"):
                raise BadUsage('url: write the whole path, such as "unix:/run/meterd/http.sock"')
            return
        if not _is_address(self.url):
            raise BadUsage('url: write an address such as "http://127.0.0.1:8787"')
        plain = urlsplit(self.url).scheme == "http"
        if plain and self.token and not self.trusted and not _is_loopback(self.host):
            raise BadUsage(
                "url: a token goes over https, or to this machine; write https://, or trusted=True"
                " where the network between is your own"
            )

    @property
    def socket_path(self) -> str:
        """The path of the Unix socket; "" where it is none."""
        return self.url.removeprefix(UNIX) if self.url.startswith(UNIX) else ""

    @property
    def host(self) -> str:
        """The host's name."""
        return "localhost" if self.socket_path else urlsplit(self.url).hostname or ""

    @property
    def base(self) -> str:
        """What stands before a path."""
        return "http://localhost" if self.socket_path else self.url.rstrip("/")

    @property
    def _key(self) -> bytes:
        """The key of the secret; nothing where it has none."""
        text = self.secret.removeprefix(WEBHOOK_PREFIX)
        try:
            return base64.b64decode(text, validate=True) if text != self.secret else b""
        except (binascii.Error, ValueError):
            return b""

    def headers(self, body: bytes, further: Mapping[str, str] | None = None) -> dict[str, str]:
        """Headers of a request with this JSON body; a signature is as old as the request."""
        own = {"Content-Type": "application/json", "User-Agent": "meterd-sdk"}
        if self.token:
            own["Authorization"] = f"Bearer {self.token}"
        if self.secret:
            own |= _signature(self._key, body)
        return {**own, **(further or {})}


def _signature(key: bytes, body: bytes) -> dict[str, str]:
    """Sign a body: the headers of Standard Webhooks 1.0."""
    number, now = f"msg_{secrets.token_hex(12)}", str(int(time.time()))
    digest = hmac.digest(key, f"{number}.{now}.".encode() + body, "sha256")
    return {
        "webhook-id": number,
        "webhook-timestamp": now,
        "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
    }


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return False
    plain = _URL.match(url) is not None and not set(url) & set("?#@\\")
    return plain and bool(host) and parts.scheme in {"http", "https"}


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back: a status and a body, or 0 and why there is none."""

    status: int
    body: bytes = b""
    flaw: str = ""
    retry_after_s: int | None = None

    @property
    def said(self) -> str:
        """What to tell a person of an answer that is no success."""
        if not self.status:
            return self.flaw
        text = self.body[:300].decode("utf-8", "replace")
        return f"{self.status} {text if text.isprintable() else ascii(text)}"


def seconds_of(header: str | None) -> int | None:
    """Read a Retry-After in seconds, at most five minutes; None: there is none that is read."""
    if header is None or _SECONDS.match(header.strip()) is None:
        return None
    return min(int(header), RETRY_AFTER_MAX_S)


class Wire:
    """One connection that is kept. One thread at a time."""

    def __init__(self, place: Place, timeout_s: float) -> None:
        self._place = place
        self._timeout_s = timeout_s
        self._kept: http.client.HTTPConnection | None = None

    def post(self, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> Reply:
        """Ask once, or twice where the kept connection has died. Raises nothing."""
        reused = self._kept is not None
        reply = self._post(path, body, headers)
        return self._post(path, body, headers) if reused and not reply.status else reply

    def _post(self, path: str, body: bytes, headers: Mapping[str, str] | None) -> Reply:
        try:
            if self._kept is None:
                self._kept = self._connection()
            self._kept.request(
                "POST", self._prefix + path, body, self._place.headers(body, headers)
            )
            response = self._kept.getresponse()
            content = response.read(BODY_BYTES_MAX)
            if response.will_close or not response.isclosed():
                self.close()
            after = seconds_of(response.getheader("Retry-After"))
            return Reply(response.status, content, retry_after_s=after)
        except TimeoutError:
            self.close()
            return Reply(0, flaw=f"no answer within {self._timeout_s:g} s")
        except _FAILURES as error:
            self.close()
            return Reply(0, flaw=f"{type(error).__name__}: {error}"[:300])

    @property
    def _prefix(self) -> str:
        return urlsplit(self._place.base).path

    def _connection(self) -> http.client.HTTPConnection:
        place = self._place
        if place.socket_path:
            return _UnixConnection(place.socket_path, self._timeout_s)
        to = urlsplit(place.url)
        if to.scheme == "http":
            return http.client.HTTPConnection(place.host, to.port or 80, timeout=self._timeout_s)
        context = place.tls or ssl.create_default_context()
        port = to.port or 443
        return http.client.HTTPSConnection(
            place.host, port, timeout=self._timeout_s, context=context
        )

    def close(self) -> None:
        """Let go of the connection; the next question opens another."""
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.close()


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(self._path)
        except OSError:
            self.sock.close()
            raise
