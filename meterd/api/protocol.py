"""What aiohttp answers by itself, before any room is asked: in the form of all other problems.

A request that is no HTTP never comes to the middlewares. The rule kept here: nothing of what was
sent is repeated in the answer.
"""

from __future__ import annotations

from aiohttp import hdrs, web
from aiohttp.web_protocol import RequestHandler
from aiohttp.web_server import Server

from meterd.api.problems import Problem, answer

UNREADABLE = "this is no request of HTTP/1.1, or one of its headers is too long"
EXPECTATION = "the only expectation that is met is 100-continue"


class _Handler(RequestHandler):
    """Reads requests from one connection, and refuses what is none with a problem."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Log as aiohttp does, answer in our form, and close the connection."""
        super().handle_error(request, status, exc, message)
        kind, detail = "request-refused", UNREADABLE
        if status >= 500:
            kind, detail = "internal", "meterd made a mistake; its log says which"
        response = answer(Problem(status, kind, detail), request)
        response.force_close()
        return response


class _Server(Server):
    """Makes a handler of ours for each connection."""

    def __call__(self) -> RequestHandler:
        return _Handler(self, loop=self._loop, **self._kwargs)


class Runner(web.AppRunner):
    """Serves an application; what aiohttp answers by itself is a problem like all others."""

    async def _make_server(self) -> Server:
        server = await super()._make_server()
        server.__class__ = _Server  # There is no hook for it; a test looks whether it still works.
        return server


async def expected(request: web.Request) -> web.StreamResponse | None:
    """Meet `Expect: 100-continue`; refuse any other expectation."""
    if request.headers.get(hdrs.EXPECT, "").lower() != "100-continue":
        return answer(Problem(417, "expectation", EXPECTATION), request)
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0  # The answer itself has not begun.
    return None
