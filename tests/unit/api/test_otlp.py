"""`POST /v1/traces` and `/v1/logs`: the answers that OTLP asks for, over a real bookkeeper."""

from __future__ import annotations

import asyncio
import base64
import gzip
import time
import zlib
from fractions import Fraction

import pytest
import structlog
from google.rpc.status_pb2 import Status
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext

from meterd.api import ApiSettings, ApiToken, Scope
from meterd.api.otlp import unpacked
from meterd.api.problems import Problem
from meterd.config.settings import OtlpSettings
from meterd.otlp.genai import COUNTED
from meterd.otlp.reading import Encoding
from meterd.producers import Producer, Producers
from tests import otlp
from tests.signing import key_of, signed

ENCODINGS = list(Encoding)
CALL = {**otlp.CALL, "meterd.agreement": "esc_1"}
PRICE = Fraction(1080 * 2, 1_000_000) + Fraction(1, 1000)  # Of its tokens, and of itself.


def spans_of(world, *calls):
    """A request with a span for each; they ended now."""
    now_ns = world.clock.wall() * 10**6
    return otlp.traces(
        *(
            otlp.span(call, span_id=f"{place:016x}", at_ns=now_ns)
            for place, call in enumerate(calls, start=1)
        )
    )


async def send(world, message, encoding=Encoding.PROTOBUF, path="/v1/traces", **options):
    headers = {"Content-Type": encoding.value, **options.pop("headers", {})}
    return await world.post(path, otlp.written(message, encoding), headers=headers, **options)


def accrued(world):
    return world.bookkeeper.ledger.accounts["esc_1"].accrued


def metric(world, name):
    text = world.metrics.exposition("")[0].decode()
    (line,) = [line for line in text.splitlines() if line.startswith(name + " ")]
    return float(line.split()[-1])


@pytest.mark.parametrize("encoding", ENCODINGS)
async def test_calls_of_models_are_charged_and_the_rest_is_ignored(world, encoding):
    """200 in the encoding of the request, partial_success unset; what is ignored is counted."""
    message = spans_of(world, CALL, {"http.request.method": "GET"}, CALL, {})
    answer = await send(world, message, encoding)

    assert answer.status == 200
    assert answer.headers["Content-Type"] == encoding.value
    assert answer.body == (b"{}" if encoding is Encoding.JSON else b"")
    assert accrued(world) == 2 * PRICE
    assert world.store.commits >= 1
    assert metric(world, 'meterd_otlp_ignored_total{signal="traces"}') == 2
    assert metric(world, 'meterd_otlp_ignored_total{signal="logs"}') == 0
    assert metric(world, 'meterd_events_total{result="accepted",source="otlp"}') == 2


async def test_a_batch_that_comes_again_and_its_log_records_are_duplicates(world):
    """Exporters send again what they have no answer to; both signals tell of the same calls."""
    message = spans_of(world, CALL, CALL)
    later_ns = world.clock.wall() * 10**6 + 1
    records = otlp.logs(
        *(otlp.record(CALL, span_id=f"{place:016x}", at_ns=later_ns) for place in (1, 2))
    )
    await send(world, message)
    before = accrued(world)
    again = await send(world, message, Encoding.JSON)
    logs = await send(world, records, path="/v1/logs")

    assert (again.status, again.body, logs.status, logs.body) == (200, b"{}", 200, b"")
    assert accrued(world) == before > 0
    assert metric(world, 'meterd_events_total{result="duplicate",source="otlp"}') == 4


async def test_log_records_alone_are_charged_too(world):
    """Whoever exports no traces has them."""
    record = otlp.record(CALL, at_ns=world.clock.wall() * 10**6)
    answer = await send(world, otlp.logs(record, otlp.record({})), path="/v1/logs")

    assert answer.status == 200
    assert accrued(world) > 0
    assert metric(world, 'meterd_otlp_ignored_total{signal="logs"}') == 1


@pytest.mark.parametrize("encoding", ENCODINGS)
async def test_what_cannot_be_charged_is_a_partial_success_and_a_dead_letter(world, encoding):
    """An exporter must not send it again; a person finds it with its reason."""
    nobodys = {**CALL, "meterd.agreement": ""}
    odd = {**CALL, "gen_ai.usage.input_tokens": "many"}
    more = {**CALL, "gen_ai.usage.cache_read.input_tokens": 1001}
    answer = await send(world, spans_of(world, nobodys, CALL, odd, {}, more), encoding)

    if encoding is Encoding.JSON:
        partial = answer.json["partialSuccess"]
        rejected, said = int(partial["rejectedSpans"]), partial["errorMessage"]
    else:
        told = ExportTraceServiceResponse.FromString(answer.body).partial_success
        rejected, said = told.rejected_spans, told.error_message
    assert (answer.status, rejected) == (200, 3)
    assert said.startswith("3 spans were rejected and are kept as dead letters (meterd dead-lette")
    assert "unknown_agreement" in said
    assert 'bad_quantity: input_tokens is "many"; a count is a whole number' in said
    assert world.bookkeeper.dead_letters == 3
    assert accrued(world) > 0


async def test_log_records_are_rejected_under_their_own_name(world):
    """And one without ids says so."""
    record = otlp.record(CALL, trace="", span_id="", at_ns=world.clock.wall() * 10**6)
    answer = await send(world, otlp.logs(record), path="/v1/logs")
    told = ExportLogsServiceResponse.FromString(answer.body).partial_success

    assert told.rejected_log_records == 1
    assert "no_id: it has no trace id and span id" in told.error_message


async def test_many_rejections_are_told_of_in_few_words(world):
    """The dead letters have them all."""
    message = spans_of(world, *[{**CALL, "meterd.agreement": "x" * 300}] * 50)
    told = ExportTraceServiceResponse.FromString((await send(world, message)).body).partial_success

    assert told.rejected_spans == 50
    assert len(told.error_message) < 2000


async def test_an_operation_that_nobody_knows_is_logged_once_and_told_each_time(world):
    """No money moves, nothing is rejected, and a person learns of it."""
    message = spans_of(world, {**CALL, "gen_ai.operation.name": "Rerank"})
    with structlog.testing.capture_logs() as lines:
        answers = [await send(world, message) for _ in range(2)]
    for answer in answers:
        told = ExportTraceServiceResponse.FromString(answer.body).partial_success
        warning = "tokens of operations that are not in otlp.operations are not charged: rerank"

        assert (told.rejected_spans, told.error_message) == (0, warning)
    logged = [line for line in lines if line["action"] == "otlp_operation_unknown"]
    assert [line["operation"] for line in logged] == ["rerank"]
    assert accrued(world) == 0
    assert metric(world, 'meterd_otlp_ignored_total{signal="traces"}') == 2


async def test_operations_count_as_they_are_configured(make_world):
    """Whoever knows an operation may charge it, and one that is left out is told of."""
    world = await make_world(ApiSettings(otlp_operations=frozenset({"rerank"})))
    await world.bind()
    reranked = {**CALL, "gen_ai.operation.name": "rerank"}
    told = ExportTraceServiceResponse.FromString(
        (await send(world, spans_of(world, reranked, CALL))).body
    ).partial_success

    assert accrued(world) == PRICE
    assert told.error_message.endswith(": chat")


def test_the_configuration_counts_what_the_conventions_call_calls_of_a_model():
    """Its default is written twice, since neither room knows the other."""
    assert frozenset(OtlpSettings().operations) == COUNTED == ApiSettings().otlp_operations


async def test_a_document_that_is_too_large_is_a_dead_letter_of_its_beginning(world):
    """A model's name of a megabyte is somebody's mistake; its neighbour is charged."""
    huge = {**CALL, "gen_ai.response.model": "x" * 100_000}
    told = ExportTraceServiceResponse.FromString(
        (await send(world, spans_of(world, huge, CALL))).body
    ).partial_success

    assert told.rejected_spans == 1
    assert "too_large" in told.error_message
    assert accrued(world) > 0


@pytest.mark.parametrize(
    ("path", "response"),
    [("/v1/traces", ExportTraceServiceResponse), ("/v1/logs", ExportLogsServiceResponse)],
)
async def test_an_empty_request_is_a_success(world, path, response):
    """OTLP wants it so; nothing is committed for it."""
    protobuf = await world.post(path, b"", headers={"Content-Type": Encoding.PROTOBUF.value})
    in_json = await world.post(path, b"{}", headers={"Content-Type": "application/json"})

    assert (protobuf.status, protobuf.body) == (200, response().SerializeToString())
    assert (in_json.status, in_json.json) == (200, {})


# -- Refusals --------------------------------------------------------------------------------------


def status_of(answer):
    """The sentence of a refusal, in either encoding."""
    if answer.headers["Content-Type"] == Encoding.JSON.value:
        return answer.json["message"]
    assert answer.headers["Content-Type"] == Encoding.PROTOBUF.value
    return Status.FromString(answer.body).message


@pytest.mark.parametrize("path", ["/v1/traces", "/v1/logs"])
@pytest.mark.parametrize("encoding", ENCODINGS)
async def test_what_is_no_otlp_is_refused_for_good(world, path, encoding):
    """400, which no exporter sends again, and a status that says why."""
    answer = await world.post(path, b"\xff\xfe", headers={"Content-Type": encoding.value})

    assert answer.status == 400
    assert status_of(answer).startswith("the body is no ")


@pytest.mark.parametrize("kind", ["text/plain", "application/protobuf", "application/x-ndjson"])
async def test_another_content_type_is_refused_as_a_problem(world, kind):
    """There is no encoding that the answer could be in."""
    answer = await world.post("/v1/traces", b"{}", headers={"Content-Type": kind})

    assert (answer.status, answer.json["type"]) == (415, "urn:meterd:problem:media-type")
    assert "application/x-protobuf" in answer.json["detail"]


async def test_a_content_type_may_have_a_parameter(world):
    """As browsers and some clients write it."""
    headers = {"Content-Type": "application/json; charset=utf-8"}

    assert (await world.post("/v1/traces", b"{}", headers=headers)).status == 200


@pytest.mark.parametrize("encoding", ENCODINGS)
async def test_what_cannot_be_taken_now_is_to_come_again(world, encoding):
    """503 with Retry-After: one of the four that exporters try again."""
    world.store.writable = False
    answer = await send(world, spans_of(world, CALL), encoding)
    world.store.writable = True
    again = await send(world, spans_of(world, CALL), encoding)

    assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    assert status_of(answer) == "the disk is full; send this again later"
    assert again.status == 200
    assert metric(world, 'meterd_events_total{result="accepted",source="otlp"}') == 1


@pytest.mark.parametrize("encoding", ENCODINGS)
async def test_more_spans_than_are_taken_at_once_are_refused_whole(make_world, encoding):
    """None of them is counted."""
    world = await make_world(ApiSettings(events_max=5))
    await world.bind()
    answer = await send(world, spans_of(world, *[CALL] * 4), encoding)

    assert answer.status == 413
    assert status_of(answer) == "more than 5 spans; send fewer at once"
    assert accrued(world) == 0


@pytest.mark.parametrize("encoding", ENCODINGS)
async def test_a_body_beyond_the_limit_is_refused(make_world, encoding):
    """By the sentence that names the key."""
    world = await make_world(ApiSettings(otlp_body_limit=1000))
    headers = {"Content-Type": encoding.value}
    at_limit = await world.post("/v1/traces", b"x" * 1000, headers=headers)
    answer = await world.post("/v1/traces", b"x" * 1001, headers=headers)

    assert at_limit.status in {200, 400}  # In protobuf it is a field that nobody knows.
    assert answer.status == 413
    assert status_of(answer) == (
        "the body has more than 1000 bytes (otlp.body_limit); send smaller batches"
    )


async def test_a_body_may_be_longer_than_other_calls_take(make_world):
    """Spans that carry what was asked and answered are large, and a refused one is lost."""
    world = await make_world(ApiSettings(body_limit=1000))
    await world.bind()
    long = {**CALL, "gen_ai.input.messages": "x" * 100_000}
    answer = await send(world, spans_of(world, long))

    assert (answer.status, answer.body) == (200, b"")
    assert accrued(world) == PRICE


async def test_who_may_not_send_reads_a_problem(make_world):
    """The door is the same for all calls."""
    token = ApiToken("reader", "token-of-a-reader-0123456789", frozenset({Scope.READ}))
    world = await make_world(ApiSettings(tokens=(token,)))
    nobody = await world.post("/v1/traces", b"", headers={"Content-Type": "application/json"})
    reader = await world.post(
        "/v1/logs",
        b"",
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {token.text}"},
    )

    assert (nobody.status, reader.status) == (401, 403)
    assert nobody.headers["Content-Type"] == "application/problem+json"


async def test_an_exporter_tries_again_when_it_is_told_to(world):
    """OpenTelemetry's own, over a full disk: 503 and Retry-After, and then it is charged once."""
    kept = InMemorySpanExporter()
    provider = TracerProvider(resource=Resource({"meterd.agreement": "esc_1"}))
    provider.add_span_processor(SimpleSpanProcessor(kept))
    with provider.get_tracer("test").start_as_current_span("chat") as span:
        span.set_attribute("gen_ai.usage.input_tokens", 7)
    exporter = OTLPSpanExporter(f"{world.base}/v1/traces")
    world.store.writable = False
    world.clock.wall_ms = time.time_ns() // 10**6
    exporting = asyncio.create_task(asyncio.to_thread(exporter.export, kept.get_finished_spans()))
    refused = 'meterd_http_requests_total{code="503",method="POST",route="/v1/traces"}'
    while refused not in world.metrics.exposition("")[0].decode():
        await asyncio.sleep(0.01)
    world.store.writable = True

    assert await exporting is SpanExportResult.SUCCESS
    assert accrued(world) == Fraction(7 * 2, 1_000_000) + Fraction(1, 1000)
    exporter.shutdown()
    provider.shutdown()


async def test_a_body_that_was_read_for_its_signature_is_read_no_second_time(make_world):
    """A producer with keys signs here too, with whatever stands between it and its exporter."""
    token = ApiToken("sender", "token-of-a-sender-0123456789", frozenset({Scope.INGEST}))
    world = await make_world(ApiSettings(tokens=(token,)))
    await world.bind()
    key = key_of("sender")
    keys = (base64.b64decode(key.removeprefix("whsec_")),)
    world.bookkeeper.producers = Producers([Producer("sender", token="sender", keys=keys)])
    message = spans_of(world, CALL)
    body = otlp.written(message, Encoding.PROTOBUF)
    bearer = {"Authorization": f"Bearer {token.text}"}
    proof = signed(key, body, at=world.clock.wall() // 1000)
    unsigned = await send(world, message, headers=bearer)
    answer = await send(world, message, headers={**bearer, **proof})

    assert (unsigned.status, answer.status, answer.body) == (401, 200, b"")
    assert accrued(world) == PRICE


async def test_an_exporter_shows_its_token_by_the_environment(make_world, monkeypatch):
    """As the documents have it, with a space written as the variable wants it."""
    token = ApiToken("sender", "token-of-a-sender-0123456789", frozenset({Scope.INGEST}))
    world = await make_world(ApiSettings(tokens=(token,)))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", world.base)
    stranger = OTLPSpanExporter()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"Authorization=Bearer%20{token.text}")
    sender = OTLPSpanExporter()
    spans = [ReadableSpan("chat", SpanContext(1, 1, is_remote=False))]

    assert await asyncio.to_thread(stranger.export, spans) is SpanExportResult.FAILURE
    assert await asyncio.to_thread(sender.export, spans) is SpanExportResult.SUCCESS
    assert metric(world, 'meterd_otlp_ignored_total{signal="traces"}') == 1
    stranger.shutdown()
    sender.shutdown()


async def test_what_is_no_count_is_none_when_it_is_tried_again_either(world):
    """12.5 tokens would be a fine quantity of anything else."""
    odd = {**CALL, "gen_ai.usage.input_tokens": 12.5}
    await send(world, spans_of(world, odd, {**CALL, "gen_ai.usage.input_tokens": True}))
    letters = (await world.get("/v1/dead-letters")).json["items"]
    for letter in letters:
        again = await world.post(f"/v1/dead-letters/{letter['id']}/replay")

        assert [one["reason"] for one in again.json["rejected"]] == ["malformed"]
    assert len(letters) == 2
    assert accrued(world) == 0


# -- Compression -----------------------------------------------------------------------------------

GZIP = {"Content-Encoding": "gzip"}


async def zipped(world, body, encoding=Encoding.PROTOBUF):
    headers = {"Content-Type": encoding.value, **GZIP}
    return await world.post("/v1/traces", body, headers=headers)


@pytest.mark.parametrize("encoding", ENCODINGS)
async def test_a_body_in_gzip_is_the_same_body(world, encoding):
    """Exporters may be told to send so."""
    body = otlp.written(spans_of(world, CALL), encoding)
    plain = await world.post("/v1/traces", body, headers={"Content-Type": encoding.value})
    before = accrued(world)
    packed = await zipped(world, gzip.compress(body), encoding)

    assert (plain.status, packed.status, packed.body) == (200, 200, plain.body)
    assert accrued(world) == before > 0
    assert metric(world, 'meterd_events_total{result="duplicate",source="otlp"}') == 1


async def test_a_bomb_is_refused_and_never_unpacked(make_world):
    """A kilobyte of gzip that would be a gigabyte of zeros is unpacked up to the limit alone."""
    world = await make_world(ApiSettings(otlp_body_limit=100_000))
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join(packer.compress(bytes(10**6)) for _ in range(64)) + packer.flush()
    answer = await zipped(world, bomb)

    assert len(bomb) < 100_000
    assert answer.status == 413
    assert "100000 bytes" in status_of(answer)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x0a\x00",
        gzip.compress(b"\x0a\x00")[:-1],
        gzip.compress(b"\x0a\x00") + b"x",
        gzip.compress(b"\x0a\x00") * 2,
        zlib.compress(b"\x0a\x00"),
        gzip.compress(b"\x0a\x00")[:-4] + b"\x00\x00\x00\x09",
    ],
)
async def test_what_is_no_whole_gzip_is_refused_for_good(world, body):
    """Cut off, followed by more, another format, or with a wrong sum."""
    answer = await zipped(world, body)

    assert answer.status == 400
    assert "gzip" in status_of(answer)


@pytest.mark.parametrize("size", [0, 1, 99, 100])
def test_a_body_of_just_the_limit_is_taken(size):
    """And one byte more is not."""
    plain = bytes(size)

    assert unpacked(gzip.compress(plain), 100) == plain
    with pytest.raises(Problem, match="more than 100 bytes"):
        unpacked(gzip.compress(bytes(101)), 100)


@pytest.mark.parametrize("encoding", ["deflate", "br", "zstd", "gzip, gzip"])
async def test_another_compression_is_refused_with_what_is_taken(world, encoding):
    """OTLP has gzip alone."""
    answer = await world.post(
        "/v1/traces",
        b"x",
        headers={"Content-Type": "application/json", "Content-Encoding": encoding},
    )

    assert (answer.status, answer.headers["Accept-Encoding"]) == (415, "gzip, identity")


async def test_other_calls_take_no_gzip_still(world):
    """They have no reason to."""
    answer = await world.post("/v1/events", gzip.compress(b"{}"), headers=GZIP)

    assert (answer.status, answer.headers["Accept-Encoding"]) == (415, "identity")
