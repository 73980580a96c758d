"""Every decoder that reads what comes from outside, as a function of bytes, with its oracle.

The rule of each: nonsense becomes a rejection, a list of mistakes or an outcome, and nothing else
leaves as an exception; what was read is exactly what was written. A target knows nothing of the
fuzzer that calls it, so the corpus runs through it on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import msgspec

from meterd import config
from meterd.api import events as posted
from meterd.api.problems import Problem
from meterd.core import money
from meterd.core.events import EventDecoder, Reason, Rejection, UsageEvent, quantity_nanos
from meterd.core.settlement import (
    Answer,
    Answered,
    AnswerKind,
    Escrow,
    EscrowStatus,
    Observed,
    Reading,
    Release,
    ReleaseStatus,
    Rules,
    step,
)
from meterd.errors import ConfigurationError
from meterd.escrow import documents, outcomes
from meterd.otlp import genai, reading
from meterd.otlp.reading import Encoding, Signal
from meterd.sandbox import wire
from meterd.sandbox.ledger import AMOUNT_MAX, Deadline
from meterd.sources import mqtt, redis_streams
from tests.unit.core.books import NOW, SENTINEL, Till

# What stands between the parts of an input that has several: no good part holds it.
CUT = b"\xff\n"

DECODER = EventDecoder(SENTINEL)
KEY = "pf_live_fuzz_0123456789abcdef"
MASK = outcomes.Mask(KEY)


# -- Events ----------------------------------------------------------------------------------------


def events(data: bytes) -> None:
    """A batch of bare JSON: it decodes like its parts one by one, and its numbers are exact."""
    payloads = data.split(CUT)
    together = DECODER.decode(payloads)
    assert len(together) == len(payloads)
    for index, (payload, decoded) in enumerate(zip(payloads, together, strict=True)):
        (alone,) = DECODER.decode([payload])
        assert _facts(decoded) == _facts(alone), "a neighbour changed what an event says"
        if isinstance(decoded, Rejection):
            assert decoded.index == index
            _fit_to_show(decoded.detail, decoded.id)
    till = Till()
    verdicts = till.verdicts(payloads, ids=[f"t-{index}" for index in range(len(payloads))])
    assert all(verdict == "" or verdict in tuple(Reason) for verdict in verdicts)
    till.take(payloads, ids=[f"t-{index}" for index in range(len(payloads))], now=NOW + 1)
    assert sum(row.events for row in till.rows.values()) == till.accepted


def _facts(decoded: UsageEvent | Rejection) -> tuple[object, ...]:
    """What an event says, however it came to be read."""
    if isinstance(decoded, Rejection):
        return decoded.id, decoded.reason, decoded.detail
    event = decoded
    names = (event.id, event.source, event.agreement, event.escrow_id, event.meter, event.type)
    return *names, event.time, sorted(event.dimensions.items()), _nanos(event.quantity)


def _nanos(quantity: int | str | msgspec.Raw) -> int:
    """The exact quantity, which formats back to itself; 0: there is none."""
    try:
        nanos = quantity_nanos(quantity)
    except money.BadNumber as error:
        _fit_to_show(str(error))
        return 0
    assert 0 < nanos <= money.QUANTITY_MAX * money.NANOS
    assert money.parse_quantity(money.format_quantity(nanos)) == nanos
    text = quantity if isinstance(quantity, int | str) else bytes(quantity).strip(b'"').decode()
    if isinstance(text, int) or "\\" not in text:  # JSON may write a digit as an escape.
        assert Fraction(text) * money.NANOS == nanos, "a quantity was not read exactly"
    return nanos


def _fit_to_show(*texts: str) -> None:
    for text in texts:
        assert text.isprintable(), "a text from outside would forge a line of the log"
        assert len(text) <= 400


def redis(data: bytes) -> None:
    """The fields of entries: an entry is a fault, or one JSON document that says the same."""
    entries = [(b"1-%d" % place, part.split(b"\0")) for place, part in enumerate(data.split(CUT))]
    payloads, faults = redis_streams.payloads_of(entries)
    assert len(payloads) == len(entries)
    for index, (_, fields) in enumerate(entries):
        payload, fault = redis_streams.payload_of(fields)
        assert payloads[index] == payload
        assert faults.get(index) == fault
        if fault is not None:
            _fit_to_show(fault.detail)
        elif redis_streams.EVENT_FIELD not in fields[::2]:
            _same_fields(fields, msgspec.json.decode(payload, type=dict[str, msgspec.Raw]))
    events(CUT.join(payloads))


def _same_fields(fields: Sequence[bytes], said: Mapping[str, msgspec.Raw]) -> None:
    for name, value in zip(fields[::2], fields[1::2], strict=True):
        if name.decode() in said and name not in {b"dimensions", b"data"}:
            assert msgspec.json.decode(said[name.decode()], type=str) == value.decode()


@dataclass
class Arrival:
    """One PUBLISH."""

    topic: str
    payload: bytes
    retain: bool
    packet_id: int | None
    user_properties: Sequence[tuple[str, str]]
    content_type: str | None = None


def topics(data: bytes) -> None:
    """Template, topic, id and payload of MQTT: what the template names, the topic says."""
    flags, *parts = (data[:1] or b"\0")[0], *data[1:].split(CUT, 3)
    text, topic, event_id, payload = (*parts, *[b""] * 4)[:4]
    pattern = text.decode("utf-8", "replace")
    try:
        template = mqtt.TopicTemplate.parse(pattern)
    except ValueError:
        return
    if not pattern.isprintable():  # It is the user's own, and so is the log that shows it.
        return
    assert template.filter.count("/") == pattern.count("/")
    name = topic.decode("utf-8", "replace")
    said = template.fields(name)
    assert said is None or set(said) == template.names
    assert said is None or all(value and value in name for value in said.values())
    reading = mqtt.Reading(template, anonymous=bool(flags & 1), qos0=bool(flags & 2))
    properties = [("id", event_id.decode("utf-8", "replace"))] if event_id else []
    arrival = Arrival(name, payload, bool(flags & 4), 1 if flags & 8 else None, properties)
    deliveries = reading.deliveries([arrival])
    for fault in deliveries.faults.values():
        _fit_to_show(fault.detail)
    assert said is not None or deliveries.faults
    for decoded in DECODER.decode(deliveries.payloads):
        if isinstance(decoded, UsageEvent):
            _nanos(decoded.quantity)


def bodies(data: bytes) -> None:
    """The body of a POST: refused whole, or cut into events as the bytes that came."""
    try:
        parts = posted.split(data[1:], ndjson=bool(data[:1] == b"\1"))
    except Problem as problem:
        _fit_to_show(problem.detail)
        return
    assert parts or not data[1:].strip(posted.BLANKS)
    assert all(part in data for part in parts), "an event was written anew"
    events(CUT.join(parts))


def spans(data: bytes) -> None:
    """A request of an exporter: refused whole, or usage and nothing, and each count is exact."""
    flags, body = (data[:1] or b"\0")[0], data[1:]
    signal = Signal.LOGS if flags & 1 else Signal.TRACES
    encoding = Encoding.JSON if flags & 2 else Encoding.PROTOBUF
    try:
        items = reading.read(signal, encoding, body, wanted=genai.WANTED, items_max=1000)
    except (reading.BadRequest, reading.TooManyItems) as error:
        _fit_to_show(str(error))
        return
    documents = []
    for item in items:
        assert set(item.attributes) | set(item.resource) <= genai.WANTED
        usage = genai.usage_of(item)
        if isinstance(usage, genai.Ignored):
            continue
        documents.append(usage.document)
        said = msgspec.json.decode(usage.document)
        assert said["type"] == genai.TYPE
        if usage.fault is not None:
            _fit_to_show(usage.fault.detail)
            continue
        assert said["id"] == f"{item.trace_id}-{item.span_id}"
        counts = [said["data"][name] for name in genai.TOKENS if name in said["data"]]
        assert counts
        assert all(type(count) is int and count >= 0 for count in counts)
    if documents:
        events(CUT.join(documents))


# -- Configuration ---------------------------------------------------------------------------------


def configuration(data: bytes) -> None:
    """The text of a file: settings, or mistakes that each say where and what instead."""
    text = data.decode("utf-8", "replace")
    if "_file" in text:  # A fuzzer would read its way through this machine.
        text = text.replace("_file", "_fil")
    try:
        settings = config.parse(text, {})
    except ConfigurationError as error:
        mistakes = error.mistakes
    else:
        mistakes = ()
        _prices_are_exact(settings)
    assert all(mistake.key and mistake.message for mistake in mistakes)


def _prices_are_exact(settings: config.Settings) -> None:
    assert settings.escrow.release_max_micros > 0
    for plan in settings.plans.values():
        for rate in plan.rates:
            assert money.parse_price(money.format_price(rate.price_picos)) == rate.price_picos


# -- The escrow service ----------------------------------------------------------------------------

AMOUNT = 10_000
RELEASE = Release(
    id="rl-1",
    escrow="esc_1",
    amount=AMOUNT,
    before=20_000,
    status=ReleaseStatus.SENT,
    why="amount",
    units=0,
    created_at=NOW,
    history=((NOW, "intended", "amount"), (NOW, "sent", "")),
)
STATE = Escrow(
    id="esc_1",
    agreement="esc_1",
    role="main",
    status=EscrowStatus.ACTIVE,
    total=10_000_000,
    settled=20_000,
    observed=20_000,
    remaining=9_980_000,
    service_status="active",
    release=RELEASE,
)
STATUSES = (200, 200, 200, 201, 202, 204, 301, 400, 401, 402, 403, 404, 409, 422, 429, 500, 503)


def answers(data: bytes) -> None:
    """Status, headers and body of the service: an outcome that shows no key and pays no more."""
    number, _, rest = data[:1] or b"\0", None, data[1:]
    wait, body = rest.split(CUT, 1) if CUT in rest else (b"", rest)
    headers = {"Retry-After": wait.decode("latin-1"), "X-RateLimit-Reset": wait.decode("latin-1")}
    received = outcomes.Received(STATUSES[number[0] % len(STATUSES)], headers, body)
    read = outcomes.answer_to_read(received, MASK, 1.0, NOW)
    listed = outcomes.answer_to_list(received, MASK, 1.0, NOW)
    answer = outcomes.answer_to_release(RELEASE, received, MASK, NOW)
    for outcome in (read, listed, answer):
        assert KEY not in repr(outcome), "an answer would put the key into the log"
    assert documents.error_text(received) is None or answer.kind is not AnswerKind.CONFIRMED
    _fit_to_show(answer.detail)
    _wait_is_sane(answer.retry_after, getattr(read, "retry_after", None))
    if isinstance(read, Reading):
        assert 0 <= read.total <= documents.AMOUNT_MAX
        assert read.released <= documents.AMOUNT_MAX
    _pays_no_more(answer, read)


def _wait_is_sane(*waits: float | None) -> None:
    assert all(wait is None or 0 <= wait <= outcomes.WAIT_S_MAX for wait in waits)


def _pays_no_more(answer: Answer, read: object) -> None:
    """Through the state table: at most what was asked is booked, and nothing is sent by itself."""
    state, _ = step(STATE, Answered(answer, 2.0, NOW), Rules())
    assert state.settled in (STATE.settled, STATE.settled + AMOUNT)
    if answer.kind is AnswerKind.CONFIRMED:
        assert answer.amount is not None or answer.released is not None
    if isinstance(read, Reading):
        new = Escrow(id="esc_1", agreement="esc_1", role="main")
        after, _ = step(state, Observed(read, 3.0, NOW, STATE.settled + AMOUNT), Rules())
        assert after.settled in (state.settled, STATE.settled + AMOUNT)
        assert after.payable(STATE.settled + AMOUNT) <= AMOUNT
        for mono in (4.0, 99.0):  # Twice the same, apart: what is taken then holds nothing odd.
            adopted = replace(read, mono=mono)
            new, _ = step(new, Observed(adopted, mono, NOW, AMOUNT), Rules())
        assert min(new.baseline, new.observed, new.remaining) >= 0, "a figure below zero is taken"
        assert new.payable(AMOUNT) <= AMOUNT


# -- The sandbox -----------------------------------------------------------------------------------


def requests(data: bytes) -> None:
    """A request's body at the sandbox: fields within their limits, or a refusal with its code."""
    key, body = data.split(CUT, 1) if CUT in data else (b"", data)
    readers: tuple[Callable[[Mapping[str, Any]], object], ...] = (
        wire.read_amount,
        wire.read_memo,
        lambda fields: wire.read_agent(fields, "to_agent_id"),
        lambda fields: wire.read_deadline(fields, NOW),
        lambda fields: wire.read_direction(fields, Deadline.RELEASE),
        lambda _: wire.read_key(key.decode("latin-1")),
        lambda _: wire.read_whole(key.decode("latin-1"), "limit", 10, 100),
    )
    try:
        fields = wire.read_object(body)
    except wire.BadRequest as refusal:
        _fit_to_show(refusal.text)
        return
    for reader in readers:
        try:
            reader(fields)
        except wire.BadRequest as refusal:
            _fit_to_show(refusal.code, refusal.text)
        else:
            if reader is wire.read_amount:
                micros = wire.read_amount(fields)
                assert 0 < micros <= AMOUNT_MAX
                assert Fraction(fields["amount"]) * money.MICROS == micros


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (events, redis, topics, bodies, spans, configuration, answers, requests)
}
