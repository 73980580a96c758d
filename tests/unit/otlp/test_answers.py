from __future__ import annotations

import json

import pytest
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from meterd.otlp import answers
from meterd.otlp.reading import Encoding, Signal


def test_full_success_leaves_partial_success_unset():
    """OTLP demands it: an exporter takes a set one for a warning."""
    for signal in Signal:
        assert answers.exported(signal, Encoding.PROTOBUF) == b""
        assert answers.exported(signal, Encoding.JSON) == b"{}"


def test_rejections_are_counted_and_explained_in_the_encoding_of_the_request():
    """Under the name that the signal has for them."""
    spans = ExportTraceServiceResponse.FromString(
        answers.exported(Signal.TRACES, Encoding.PROTOBUF, 2, "why")
    ).partial_success
    records = ExportLogsServiceResponse.FromString(
        answers.exported(Signal.LOGS, Encoding.PROTOBUF, 3, "why")
    ).partial_success

    assert (spans.rejected_spans, spans.error_message) == (2, "why")
    assert (records.rejected_log_records, records.error_message) == (3, "why")
    assert json.loads(answers.exported(Signal.TRACES, Encoding.JSON, 2, "why")) == {
        "partialSuccess": {"rejectedSpans": "2", "errorMessage": "why"}
    }
    assert json.loads(answers.exported(Signal.LOGS, Encoding.JSON, 0, "a warning")) == {
        "partialSuccess": {"rejectedLogRecords": "0", "errorMessage": "a warning"}
    }


@pytest.mark.parametrize(
    "message", ["", "why", "weil 3 € fehlen", "x" * 127, "x" * 128, "é" * 10_000]
)
@pytest.mark.parametrize(("http", "code"), [(400, 3), (413, 8), (503, 14), (418, 2)])
def test_a_status_is_one_that_googles_own_class_reads(message, http, code):
    """Written by hand, read by the real one; a long sentence is cut, between two characters."""
    status = Status.FromString(answers.status(Encoding.PROTOBUF, http, message))

    assert status.code == code
    assert message.startswith(status.message)
    assert len(status.message.encode()) == min(len(message.encode()), answers.MESSAGE_BYTES_MAX)
    assert json.loads(answers.status(Encoding.JSON, http, message)) == {
        "code": code,
        "message": message,
    }
