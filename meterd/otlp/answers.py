"""What OTLP answers: all was taken, some was not, or a `google.rpc.Status` that says why nothing.

The rule kept here: an answer comes in the encoding of its request. Rejections of single items are a
success with a count and a sentence, since an exporter must not send them again; they are kept as
dead letters.
"""

from __future__ import annotations

import msgspec
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from meterd.otlp.reading import Encoding, Signal

MESSAGE_BYTES_MAX = 4000
# Of google.rpc.Code, by the HTTP status that goes with it.
_CODES = {400: 3, 413: 8, 503: 14}
_UNKNOWN = 2


def exported(signal: Signal, encoding: Encoding, rejected: int = 0, message: str = "") -> bytes:
    """Answer that the request was taken, all but `rejected`; `message` may warn of more."""
    if encoding is Encoding.JSON:
        field = "rejectedSpans" if signal is Signal.TRACES else "rejectedLogRecords"
        # 64-bit numbers are texts in protobuf's JSON.
        partial = {field: str(rejected), "errorMessage": message}
        return msgspec.json.encode({"partialSuccess": partial} if rejected or message else {})
    if signal is Signal.TRACES:
        traces = ExportTraceServiceResponse()
        if rejected or message:
            traces.partial_success.rejected_spans = rejected
            traces.partial_success.error_message = message
        return traces.SerializeToString()
    logs = ExportLogsServiceResponse()
    if rejected or message:
        logs.partial_success.rejected_log_records = rejected
        logs.partial_success.error_message = message
    return logs.SerializeToString()


def status(encoding: Encoding, http_status: int, message: str) -> bytes:
    """Write a `google.rpc.Status`: a code and a sentence for whoever runs the exporter."""
    code = _CODES.get(http_status, _UNKNOWN)
    if encoding is Encoding.JSON:
        return msgspec.json.encode({"code": code, "message": message})
    text = message.encode("utf-8", "replace")[:MESSAGE_BYTES_MAX]
    text = text.decode("utf-8", "ignore").encode()  # A character that was cut in two is dropped.
    # Two fields of one message need no generated class: the code as field 1, the text as field 2.
    return bytes((0x08, code, 0x12)) + varint(len(text)) + text


def varint(number: int) -> bytes:
    """Write a length as protobuf does."""
    written = b""
    while number >= 0x80:
        written += bytes((number & 0x7F | 0x80,))
        number >>= 7
    return written + bytes((number,))
