"""The line to a service that moves money: one exchange at a time, and whether it left.

The rule kept here: a call that pays leaves at most once, and this file knows whether it left. So it
has no redirects, no proxy, no retry, and a connection of its own: on a kept-alive connection a
request can meet the service's closing of it, which looks like a lost answer; on a new one, whatever
fails before the first byte has certainly not been asked. A reading moves nothing: it goes over
kept-alive connections, and aiohttp asks it once more when such a connection was lost.

The API key goes to `base_url` and nowhere else: the service's own words (a redirect, a link to the
next page) never name an address that is asked.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import ClassVar, Generic, Self, TypeVar
from urllib.parse import quote, urlsplit

import aiohttp

from meterd.core.settlement import Answer, AnswerKind
from meterd.errors import ConfigurationError, Mistake, Refused, Unavailable
from meterd.escrow.documents import (
    BODY_BYTES_MAX,
    Mask,
    Received,
    error_text,
)

Observe = Callable[[str, str, float], None]

# --------------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True, slots=True)
class ServiceApi:
    """Where a service is and how it is spoken to. Mistakes raise `ConfigurationError`."""

    TABLE: ClassVar[str] = "service"  # Where its keys stand in the configuration.

    base_url: str
    api_key: str = field(repr=False)
    idempotency_header: str = "Idempotency-Key"
    request_timeout_s: float = (
        30.0  # For the whole of a call, from the name's look-up to the body's end.
    )
    connections_max: int = (
        64  # The caller bounds how much it asks at once; this bounds a mistake of it.
    )

    def __post_init__(self) -> None:
        checks = (*self._checks(), *self._own_checks())
        mistakes = tuple(
            Mistake(f"{self.TABLE}.{key}", message) for wrong, key, message in checks if wrong
        )
        if mistakes:
            raise ConfigurationError(mistakes)
        object.__setattr__(self, "base_url", self.base_url.rstrip("/"))

    def _checks(self) -> tuple[tuple[bool, str, str], ...]:
        return (
            (
                not _safe_address(self.base_url),
                "base_url",
                "must be https (http for loopback alone), without user, ? and #",
            ),
            (_KEY.match(self.api_key) is None, "api_key", "must be 1 to 512 visible characters"),
            (
                _TOKEN.match(self.idempotency_header) is None,
                "idempotency_header",
                "must be the name of a header, such as Idempotency-Key",
            ),
            (not self.request_timeout_s > 0, "request_timeout", "must be more than 0"),
            (self.connections_max < 1, "connections_max", "must be at least 1"),
        )

    def _own_checks(self) -> tuple[tuple[bool, str, str], ...]:
        return ()

    def address(self, path: str, named: str = "") -> str:
        """Where a call goes; `named` stands for `{id}`."""
        return self.base_url + path.replace("{id}", quote(named, safe=""))


def is_path_with_id(path: str) -> bool:
    """Whether it can stand behind `base_url`, with a place for an id."""
    return _PATH.match(path) is not None and path.count("{id}") == 1


def is_path_without_id(path: str) -> bool:
    """Whether it can stand behind `base_url` as it is."""
    return _PATH.match(path) is not None and "{" not in path


AGENT_ID = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9_.:-]{1,64}\Z", re.ASCII)  # `..` leads elsewhere.
_KEY = re.compile(r"[!-~]{1,512}\Z", re.ASCII)
_PATH = re.compile(r"/(?!.*\.\.)[A-Za-z0-9_./{}-]{0,255}\Z", re.ASCII)
_TOKEN = re.compile(r"[A-Za-z0-9-]{1,64}\Z", re.ASCII)
_URL = re.compile(r"[!-~]{1,512}\Z", re.ASCII)


def _safe_address(url: str) -> bool:
    """Whether a key may be sent there: nobody listens on the way, and the host is plain to see."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return False
    plain = _URL.match(url) is not None and not set(url) & set("?#@\\")
    if not plain or not host:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(host))


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# --------------------------------------------------------------------------------------------------
# Exchanges


@dataclass(slots=True)
class Exchange:
    """How far one request came. `left`: a byte of it may have left this machine."""

    left: bool = False
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    flaw: str = ""

    @property
    def received(self) -> Received | None:
        """What came back; None: no head of an answer."""
        if not self.status:
            return None
        return Received(self.status, self.headers, self.body, self.flaw)

    @property
    def code(self) -> str:
        """How it ended, for the metric: a status, or one of two words."""
        if self.status:
            return str(self.status)
        return "no_answer" if self.left else "not_sent"

    @property
    def silence(self) -> Answer:
        """What it means that nothing came back: NOT_SENT promises that not a byte left."""
        assert not self.status
        if self.left:
            return Answer(AnswerKind.DOUBT, f"no answer: {self.flaw}")
        return Answer(AnswerKind.NOT_SENT, f"nothing was sent: {self.flaw}")


# What a wire can do to a request. Anything else is a mistake in here and stops the process: what
# was sent is then found unfinished in the store, which is the same as a doubt.
_WIRE_FAILURES = (aiohttp.ClientError, OSError, ValueError)


def ignore(_: str, __: str, ___: float) -> None:
    """The observer of those who count nothing."""


def wall_ms() -> int:
    """Milliseconds since 1970, by this machine."""
    return time.time_ns() // 1_000_000


class Line:
    """One service over HTTP. An async context manager; its calls may run side by side.

    mono     seconds of the clock that measures calls.
    observe  called once for each call with its name, its status (or `not_sent`, `no_answer`) and
             its seconds.
    """

    def __init__(
        self, api: ServiceApi, *, mono: Callable[[], float], observe: Observe = ignore
    ) -> None:
        self._api = api
        self._mono = mono
        self._observe = observe
        self._stack = AsyncExitStack()
        self._readings: aiohttp.ClientSession | None = None
        self._payments: aiohttp.ClientSession | None = None
        self.mask = Mask(api.api_key)

    async def __aenter__(self) -> Self:
        self._readings = await self._stack.enter_async_context(self._session(reuse=True))
        self._payments = await self._stack.enter_async_context(self._session(reuse=False))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._readings = self._payments = None
        await self._stack.__aexit__(kind, error, trace)

    async def get(
        self, call: str, address: str, query: Mapping[str, str] | None = None
    ) -> Exchange:
        """Read. Comes back with how far it came; raises only a cancellation."""
        assert self._readings is not None, "async with comes first"
        return await self._ask(self._readings, call, "GET", address, query=query)

    async def post(
        self, call: str, address: str, document: Mapping[str, object], key: str
    ) -> Exchange:
        """Ask for something that moves money: at most one request leaves, over a new connection.

        Comes back with how far it came. A cancellation is raised as it is: the caller must then
        take what it asked for as in doubt.
        """
        assert self._payments is not None, "async with comes first"
        headers = {"Content-Type": "application/json", self._api.idempotency_header: key}
        body = json.dumps(document).encode()
        return await self._ask(self._payments, call, "POST", address, body=body, headers=headers)

    async def probe_refusal(
        self, path: str, named: str, document: Mapping[str, object], *, of_what: str
    ) -> str:
        """How a payment out of what does not exist is refused, without the call's own names.

        `named` was made up, so that nothing can be paid. Raises `Unavailable` when nobody answers
        and `Refused` when the service must not be used.
        """
        key = f"rel_probe_{secrets.token_hex(8)}"
        exchange = await self.post("probe", self._api.address(path, named), document, key)
        received = exchange.received
        if received is None:
            raise Unavailable(f"{path} was not answered: {exchange.flaw}")
        if received.status < 300:
            raise Refused(f"the service answered {received.status} to {of_what}")
        text = error_text(received)
        if text is None and received.status != 404:
            raise Refused(f"{path} answered {received.status} without the documented error")
        call = path.rsplit("/", 1)[-1].replace("{id}", named)
        text = (text or "no documented error").replace(call, "(call)").replace(named, "(id)")
        return self.mask.excerpt(f"{received.status} {text}")

    async def _ask(
        self,
        session: aiohttp.ClientSession,
        call: str,
        method: str,
        address: str,
        *,
        query: Mapping[str, str] | None = None,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Exchange:
        """Make one call within the time-out.

        Comes back with how far it came; raises only a cancellation.
        """
        exchange = Exchange()
        started = self._mono()
        try:
            async with (
                asyncio.timeout(self._api.request_timeout_s),
                session.request(
                    method,
                    address,
                    params=query,
                    data=body,
                    headers=headers,
                    allow_redirects=False,
                    trace_request_ctx=exchange,
                ) as response,
            ):
                exchange.status, exchange.headers = response.status, response.headers
                await _receive(response, exchange)
        except TimeoutError:
            exchange.flaw = f"no whole answer within {self._api.request_timeout_s:g} s"
        except _WIRE_FAILURES as error:
            exchange.flaw = self.mask.excerpt(f"{type(error).__name__}: {error}")
        self._observe(call, exchange.code, self._mono() - started)
        return exchange

    def _session(self, *, reuse: bool) -> aiohttp.ClientSession:
        """A session that adds nothing of its own.

        No proxy, netrc, cookies, decompression, clock.
        """
        trace = aiohttp.TraceConfig()
        # Both fire before the bytes they speak of are written, so that a doubt is never taken for
        # NOT_SENT.
        trace.on_request_headers_sent.append(_note_departure)
        trace.on_request_chunk_sent.append(_note_departure)
        limit = self._api.connections_max
        connector = (
            aiohttp.TCPConnector(limit=limit)
            if reuse
            else aiohttp.TCPConnector(limit=limit, force_close=True)
        )
        return aiohttp.ClientSession(
            connector=connector,
            trace_configs=[trace],
            trust_env=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # A small answer could become a large one.
            timeout=aiohttp.ClientTimeout(total=None),  # `_ask` has the one time-out there is.
            headers={
                "Authorization": f"Bearer {self._api.api_key}",
                "Accept": "application/json",
                "Accept-Encoding": "identity",
                "User-Agent": "meterd",
            },
        )


A = TypeVar("A", bound=ServiceApi)


class ServiceClient(Generic[A]):
    """What asks one service. An async context manager; its calls may run side by side.

    mono     seconds of the clock that stamps readings and measures calls.
    wall     milliseconds since 1970, for waits that the service gives as a date.
    observe  called once for each call with its name, its status (or `not_sent`, `no_answer`) and
             its seconds.
    """

    def __init__(
        self,
        api: A,
        *,
        mono: Callable[[], float] = time.monotonic,
        wall: Callable[[], int] = wall_ms,
        observe: Observe = ignore,
    ) -> None:
        self._api = api
        self._line = Line(api, mono=mono, observe=observe)
        self._mask = self._line.mask
        self._mono = mono
        self._wall = wall

    async def __aenter__(self) -> Self:
        await self._line.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._line.__aexit__(kind, error, trace)


async def _note_departure(_: aiohttp.ClientSession, context: object, __: object) -> None:
    exchange = getattr(context, "trace_request_ctx", None)
    assert isinstance(exchange, Exchange)
    exchange.left = True


async def _receive(response: aiohttp.ClientResponse, exchange: Exchange) -> None:
    """Read the body as far as it may be long; what is longer ends the connection."""
    while len(exchange.body) <= BODY_BYTES_MAX:
        piece = await response.content.read(BODY_BYTES_MAX + 1 - len(exchange.body))
        if not piece:
            return
        exchange.body += piece
    exchange.flaw = "the body is longer than 64 KiB"
    response.close()
