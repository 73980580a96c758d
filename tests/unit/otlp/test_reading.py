from __future__ import annotations

import base64
import json

import pytest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue

from meterd.otlp import answers, reading
from meterd.otlp.genai import WANTED
from meterd.otlp.reading import BadRequest, Encoding, Signal, TooManyItems
from tests import otlp
from tests.otlp import AT_NS, CALL, SPAN, TRACE

ENCODINGS = list(Encoding)
SIGNALS = list(Signal)


def read(body, signal=Signal.TRACES, encoding=Encoding.JSON, items_max=100):
    return reading.read(signal, encoding, body, wanted=WANTED, items_max=items_max)


def json_of(span, **members):
    """A request of one span, written by hand."""
    scope = {"spans": [span], **members}
    return json.dumps({"resourceSpans": [{"scopeSpans": [scope]}]}).encode()


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("signal", SIGNALS)
def test_items_are_read_in_order_with_the_wanted_attributes_alone(signal, encoding):
    """What a prompt says is none of meterd's business."""
    attributes = {**CALL, "gen_ai.input.messages": "a secret", "other": 1}
    traces = signal is Signal.TRACES
    make, request = (otlp.span, otlp.traces) if traces else (otlp.record, otlp.logs)
    message = request(make(attributes), make({}, span_id="ab" * 8))
    first, second = read(otlp.written(message, encoding), signal, encoding)

    assert (first.trace_id, first.span_id, first.at_ns) == (TRACE, SPAN, AT_NS)
    assert first.attributes == CALL
    assert first.resource == otlp.SERVICE
    assert (second.span_id, second.attributes) == ("ab" * 8, {})


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("signal", SIGNALS)
def test_an_empty_request_has_no_items(signal, encoding):
    """OTLP wants it answered with success."""
    empty = b"" if encoding is Encoding.PROTOBUF else b"{}"

    assert read(empty, signal, encoding) == []


@pytest.mark.parametrize(
    "body",
    [
        b'{"resourceSpans": null}',
        b'{"resourceSpans": [{"resource": null, "scopeSpans": null}]}',
        b'{"resourceSpans": [{"scopeSpans": [{"spans": null}]}]}',
        b'{"resourceSpans": [{}], "later": {"deep": [1, 2]}}',
        b'{"resource_spans": [{"scope_spans": [{"spans": [{}]}]}]}',
    ],
)
def test_null_is_nothing_and_an_unknown_name_is_passed_over(body):
    """As protobuf's JSON has the one and OTLP's the other; names are in lowerCamelCase alone."""
    assert read(body) == []


def test_attributes_of_json_are_read_in_each_form_that_a_number_has():
    """64-bit integers come as texts and as numbers."""
    values = [
        {"intValue": "12"},
        {"intValue": 12},
        {"stringValue": "12"},
        {"doubleValue": 12},
        {"doubleValue": 12.0},
        {"doubleValue": 12.5},
        {"doubleValue": "NaN"},
        {"intValue": "-12"},
        {"intValue": "twelve"},
        {"boolValue": False},
        {"arrayValue": {"values": [{"intValue": "1"}]}},
        {"kvlistValue": {}},
        {"bytesValue": "AA=="},
        {"arrayValue": None, "kvlistValue": None, "stringValue": "12"},
    ]
    name = "gen_ai.usage.input_tokens"
    read_as = [
        item.attributes[name]
        for value in values
        for item in read(json_of({"attributes": [{"key": name, "value": value}]}))
    ]

    assert read_as == [12, 12, "12", 12, 12, "12.5", "NaN", -12, "twelve", *[None] * 4, "12"]


@pytest.mark.parametrize("value", [None, {}, {"stringValue": None}, {"later": 1}])
def test_an_attribute_of_json_without_a_value_is_not_there(value):
    """Neither zero nor a text of no letters."""
    (item,) = read(json_of({"attributes": [{"key": "gen_ai.system", "value": value}]}))

    assert item.attributes == {}


@pytest.mark.parametrize(
    "span",
    [
        {"traceId": base64.b64encode(bytes(range(16))).decode(), "spanId": "AAECAwQFBgc="},
        {"traceId": None, "spanId": None},
        {"traceId": TRACE[:-1], "spanId": SPAN + "0"},
        {"traceId": "0" * 32, "spanId": "0" * 16},
        {"traceId": TRACE[:-1] + "g", "spanId": SPAN[:-1] + " "},
    ],
)
def test_an_id_of_json_that_is_not_hexadecimal_is_none(span):
    """OTLP's JSON has no base64."""
    (item,) = read(json_of(span))

    assert (item.trace_id, item.span_id) == ("", "")


@pytest.mark.parametrize("at", [AT_NS, str(AT_NS)])
def test_a_time_of_json_is_a_number_or_its_digits(at):
    """Exact either way."""
    (item,) = read(json_of({"endTimeUnixNano": at}))

    assert item.at_ns == AT_NS


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b'"text"',
        b"{",
        b"\xef\xbb\xbf{}",
        b'{"resourceSpans": {}}',
        b'{"resourceSpans": [1]}',
        b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"attributes": {"a": 1}}]}]}]}',
        b'{"resourceSpans": ' + b"[" * 100_000,
        b'{"later": ' + b"[" * 100_000,
        b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"traceId": "\xff"}]}]}]}',
        json_of({"endTimeUnixNano": "soon"}),
        json_of({"endTimeUnixNano": -1}),
        json_of({"endTimeUnixNano": str(2**64)}),
        json_of({"traceId": 12}),
    ],
)
def test_a_body_that_is_no_request_in_json_is_refused_with_a_sentence(body):
    """As a whole, and it says why."""
    with pytest.raises(BadRequest) as refused:
        read(body)

    assert str(refused.value).isprintable()
    assert 10 < len(str(refused.value)) < 300


def nested(levels: int) -> bytes:
    """A span with an attribute that is a list in a list in a list."""
    inner = AnyValue(string_value="x").SerializeToString()
    for _ in range(levels):
        listed = b"\x0a" + answers.varint(len(inner)) + inner
        inner = b"\x2a" + answers.varint(len(listed)) + listed
    for field in (b"\x12", b"\x4a", b"\x12", b"\x12", b"\x0a"):
        inner = field + answers.varint(len(inner)) + inner
    return inner


def test_a_list_in_a_list_is_no_mistake():
    """What is nested without end is refused below; what is nested at all is not."""
    (item,) = read(nested(10), encoding=Encoding.PROTOBUF)

    assert item.attributes == {}


@pytest.mark.parametrize(
    "body",
    [
        b"\xff",
        b"{}",
        b"\x0a\xff\xff\xff\xff\x0f",
        b"\x0a\x05\x0a",
        otlp.traces(otlp.span(CALL)).SerializeToString()[:-1],
        otlp.traces(otlp.span({"gen_ai.system": "~"})).SerializeToString().replace(b"~", b"\xff"),
        nested(2000),
    ],
)
def test_a_body_that_is_no_request_in_protobuf_is_refused_with_a_sentence(body):
    """Cut off, nonsense, no UTF-8 or nested without end."""
    with pytest.raises(BadRequest, match=r"^the body is no ExportTraceServiceRequest in protobuf$"):
        read(body, encoding=Encoding.PROTOBUF)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("signal", SIGNALS)
def test_more_items_than_are_taken_are_refused_before_any_is_looked_at(signal, encoding):
    """What holds items counts too: nothing but empty holders is work as well."""
    traces = signal is Signal.TRACES
    make, request = (otlp.span, otlp.traces) if traces else (otlp.record, otlp.logs)
    few, many = (otlp.written(request(*[make({})] * n), encoding) for n in (8, 9))
    empty = b"\x0a\x00" * 11
    if encoding is Encoding.JSON:
        name = "resourceSpans" if traces else "resourceLogs"
        empty = json.dumps({name: [{}] * 11}).encode()

    assert len(read(few, signal, encoding, items_max=10)) == 8
    for body in (many, empty):
        with pytest.raises(TooManyItems, match="more than 10"):
            read(body, signal, encoding, items_max=10)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_more_attributes_than_anybody_has_are_refused_before_any_is_looked_at(
    encoding, monkeypatch
):
    """Of all items together, the empty ones too."""
    monkeypatch.setattr(reading, "ATTRIBUTES_MAX", 10)
    few, many = (
        otlp.written(
            otlp.traces(otlp.span({str(n): n for n in range(5)}), otlp.span(dict.fromkeys(rest))),
            encoding,
        )
        for rest in ("abcde", "abcdef")
    )

    assert len(read(few, encoding=encoding)) == 2
    with pytest.raises(TooManyItems, match="more than 10 attributes in all"):
        read(many, encoding=encoding)
