"""Who may call: bearer tokens with scopes; without tokens, only programs of this machine.

Each call names its scope in the table of its room; a call without an entry is refused. With tokens,
a request needs one whose scopes list that very scope. Without any, meterd listens on loopback
alone, where the danger is a web page in a browser of this machine: a name that resolves to
127.0.0.1 (the Host header tells) or a form that posts across origins (the Origin header tells).
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Mapping, Sequence
from hmac import compare_digest
from urllib.parse import urlsplit

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from meterd.api.problems import Problem
from meterd.api.settings import ApiToken, Scope

ACTOR = web.RequestKey("actor", str)  # The name for the journal.
# What the caller may do, for calls that hold several acts; without tokens, everything.
SCOPES = web.RequestKey("scopes", frozenset[Scope])
OPEN_ACTOR = "http"
SCHEME = "bearer "


class Guard:
    """Knows the tokens and what each call asks for."""

    def __init__(
        self, tokens: Sequence[ApiToken], scopes: Mapping[web.AbstractRoute, Scope | None]
    ) -> None:
        # Digests have one length: a comparison tells nothing of the length of a token either.
        self._tokens = [(_digest(token.text), token) for token in tokens]
        self._scopes = scopes

    def middleware(self) -> Middleware:
        """Make the middleware that lets a request pass or raises a `Problem`."""

        @web.middleware
        async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
            self._admit(request)
            return await handler(request)

        return guard

    def _admit(self, request: web.Request) -> None:
        request[ACTOR], request[SCOPES] = OPEN_ACTOR, frozenset[Scope]()
        if not self._tokens:
            request[SCOPES] = frozenset(Scope)
            _same_machine(request)
            return
        route = request.match_info.route
        if route.resource is None:
            return  # 404 or 405: aiohttp's own answer follows.
        if route not in self._scopes:
            raise Problem(403, "forbidden", "this call is open to nobody")
        scope = self._scopes[route]
        if scope is None:
            return
        token = self._token(request)
        if scope not in token.scopes:
            raise scope_missing(scope)
        request[ACTOR], request[SCOPES] = token.name, token.scopes

    def _token(self, request: web.Request) -> ApiToken:
        header = request.headers.get(hdrs.AUTHORIZATION, "")
        text = header[len(SCHEME) :].strip() if header[: len(SCHEME)].lower() == SCHEME else ""
        given = _digest(text)
        found: ApiToken | None = None
        for digest, token in self._tokens:  # All of them, always: how long it takes tells nothing.
            if compare_digest(digest, given):
                found = token
        if found is None or not text:
            detail = "send a known token: Authorization: Bearer TOKEN"
            challenge = {"WWW-Authenticate": 'Bearer realm="meterd"'}
            raise Problem(401, "token-missing", detail, headers=challenge)
        return found


def scope_missing(scope: Scope) -> Problem:
    """Refuse a caller whose token does not list a scope."""
    return Problem(403, "scope-missing", f"this needs a token with the scope {scope.value}")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _same_machine(request: web.Request) -> None:
    """Refuse what a foreign web page makes a browser of this machine send."""
    if not _is_loopback(request.headers.get(hdrs.HOST, "")):
        detail = "without tokens meterd answers only to localhost, 127.0.0.1 or [::1] as Host"
        raise Problem(403, "host-refused", detail)
    origin = request.headers.get(hdrs.ORIGIN)
    if origin is not None and _authority(origin) != request.headers.get(hdrs.HOST, ""):
        raise Problem(403, "origin-refused", "a page of another origin may not call this")


def _authority(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _is_loopback(authority: str) -> bool:
    try:
        host = urlsplit(f"//{authority}").hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
