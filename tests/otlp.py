"""Requests of OpenTelemetry's exporters for tests, in protobuf and in OTLP's JSON.

The JSON is made by protobuf's own library and by OTLP's rules on top of it (hexadecimal ids,
numbers for enumerations), so it shares nothing with the decoder that reads it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, ResourceLogs, ScopeLogs
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span

from meterd.otlp.genai import EVENT
from meterd.otlp.reading import Encoding

TRACE, SPAN = "5b8efff798038103d269b633813fc60c", "eee19b7ec3c1b174"
AT_NS = 1_795_348_800_123_456_789  # 2026-11-22T12:00:00.123456789Z
CALL = {
    "meterd.agreement": "customer-1",
    "gen_ai.operation.name": "chat",
    "gen_ai.provider.name": "openai",
    "gen_ai.request.model": "large",
    "gen_ai.response.model": "large-2026-11",
    "gen_ai.usage.input_tokens": 1000,
    "gen_ai.usage.output_tokens": 80,
}
SERVICE = {"service.name": "checkout", "service.namespace": "shop"}


def value(plain: Any) -> AnyValue:
    """A Python value as an attribute's."""
    if isinstance(plain, AnyValue):
        return plain
    if isinstance(plain, bool):
        return AnyValue(bool_value=plain)
    if isinstance(plain, int):
        return AnyValue(int_value=plain)
    if isinstance(plain, float):
        return AnyValue(double_value=plain)
    if isinstance(plain, list):
        return AnyValue(array_value=ArrayValue(values=map(value, plain)))
    return AnyValue() if plain is None else AnyValue(string_value=plain)


def pairs(attributes: Mapping[str, Any]) -> list[KeyValue]:
    """Attributes as OTLP has them."""
    return [KeyValue(key=key, value=value(plain)) for key, plain in attributes.items()]


def span(
    attributes: Mapping[str, Any], *, trace: str = TRACE, span_id: str = SPAN, at_ns: int = AT_NS
) -> Span:
    """A span that has ended."""
    return Span(
        trace_id=bytes.fromhex(trace),
        span_id=bytes.fromhex(span_id),
        name="chat large",
        kind=Span.SPAN_KIND_CLIENT,
        start_time_unix_nano=max(at_ns - 10**9, 0),
        end_time_unix_nano=at_ns,
        attributes=pairs(attributes),
    )


def record(
    attributes: Mapping[str, Any],
    *,
    trace: str = TRACE,
    span_id: str = SPAN,
    at_ns: int = AT_NS,
    name: str = EVENT,
) -> LogRecord:
    """A log record of the event that tells of a call of a model."""
    return LogRecord(
        trace_id=bytes.fromhex(trace),
        span_id=bytes.fromhex(span_id),
        time_unix_nano=at_ns,
        event_name=name,
        attributes=pairs(attributes),
    )


def traces(*spans: Span, resource: Mapping[str, Any] | None = None) -> ExportTraceServiceRequest:
    """A request with all of them under one resource."""
    about = Resource(attributes=pairs(SERVICE if resource is None else resource))
    scopes = [ScopeSpans(spans=spans)]
    return ExportTraceServiceRequest(
        resource_spans=[ResourceSpans(resource=about, scope_spans=scopes)]
    )


def logs(*records: LogRecord, resource: Mapping[str, Any] | None = None) -> Message:
    """The same for log records."""
    about = Resource(attributes=pairs(SERVICE if resource is None else resource))
    scopes = [ScopeLogs(log_records=records)]
    return ExportLogsServiceRequest(resource_logs=[ResourceLogs(resource=about, scope_logs=scopes)])


def written(message: Message, encoding: Encoding) -> bytes:
    """A request as an exporter writes it."""
    if encoding is Encoding.PROTOBUF:
        return message.SerializeToString()
    document = MessageToDict(message, use_integers_for_enums=True)
    return json.dumps(_with_hexadecimal_ids(document)).encode()


def _with_hexadecimal_ids(document: Any) -> Any:
    if isinstance(document, Sequence) and not isinstance(document, str):
        return [_with_hexadecimal_ids(one) for one in document]
    if not isinstance(document, dict):
        return document
    return {
        name: base64.b64decode(inner).hex().upper()
        if name in {"traceId", "spanId", "parentSpanId"}
        else _with_hexadecimal_ids(inner)
        for name, inner in document.items()
    }
