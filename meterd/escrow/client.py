"""The escrow service over HTTP: what meterd asks it, each question in one function.

The rule kept here: a release leaves at most once, and this file knows whether it left. So a release
has no redirects, no proxy, no retry, and a connection of its own: on a kept-alive connection a
request can meet the service's closing of it, which looks like a lost answer; on a new one, whatever
fails before the first byte has certainly not been asked. A reading moves nothing: it goes over
kept-alive connections, and aiohttp asks it once more when such a connection was lost.

The API key goes to `base_url` and nowhere else: the service's own words (a redirect, a link to the
next page) never name an address that is asked. How answers are read is in `outcomes`.
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
from typing import Self
from urllib.parse import quote, urlsplit

import aiohttp

from meterd.core.money import format_amount
from meterd.core.settlement import Answer, AnswerKind, Reading, Release
from meterd.errors import ConfigurationError, Mistake, Refused, Unavailable
from meterd.escrow.outcomes import (
    BODY_BYTES_MAX,
    ESCROW_ID,
    MEMO_PREFIX,
    RELEASE_ID,
    Listed,
    Mask,
    Page,
    Received,
    Unread,
    answer_to_list,
    answer_to_read,
    answer_to_release,
    error_text,
)

PAGES_MAX = 200  # With 50 escrows on each, ten thousand of one agent.
PAGE_ESCROWS = 50
Observe = Callable[[str, str, float], None]

# --------------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True, slots=True)
class EscrowPaths:
    """What stands behind `base_url` for each call; `{id}` is the escrow's."""

    status: str = "/escrow/{id}"
    list: str = "/escrow"
    release_partial: str = "/escrow/{id}/release-partial"


@dataclass(frozen=True, slots=True)
class EscrowApi:
    """Where the service is and how it is spoken to. Mistakes raise `ConfigurationError`."""

    base_url: str
    api_key: str = field(repr=False)
    paths: EscrowPaths = EscrowPaths()
    idempotency_header: str = "Idempotency-Key"
    request_timeout_s: float = (
        30.0  # For the whole of a call, from the name's look-up to the body's end.
    )
    connections_max: int = (
        64  # The caller bounds how much it asks at once; this bounds a mistake of it.
    )

    def __post_init__(self) -> None:
        mistakes = tuple(
            Mistake(f"escrow.{key}", message) for wrong, key, message in self._checks() if wrong
        )
        if mistakes:
            raise ConfigurationError(mistakes)
        object.__setattr__(self, "base_url", self.base_url.rstrip("/"))

    def _checks(self) -> tuple[tuple[bool, str, str], ...]:
        with_id = (self.paths.status, self.paths.release_partial)
        return (
            (
                not _safe_address(self.base_url),
                "base_url",
                "must be https (http for loopback alone), without user, ? and #",
            ),
            (_KEY.match(self.api_key) is None, "api_key", "must be 1 to 512 visible characters"),
            (
                any(_PATH.match(path) is None or path.count("{id}") != 1 for path in with_id),
                "paths",
                'must begin with / and have {id} once, such as "/escrow/{id}"',
            ),
            (
                _PATH.match(self.paths.list) is None or "{" in self.paths.list,
                "paths",
                'must begin with /, such as "/escrow"',
            ),
            (
                _TOKEN.match(self.idempotency_header) is None,
                "idempotency_header",
                "must be the name of a header, such as Idempotency-Key",
            ),
            (not self.request_timeout_s > 0, "request_timeout", "must be more than 0"),
            (self.connections_max < 1, "connections_max", "must be at least 1"),
        )


_KEY = re.compile(r"[!-~]{1,512}\Z", re.ASCII)
_PATH = re.compile(r"/(?!.*\.\.)[A-Za-z0-9_./{}-]{0,255}\Z", re.ASCII)
_TOKEN = re.compile(r"[A-Za-z0-9-]{1,64}\Z", re.ASCII)
_URL = re.compile(r"[!-~]{1,512}\Z", re.ASCII)
_AGENT_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}\Z", re.ASCII)


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
# Client


@dataclass(frozen=True, slots=True)
class Listing:
    """An agent's escrows. `skipped` entries made no sense; `complete`: there were no more pages."""

    escrows: tuple[Listed, ...]
    skipped: int
    complete: bool


@dataclass(slots=True)
class _Exchange:
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


# What a wire can do to a request. Anything else is a mistake in here and stops the process: what
# was sent is then found unfinished in the store, which is the same as a doubt.
_WIRE_FAILURES = (aiohttp.ClientError, OSError, ValueError)


def _ignore(_: str, __: str, ___: float) -> None:
    """The default for those who count nothing."""


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000


class EscrowClient:
    """The escrow service. An async context manager; its calls may run side by side.

    mono     seconds of the clock that stamps readings and measures calls.
    wall     milliseconds since 1970, for waits that the service gives as a date.
    observe  called once for each call with its name, its status (or `not_sent`, `no_answer`) and
             its seconds.
    """

    def __init__(
        self,
        api: EscrowApi,
        *,
        mono: Callable[[], float] = time.monotonic,
        wall: Callable[[], int] = _wall_ms,
        observe: Observe = _ignore,
    ) -> None:
        self._api = api
        self._mask = Mask(api.api_key)
        self._mono = mono
        self._wall = wall
        self._observe = observe
        self._stack = AsyncExitStack()
        self._readings: aiohttp.ClientSession | None = None
        self._releases: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._readings = await self._stack.enter_async_context(self._session(reuse=True))
        self._releases = await self._stack.enter_async_context(self._session(reuse=False))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._readings = self._releases = None
        await self._stack.__aexit__(kind, error, trace)

    async def read(self, escrow: str) -> Reading | Unread:
        """Read an escrow. What went wrong is a value: only a cancellation is raised."""
        if ESCROW_ID.match(escrow) is None:
            return Unread("missing", "no escrow can have this id: it is not 1 to 64 of A-Za-z0-9_-")
        mono = self._mono()
        exchange = await self._get("read", self._address(self._api.paths.status, escrow))
        if exchange.received is None:
            return Unread("unavailable", exchange.flaw)
        return answer_to_read(exchange.received, self._mask, mono, self._wall())

    async def release_partial(self, release: Release) -> Answer:
        """Ask for a release: at most one request leaves, whatever happens.

        The caller has made the intention durable. NOT_SENT promises that not a byte left; whatever
        is not certain is a DOUBT. A cancellation is raised as it is: the caller must then take the
        release for in doubt. Raises `ValueError` before anything is sent for an amount of zero or
        less, which some services take for "everything", and for ids that cannot stand in an address
        or a header.
        """
        if release.amount <= 0:
            raise ValueError("a release must be of more than 0: zero would be taken for everything")
        if ESCROW_ID.match(release.escrow) is None or RELEASE_ID.match(release.id) is None:
            raise ValueError("an escrow's or a release's id is not 1 to 64 of A-Za-z0-9_-")
        exchange = await self._post_release(
            "release_partial",
            self._address(self._api.paths.release_partial, release.escrow),
            release.amount,
            release.id,
        )
        if exchange.received is not None:
            return answer_to_release(release, exchange.received, self._mask, self._wall())
        if exchange.left:
            return Answer(AnswerKind.DOUBT, f"no answer: {exchange.flaw}")
        return Answer(AnswerKind.NOT_SENT, f"nothing was sent: {exchange.flaw}")

    async def list_escrows(self, agent_id: str) -> Listing | Unread:
        """Read an agent's escrows, page by page, at most 200 pages.

        Raises `ValueError` for an id of no agent.
        """
        if _AGENT_ID.match(agent_id) is None:
            raise ValueError("an agent's id is 1 to 64 of A-Za-z0-9_.:-")
        address = self._api.base_url + self._api.paths.list
        query = {"agent_id": agent_id, "limit": str(PAGE_ESCROWS)}
        escrows: list[Listed] = []
        skipped = 0
        for _ in range(PAGES_MAX):
            page = await self._page(address, query)
            if isinstance(page, Unread):
                return page
            escrows += page.escrows
            skipped += page.skipped
            if page.cursor is None:
                return Listing(tuple(escrows), skipped, complete=True)
            if page.cursor == query.get("cursor"):
                return Unread("nonsense", "the list's cursor leads back to the same page")
            query["cursor"] = page.cursor
        return Listing(tuple(escrows), skipped, complete=False)

    async def probe(self) -> str:
        """Check without moving money that the key reads and that release-partial exists.

        Comes back with what was found, for a person. Asks for an escrow that is made up here, so
        that nothing can be paid: by GET, by release-partial, and by a call that no service has. A
        service that answers the last two alike has no release-partial. Raises `Unavailable` when it
        does not answer, `Refused` when it must not be used as it is configured.
        """
        escrow = f"esc_meterd_probe_{secrets.token_hex(8)}"
        # 1. The key, and what the service says of an escrow that does not exist.
        read = await self.read(escrow)
        if isinstance(read, Reading):
            raise Refused("the service shows an escrow that does not exist; check escrow.base_url")
        if read.kind == "key_refused":
            raise Refused(f"the service refused the key ({read.detail}); check escrow.api_key")
        if read.kind != "missing":
            raise Unavailable(f"an unknown escrow was not answered with 404: {read.detail}")
        # 2. The call that releases, and one beside it that cannot exist.
        path = self._api.paths.release_partial
        beside = path + ("/" if path.endswith("{id}") else "-") + secrets.token_hex(4)
        real = await self._probe_call(path, escrow)
        control = await self._probe_call(beside, escrow)
        if real == control:
            raise Refused(
                f"the service answers {path} as it answers a call that does not exist ({real}); "
                "check escrow.paths.release_partial, and never use /release in its place"
            )
        return f"the key reads, and {path} exists: {real}"

    async def _probe_call(self, path: str, escrow: str) -> str:
        """How a release from an escrow that does not exist is refused, without the call's names."""
        exchange = await self._post_release(
            "probe", self._address(path, escrow), 1, f"rel_probe_{secrets.token_hex(8)}"
        )
        received = exchange.received
        if received is None:
            raise Unavailable(f"{path} was not answered: {exchange.flaw}")
        if received.status < 300:
            raise Refused(
                f"the service answered {received.status} to a release from an escrow that does not "
                "exist: do not let meterd release there"
            )
        text = error_text(received)
        if text is None and received.status != 404:
            raise Refused(f"{path} answered {received.status} without the documented error")
        call = path.rsplit("/", 1)[-1].replace("{id}", escrow)
        text = (text or "no documented error").replace(call, "(call)").replace(escrow, "(id)")
        return self._mask.excerpt(f"{received.status} {text}")

    # -- One request -------------------------------------------------------------------------------

    def _address(self, path: str, escrow: str) -> str:
        return self._api.base_url + path.replace("{id}", quote(escrow, safe=""))

    async def _page(self, address: str, query: Mapping[str, str]) -> Page | Unread:
        mono = self._mono()
        exchange = await self._get("list", address, query)
        if exchange.received is None:
            return Unread("unavailable", exchange.flaw)
        return answer_to_list(exchange.received, self._mask, mono, self._wall())

    async def _get(
        self, call: str, address: str, query: Mapping[str, str] | None = None
    ) -> _Exchange:
        assert self._readings is not None, "async with EscrowClient(...) comes first"
        return await self._ask(self._readings, call, "GET", address, query=query)

    async def _post_release(self, call: str, address: str, micros: int, key: str) -> _Exchange:
        assert self._releases is not None, "async with EscrowClient(...) comes first"
        assert micros > 0
        body = json.dumps({"amount": format_amount(micros), "memo": f"{MEMO_PREFIX}{key}"}).encode()
        headers = {"Content-Type": "application/json", self._api.idempotency_header: key}
        return await self._ask(self._releases, call, "POST", address, body=body, headers=headers)

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
    ) -> _Exchange:
        """Make one call within the time-out.

        Comes back with how far it came; raises only a cancellation.
        """
        exchange = _Exchange()
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
            exchange.flaw = self._mask.excerpt(f"{type(error).__name__}: {error}")
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


async def _note_departure(_: aiohttp.ClientSession, context: object, __: object) -> None:
    exchange = getattr(context, "trace_request_ctx", None)
    assert isinstance(exchange, _Exchange)
    exchange.left = True


async def _receive(response: aiohttp.ClientResponse, exchange: _Exchange) -> None:
    """Read the body as far as it may be long; what is longer ends the connection."""
    while len(exchange.body) <= BODY_BYTES_MAX:
        piece = await response.content.read(BODY_BYTES_MAX + 1 - len(exchange.body))
        if not piece:
            return
        exchange.body += piece
    exchange.flaw = "the body is longer than 64 KiB"
    response.close()
