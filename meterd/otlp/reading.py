"""What an exporter sends, decoded: one shape for spans and log records, protobuf and JSON.

The rules kept here: both encodings of a request give the same items, and only the attributes that
somebody asks for are looked at. A body that is none of OTLP raises `BadRequest` as a whole; what is
odd about one item (an id of zeros, a number that is none) is left for `genai` to judge, so that it
never costs its neighbours.

OTLP's JSON is not protobuf's: ids are hexadecimal, enumerations are numbers, and what is unknown is
passed over. So it is read by shapes of its own, which name the few fields that count here.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from meterd.core.events import printable
from meterd.core.flaws import json_flaw

TRACE_ID_HEX, SPAN_ID_HEX = 32, 16
ATTRIBUTES_MAX = 500_000  # Of all items together: a million that are empty are work all the same.
EXACT_MAX = 2**53  # Up to here a double holds every whole number.
_HEX = re.compile(r"[0-9a-f]+\Z", re.ASCII)
_DIGITS = re.compile(r"[0-9]{1,20}\Z", re.ASCII)

Scalar = int | str | None  # None: there is a value, and it is neither a number nor a text.


class Signal(enum.StrEnum):
    """What an exporter sends, and what its items are called."""

    TRACES = "traces"
    LOGS = "logs"

    @property
    def items(self) -> str:
        """A word for several of its items."""
        return "spans" if self is Signal.TRACES else "log records"


class Encoding(enum.StrEnum):
    """How it is written: the content type of the request, and of its answer."""

    PROTOBUF = "application/x-protobuf"
    JSON = "application/json"


class BadRequest(Exception):
    """A body that is not the request it should be; the message says why."""


class TooManyItems(Exception):
    """A request with more items than are taken at once."""


@dataclass(frozen=True, slots=True)
class Item:
    """One span or log record, as far as usage is concerned.

    Ids are hexadecimal; "" where there is none that could name anything. `at_ns` is when a span
    ended or a record was made, since the epoch; 0: it does not say. Of the attributes, and of those
    of the resource, only the wanted are here.
    """

    signal: Signal
    trace_id: str
    span_id: str
    at_ns: int
    event_name: str
    attributes: Mapping[str, Scalar]
    resource: Mapping[str, Scalar]


def read(
    signal: Signal, encoding: Encoding, body: bytes, *, wanted: Collection[str], items_max: int
) -> list[Item]:
    """Decode a request. Raises `BadRequest`, or `TooManyItems` before any item is looked at."""
    form = _FORMS[encoding]
    request = form.decode(signal, body)
    groups = list(_groups(signal, request, items_max))
    make = _span if signal is Signal.TRACES else _record
    items = []
    for resource, of_resource in groups:
        about = {} if resource is None else _chosen(resource.attributes, wanted, form)
        items += [
            make(item, _chosen(item.attributes, wanted, form), about, form) for item in of_resource
        ]
    return items


# -- One walk through either encoding --------------------------------------------------------------


def _groups(signal: Signal, request: Any, items_max: int) -> Iterator[tuple[Any, Sequence[Any]]]:
    """Yield each resource with the items of one of its scopes.

    What holds items counts as one too: a request of nothing but empty holders is work as well.
    """
    count = attributes = 0
    resources = request.resource_spans if signal is Signal.TRACES else request.resource_logs
    for of_resource in resources or ():
        count += 1
        scopes = of_resource.scope_spans if signal is Signal.TRACES else of_resource.scope_logs
        for scope in scopes or ():
            items = (scope.spans if signal is Signal.TRACES else scope.log_records) or ()
            count += 1 + len(items)
            if count > items_max:
                raise TooManyItems(f"more than {items_max} {signal.items}; send fewer at once")
            attributes += sum(len(item.attributes or ()) for item in items)
            if attributes > ATTRIBUTES_MAX:
                detail = f"more than {ATTRIBUTES_MAX} attributes in all; send fewer items at once"
                raise TooManyItems(detail)
            yield of_resource.resource, items
        if count > items_max:
            raise TooManyItems(f"more than {items_max} resources; send fewer at once")


def _chosen(attributes: Any, wanted: Collection[str], form: _Form) -> dict[str, Scalar]:
    """Read the attributes that are wanted; one without a value is not there."""
    return {
        attribute.key: form.scalar(attribute.value)
        for attribute in attributes or ()
        if attribute.key in wanted and attribute.value is not None and form.is_set(attribute.value)
    }


def _span(span: Any, chosen: dict[str, Scalar], about: dict[str, Scalar], form: _Form) -> Item:
    return Item(
        Signal.TRACES,
        _id(form.hexadecimal(span.trace_id), TRACE_ID_HEX),
        _id(form.hexadecimal(span.span_id), SPAN_ID_HEX),
        _nanoseconds(span.end_time_unix_nano),
        "",
        chosen,
        about,
    )


def _record(record: Any, chosen: dict[str, Scalar], about: dict[str, Scalar], form: _Form) -> Item:
    name = record.event_name or chosen.get("event.name") or ""
    return Item(
        Signal.LOGS,
        _id(form.hexadecimal(record.trace_id), TRACE_ID_HEX),
        _id(form.hexadecimal(record.span_id), SPAN_ID_HEX),
        _nanoseconds(record.time_unix_nano) or _nanoseconds(record.observed_time_unix_nano),
        name if isinstance(name, str) else "",
        chosen,
        about,
    )


def _id(text: str, length: int) -> str:
    """An id, if it can be one: the right length, and not all zeros."""
    usable = len(text) == length and _HEX.match(text) is not None and text.strip("0")
    return text if usable else ""


def _nanoseconds(value: int | str | None) -> int:
    if isinstance(value, str):
        if _DIGITS.match(value) is None:
            raise BadRequest(f"a time is {printable(value, 40)!r}; write nanoseconds as digits")
        value = int(value)
    if value is None or value == 0:
        return 0
    if not 0 < value < 2**64:
        raise BadRequest("a time is no number of nanoseconds since the epoch")
    return value


def _exact(number: float) -> int | str:
    """A double as the whole number it is; any other as a text, which nobody takes for a count."""
    if number.is_integer() and -EXACT_MAX <= number <= EXACT_MAX:
        return int(number)
    return repr(number)


# -- The two encodings -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Form:
    """How one encoding writes requests, ids and values."""

    decode: Callable[[Signal, bytes], Any]
    hexadecimal: Callable[[Any], str]
    is_set: Callable[[Any], bool]
    scalar: Callable[[Any], Scalar]


def _decode_protobuf(signal: Signal, body: bytes) -> Any:
    traces = signal is Signal.TRACES
    request = ExportTraceServiceRequest() if traces else ExportLogsServiceRequest()
    try:
        request.ParseFromString(body)
    except (DecodeError, RecursionError, ValueError):
        raise BadRequest(f"the body is no {type(request).__name__} in protobuf") from None
    return request


def _protobuf_scalar(value: Any) -> Scalar:
    match value.WhichOneof("value"):
        case "string_value":
            return str(value.string_value)
        case "int_value":
            return int(value.int_value)
        case "double_value":
            return _exact(value.double_value)
    return None


class _Value(msgspec.Struct, rename="camel", gc=False):
    """A value; what is longer than a line is only known to be there."""

    string_value: str | None = None
    int_value: int | str | None = None
    double_value: float | str | None = None
    bool_value: bool | None = None
    array_value: msgspec.Raw = msgspec.Raw(b"")
    kvlist_value: msgspec.Raw = msgspec.Raw(b"")
    bytes_value: msgspec.Raw = msgspec.Raw(b"")


class _Attribute(msgspec.Struct, gc=False):
    key: str = ""
    value: _Value | None = None


class _Resource(msgspec.Struct):
    attributes: list[_Attribute] | None = None


class _Span(msgspec.Struct, rename="camel"):
    trace_id: str | None = None
    span_id: str | None = None
    end_time_unix_nano: int | str | None = None
    attributes: list[_Attribute] | None = None


class _ScopeSpans(msgspec.Struct, rename="camel"):
    spans: list[_Span] | None = None


class _ResourceSpans(msgspec.Struct, rename="camel"):
    resource: _Resource | None = None
    scope_spans: list[_ScopeSpans] | None = None


class _Traces(msgspec.Struct, rename="camel"):
    resource_spans: list[_ResourceSpans] | None = None


class _LogRecord(msgspec.Struct, rename="camel"):
    trace_id: str | None = None
    span_id: str | None = None
    time_unix_nano: int | str | None = None
    observed_time_unix_nano: int | str | None = None
    event_name: str | None = None
    attributes: list[_Attribute] | None = None


class _ScopeLogs(msgspec.Struct, rename="camel"):
    log_records: list[_LogRecord] | None = None


class _ResourceLogs(msgspec.Struct, rename="camel"):
    resource: _Resource | None = None
    scope_logs: list[_ScopeLogs] | None = None


class _Logs(msgspec.Struct, rename="camel"):
    resource_logs: list[_ResourceLogs] | None = None


_JSON: Mapping[Signal, msgspec.json.Decoder[Any]] = {
    Signal.TRACES: msgspec.json.Decoder(_Traces),
    Signal.LOGS: msgspec.json.Decoder(_Logs),
}


def _decode_json(signal: Signal, body: bytes) -> Any:
    try:
        return _JSON[signal].decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        flaw = printable(json_flaw(error, body, ""))
        raise BadRequest(f"the body is no OTLP JSON: {flaw}") from None


def _json_is_set(value: _Value) -> bool:
    return (
        value.string_value is not None
        or value.int_value is not None
        or value.double_value is not None
        or value.bool_value is not None
        or any(map(_is_there, (value.array_value, value.kvlist_value, value.bytes_value)))
    )


def _is_there(raw: msgspec.Raw) -> bool:
    return bytes(raw) not in {b"", b"null"}


def _json_scalar(value: _Value) -> Scalar:
    if value.string_value is not None:
        return value.string_value
    if value.int_value is not None:
        whole = value.int_value
        is_number = isinstance(whole, str) and _DIGITS.match(whole.removeprefix("-")) is not None
        return int(whole) if is_number else whole
    if isinstance(value.double_value, str):
        return value.double_value  # "NaN" and "Infinity".
    return None if value.double_value is None else _exact(value.double_value)


_FORMS: Mapping[Encoding, _Form] = {
    Encoding.PROTOBUF: _Form(
        _decode_protobuf,
        hexadecimal=lambda value: bytes(value).hex(),
        is_set=lambda value: value.WhichOneof("value") is not None,
        scalar=_protobuf_scalar,
    ),
    Encoding.JSON: _Form(
        _decode_json,
        hexadecimal=lambda value: (value or "").lower(),
        is_set=_json_is_set,
        scalar=_json_scalar,
    ),
}
