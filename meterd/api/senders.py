"""Which producer a request comes from, and whether it has signed what it sends.

The rule kept here: whoever comes with a producer's token is that producer, in every call that sends
something; where the producer has keys, the body is signed or the call is refused whole, with
nothing accrued. No call has to know: what it submits is that producer's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from meterd.api.auth import ACTOR
from meterd.api.problems import Problem
from meterd.api.settings import Scope
from meterd.bookkeeper import Bookkeeper
from meterd.producers import CALLER, PROOF_FIELDS, Producer, flaw_of
from meterd.sources import Proof

READS = frozenset({"GET", "HEAD", "OPTIONS"})
UNKNOWN = "this token belongs to no producer; name it in the token of one of [[producers]]"
BINARY = "ce-specversion is a header, which no signature covers; send CloudEvents in one document"


class Senders:
    """Knows the bookkeeper's producers, which a reload may change."""

    def __init__(
        self, bookkeeper: Bookkeeper, scopes: Mapping[web.AbstractRoute, Scope | None]
    ) -> None:
        self._bookkeeper = bookkeeper
        self._scopes = scopes

    def middleware(self) -> Middleware:
        """Make the middleware that lets a request pass as its producer's, or raises a `Problem`."""

        @web.middleware
        async def senders(request: web.Request, handler: Handler) -> web.StreamResponse:
            producers = self._bookkeeper.producers
            if not producers or request.method in READS:
                return await handler(request)
            producer = producers.by_token(request[ACTOR])
            if producer is None:
                sends = self._scopes.get(request.match_info.route) is Scope.INGEST
                if producers.required and sends:
                    raise Problem(403, "producer-unknown", UNKNOWN)
                return await handler(request)
            if producer.keys:
                await _hold_against(producer, request, self._bookkeeper.clock.wall)
            before = CALLER.set(producer.name)
            try:
                return await handler(request)
            finally:
                CALLER.reset(before)

        return senders


async def _hold_against(producer: Producer, request: web.Request, wall: Callable[[], int]) -> None:
    """Hold a body against its signature, as the bytes that came. Raises `Problem`."""
    if "ce-specversion" in request.headers:
        flaw = BINARY
    else:
        named = ((name, request.headers.get(name, "")) for name in PROOF_FIELDS)
        flaw = flaw_of(Proof.of(named), await request.read(), producer.keys, wall())
    if flaw:
        challenge = {"WWW-Authenticate": 'StandardWebhooks realm="meterd"'}
        raise Problem(401, "bad-signature", flaw, headers=challenge)
