"""How requests are read and answers are written, the same in every room of the API.

Money and quantities are decimal strings, never JSON numbers; times are ISO 8601 in UTC; every list
is a page with a limit.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from meterd.api.problems import Problem
from meterd.api.settings import Scope
from meterd.core.flaws import json_flaw

LIMIT_MAX = 1000
LIMIT_DEFAULT = 100
REASON_CHARS_MAX = 500
COMMAND_BYTES_MAX = 64 * 1024  # Of a body that is no event.

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LAST_MS = 253_402_300_799_999  # The end of the year 9999: a service may name any deadline.
_WHOLE = re.compile(r"[0-9]{1,18}\Z", re.ASCII)
_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}\Z", re.ASCII)
_ESCROW_ID = re.compile(r"[A-Za-z0-9_-]{1,64}\Z", re.ASCII)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the API. A scope of None: open to everybody."""

    method: str
    path: str
    scope: Scope | None
    answer: Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a list is asked for.

    `cursor` is the `next` of the page before; "" at the beginning.
    """

    limit: int
    cursor: str

    @property
    def number(self) -> int:
        """The cursor of a list that is numbered. Raises `Problem`."""
        if not self.cursor:
            return 0
        if _WHOLE.match(self.cursor) is None:
            raise Problem(400, "bad-query", "cursor: give back the next of the page before")
        return int(self.cursor)


def read_page(request: web.Request) -> Page:
    """Read `limit` (1 to 1000) and `cursor` of a query. Raises `Problem`."""
    text = request.query.get("limit", str(LIMIT_DEFAULT))
    if _WHOLE.match(text) is None or not 1 <= int(text) <= LIMIT_MAX:
        raise Problem(400, "bad-query", f"limit: a whole number from 1 to {LIMIT_MAX}")
    cursor = request.query.get("cursor", "")
    if cursor and _ID.match(cursor) is None:
        raise Problem(400, "bad-query", "cursor: give back the next of the page before")
    return Page(int(text), cursor)


def page_answer(items: list[Any], following: str | None) -> web.Response:
    """Answer with a page of a list; `following` asks for the next, None: it was the last."""
    return json_answer({"items": items, "next": following})


def json_answer(document: Any, status: int = 200, **headers: str) -> web.Response:
    """Answer with JSON."""
    return web.Response(
        body=msgspec.json.encode(document),
        status=status,
        content_type="application/json",
        headers=headers,
    )


async def read_command(request: web.Request, kind: type[T], *, example: str) -> T:
    """Read a small JSON object strictly: unknown members are refused.

    An empty body is `{}`. Raises `Problem`.
    """
    body = await request.read()
    if len(body) > COMMAND_BYTES_MAX:
        raise Problem(413, "body-too-large", f"at most {COMMAND_BYTES_MAX} bytes here")
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        said = printable(json_flaw(error, body, "the body"), 200)
        raise Problem(400, "bad-body", f"{said}; send for example {example}") from None


def read_reason(text: str, *, needed: bool = True) -> str:
    """Check a reason for the journal. Raises `Problem`."""
    text = text.strip()
    if needed and not text:
        raise Problem(400, "reason-missing", 'say why: {"reason": "…"}; it is journalled')
    if len(text) > REASON_CHARS_MAX or not text.isprintable():
        detail = f"reason: one line of at most {REASON_CHARS_MAX} printable characters"
        raise Problem(400, "bad-body", detail)
    return text


def read_id(request: web.Request, name: str = "id") -> str:
    """Read an id out of the path. Raises `Problem`."""
    text = request.match_info[name]
    if _ID.match(text) is None:
        raise Problem(400, "bad-id", "an id has 1 to 128 letters, digits, _ . : or -")
    return text


def read_filter(request: web.Request, name: str) -> str | None:
    """Read an id or a word out of a query; None: it is not given. Raises `Problem`."""
    text = request.query.get(name)
    if text is not None and _ID.match(text) is None:
        raise Problem(400, "bad-query", f"{name}: 1 to 128 letters, digits, _ . : or -")
    return text


def is_id(text: str) -> bool:
    """Whether a text can be an agreement's id."""
    return _ID.match(text) is not None


def is_escrow_id(text: str) -> bool:
    """Whether a text can be an escrow's id."""
    return _ESCROW_ID.match(text) is not None


def iso_time(ms: int | None) -> str | None:
    """Write wall ms as "2026-11-23T12:00:00.000Z"; None for 0 and what no calendar holds."""
    if not ms or not 0 < ms <= _LAST_MS:
        return None
    moment = _EPOCH + timedelta(milliseconds=ms)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def printable(text: str, chars_max: int) -> str:
    """Cut and escape a text from outside."""
    cut = text[:chars_max]
    return cut if cut.isprintable() else cut.encode("unicode_escape").decode("ascii")[:chars_max]
