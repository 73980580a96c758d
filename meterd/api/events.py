"""`POST /v1/events`: the source whose answer is its ack.

The rule kept here: 200 is said only after the commit, and a body is either refused whole, with
nothing accrued, or taken event by event. Events are cut out of the body as the bytes that came,
never written anew: their reading is the core's.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from aiohttp import web

from meterd.api.parts import Parts
from meterd.api.problems import Problem
from meterd.api.settings import Scope
from meterd.api.wire import Call, json_answer, printable
from meterd.bookkeeper import Recorded
from meterd.core.events import EVENT_BYTES_MAX, Reason
from meterd.core.flaws import json_flaw
from meterd.sources import Deliveries, Fault

SOURCE = "http"
NDJSON = frozenset({"application/x-ndjson", "application/ndjson", "application/jsonl"})
NOT_YET = frozenset({"application/cloudevents+json", "application/cloudevents-batch+json"})
BLANKS = b" \t\r\n"
EXAMPLE = '{"id": "req-1", "escrow_id": "esc_1", "meter": "tokens", "quantity": 12}'

_raws = msgspec.json.Decoder(list[msgspec.Raw])
_raw = msgspec.json.Decoder(msgspec.Raw)
_NOT_JSON = (msgspec.MsgspecError, ValueError, RecursionError)


class Events:
    """The room of `POST /v1/events`."""

    def __init__(self, parts: Parts) -> None:
        self._intake = parts.intake
        self._events_max = parts.settings.events_max

    def calls(self) -> list[Call]:
        """List the calls of this room."""
        return [Call("POST", "/v1/events", Scope.INGEST, self._post)]

    async def _post(self, request: web.Request) -> web.Response:
        if request.content_type in NOT_YET or "ce-specversion" in request.headers:
            detail = f"CloudEvents are not available in this version; send {EXAMPLE}"
            raise Problem(415, "media-type", detail)
        payloads = split(await request.read(), ndjson=request.content_type in NDJSON)
        if len(payloads) > self._events_max:
            detail = f"{len(payloads)} events; send at most {self._events_max} at once"
            raise Problem(413, "too-many-events", detail)
        recorded = await self._intake.submit(SOURCE, deliveries_of(payloads))
        return json_answer(results(recorded))


def split(body: bytes, *, ndjson: bool) -> list[bytes]:
    """Cut a body into its events, as they came: one object, a list of them, or one a line.

    Lines are taken where the content type says so, and where the first line is a whole JSON object
    with more lines behind it. Raises `Problem` when the body as a whole is none of these.
    """
    text = body.strip(BLANKS)
    if not text:
        raise Problem(400, "no-event", f"the body is empty; send {EXAMPLE}")
    if ndjson:
        return _lines(text)
    if text.startswith(b"["):
        return _items(text)
    if not text.startswith(b"{"):
        raise Problem(
            400, "not-json", f"{_what(text)}; send {EXAMPLE}, a list of them, or one a line"
        )
    try:
        _raw.decode(text)
    except _NOT_JSON as error:
        lines = _lines(text)
        if len(lines) > 1 and _is_json(lines[0]):
            return lines
        raise Problem(400, "not-json", f"the body: {_said(error, text)}") from None
    return [text]


def _lines(text: bytes) -> list[bytes]:
    return [line for part in text.split(b"\n") if (line := part.strip(BLANKS))]


def _items(text: bytes) -> list[bytes]:
    try:
        items = _raws.decode(text)
    except _NOT_JSON as error:
        raise Problem(400, "not-json", f"the body: {_said(error, text)}") from None
    if not items:
        raise Problem(400, "no-event", f"the list is empty; send {EXAMPLE}")
    return [bytes(item) for item in items]


def _is_json(text: bytes) -> bool:
    try:
        _raw.decode(text)
    except _NOT_JSON:
        return False
    return True


def _what(text: bytes) -> str:
    try:
        _raw.decode(text)
    except _NOT_JSON as error:
        return f"the body: {_said(error, text)}"
    return "the body is no event"


def _said(error: Exception, text: bytes) -> str:
    return printable(json_flaw(error, text), 200)


def deliveries_of(payloads: Sequence[bytes]) -> Deliveries:
    """Bundle payloads.

    One that is too large will be a dead letter, and only its beginning is kept of it.
    """
    if max(map(len, payloads)) <= EVENT_BYTES_MAX:
        return Deliveries(payloads)
    faults = {
        index: Fault(
            Reason.TOO_LARGE,
            f"{len(payload)} bytes; an event may have {EVENT_BYTES_MAX}, and so many are kept",
        )
        for index, payload in enumerate(payloads)
        if len(payload) > EVENT_BYTES_MAX
    }
    return Deliveries([payload[:EVENT_BYTES_MAX] for payload in payloads], faults=faults)


def results(recorded: Recorded) -> dict[str, object]:
    """Say what became of each event of a batch; rejections in the order of the events."""
    rejections = sorted(recorded.rejections, key=lambda rejection: rejection.index)
    return {
        "accepted": recorded.accepted,
        "duplicates": recorded.duplicates,
        "rejected": [
            {
                "index": rejection.index,
                "id": rejection.id,
                "reason": rejection.reason.value,
                "detail": rejection.detail,
            }
            for rejection in rejections
        ],
    }
