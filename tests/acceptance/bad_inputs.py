"""The table of bad inputs: what is sent, its verdict, and what the reason must say.

Every row is fired over every transport that takes JSON (see `test_bad_inputs`). `@id` becomes an id
that was not used before, `@escrow` the escrow of an agreement that is active.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

OK, AGAIN, WHOLE = "accepted", "duplicate", "400"
# In a batch with others a number is read by its digits, alone as a number: the words differ.
TOO_MUCH = "at most 1e15"
PLAIN = "not a plain decimal such as 12"
DIGITS = "more than 16 digits before the point, or 24 behind it"


@dataclass(frozen=True)
class Row:
    """A payload, its verdict, and words that its reason has; " | " stands between alternatives.

    As the whole body of a request, or within a list, JSON that cannot even be cut is refused for
    the whole body (`WHOLE`), with the same words where they are not given.
    """

    payload: bytes
    verdict: str
    says: str = ""
    body: str = ""  # As the body of a request; "" is `verdict`.
    listed: str = ""  # As an item of a list; "" is `verdict`.
    body_says: str = ""


def event(raw_quantity: str | None = None, **changes: object) -> bytes:
    """A good event with changes; `...` leaves a field out, a raw quantity is put in as it is."""
    fields = {"id": "@id", "escrow_id": "@escrow", "meter": "units", "quantity": 1, **changes}
    text = json.dumps({name: value for name, value in fields.items() if value is not ...})
    if raw_quantity is not None:
        text = text.replace('"quantity": 1', f'"quantity": {raw_quantity}')
    return text.encode()


def moment(**shift: float) -> str:
    """A time so far from now."""
    return (datetime.now(UTC) + timedelta(**shift)).isoformat()


def _no_json(payload: bytes, says: str, body_says: str = "", listed: str = WHOLE) -> Row:
    return Row(payload, "malformed", says, WHOLE, listed, body_says)


def _no_event(payload: bytes, found: str) -> Row:
    """JSON, but no object."""
    return Row(payload, "malformed", f"must be an object, and is {found}", WHOLE, "", "no event")


def _quantity(quantity: str, says: str) -> Row:
    return Row(event(quantity), "bad_quantity", says)


def _nobody(says: str, **changes: object) -> Row:
    return Row(event(**changes), "unknown_agreement", says)


JSON: dict[str, Row] = {
    "null": _no_event(b"null", "null"),
    "a text": _no_event(b'"str"', "a text"),
    "a list": Row(b"[]", "malformed", "is a list", WHOLE, "", "the list is empty"),
    "true": _no_event(b"true", "true or false"),
    "a number": _no_event(b"17", "a number"),
    "truncated": _no_json(b'{"id": "x", "escrow_id": "e', "it breaks off", listed=WHOLE),
    "trailing garbage": _no_json(event() + b" garbage", "trailing characters"),
    "two documents": _no_json(event() + event(), "trailing characters"),
    "a byte order mark": _no_json(b"\xef\xbb\xbf" + event(), "begins with a byte order mark"),
    "UTF-16": _no_json(event().decode().encode("utf-16"), "begins with a byte order mark"),
    "gzip": _no_json(gzip.compress(event()), "is compressed (gzip)"),
    "single quotes": _no_json(b"{'id': 'x'}", "no JSON"),
    "a comment": _no_json(b'{"id": "@id" /* mine */}', "no JSON"),
    "a comma too many": _no_json(event().replace(b"}", b",}"), "no JSON"),
    "invalid UTF-8": Row(
        event(meter="x").replace(b'"x"', b'"\xff\xfe"'), "malformed", "is not valid UTF-8"
    ),
    "a lone surrogate": _no_json(event(id="x\ud800"), "unexpected end of"),
    "NUL in a text": Row(event(id="x\0y"), "malformed", "control characters"),
    "sixty thousand brackets": _no_json(b"[" * 60_000, "is a list", "nested too deeply"),
    "nested deeply": _no_json(
        event(x="@deep").replace(b'"@deep"', b"[" * 20_000 + b"]" * 20_000), "nested too deeply"
    ),
    "a mebibyte and one": Row(
        b'{"x": "' + b"x" * (1024 * 1024 - 8) + b'"}', "too_large", "1048577 bytes; an event may"
    ),
    "thousands of unknown keys": Row(event(**{f"k{n}": n for n in range(4000)}), OK),
    # What is given twice counts as it comes last, everywhere.
    "a key twice": Row(event().replace(b'"id": "@id"', b'"id": "", "id": "@id"'), OK),
}

NUMBERS: dict[str, Row] = {
    "NaN": _no_json(event("NaN"), "invalid character"),
    "Infinity": _no_json(event("-Infinity"), "invalid"),
    "a leading zero": _no_json(event("01"), "invalid number"),
    "NaN as a text": _quantity('"NaN"', PLAIN),
    "sNaN": _quantity('"sNaN"', PLAIN),
    "1e400": _quantity("1e400", PLAIN),
    "1e999999999": _quantity("1e999999999", PLAIN),
    "1e1000000 as a text": _quantity('"1e1000000"', PLAIN),
    "minus one": _quantity("-1", f"greater than 0 | {PLAIN}"),
    "minus one as a text": _quantity('"-1"', PLAIN),
    "zero": _quantity("0", "greater than 0"),
    "minus zero": _quantity("-0.0", PLAIN),
    "yes": _quantity("true", PLAIN),
    "nothing": _quantity("null", PLAIN),
    "a list of numbers": _quantity("[1]", PLAIN),
    "no quantity": Row(event(quantity=...), "bad_quantity", "there is no quantity"),
    "an empty quantity": _quantity('""', "there is no quantity"),
    "blanks": _quantity('" 5\\n"', PLAIN),
    "an underscore": _quantity('"1_000"', PLAIN),
    "a comma": _quantity('"1,5"', PLAIN),
    "full-width digits": Row(event(quantity="\uff11"), "bad_quantity", PLAIN),
    "hexadecimal": _quantity('"0x10"', PLAIN),
    "2^53+1": _quantity("9007199254740993", TOO_MUCH),
    "2^63-1": _quantity("9223372036854775807", f"{TOO_MUCH} | {DIGITS}"),
    "2^63": _quantity("9223372036854775808", f"{TOO_MUCH} | {DIGITS}"),
    "2^70": _quantity("1180591620717411303424", f"{TOO_MUCH} | {DIGITS}"),
    "one too many": _quantity("1000000000000001", TOO_MUCH),
    "one too many as a text": _quantity('"1000000000000001"', "at most 1e15"),
    "5,000 digits": _quantity("9" * 5000, DIGITS),
    "5,000 digits as a text": _quantity(f'"{"9" * 5000}"', DIGITS),
    "60,000 decimals": _quantity("0." + "3" * 60_000, DIGITS),
    "a million decimals": Row(event("0." + "3" * 1_000_000), "too_large", "an event may have"),
    "30 decimals": _quantity("0." + "3" * 30, DIGITS),
    "ten decimals": _quantity("0.0000000001", "more than 9 decimals"),
    "almost one": _quantity("0.99999999999999999999", "more than 9 decimals"),
    "nine decimals": Row(event("0.000000001"), OK),
    # At 0.001 a unit it is 1e12 USDC; in picos that is far beyond 64 bits.
    "the most": Row(event("1000000000000000", escrow_id=..., agreement="rich"), OK),
    "the most, to the last decimal": Row(
        event('"999999999999999.999999999"', escrow_id=..., agreement="rich"), OK
    ),
}

IDENTITY: dict[str, Row] = {
    "no id": Row(event(id=...), "no_id", "the event has no id"),
    "an empty id": Row(event(id=""), "no_id", "the event has no id"),
    "a number for an id": Row(event(id=5), "malformed", "id: it must be a text, and is a number"),
    "an id of 60 KiB": Row(event(id="x" * 60_000), "malformed", "60000 characters; 256"),
    "an id of 64 KiB": Row(event(id="x" * 65_536), "too_large", "an event may have 65536"),
    "line breaks in an id": Row(event(id="x\r\nSet-Cookie: y"), "malformed", "control characters"),
    "SQL in an id": Row(event(id="@id'; DROP TABLE counter; --"), OK),
    "a picture in an id": Row(event(id="@id-\U0001f4b8"), OK),
    "a source of 300 characters": Row(event(source="x" * 300), "malformed", "300 characters"),
    "line breaks in a source": Row(event(source="a\nb"), "malformed", "the source has control"),
    "the same again": Row(event(id="base", source="svc"), AGAIN),
    "the same, spelt otherwise": Row(event('"1.000"', id="base", source="svc"), AGAIN),
    "the same id, another quantity": Row(
        event("2", id="base", source="svc"), "conflict", "came before with other content"
    ),
    "the same id, another time": Row(
        event(id="base", source="svc", time=moment(hours=-1)), "conflict", "other content"
    ),
    "the same id, another agreement": Row(
        event(id="base", source="svc", escrow_id=..., agreement="other"), "conflict", "came before"
    ),
    "the same id of another producer": Row(event(id="base", source="@id"), OK),
    "no agreement": _nobody("names no agreement and no escrow_id", escrow_id=...),
    "an unknown escrow": _nobody("no agreement for 'esc_unknown'; bind", escrow_id="esc_unknown"),
    "a path for an escrow": _nobody("no agreement for '../admin'", escrow_id="../admin"),
    "line breaks in an escrow": _nobody("'esc\\r\\nx'", escrow_id="esc\r\nx"),
    "an escrow of 10 KiB": _nobody("no agreement for 'xxx", escrow_id="x" * 10_240),
    "an agreement that is a list": Row(
        event(escrow_id=["x"]), "malformed", "escrow_id: it must be a text, and is a list"
    ),
    "a closed agreement": Row(
        event(escrow_id=..., agreement="closed"), "closed", "agreement closed is closed"
    ),
    "two agreements": Row(event(agreement="kinds"), "mismatch", "name different agreements"),
    "an unknown meter": Row(
        event(meter="gpus"), "unknown_meter", "has no meter 'gpus'; it has units"
    ),
    "no meter": Row(event(meter=...), "unknown_meter", "it has units"),
    "a meter without a rate": Row(event(meter="tokens"), "unknown_meter", "no meter 'tokens'"),
    "no rate for the kind": Row(
        event(escrow_id=..., agreement="kinds", meter="tokens", dimensions={"kind": "x"}),
        "no_rate",
        "no rate of plan kinds fits the dimensions",
    ),
    "a number for a dimension": Row(
        event(dimensions={"kind": 1}), "malformed", "dimensions, a value of it: it must be a text"
    ),
    "dimensions that are a text": Row(
        event(dimensions="kind=x"), "malformed", "dimensions: it must be an object, and is a text"
    ),
    "a price where the plan has one": Row(event(price="0.5"), "bad_price", "leave price out"),
    "an unknown type": Row(event(type="meterd.milestone"), "unknown_type", "meterd.milestone"),
}

TIMES: dict[str, Row] = {
    "1969": Row(event(time="1969-12-31T23:59:59Z"), "late", "older than the dedupe window"),
    "9999": Row(event(time="9999-12-31T23:59:59Z"), "early", "more than 5 minutes ahead"),
    "a day ahead": Row(event(time=moment(days=1)), "early", "check the clock"),
    "older than the window": Row(event(time=moment(hours=-73)), "late", "older than"),
    "inside the window": Row(event(time=moment(hours=-71)), OK),
    "exactly at a price change": Row(event(escrow_id=..., agreement="dearer", time="@change"), OK),
    "no time zone": Row(
        event(time="2026-11-23T12:00:00"), "malformed", "time: write a time with its zone"
    ),
    "no time": Row(event(time="yesterday"), "malformed", "time: write a time with its zone"),
    "seconds since 1970": Row(
        event(time=1764072000), "malformed", "time: it must be a text such as 2026"
    ),
    "the 31st of February": Row(event(time="2026-02-31T00:00:00Z"), "malformed", "time: write"),
}


def cloud(raw_data: str | None = None, **changes: object) -> bytes:
    """A CloudEvent that is accepted, with changes; the data may be put in as they stand."""
    usual = {
        "specversion": "1.0",
        "id": "@id",
        "source": "/svc",
        "type": "meterd.usage",
        "subject": "good",
        "data": {"meter": "units", "quantity": 1},
    }
    fields = {name: value for name, value in {**usual, **changes}.items() if value is not ...}
    if raw_data is None:
        return json.dumps(fields).encode()
    return json.dumps({**fields, "data": "@data"}).replace('"@data"', raw_data).encode()


def _data(says: str, raw_data: str | None = None, **changes: object) -> Row:
    return Row(cloud(raw_data, **changes), "malformed", says)


def typed(raw_data: str) -> bytes:
    """A CloudEvent of a type that the configuration maps to a meter."""
    return cloud(raw_data, type="completion", subject="typed")


def _measured(raw_data: str, says: str) -> Row:
    return Row(typed(raw_data), "bad_quantity", says)


def _model(says: str, **data: object) -> Row:
    return Row(cloud(type="meterd.genai", subject="models", data=data), "bad_quantity", says)


CLOUDEVENTS: dict[str, Row] = {
    "a CloudEvent": Row(cloud(), OK),
    "a CloudEvent with attributes of its own": Row(cloud(traceparent="00-1", colour=None), OK),
    "specversion 0.3": _data('specversion: only "1.0" is known', specversion="0.3"),
    "specversion 1": _data('specversion: only "1.0" is known', specversion="1"),
    "a number for a specversion": _data("specversion: it must be a text", specversion=1.0),
    "a CloudEvent without a type": _data("type: a CloudEvent must say what it is", type=...),
    "a type that is a list": _data("type: it must be a text, and is a list", type=[]),
    "a CloudEvent of an unknown type": Row(
        cloud(type="com.example.unheard"), "unknown_type", "com.example.unheard"
    ),
    "a type of 10 KiB": Row(cloud(type="x" * 10_240), "unknown_type", "xxx"),
    "a type of meterd that is not known": Row(
        cloud(type="meterd.teapot"), "unknown_type", "meterd.teapot"
    ),
    "a CloudEvent without an id": Row(cloud(id=...), "no_id", "the event has no id"),
    "a CloudEvent without a subject": Row(
        cloud(subject=...), "unknown_agreement", "names no agreement"
    ),
    "a subject that nobody knows": Row(
        cloud(subject="../admin"), "unknown_agreement", "no agreement for '../admin'"
    ),
    "a subject beside another agreement": Row(
        cloud(agreement="kinds"), "mismatch", "subject and agreement name different agreements"
    ),
    "a time of no zone": _data("time: write a time with its zone", time="2026-11-23T12:00:00"),
    "no data": _data("there is none, and meterd.usage needs it", data=...),
    "data that are null": _data("data: ", "null"),
    "data that are a text": _data("data: it must be an object, and is a text", '"x"'),
    "data that are a list": _data("data: it must be an object, and is a list", "[1]"),
    "data that are no JSON": Row(cloud("{no: 1}"), "malformed", "no JSON", WHOLE, WHOLE),
    "data of XML": _data(
        "text/xml cannot be read; send application/json", datacontenttype="text/xml"
    ),
    "data of nothing known": _data("cannot be read", datacontenttype="\u0000"),
    "base64 that is none": _data("data_base64: no base64", data=..., data_base64="***"),
    "base64 of what is no JSON": _data("no JSON", data=..., data_base64="bm8ganNvbg=="),
    "base64 of JSON": Row(
        # {"meter":"units","quantity":1}
        cloud(data=..., data_base64="eyJtZXRlciI6InVuaXRzIiwicXVhbnRpdHkiOjF9"),
        OK,
    ),
    "a quantity that is none": Row(
        cloud('{"meter": "units", "quantity": 1e400}'), "bad_quantity", PLAIN
    ),
    "data without a meter": Row(cloud('{"quantity": 1}'), "unknown_meter", "it has units"),
    "typed data": Row(typed('{"usage": {"total": "1.5"}, "model": "m"}'), OK),
    "a value that is missing": _measured("{}", "data: there is no $.usage.total"),
    "a value that is null": _measured('{"usage": {"total": null}}', "there is no $.usage.total"),
    "a value that is true": _measured('{"usage": {"total": true}}', "$.usage.total is no number"),
    "a value that is an object": _measured('{"usage": {"total": {}}}', "is no number"),
    "a value that is a word": _measured('{"usage": {"total": "many"}}', PLAIN),
    "a value below zero": _measured('{"usage": {"total": -1}}', "greater than 0 | not a plain"),
    "a value of ten decimals": _measured('{"usage": {"total": 0.0000000001}}', "9 decimals"),
    "a value with an exponent": _measured('{"usage": {"total": 1e999}}', PLAIN),
    "typed data without data": Row(
        cloud(type="completion", subject="typed", data=...), "bad_quantity", "there is no $.usage"
    ),
    "data nested too deeply": Row(
        typed('{"usage": {"total": 1}, "x": ' + "[" * 20 + "]" * 20 + "}"),
        "malformed",
        "data: nested more than 16 deep",
    ),
    "a dimension that is a list": Row(
        typed('{"usage": {"total": 1}, "model": ["a", "b"]}'), "malformed", "the dimension model"
    ),
    "a call of a model without tokens": _model("neither input_tokens nor output_tokens"),
    "more from the cache than read": _model(
        "are part of input_tokens", input_tokens=5, cached_tokens=6
    ),
    "tokens below zero": _model("input_tokens: ", input_tokens=-5),
    "tokens that are a word": _model("output_tokens: not a plain", output_tokens="many"),
}

ROWS: dict[str, Row] = {**JSON, **NUMBERS, **IDENTITY, **TIMES, **CLOUDEVENTS}
# The transport's own id of a delivery serves where the event has none.
NEEDS_ID = frozenset({"no id", "an empty id", "a CloudEvent without an id"})
