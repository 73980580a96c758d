"""`GET /v1/authorize`: the gate's question as proxies ask it, without a body.

nginx's `auth_request` and its likes send a GET of their own before they pass a request on, and
understand 2xx, 401 and 403 alone: to any other answer nginx says 500. The rule kept here: what may
not be served is a 403, whatever the reason, and the reason stands in a header. A mistake in the
proxy's own configuration stays a 400.

The question stands in the query or in headers, not in both. A proxy that copies what its callers
send takes the headers: in a query a caller's `customer-1&quantity=0` would be two parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aiohttp import web

from meterd.api.problems import Problem
from meterd.api.wire import json_answer

PREFIX = "X-Meterd-"
NAMES = ("agreement", "meter", "quantity")
DIMENSION = "dimension."  # ?dimension.model=m-large
DIMENSIONS_HEADER = "X-Meterd-Dimensions"  # model=m-large, kind=output
NO_AGREEMENT = "the request names no agreement"
UNKNOWN_AGREEMENT = "there is no such agreement"
EXAMPLE = "GET /v1/authorize?agreement=customer-1&meter=calls&quantity=1&dimension.model=m-large"


def question(request: web.Request) -> dict[str, Any]:
    """Read what is asked: agreement ("" where none is named), meter, quantity and dimensions.

    Raises `Problem`.
    """
    from_headers = any(name.lower().startswith(PREFIX.lower()) for name in request.headers)
    if from_headers and request.query:
        raise Problem(400, "bad-query", f"ask by the query or by {PREFIX}* headers, not by both")
    asked = _from_headers(request) if from_headers else _from_query(request)
    if not asked["meter"]:
        raise Problem(400, "bad-query", f"name the meter, such as {EXAMPLE}")
    return asked


def _from_query(request: web.Request) -> dict[str, Any]:
    dimensions: dict[str, str] = {}
    asked: dict[str, Any] = {"agreement": "", "meter": "", "quantity": "1"}
    seen: set[str] = set()
    for name, value in request.query.items():
        if name in seen:
            raise Problem(400, "bad-query", f"{name[:80]} is given twice")
        seen.add(name)
        if name.startswith(DIMENSION):
            dimensions[name.removeprefix(DIMENSION)] = value
        elif name in NAMES:
            asked[name] = value
        else:
            raise Problem(400, "bad-query", f"{name[:80]!r} is not known; ask {EXAMPLE}")
    return {**asked, "dimensions": dimensions}


def _from_headers(request: web.Request) -> dict[str, Any]:
    asked = {name: _header(request, f"{PREFIX}{name.title()}") for name in NAMES}
    dimensions: dict[str, str] = {}
    for part in filter(None, _header(request, DIMENSIONS_HEADER).split(",")):
        name, equals, value = part.strip().partition("=")
        if not equals or not name or name in dimensions:
            raise Problem(400, "bad-query", f"{DIMENSIONS_HEADER}: write model=m-large, kind=input")
        dimensions[name] = value
    return {**asked, "quantity": asked["quantity"] or "1", "dimensions": dimensions}


def _header(request: web.Request, name: str) -> str:
    found = request.headers.getall(name, [""])
    if len(found) > 1:
        raise Problem(400, "bad-query", f"{name} is given twice")
    return found[0].strip()


def refusal(reason: str) -> web.Response:
    """Refuse a request that nobody can be asked to pay for."""
    return verdict({"allowed": False, "headroom": None, "needed": "0.00", "reason": reason})


def verdict(answer: Mapping[str, Any]) -> web.Response:
    """Answer 200 or 403; what a proxy may hand on stands in headers."""
    headers = {f"{PREFIX}Needed": str(answer["needed"])}
    if answer["headroom"] is not None:
        headers[f"{PREFIX}Headroom"] = str(answer["headroom"])
    if answer.get("reason"):
        reason = str(answer["reason"]).encode("ascii", "replace").decode("ascii")
        headers[f"{PREFIX}Reason"] = reason
    return json_answer(dict(answer), 200 if answer["allowed"] else 403, **headers)
