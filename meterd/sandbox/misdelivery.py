"""The last step of an answer: how it goes out, and each way in which a fault spoils that step.

The rule kept here: nothing in here moves money or knows why. Whether the request was carried out
was settled before; this is about what the asker gets to see of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiohttp import web

from meterd.sandbox.faults import Rule, spoiled

HTML = b"<!DOCTYPE html>\n<html><title>Bad gateway</title><body>Try later.</body></html>\n"
ENDLESS_PIECE = b"a" * 16_384
ENDLESS_BYTES_MAX = 1 << 30  # A client that reads on for a gibibyte has been tested enough.

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Reply:
    """What the service has to say: a status, a JSON document, further headers."""

    status: int
    document: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)


def refusal(status: int, code: str, text: str, **headers: str) -> Reply:
    """An error as the contract has it.

    `{"error": code, "message": text}`; `_` in a header's name stands for `-`.
    """
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, {"error": code, "message": text}, named)


def plain(reply: Reply) -> web.Response:
    """The answer as it is meant."""
    return web.Response(
        status=reply.status,
        body=_encode(reply.document),
        content_type="application/json",
        headers=reply.headers or None,
    )


async def deliver(request: web.Request, reply: Reply, rule: Rule | None) -> web.StreamResponse:
    """Answer as the rule has it; None: as it is meant."""
    if rule is None:
        return plain(reply)
    way = _WAYS.get(rule.kind)
    if way is not None:
        return await way(request, reply, rule)
    if rule.kind in _REFUSALS:
        return plain(_REFUSALS[rule.kind](request, rule))
    return plain(Reply(reply.status, spoiled(rule.kind, dict(reply.document), rule.told)))


def _error_500(_: web.Request, rule: Rule) -> Reply:
    status = rule.told.get("status", 500)
    return refusal(status, "internal_error", "something went wrong on our side")


def _rate_limit(_: web.Request, rule: Rule) -> Reply:
    headers = {"Retry_After": rule.told["retry_after"]} if "retry_after" in rule.told else {}
    return refusal(429, "rate_limited", "too many requests", **headers)


def _redirect(request: web.Request, rule: Rule) -> Reply:
    """Without a `location` it points back here.

    Who repeats a POST after it pays, and the log shows that.
    """
    location = rule.told.get("location", f"{request.path}?redirected=1")
    return refusal(rule.told.get("status", 307), "moved", "look elsewhere", Location=location)


def _echo_key(request: web.Request, rule: Rule) -> Reply:
    sent = request.headers.get("Authorization", "")
    return refusal(rule.told.get("status", 500), "internal_error", f"rejected header: {sent}")


_REFUSALS: Mapping[str, Callable[[web.Request, Rule], Reply]] = {
    "error_500_before": _error_500,
    "error_500_after": _error_500,
    "rate_limit": _rate_limit,
    "conflict_409": lambda _, __: refusal(409, "conflict", "this was asked for before"),
    "unauthorized_401": lambda _, __: refusal(401, "unauthorized", "this key is not valid"),
    "redirect": _redirect,
    "echo_key_in_error": _echo_key,
}


async def _close(request: web.Request, _: Reply, __: Rule) -> web.StreamResponse:
    """Not a byte of an answer; the response that is returned has nowhere to go."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=500)


async def _close_during(request: web.Request, reply: Reply, _: Rule) -> web.StreamResponse:
    """Half of the body that its head promised."""
    body = _encode(reply.document)
    response = _stream(reply.status)
    response.content_length = len(body)
    await response.prepare(request)
    await response.write(body[: len(body) // 2])
    if request.transport is not None:
        request.transport.close()  # Sends what was written, then ends.
    return response


async def _delay(_: web.Request, reply: Reply, rule: Rule) -> web.StreamResponse:
    await asyncio.sleep(rule.ms("seconds") / 1000)
    return plain(reply)


async def _land_late(request: web.Request, reply: Reply, rule: Rule) -> web.StreamResponse:
    """The connection ends, or an answer says that it was only taken note of."""
    if "status" not in rule.told:
        return await _close(request, reply, rule)
    status = rule.told["status"]
    return plain(Reply(status, reply.document) if status < 300 else _error_500(request, rule))


async def _html(_: web.Request, __: Reply, rule: Rule) -> web.StreamResponse:
    return web.Response(status=rule.told.get("status", 502), body=HTML, content_type="text/html")


async def _truncated(_: web.Request, reply: Reply, __: Rule) -> web.StreamResponse:
    """A whole HTTP answer with half a document in it."""
    body = _encode(reply.document)
    return web.Response(
        status=reply.status, body=body[: len(body) // 2], content_type="application/json"
    )


async def _empty(_: web.Request, __: Reply, ___: Rule) -> web.StreamResponse:
    return web.Response(status=200, content_type="application/json")


async def _empty_object(_: web.Request, __: Reply, ___: Rule) -> web.StreamResponse:
    return plain(Reply(200, {}))


async def _endless(request: web.Request, reply: Reply, _: Rule) -> web.StreamResponse:
    """A document that begins well and never ends, as long as somebody reads it."""
    response = _stream(reply.status)
    await response.prepare(request)
    await response.write(_encode(reply.document)[:-1] + b',"note":"')
    sent = 0
    while sent < ENDLESS_BYTES_MAX:
        if request.transport is None or request.transport.is_closing():
            break
        await response.write(ENDLESS_PIECE)
        sent += len(ENDLESS_PIECE)
        await asyncio.sleep(0)
    return response


def _stream(status: int) -> web.StreamResponse:
    return web.StreamResponse(status=status, headers={"Content-Type": "application/json"})


_WAYS: Mapping[str, Callable[[web.Request, Reply, Rule], Awaitable[web.StreamResponse]]] = {
    "close_before": _close,
    "close_after": _close,
    "close_during_answer": _close_during,
    "delay_answer": _delay,
    "land_late": _land_late,
    "html_page": _html,
    "truncated_json": _truncated,
    "empty_200": _empty,
    "empty_object_200": _empty_object,
    "endless_body": _endless,
}
