"""`GET /`: the dashboard, three static files of this package.

The page itself is public; its data calls need the read scope. Its policy forbids every foreign
address and every script or style inside the page, so that a text from outside that slipped into it
could neither run nor speak to anybody.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from aiohttp import hdrs, web

from meterd.api.wire import Call

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_FILES = (
    ("/", "index.html", "text/html; charset=utf-8"),
    ("/dashboard/style.css", "style.css", "text/css; charset=utf-8"),
    ("/dashboard/app.js", "app.js", "text/javascript; charset=utf-8"),
)


@dataclass(frozen=True, slots=True)
class _StaticFile:
    """One file, read once."""

    body: bytes
    content_type: str
    etag: str

    async def answer(self, request: web.Request) -> web.Response:
        headers = {
            hdrs.CACHE_CONTROL: "no-cache",
            hdrs.ETAG: self.etag,
            "Content-Security-Policy": POLICY,
            "Referrer-Policy": "no-referrer",
        }
        if request.headers.get(hdrs.IF_NONE_MATCH) == self.etag:
            return web.Response(status=304, headers=headers)
        headers[hdrs.CONTENT_TYPE] = self.content_type
        return web.Response(body=self.body, headers=headers)


def calls() -> list[Call]:
    """List the calls that serve the dashboard."""
    found = []
    for path, name, content_type in _FILES:
        body = files("meterd.api").joinpath("dashboard", name).read_bytes()
        etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        found.append(Call("GET", path, None, _StaticFile(body, content_type, etag).answer))
    return found
