"""`POST /v1/events` and OpenMeter's `POST /api/v1/events`: sources whose answer is their ack.

The rule kept here: 200 is said only after the commit, and a body is either refused whole, with
nothing accrued, or taken event by event. Events are cut out of the body as the bytes that came,
never written anew: their reading is the core's.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import unquote

import msgspec
from aiohttp import hdrs, web

from meterd.api.parts import Parts
from meterd.api.problems import Problem
from meterd.api.settings import Scope
from meterd.api.wire import Call, json_answer, printable
from meterd.bookkeeper import Recorded
from meterd.core.envelopes import assemble
from meterd.core.events import EVENT_BYTES_MAX, Reason
from meterd.core.flaws import json_flaw
from meterd.sources import Deliveries, Fault

SOURCE = "http"
NDJSON = frozenset({"application/x-ndjson", "application/ndjson", "application/jsonl"})
CLOUDEVENT, CLOUDEVENTS = "application/cloudevents+json", "application/cloudevents-batch+json"
BINARY = "ce-"  # The attributes of a CloudEvent in binary mode are headers that begin so.
REJECTED_SHOWN = 10  # In an answer that is a sentence.
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
        return [
            Call("POST", "/v1/events", Scope.INGEST, self._post),
            Call("POST", "/api/v1/events", Scope.INGEST, self._post_openmeter),
        ]

    async def _post(self, request: web.Request) -> web.Response:
        return json_answer(results(await self._record(request)))

    async def _post_openmeter(self, request: web.Request) -> web.Response:
        """Take what OpenMeter's clients send: CloudEvents, answered without a body.

        Where nothing was taken, that is said as OpenMeter says it; a part that was rejected is
        among the dead letters all the same, so a client has nothing to send again.
        """
        recorded = await self._record(request)
        if recorded.rejections and not recorded.accepted and not recorded.duplicates:
            said = [f"{one.reason.value}: {one.detail}" for one in recorded.rejections]
            detail = "; ".join(said[:REJECTED_SHOWN])
            raise Problem(400, "rejected", f"kept as dead letters: {detail}")
        return web.Response(status=204, headers={"Meterd-Rejected": str(len(recorded.rejections))})

    async def _record(self, request: web.Request) -> Recorded:
        payloads = payloads_of(request, await request.read())
        if len(payloads) > self._events_max:
            detail = f"{len(payloads)} events; send at most {self._events_max} at once"
            raise Problem(413, "too-many-events", detail)
        return await self._intake.submit(SOURCE, deliveries_of(payloads))


def payloads_of(request: web.Request, body: bytes) -> list[bytes]:
    """Cut a body into its events, whatever its content type; a binary CloudEvent is put together.

    Raises `Problem`.
    """
    kind = request.content_type
    if f"{BINARY}specversion" in request.headers:
        return [_binary(request, body)]
    if kind == CLOUDEVENTS and not body.lstrip(BLANKS).startswith(b"["):
        raise Problem(400, "not-a-list", f"{CLOUDEVENTS} is a list of CloudEvents")
    if kind == CLOUDEVENT and not body.lstrip(BLANKS).startswith(b"{"):
        raise Problem(400, "not-an-object", f"{CLOUDEVENT} is one CloudEvent")
    return split(body, ndjson=kind in NDJSON)


def _binary(request: web.Request, body: bytes) -> bytes:
    """Put a CloudEvent in binary mode together: its attributes are headers, the body its data."""
    attributes = [
        (name.lower().removeprefix(BINARY), value)
        for name, value in request.headers.items()
        if name.lower().startswith(BINARY)
    ]
    try:
        decoded = [(name, _unquoted(name, value)) for name, value in attributes]
        return assemble(decoded, request.headers.get(hdrs.CONTENT_TYPE, ""), body)
    except ValueError as error:
        raise Problem(400, "not-an-event", str(error)) from None


def _unquoted(name: str, value: str) -> str:
    """Read a header's percent-encoding. Raises `ValueError`."""
    try:
        return unquote(value, errors="strict")
    except UnicodeDecodeError:
        raise ValueError(f"ce-{name[:80]}: its percent-encoding is no UTF-8") from None


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
