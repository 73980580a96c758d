"""`GET /openapi.json`: every call of the API in the form that tools read, OpenAPI 3.1.

The rule: the table below says what a call is for, what it takes and what it answers. Paths, methods
and scopes are taken from the calls themselves, so that they cannot differ, and a call that is not
in the table stops the daemon at its start. Shapes name what is always there; answers may grow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from meterd import __version__
from meterd.api import idempotency, problems
from meterd.api.idempotency import takes_keys
from meterd.api.wire import LIMIT_DEFAULT, LIMIT_MAX, REASON_CHARS_MAX, Call, json_answer
from meterd.core.events import Reason
from meterd.core.settlement import ReleaseStatus

PATH = "/openapi.json"
JSON = "application/json"
EVENTS = "text/event-stream"
Schema = Mapping[str, Any]

# -- Shapes ----------------------------------------------------------------------------------------

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
FLAG: Schema = {"type": "boolean"}
BINARY: Schema = {"schema": {"type": "string", "format": "binary"}}
TEXT_OR_NONE: Schema = {"type": ["string", "null"]}
WHOLE_OR_NONE: Schema = {"type": ["integer", "null"]}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
# Money and quantities are texts, never JSON numbers: a number would become a float somewhere.
AMOUNT: Schema = {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]+)?$", "examples": ["0.007808"]}
AMOUNT_OR_NONE: Schema = {**AMOUNT, "type": ["string", "null"]}
TIME: Schema = {"type": ["string", "null"], "examples": ["2026-11-23T12:00:00.000Z"]}
ID: Schema = {"type": "string", "pattern": "^[A-Za-z0-9_.:-]{1,128}$"}
HEX: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
NUMBER: Schema = {"type": "string", "pattern": "^[0-9]{1,18}$"}
REASON: Schema = {
    "type": "string",
    "maxLength": REASON_CHARS_MAX,
    "description": "One printable line for the journal.",
    "examples": ["checked with the payer"],
}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _object(**members: Schema) -> Schema:
    """Describe an object that always has these members, and may have others."""
    return {"type": "object", "required": [*members], "properties": members}


def _body(required: str = "", **members: Schema) -> Schema:
    """Describe what is sent: nothing but these members is taken."""
    return {
        "type": "object",
        "required": required.split(),
        "properties": members,
        "additionalProperties": False,
    }


def _otlp_holders(scopes: str, items: str) -> Schema:
    """Describe what holds spans or log records: by resource, and by what made them."""
    things: Schema = {"type": "object", "properties": {items: _list({"type": "object"})}}
    return _list({"type": "object", "properties": {scopes: _list(things)}})


def _page(name: str) -> Schema:
    return _object(items=_list(_ref(name)), next=TEXT_OR_NONE)


_ESCROW: Schema = {**TEXT, "pattern": "^[A-Za-z0-9_-]{1,64}$"}
_QUANTITY: Schema = {
    "anyOf": [
        {"type": "integer", "minimum": 1, "maximum": 10**15},
        {"type": "string", "pattern": r"^[0-9]{1,15}(\.[0-9]{1,9})?$"},
    ]
}
SCHEMAS: Mapping[str, Schema] = {
    "Problem": _object(type=TEXT, title=TEXT, status=WHOLE, detail=TEXT, instance=TEXT),
    "Event": {
        "type": "object",
        "required": ["id", "meter", "quantity"],
        "properties": {
            "id": {**TEXT, "minLength": 1, "maxLength": 256},
            "agreement": TEXT,
            "escrow_id": TEXT,
            "meter": TEXT,
            "quantity": {
                "description": "Greater than 0, at most 1e15, with at most 9 decimals.",
                "anyOf": [
                    {"type": "number", "exclusiveMinimum": 0, "maximum": 10**15},
                    {"type": "string", "pattern": r"^[0-9]{1,15}(\.[0-9]{1,9})?$"},
                ],
            },
            "source": TEXT,
            "time": {**TEXT, "format": "date-time"},
            "dimensions": TEXTS,
        },
    },
    "CloudEvent": {
        "type": "object",
        "required": ["specversion", "type", "source", "id", "subject"],
        "properties": {
            "specversion": {"const": "1.0"},
            "type": {**TEXT, "minLength": 1},
            "source": {**TEXT, "minLength": 1, "maxLength": 256},
            "id": {**TEXT, "minLength": 1, "maxLength": 256},
            "subject": {**TEXT, "description": "The id of the agreement, or of its escrow."},
            "time": {**TEXT, "format": "date-time"},
            "sequence": TEXT,
            "datacontenttype": TEXT,
            "data": {},
        },
    },
    "Recorded": _object(
        accepted=WHOLE,
        duplicates=WHOLE,
        rejected=_list(_object(index=WHOLE, id=TEXT, reason=_ref("Reason"), detail=TEXT)),
    ),
    # OpenTelemetry describes its own; of the fields that a request may have, these count here.
    "Traces": {
        "type": "object",
        "required": [],
        "properties": {"resourceSpans": _otlp_holders("scopeSpans", "spans")},
    },
    "Logs": {
        "type": "object",
        "required": [],
        "properties": {"resourceLogs": _otlp_holders("scopeLogs", "logRecords")},
    },
    "Exported": {
        "type": "object",
        "properties": {"partialSuccess": {"type": "object", "properties": {"errorMessage": TEXT}}},
    },
    "Refusal": _object(code=WHOLE, message=TEXT),
    "Reason": {"type": "string", "enum": [*Reason]},
    "Agreement": _object(
        id=TEXT,
        plan=TEXT,
        payer=TEXT,
        state=TEXT,
        reason=TEXT,
        next=TEXT_OR_NONE,
        closing=FLAG,
        opened_at=TIME,
        events=WHOLE,
        accrued=AMOUNT,
        released=AMOUNT,
        unsettled=AMOUNT,
        in_doubt=AMOUNT,
        headroom=AMOUNT_OR_NONE,
        holds=AMOUNT,
        runway={**WHOLE_OR_NONE, "description": "Seconds that the headroom lasts."},
        uncollectible=AMOUNT,
        escrows=_list(_ref("Escrow")),
        release={"anyOf": [_ref("Release"), {"type": "null"}]},
    ),
    "Escrow": _object(
        id=TEXT,
        role=TEXT,
        status=TEXT,
        service_status=TEXT,
        total=AMOUNT,
        released=AMOUNT,
        remaining=AMOUNT,
        deadline=TIME,
    ),
    "Release": _object(
        id=TEXT,
        agreement=TEXT_OR_NONE,
        escrow=TEXT,
        amount=AMOUNT,
        status={"type": "string", "enum": [*ReleaseStatus]},
        why=TEXT,
        created_at=TIME,
        history=_list(_object(at=TIME, status=TEXT, detail=TEXT)),
    ),
    "Receipt": _object(
        number=WHOLE,
        at=TIME,
        statement=_object(
            form=WHOLE,
            kind={"type": "string", "enum": ["release", "late", "close"]},
            agreement=TEXT,
            number=WHOLE,
            previous=HEX,
            key=HEX,
            at=WHOLE,
            release={"type": ["object", "null"]},
            usage=_list({"type": "object"}),
            accrued=AMOUNT,
            released=AMOUNT,
        ),
        hash=HEX,
        signature=TEXT,
    ),
    "Usage": _object(
        meter=TEXT,
        unit=TEXT,
        dimensions=TEXTS,
        quantity=AMOUNT,
        events=WHOLE,
        card=TEXT,
        accrued=AMOUNT_OR_NONE,
    ),
    "Plan": _object(
        name=TEXT,
        pattern=TEXT,
        card=TEXT,
        rates=_list({"type": "object"}),
        settle={"type": "object"},
    ),
    "DeadLetter": _object(
        id=WHOLE,
        source=TEXT,
        event_id=TEXT,
        reason=_ref("Reason"),
        detail=TEXT,
        received_at=TIME,
        payload=TEXT,
        payload_bytes=WHOLE,
    ),
    "Tried": _object(
        tried=WHOLE,
        accepted=WHOLE,
        duplicates=WHOLE,
        rejected=_list(_object(id=WHOLE, reason=_ref("Reason"), detail=TEXT)),
        next=WHOLE_OR_NONE,
    ),
    "Producer": _object(
        source=TEXT,
        first=WHOLE,
        last=WHOLE,
        last_at=TIME,
        missing=WHOLE,
        missing_ranges=_list({**_list(WHOLE), "minItems": 2, "maxItems": 2}),
        missing_since=TIME,
        given_up=WHOLE,
        runs=WHOLE,
        exact=FLAG,
    ),
    "GiveUp": _body("source reason", source=TEXT, reason=REASON),
    "JournalEntry": _object(
        number=WHOLE, at=TIME, actor=TEXT, action=TEXT, subject=TEXT, detail=TEXT, hash=TEXT
    ),
    "Status": _object(
        version=TEXT,
        now=TIME,
        flow=_object(word=TEXT, blocked=TEXT),
        totals=TEXTS,
        events=_object(accepted=WHOLE, duplicates=WHOLE, rejected=WHOLE, pending=WHOLE),
        agreements=_object(total=WHOLE, by_state={"type": "object"}),
        frozen=_list({"type": "object"}),
        in_doubt=_list({"type": "object"}),
        exhausted=_list({"type": "object"}),
        sources=_list(_object(name=TEXT, kind=TEXT, connected=FLAG, error=TEXT)),
        store=_object(writable=FLAG, bytes=WHOLE),
        dead_letters=WHOLE,
    ),
    "Copy": _object(path=TEXT, bytes=WHOLE),
    # One event of the stream; `data` is a JSON object.
    "StreamEvent": {
        "type": "object",
        "properties": {"id": TEXT, "event": TEXT, "data": TEXT},
    },
    "Alive": _object(status={"const": "ok"}),
    "Ready": _object(status={"const": "ready"}, degraded=TEXT),
    "Binding": _body(
        "plan",
        plan=TEXT,
        payer={"type": ["string", "null"], "maxLength": 256},
        escrows={
            "type": ["object", "null"],
            "minProperties": 1,
            "properties": {
                role: {"anyOf": [_ESCROW, _list(_ESCROW)]}
                for role in ("main", "base", "overage", "wallet")
            },
            "additionalProperties": False,
        },
    ),
    "Order": _body(
        "plan",
        plan=TEXT,
        id={**TEXT, "maxLength": 128},
        payer={**TEXT, "maxLength": 256},
        provider={**TEXT, "maxLength": 256},
        deposit={"type": ["string", "null"], "pattern": r"^[0-9]{1,9}(\.[0-9]{1,6})?$"},
        next=FLAG,
    ),
    "Opening": _object(id=TEXT, agreement=TEXT, plan=TEXT),
    "Ask": _body(
        "agreement meter",
        agreement=TEXT,
        meter=TEXT,
        quantity=_QUANTITY,
        dimensions=TEXTS,
        hold={"type": ["integer", "null"], "minimum": 1, "maximum": 86_400},
    ),
    "Verdict": _object(allowed=FLAG, headroom=AMOUNT_OR_NONE, needed=AMOUNT),
    "Hold": _object(
        id=TEXT,
        agreement=TEXT,
        meter=TEXT,
        dimensions=TEXTS,
        quantity=AMOUNT,
        amount=AMOUNT,
        created_at=TIME,
        expires_at=TIME,
    ),
    "Capture": _body(quantity={"anyOf": [_QUANTITY, {"type": "null"}]}),
    "Question": _body(
        "plan",
        plan=TEXT,
        usage={
            **_list(
                _body(
                    "meter",
                    meter=TEXT,
                    quantity=_QUANTITY,
                    dimensions=TEXTS,
                    price=TEXT_OR_NONE,
                    value=TEXT,
                )
            ),
            "maxItems": 1000,
        },
        at={"type": ["string", "null"], "format": "date-time"},
        ended=FLAG,
    ),
    "Quote": _object(
        plan=TEXT,
        card=TEXT,
        lines=_list(
            _object(
                meter=TEXT,
                rate=TEXT,
                quantity=AMOUNT,
                working=_list(TEXT),
                charge=AMOUNT,
                role=TEXT,
            )
        ),
        total=AMOUNT,
        payable=AMOUNT,
    ),
    "Why": _body("reason", reason={**REASON, "minLength": 1}),
    "MaybeWhy": _body(reason=REASON),
    "Resolution": _body("landed reason", landed=FLAG, reason={**REASON, "minLength": 1}),
    "Replay": _body(
        "reason",
        reason=_ref("Reason"),
        limit={"type": "integer", "minimum": 1, "maximum": LIMIT_MAX, "default": LIMIT_DEFAULT},
        before=WHOLE_OR_NONE,
    ),
    "RpcCall": {
        "type": "object",
        "required": ["jsonrpc", "method"],
        "properties": {
            "jsonrpc": {"const": "2.0"},
            "id": {"anyOf": [TEXT, WHOLE]},
            "method": TEXT,
            "params": {"type": "object"},
        },
    },
    "Rpc": _object(jsonrpc=TEXT),
    "Wanted": _body("path", path={**TEXT, "maxLength": 1024, "examples": ["/var/backups/m.db"]}),
}

# -- Calls -----------------------------------------------------------------------------------------

_LIMIT = {"type": "integer", "minimum": 1, "maximum": LIMIT_MAX, "default": LIMIT_DEFAULT}
PAGE: Mapping[str, Schema] = {"limit": _LIMIT, "cursor": ID}
NUMBERED: Mapping[str, Schema] = {"limit": _LIMIT, "cursor": NUMBER}
EVENT_EXAMPLE = {"id": "req-1", "agreement": "customer-1", "meter": "tokens", "quantity": 1532}
_OTLP_ITEM = {
    "traceId": "5b8efff798038103d269b633813fc60c",
    "spanId": "eee19b7ec3c1b174",
    "attributes": [
        {"key": "meterd.agreement", "value": {"stringValue": "customer-1"}},
        {"key": "gen_ai.operation.name", "value": {"stringValue": "chat"}},
        {"key": "gen_ai.usage.input_tokens", "value": {"intValue": "1532"}},
        {"key": "gen_ai.usage.output_tokens", "value": {"intValue": "80"}},
    ],
}
_SPAN = {**_OTLP_ITEM, "endTimeUnixNano": "1795348800000000000"}
_RECORD = {**_OTLP_ITEM, "eventName": "gen_ai.client.inference.operation.details"}
TRACES_EXAMPLE = {"resourceSpans": [{"scopeSpans": [{"spans": [_SPAN]}]}]}
LOGS_EXAMPLE = {"resourceLogs": [{"scopeLogs": [{"logRecords": [_RECORD]}]}]}


@dataclass(frozen=True, slots=True)
class Described:
    """What one call is for, what it takes, and what it answers besides problems."""

    summary: str
    answers: Mapping[int, Schema | str]  # A schema of JSON, or another content type; "": nothing.
    query: Mapping[str, Schema] | None = None
    body: str = ""  # A name in `SCHEMAS`.
    example: object = None
    otlp: bool = False  # In protobuf as well, and refused by a `google.rpc.Status` in either.


def _act(summary: str, body: str = "Why", *, done: int = 200) -> Described:
    shown = _ref("Agreement")
    answers = {200: shown} if done == 200 else {200: shown, done: shown}
    return Described(summary, answers, body=body, example={"reason": "checked with the payer"})


AGREEMENT = "/v1/agreements/{id}"
LETTER = "/v1/dead-letters/{number}"

CALLS: Mapping[str, Described] = {
    "GET /": Described("The dashboard.", {200: "text/html", 304: ""}),
    "GET /dashboard/style.css": Described("Its style.", {200: "text/css", 304: ""}),
    "GET /dashboard/app.js": Described("Its script.", {200: "text/javascript", 304: ""}),
    f"GET {PATH}": Described("This document.", {200: {"type": "object"}}),
    "POST /v1/events": Described(
        "Tell what was used: one event, a list, or one a line. 200 means: on the disk.",
        {200: _ref("Recorded")},
        body="Event",
        example=EVENT_EXAMPLE,
    ),
    "POST /api/v1/events": Described(
        "The ingest call of OpenMeter: a CloudEvent or a list of them, whose type selects meters.",
        {204: ""},
        body="CloudEvent",
        example={
            "specversion": "1.0",
            "type": "completion",
            "source": "svc-a",
            "id": "req-1",
            "subject": "customer-1",
            "data": {"model": "m-large", "usage": {"total_tokens": 1532}},
        },
    ),
    "POST /v1/traces": Described(
        "OTLP: spans of an OpenTelemetry exporter; those that say what a model used are counted.",
        {200: _ref("Exported")},
        body="Traces",
        example=TRACES_EXAMPLE,
        otlp=True,
    ),
    "POST /v1/logs": Described(
        "OTLP: log records of an OpenTelemetry exporter; those of a model's use are counted.",
        {200: _ref("Exported")},
        body="Logs",
        example=LOGS_EXAMPLE,
        otlp=True,
    ),
    "GET /v1/agreements": Described(
        "List the agreements.",
        {200: _page("Agreement")},
        query={**PAGE, "state": ID, "plan": ID},
    ),
    "POST /v1/agreements": Described(
        "Open one: lock the escrows that its plan needs, and bind them. 202: it is being locked.",
        {200: _ref("Agreement"), 201: _ref("Agreement"), 202: {"type": "object"}},
        body="Order",
        example={"plan": "stream", "id": "customer-1"},
    ),
    "GET /v1/openings": Described(
        "List escrows being locked.", {200: _page("Opening")}, query=NUMBERED
    ),
    "POST /v1/authorize": Described(
        "May this call be served? With `hold`, its price is set aside for so many seconds.",
        {200: _ref("Verdict"), 402: _ref("Verdict")},
        body="Ask",
        example={"agreement": "customer-1", "meter": "tokens", "quantity": 1500, "hold": 60},
    ),
    "GET /v1/authorize": Described(
        "The same question as proxies ask it, by the query or by X-Meterd-* headers: 200, or 403"
        " with the reason in X-Meterd-Reason.",
        {200: _ref("Verdict"), 403: _ref("Verdict")},
        query={"agreement": TEXT, "meter": TEXT, "quantity": _QUANTITY},
    ),
    "GET /v1/holds": Described("List live holds.", {200: _page("Hold")}, query=PAGE),
    "POST /v1/holds/{id}/capture": Described(
        "Turn a hold into usage: what was really used.",
        {200: _ref("Recorded")},
        body="Capture",
        example={"quantity": "1312"},
    ),
    "POST /v1/holds/{id}/void": Described("Free a hold.", {200: _ref("Hold")}),
    f"GET {AGREEMENT}": Described("Show an agreement.", {200: _ref("Agreement")}),
    f"GET {AGREEMENT}/usage": Described(
        "List its counters.", {200: _page("Usage")}, query=NUMBERED
    ),
    f"GET {AGREEMENT}/releases": Described(
        "List its releases, newest first.",
        {200: _page("Release")},
        query={**PAGE, "status": ID},
    ),
    f"GET {AGREEMENT}/receipts": Described(
        "List its receipts, oldest first: the order of their chain.",
        {200: _page("Receipt")},
        query=NUMBERED,
    ),
    "GET /v1/receipts/key": Described(
        "The public key that receipts are signed with.",
        {200: _object(algorithm={"const": "Ed25519"}, key=HEX)},
    ),
    f"PUT {AGREEMENT}": Described(
        "Bind an escrow to a plan; the same again changes nothing.",
        {200: _ref("Agreement"), 201: _ref("Agreement")},
        body="Binding",
        example={"plan": "stream", "escrows": {"main": "esc_1"}},
    ),
    f"POST {AGREEMENT}/settle": _act("Release now what waits.", "MaybeWhy", done=202),
    f"POST {AGREEMENT}/close": _act("Settle to the last, then finish.", "MaybeWhy", done=202),
    f"POST {AGREEMENT}/freeze": _act("Release nothing more; usage still counts."),
    f"POST {AGREEMENT}/resume": _act("Go on from what the service shows."),
    "GET /v1/releases": Described(
        "List the releases of all agreements, newest first.",
        {200: _page("Release")},
        query={**PAGE, "escrow": ID, "agreement": ID, "status": ID},
    ),
    "POST /v1/releases/{id}/resolve": Described(
        "Say what became of a release in doubt.",
        {200: _ref("Agreement")},
        body="Resolution",
        example={"landed": True, "reason": "seen in the service's own history"},
    ),
    "GET /v1/dead-letters": Described(
        "List rejected events.",
        {200: _page("DeadLetter")},
        query={**NUMBERED, "reason": _ref("Reason")},
    ),
    "POST /v1/dead-letters/replay": Described(
        "Try those of one reason again.",
        {200: _ref("Tried")},
        body="Replay",
        example={"reason": "unknown_meter"},
    ),
    f"GET {LETTER}": Described("Show one, whole.", {200: _ref("DeadLetter")}),
    f"POST {LETTER}/replay": Described("Try one again.", {200: _ref("Recorded")}),
    f"DELETE {LETTER}": Described(
        "Throw one away; the reason stands in the query or the body.",
        {204: ""},
        query={"reason": REASON},
    ),
    "GET /v1/producers": Described(
        "List the producers that number their events, and what is missing of each.",
        {200: _page("Producer")},
        query={**NUMBERED, "missing": {"type": "string", "enum": ["true", "false"]}},
    ),
    "POST /v1/producers/give-up": Described(
        "Wait no more for what is missing of a producer.",
        {200: _object(source=TEXT, given_up=WHOLE)},
        body="GiveUp",
        example={"source": "svc-a", "reason": "the broker lost its disk"},
    ),
    "GET /v1/journal": Described(
        "Who did what, when and why.", {200: _page("JournalEntry")}, query=NUMBERED
    ),
    "GET /v1/plans": Described("List prices and thresholds.", {200: _page("Plan")}, query=PAGE),
    "POST /v1/quote": Described(
        "Price a usage of one period under a plan, with its working; nothing is counted.",
        {200: _ref("Quote")},
        body="Question",
        example={"plan": "stream", "usage": [{"meter": "tokens", "quantity": 1500}]},
    ),
    "GET /v1/stream": Described(
        "Server-sent events: accruals, releases and changes of state, until the client hangs up.",
        {200: EVENTS},
        query={
            "agreement": ID,
            "seconds": {"type": "integer", "minimum": 0, "maximum": 86_400},
        },
    ),
    "POST /v1/backup": Described(
        "Write a copy of the store into a new file of this machine.",
        {201: _ref("Copy")},
        body="Wanted",
        example={"path": "/var/backups/meterd/monday.db"},
    ),
    "GET /v1/status": Described(
        "Is money flowing, and what should a person do next.", {200: _ref("Status")}
    ),
    "POST /mcp": Described(
        "The Model Context Protocol, for agents: one message of JSON-RPC 2.0. Tools that change"
        " something need the scope admin as well.",
        {
            200: _ref("Rpc"),
            202: "",
            400: _ref("Rpc"),
            404: _ref("Rpc"),
            406: _ref("Rpc"),
            501: problems.CONTENT_TYPE,
        },
        body="RpcCall",
        example={"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}},
    ),
    "GET /healthz": Described("The process lives.", {200: _ref("Alive")}),
    "GET /readyz": Described("The disk takes commits, sources are there.", {200: _ref("Ready")}),
    "GET /metrics": Described("Every series, for Prometheus.", {200: "text/plain"}),
}

PROTOBUF = "application/x-protobuf"
STATUSES = frozenset({400, 413, 503})  # The problems that OTLP wants to hear of by a `Status`.
PROBLEMS: Mapping[int, str] = {
    400: "What was sent cannot be read; `detail` says why and what to send.",
    401: "A known token is missing.",
    403: "The token lacks the scope; or, without tokens, the caller is not of this machine.",
    404: "There is no such thing.",
    409: "Refused as things stand; `detail` says what to do instead.",
    413: "Too much at once.",
    415: "A content type or a content encoding that is not taken.",
    503: "Not now: send it again later.",
}
_IN_PATH = re.compile(r"\{([a-z]+)\}")


def document(calls: Sequence[Call]) -> dict[str, Any]:
    """Describe these calls. Raises `KeyError` for one that the table does not have."""
    paths: dict[str, dict[str, Any]] = {}
    for call in calls:
        described = CALLS[f"{call.method} {call.path}"]
        paths.setdefault(call.path, {})[call.method.lower()] = _operation(call, described)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "meterd",
            "version": __version__,
            "license": {"name": "Apache License 2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def call_for(calls: Sequence[Call]) -> Call:
    """Make the call that shows the document of these calls and of itself."""

    async def answer(_: web.Request) -> web.Response:
        return json_answer(shown)

    own = Call("GET", PATH, None, answer)
    shown = document([*calls, own])
    return own


KEY: Mapping[str, Any] = {
    "name": idempotency.HEADER,
    "in": "header",
    "description": "Sent again with the same key, the call does its work once.",
    "schema": {"type": "string", "minLength": 1, "maxLength": idempotency.KEY_CHARS_MAX},
}


def _operation(call: Call, described: Described) -> dict[str, Any]:
    answers = {str(status): _answer(what) for status, what in described.answers.items()}
    problems_of = dict(PROBLEMS)
    if takes_keys(call.method, call.scope):
        problems_of[422] = "The key came with another request before; take a new one."
    for status, text in problems_of.items():
        problem, own = _problem(text), answers.get(str(status), {})
        answers[str(status)] = {
            **problem,
            "content": {**own.get("content", {}), **problem["content"]},
        }
    if described.otlp:
        for status in (200, *STATUSES):
            shape = described.answers.get(status, _ref("Refusal"))
            answers[str(status)]["content"] |= {JSON: {"schema": shape}, PROTOBUF: BINARY}
    operation: dict[str, Any] = {
        "summary": described.summary,
        "parameters": _parameters(call.path, described.query or {})
        + ([KEY] if takes_keys(call.method, call.scope) else []),
        "responses": answers,
        # Without configured tokens everything is open to programs of this machine.
        "security": [] if call.scope is None else [{"token": []}, {}],
    }
    if call.scope is not None:
        operation["x-scope"] = call.scope.value
    if described.body:
        operation["requestBody"] = _request_body(described)
    return operation


def _parameters(path: str, query: Mapping[str, Schema]) -> list[dict[str, Any]]:
    in_path = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": NUMBER if name == "number" else ID,
        }
        for name in _IN_PATH.findall(path)
    ]
    in_query = [{"name": name, "in": "query", "schema": shape} for name, shape in query.items()]
    return in_path + in_query


def _request_body(described: Described) -> dict[str, Any]:
    shape = _ref(described.body)
    if described.body == "Event":
        shape = {"anyOf": [shape, {**_list(shape), "minItems": 1}]}
    content: dict[str, Any] = {JSON: {"schema": shape, "example": described.example}}
    if described.otlp:
        content[PROTOBUF] = BINARY
    return {"required": bool(SCHEMAS[described.body]["required"]), "content": content}


def _answer(what: Schema | str) -> dict[str, Any]:
    if what == "":
        return {"description": "Done."}
    if what == problems.CONTENT_TYPE:
        return _problem("This daemon cannot; `detail` says what is missing.")
    if isinstance(what, str):
        schema = _ref("StreamEvent") if what == EVENTS else TEXT
        return {"description": "As asked.", "content": {what: {"schema": schema}}}
    return {"description": "As asked.", "content": {JSON: {"schema": what}}}


def _problem(text: str) -> dict[str, Any]:
    content = {problems.CONTENT_TYPE: {"schema": _ref("Problem")}}
    return {"description": text, "content": content}
