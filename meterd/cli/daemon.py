"""The running daemon as the command line sees it: where it listens, and one call of its HTTP API.

The rule: what went wrong is said in a sentence that names the next command. The configuration is
not checked for a call: only `[http]` is read, since whoever asks for the status need not be
allowed to read the escrow's key, and since checking takes longer than asking.

A daemon that speaks TLS is known on its own machine by its very certificate, whatever name stands
in it: the configuration names the file. At an address that was typed, the certificate is held
against the authorities of the system, or those in SSL_CERT_FILE.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urlencode, urlsplit

from meterd.errors import MeterdError, NotFound, Refused, Unavailable

LISTEN_USUAL = "127.0.0.1:8787"
SEARCHED = ("meterd.toml", "/etc/meterd/meterd.toml")
# A settlement waits for a commit, not for the escrow; a daemon that needs longer is in trouble.
TIMEOUT_S = 30
ANSWER_BYTES_MAX = 64 * 1024 * 1024
UNIX = "unix:"
PEM_BEGIN, PEM_END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104  # Asked about, not bound.


class WrongUse(MeterdError):
    """What was typed cannot be done; the message says what to type instead."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: its status, its JSON, and how long the daemon asks to wait, in seconds."""

    status: int
    body: Any
    retry_after: int | None


def address(url: str | None, config: Path | None, environ: Mapping[str, str] = os.environ) -> str:
    """Where the daemon listens: `url`, else `http.listen` of the configuration, else as usual."""
    if url:
        return url.rstrip("/")
    listen = _http_of("listen", config, environ) or LISTEN_USUAL
    if listen.startswith(UNIX):
        return listen
    scheme = "https" if _http_of("tls_cert_file", config, environ) else "http"
    host, colon, port = listen.rpartition(":")
    return f"{scheme}://{EVERYWHERE.get(host, host)}{colon}{port}"


def certificate(
    url: str | None, config: Path | None, environ: Mapping[str, str] = os.environ
) -> str:
    """Read the certificate of the daemon that the configuration names; "" where there is none."""
    file = "" if url else _http_of("tls_cert_file", config, environ)
    if not file:
        return ""
    try:
        text = Path(file).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        raise WrongUse(
            f"the certificate {file} cannot be read; name the daemon as others do: --url https://…"
        ) from None
    # The daemon's own stands first. An authority behind it may have signed many others.
    begin, end = text.find(PEM_BEGIN), text.find(PEM_END)
    return text[begin : end + len(PEM_END)] if 0 <= begin < end else ""


def _http_of(key: str, config: Path | None, environ: Mapping[str, str]) -> str:
    return environ.get(f"METERD_HTTP__{key.upper()}") or _in_file(key, config, environ)


def _in_file(key: str, config: Path | None, environ: Mapping[str, str]) -> str:
    named = config or environ.get("METERD_CONFIG")
    for file in [named] if named else SEARCHED:
        try:
            with Path(file).open("rb") as opened:
                return str(tomllib.load(opened).get("http", {}).get(key, ""))
        except FileNotFoundError:
            if named:
                raise WrongUse(f"there is no {file}; name another with -c") from None
        except (OSError, tomllib.TOMLDecodeError, AttributeError, UnicodeDecodeError):
            raise WrongUse(f"{file} cannot be read; look: meterd check -c {file}") from None
    return ""


def token_of(token_file: Path | None, environ: Mapping[str, str] = os.environ) -> str:
    """Find the token: from `token_file`, METERD_TOKEN or METERD_TOKEN_FILE; "" for none."""
    if token_file is None and environ.get("METERD_TOKEN"):
        return environ["METERD_TOKEN"].strip()
    file = token_file or environ.get("METERD_TOKEN_FILE")
    if not file:
        return ""
    try:
        return Path(file).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        raise WrongUse(
            f"the token file {file} cannot be read; name another: --token-file FILE"
        ) from None


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        """As `HTTPConnection.connect`."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(self._path)


def _connection(url: str, certificate: str) -> tuple[http.client.HTTPConnection, str]:
    """Make the connection to an address, and the path before all calls."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in {"http", "https"}:
        raise WrongUse(f"{url} is no address; write one such as --url http://{LISTEN_USUAL}")
    if parts.scheme == "http":
        return http.client.HTTPConnection(host, port, timeout=TIMEOUT_S), parts.path
    context = ssl.create_default_context()
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False  # This very certificate, and no other, will do.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.load_verify_locations(cadata=certificate)
    made = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)
    return made, parts.path


class Daemon:
    """One connection to a daemon, kept open between calls. A context manager."""

    def __init__(self, url: str, token: str = "", certificate: str = "") -> None:
        self.url = url
        self._prefix = ""
        if url.startswith(UNIX):
            self._connection: http.client.HTTPConnection = _UnixConnection(url.removeprefix(UNIX))
        else:
            self._connection, self._prefix = _connection(url, certificate)
        self._headers = {"Accept": "application/json"}
        if token:
            if not token.isascii() or not token.isprintable():
                raise WrongUse("the token has characters that no token has; look into its file")
            self._headers["Authorization"] = f"Bearer {token}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._connection.close()

    def get(self, *path: str, **query: str | int | None) -> Any:
        """Ask for something: its JSON. Raises as `ask` does."""
        given = {name: value for name, value in query.items() if value not in (None, "")}
        return self.ask("GET", *path, query=given)

    def ask(
        self,
        method: str,
        *path: str,
        body: object = None,
        query: Mapping[str, str | int] | None = None,
    ) -> Any:
        """Make one call with a JSON body: the answer's JSON.

        Raises `Unavailable` when nothing answers or the daemon cannot now, `NotFound`, `Refused`.
        """
        target = "/" + "/".join(quote(part, safe="") for part in path)
        if query:
            target += "?" + urlencode(query)
        content = None if body is None else json.dumps(body).encode()
        answer = self.call(method, target, content, "application/json")
        if answer.status >= 300:
            raise self.explain(answer)
        return answer.body

    def call(self, method: str, target: str, content: bytes | None, kind: str) -> Answer:
        """Make one call and read its answer, whatever its status. Raises `Unavailable`."""
        headers = {**self._headers, **({"Content-Type": kind} if content is not None else {})}
        try:
            self._connection.request(method, self._prefix + target, content, headers)
            response = self._connection.getresponse()
            raw = response.read(ANSWER_BYTES_MAX)
        except (ConnectionRefusedError, FileNotFoundError):
            raise Unavailable(
                f"nothing answers at {self.url}; start it: meterd run (or say where it is: --url)"
            ) from None
        except ssl.SSLCertVerificationError as error:
            self._connection.close()
            raise Unavailable(
                f"{self.url} shows a certificate that is not trusted ({error.verify_message});"
                " name the file of its authority in SSL_CERT_FILE"
            ) from None
        except PermissionError:
            raise Unavailable(
                f"{self.url} may be opened by its user and group alone; join the group, or use sudo"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise Unavailable(
                f"{self.url} gave no answer ({error or type(error).__name__});"
                f" look at the daemon's log, then try again"
            ) from None
        wait = response.headers.get("Retry-After", "")
        return Answer(response.status, _json_of(raw), int(wait) if wait.isdecimal() else None)

    def explain(self, answer: Answer) -> MeterdError:
        """Make of an answer that is no success the error that says so."""
        problem = answer.body if isinstance(answer.body, dict) else {}
        detail = str(problem.get("detail") or problem.get("title") or f"HTTP {answer.status}")
        match answer.status:
            case 401:
                return Refused(
                    f"{self.url} wants a token; give one: --token-file FILE, or METERD_TOKEN"
                )
            case 403:
                return Refused(
                    f"this token may not do that ({detail}); give another: --token-file FILE"
                )
            case 404:
                return NotFound(detail)
            case 429 | 503:
                return Unavailable(detail)
            case status if status >= 500:
                return Unavailable(f"{detail} (HTTP {status}); look at the daemon's log")
        return Refused(detail)


def _json_of(raw: bytes) -> Any:
    try:
        return json.loads(raw) if raw else None
    except ValueError:
        return None
