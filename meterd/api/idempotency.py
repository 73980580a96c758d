"""`Idempotency-Key`: a call that is sent again with its key does its work once.

The header is that of the IETF draft "The Idempotency-Key HTTP Header Field". A key belongs to the
token that it comes with, so that nobody meets another's. It may stand in quotes or not.

The rule kept here: the first commit of a call's work holds its key, and an answer is durable before
it is given. So after a crash a key either has its answer, or the call may run again, and then it is
known that its work had begun. What was refused has done nothing: its key is free again. A hold is
named by its key (`hold_id_of`) and needs none of this.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from meterd.api.auth import ACTOR
from meterd.api.problems import Problem
from meterd.api.settings import Scope
from meterd.bookkeeper import BEGUN, Begun, Bookkeeper
from meterd.core.changes import KeyRow
from meterd.errors import NotFound, Refused

HEADER = "Idempotency-Key"
REPLAYED = "Idempotency-Replayed"
KEY_CHARS_MAX = 255
HOLD_DIGITS = 24  # As many as a hold without a key has.
AGREEMENT_DIGITS = 16
BODY_BYTES_MAX = 1024 * 1024  # A longer answer is not kept: its call runs again.
READS = frozenset({"GET", "HEAD", "OPTIONS"})
SCOPES = frozenset({Scope.ADMIN, Scope.GATE})
OWN = frozenset({"/v1/authorize"})  # These do by themselves what a key asks for.
# Whether a call with this key had begun its work before the process ended.
BEGUN_BEFORE = web.RequestKey("begun_before", bool)


def read_key(request: web.Request) -> str | None:
    """Read the key of a request; None: it has none. Raises `Problem`."""
    text = request.headers.get(HEADER)
    if text is None:
        return None
    key = text.strip()
    if len(key) > 1 and key[0] == key[-1] == '"':
        key = key[1:-1]
    fits = 1 <= len(key) <= KEY_CHARS_MAX and key.isascii() and key.isprintable()
    if not fits or len(request.headers.getall(HEADER)) > 1:
        detail = f"{HEADER}: one key of 1 to {KEY_CHARS_MAX} printable ASCII characters"
        raise Problem(400, "bad-key", detail)
    return key


def takes_keys(method: str, scope: Scope | None) -> bool:
    """Whether a call changes something that has no id of its own, as events have."""
    return method not in READS and scope in SCOPES


def used_otherwise() -> Problem:
    """Say that a key came with another request before."""
    detail = f"this {HEADER} came with another request before; take a new key"
    return Problem(422, "key-reused", detail)


def hold_id_of(request: web.Request, key: str) -> str:
    """Make the id of the hold that a key stands for: the same one, also after a crash."""
    return f"hold_{_digest(request, key)[:HOLD_DIGITS]}"


def agreement_id_of(request: web.Request, key: str) -> str:
    """Make the id of an agreement that is opened without one: the same one, as above."""
    return f"agr_{_digest(request, key)[:AGREEMENT_DIGITS]}"


def _digest(request: web.Request, key: str) -> str:
    return hashlib.sha256(f"{request[ACTOR]}\0{key}".encode()).hexdigest()


class Keyed:
    """Replays the answers of calls that change something."""

    def __init__(
        self, bookkeeper: Bookkeeper, scopes: Mapping[web.AbstractRoute, Scope | None]
    ) -> None:
        self._bookkeeper = bookkeeper
        self._scopes = scopes
        self._running: dict[tuple[str, str], bytes] = {}  # The fingerprints of calls under way.

    def middleware(self) -> Middleware:
        """Make the middleware, the innermost one: who calls is known, and may."""

        @web.middleware
        async def keyed(request: web.Request, handler: Handler) -> web.StreamResponse:
            key = read_key(request) if self._takes_keys(request) else None
            if key is None:
                return await handler(request)
            return await self._once(request, key, handler)

        return keyed

    def _takes_keys(self, request: web.Request) -> bool:
        route = request.match_info.route
        path = None if route.resource is None else route.resource.canonical
        return takes_keys(request.method, self._scopes.get(route)) and path not in OWN

    async def _once(self, request: web.Request, key: str, handler: Handler) -> web.StreamResponse:
        owner, fingerprint = request[ACTOR], await _fingerprint(request)
        under_way = self._running.get((owner, key))
        now = self._bookkeeper.clock.wall()
        known = self._bookkeeper.keys.get(owner, key, now)
        before = under_way or (known.fingerprint if known is not None else fingerprint)
        if before != fingerprint:
            raise used_otherwise()
        if under_way is not None:
            detail = f"the call with this {HEADER} is still running; ask again"
            raise Problem(409, "key-in-use", detail, headers={"Retry-After": "1"})
        if known is not None and known.status:
            return _replayed(known)
        request[BEGUN_BEFORE] = known is not None
        row = known or KeyRow(owner, key, fingerprint, now)
        self._running[owner, key] = fingerprint
        try:
            return await self._run(request, handler, row, written=known is not None)
        finally:
            del self._running[owner, key]

    async def _run(
        self, request: web.Request, handler: Handler, row: KeyRow, *, written: bool
    ) -> web.StreamResponse:
        begun = Begun(row, written)
        before = BEGUN.set(begun)
        try:
            response = await handler(request)
        except Exception as error:
            if _has_done_nothing(error) and begun.written:
                await self._bookkeeper.forget_key(row)
            elif begun.written:
                self._bookkeeper.keys.put(row, row.at)
            raise
        finally:
            BEGUN.reset(before)
        body = response.body if isinstance(response, web.Response) else None
        body = body if isinstance(body, bytes) else b""
        if len(body) > BODY_BYTES_MAX:
            self._bookkeeper.keys.put(row, row.at)
            return response
        kept = KeyRow(
            row.owner,
            row.key,
            row.fingerprint,
            row.at,
            response.status,
            response.content_type if body else "",
            body,
        )
        await self._bookkeeper.keep_answer(kept)
        return response


async def _fingerprint(request: web.Request) -> bytes:
    """Tell one request from another: what is asked for, and with which body."""
    head = f"{request.method} {request.rel_url.raw_path_qs}\0".encode()
    return hashlib.sha256(head + await request.read()).digest()


def _has_done_nothing(error: Exception) -> bool:
    if isinstance(error, Problem):
        return error.status < 500
    return isinstance(error, NotFound | Refused | web.HTTPClientError)


def _replayed(row: KeyRow) -> web.Response:
    headers = {REPLAYED: "true"}
    if not row.kind:
        return web.Response(status=row.status, headers=headers)
    return web.Response(body=row.body, status=row.status, content_type=row.kind, headers=headers)
