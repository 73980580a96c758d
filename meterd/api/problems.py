"""Errors as RFC 9457 problems: a type, a title, a status, a sentence and the place.

Never a stack trace.

The rule kept here: what a caller did wrong is answered. What meterd itself did wrong is answered
too, and where it may have left memory ahead of the disk, it is handed to `fatal`, which ends the
process so that the next one starts from the disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from meterd.errors import (
    InvariantBroken,
    MeterdError,
    NotFound,
    Refused,
    StoreCorrupt,
    StoreFailed,
    Unavailable,
)
from meterd.logs import get_logger

log = get_logger(__name__)

CONTENT_TYPE = "application/problem+json"
INSTANCE_CHARS_MAX = 200
_ENDS_THE_PROCESS = (InvariantBroken, StoreFailed, StoreCorrupt, AssertionError)
_READS = frozenset({"GET", "HEAD", "OPTIONS"})


class Problem(Exception):
    """A request that is refused; `detail` says why and what to do instead."""

    def __init__(
        self,
        status: int,
        kind: str,
        detail: str,
        *,
        headers: Mapping[str, str] | None = None,
        members: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.kind = kind
        self.detail = detail
        self.headers = dict(headers or {})
        self.members = dict(members or {})


def answer(problem: Problem, request: web.BaseRequest) -> web.Response:
    """Write a problem as its response."""
    document = {
        "type": f"urn:meterd:problem:{problem.kind}",
        "title": HTTPStatus(problem.status).phrase,
        "status": problem.status,
        "detail": problem.detail,
        "instance": request.rel_url.raw_path[:INSTANCE_CHARS_MAX],
        **problem.members,
    }
    response = web.Response(
        body=msgspec.json.encode(document),
        status=problem.status,
        content_type=CONTENT_TYPE,
        headers=problem.headers,
    )
    if problem.status in {413, 415}:
        response.force_close()  # What follows on this connection may be the rest of the body.
    return response


def middleware(
    fatal: Callable[[BaseException], None], *, body_limit: int, retry_after_s: int
) -> Middleware:
    """Make the middleware that turns every error into a problem."""

    @web.middleware
    async def problems(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except Problem as problem:
            return answer(problem, request)
        except web.HTTPException as error:
            return answer(_of_http(error, request, body_limit), request)
        except (web.RequestPayloadError, ConnectionError):
            return answer(Problem(400, "body-broken", "the body broke off"), request)
        except (Unavailable, NotFound, Refused) as error:
            return answer(_of_ours(error, retry_after_s), request)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  # The last net: nothing may leave as a trace.
            return answer(_of_bug(error, request, fatal), request)

    return problems


def sentence(
    error: Exception, fatal: Callable[[BaseException], None], place: str, *, changes: bool
) -> str:
    """Say what the middleware would, and do what it does, where no answer of HTTP carries it.

    `changes`: what failed may have left memory ahead of the disk.
    """
    if isinstance(error, Problem):
        return error.detail
    if isinstance(error, Unavailable | NotFound | Refused):
        return str(error)
    return _mistake(error, fatal, "POST", place, ends=changes).detail


def _of_http(error: web.HTTPException, request: web.Request, body_limit: int) -> Problem:
    """Say what aiohttp refuses by itself in our form."""
    details = {
        404: "there is no such address; the calls are listed at /openapi.json",
        405: f"{request.method[:16]} is not possible here; see the Allow header",
        413: f"the body has more than {body_limit} bytes (http.body_limit); send less at once",
    }
    kinds = {404: "not-found", 405: "method-not-allowed", 413: "body-too-large"}
    headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    status = error.status if error.status >= 400 else 500
    detail = details.get(status, error.reason)
    return Problem(status, kinds.get(status, "request-refused"), detail, headers=headers)


def _of_ours(error: MeterdError, retry_after_s: int) -> Problem:
    if isinstance(error, Unavailable):
        headers = {"Retry-After": str(retry_after_s)}
        return Problem(503, "unavailable", str(error), headers=headers)
    if isinstance(error, NotFound):
        return Problem(404, "not-found", str(error))
    return Problem(409, "refused", str(error))


def _of_bug(
    error: Exception, request: web.Request, fatal: Callable[[BaseException], None]
) -> Problem:
    """A mistake of ours.

    Behind a call that changes something nobody knows what was applied and not committed.
    """
    path = request.rel_url.raw_path[:INSTANCE_CHARS_MAX]
    return _mistake(error, fatal, request.method, path, ends=request.method not in _READS)


def _mistake(
    error: Exception, fatal: Callable[[BaseException], None], method: str, path: str, *, ends: bool
) -> Problem:
    log.error(
        "A request failed by a mistake of meterd's own.",
        action="request_failed",
        method=method,
        path=path,
        exc_info=error,
    )
    if ends or isinstance(error, _ENDS_THE_PROCESS):
        fatal(error)
        headers = {"Retry-After": "5"}
        detail = "meterd stops and starts again from its disk; send this again"
        return Problem(503, "restarting", detail, headers=headers)
    return Problem(500, "internal", "meterd made a mistake; its log says which")
