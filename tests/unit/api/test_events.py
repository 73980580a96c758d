from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Callable

import pytest

from meterd.api import ApiSettings
from meterd.api.events import split
from meterd.core.events import EVENT_BYTES_MAX
from meterd.errors import StoreFailed

EVENT = {"id": "a", "escrow_id": "esc_1", "meter": "tokens", "quantity": 1000}


def event(**changes):
    return {**EVENT, **changes}


async def until(true: Callable[[], bool]) -> None:
    """Let the loop work until something is so."""
    while not true():  # It looks at things that tell nobody when they change.
        await asyncio.sleep(0)


def line(**changes) -> bytes:
    return json.dumps(event(**changes)).encode()


GOOD_BODIES = {
    "one object": (line(), 1),
    "one object with blanks around": (b"\r\n  " + line() + b" \n", 1),
    "one object over several lines": (json.dumps(EVENT, indent=2).encode(), 1),
    "a list": (b"[" + line() + b" , " + line(id="b") + b"]", 2),
    "lines": (line() + b"\n" + line(id="b") + b"\r\n\n" + line(id="c"), 3),
    "one object twice": (b"[" + line() + b"," + line() + b"]", 2),
}


@pytest.mark.parametrize("name", GOOD_BODIES)
async def test_a_body_of_each_shape_is_taken_event_by_event(world, name):
    """One object, a list and lines are the same events."""
    body, count = GOOD_BODIES[name]
    answer = await world.post("/v1/events", body)

    assert answer.status == 200
    result = answer.json
    assert set(result) == {"accepted", "duplicates", "rejected"}
    assert result["accepted"] + result["duplicates"] == count
    assert result["rejected"] == []


BAD_BODIES = {
    "empty": (b"", 400, "no-event"),
    "blanks": (b" \n\t ", 400, "no-event"),
    "empty list": (b"[]", 400, "no-event"),
    "null": (b"null", 400, "not-json"),
    "string": (b'"str"', 400, "not-json"),
    "number": (b"12", 400, "not-json"),
    "true": (b"true", 400, "not-json"),
    "words": (b"hello", 400, "not-json"),
    "truncated": (line()[:-1], 400, "not-json"),
    "truncated list": (b"[" + line(), 400, "not-json"),
    "trailing garbage": (line() + b" x", 400, "not-json"),
    "two objects in one line": (line() + line(id="b"), 400, "not-json"),
    "garbage behind a list": (b"[" + line() + b"] x", 400, "not-json"),
    "byte order mark": (b"\xef\xbb\xbf" + line(), 400, "not-json"),
    "utf-16": (line().decode().encode("utf-16"), 400, "not-json"),
    "a hundred thousand brackets": (b"[" * 100_000, 400, "not-json"),
    "a hundred thousand braces": (b'{"a":' * 100_000, 400, "not-json"),
    "NaN": (b'{"id": "a", "quantity": NaN}', 400, "not-json"),
    "Infinity in a list": (b'[{"id": "a", "quantity": Infinity}]', 400, "not-json"),
    "too large a body": (b"[" + b" " * 700_000 + b"]", 413, "body-too-large"),
    "too many events": (b"[" + b",".join([b"{}"] * 101) + b"]", 413, "too-many-events"),
    "too many lines": (b"{}\n" * 101, 413, "too-many-events"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
async def test_a_body_that_is_no_event_is_refused_whole(make_world, name):
    """What cannot be cut into events is a problem, and nothing of it is kept."""
    world = await make_world(ApiSettings(body_limit=700_000, events_max=100))
    body, status, kind = BAD_BODIES[name]
    answer = await world.post("/v1/events", body)

    assert (answer.status, answer.json["type"]) == (status, f"urn:meterd:problem:{kind}")
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert (world.store.commits, world.fatal) == (0, [])


BAD_EVENTS = {
    "no object": (b"7", "malformed"),
    "null": (b"null", "malformed"),
    "a list": (b"[]", "malformed"),
    "empty object": (b"{}", "unknown_agreement"),
    "no id": (line(id=""), "no_id"),
    "an id of 64 KiB": (line(id="x" * 60_000), "malformed"),
    "a control character in the id": (line(id="a\r\nb"), "malformed"),
    "an id that is a number": (line(id=7), "malformed"),
    "unknown escrow": (line(escrow_id="../admin"), "unknown_agreement"),
    "unknown meter": (line(meter="'; DROP TABLE"), "unknown_meter"),
    "quantity zero": (line(quantity=0), "bad_quantity"),
    "quantity below zero": (line(quantity=-1), "bad_quantity"),
    "quantity true": (line(quantity=True), "bad_quantity"),
    "quantity missing": (json.dumps({**EVENT, "quantity": ""}).encode(), "bad_quantity"),
    "quantity 2^70": (line(quantity=2**70), "bad_quantity"),
    "quantity with an exponent": (line().replace(b"1000", b"1e999999999"), "bad_quantity"),
    "quantity as sNaN": (line(quantity="sNaN"), "bad_quantity"),
    "quantity with full-width digits": (line(quantity="\uff11"), "bad_quantity"),
    "quantity with blanks": (line(quantity=" 5\n"), "bad_quantity"),
    "quantity of thirty decimals": (line(quantity="0." + "1" * 30), "bad_quantity"),
    "quantity of 5,000 digits": (line().replace(b"1000", b"9" * 5000), "bad_quantity"),
    "invalid utf-8": (line().replace(b'"a"', b'"\xff"'), "malformed"),
    "a year ago": (line(time="2025-11-23T12:00:00Z"), "late"),
    "a day ahead": (line(time="2026-11-24T12:00:00Z"), "early"),
    "no time zone": (line(time="2026-11-23T12:00:00"), "malformed"),
    "unknown type": (line(type="meterd.other"), "unknown_type"),
    "too large": (line(dimensions={"x": "y" * EVENT_BYTES_MAX}), "too_large"),
    "a million dimensions": (line(dimensions={str(n): "" for n in range(1000)}), "malformed"),
}


@pytest.mark.parametrize("name", BAD_EVENTS)
async def test_a_bad_event_becomes_a_dead_letter_and_spoils_nothing(world, name):
    """One bad event among good ones is rejected with its place and reason, and kept."""
    bad, reason = BAD_EVENTS[name]
    answer = await world.post(
        "/v1/events", b"[" + b",".join([line(id="g1"), bad, line(id="g2")]) + b"]"
    )

    assert answer.status == 200, answer.body[:300]
    assert (answer.json["accepted"], answer.json["duplicates"]) == (2, 0)
    [rejected] = answer.json["rejected"]
    assert set(rejected) == {"index", "id", "reason", "detail"}
    assert (rejected["index"], rejected["reason"]) == (1, reason), rejected
    assert rejected["detail"]
    [letter] = world.store.letters.values()
    assert letter.payload == bad[:EVENT_BYTES_MAX]
    assert world.fatal == []


async def test_bad_lines_are_rejected_one_by_one_where_lines_are_announced(world):
    """The content type of NDJSON makes each line stand for itself, the first too."""
    body = b"not json\n" + line() + b'\n{"id": "half\n'
    answer = await world.post(
        "/v1/events", body, headers={"Content-Type": "application/x-ndjson; charset=utf-8"}
    )

    assert answer.json["accepted"] == 1
    assert [item["index"] for item in answer.json["rejected"]] == [0, 2]


async def test_results_name_duplicates_and_conflicts_in_the_order_of_the_events(world):
    """The same content again is a duplicate, other content a conflict; rejections come by place."""
    await world.post("/v1/events", event())
    answer = await world.post(
        "/v1/events", [event(quantity=7), event(), event(id="b"), event(id="c", meter="none")]
    )

    assert (answer.json["accepted"], answer.json["duplicates"]) == (1, 1)
    reasons = [(item["index"], item["id"], item["reason"]) for item in answer.json["rejected"]]
    assert reasons == [(0, "a", "conflict"), (3, "c", "unknown_meter")]


async def test_quantities_are_read_exactly(world):
    """Numbers and texts with many decimals add up without a float in between."""
    body = b"[%s,%s]" % (
        line(id="x").replace(b"1000", b"0.1"),
        line(id="y", quantity="0.200000001"),
    )
    await world.post("/v1/events", body)
    usage = await world.get("/v1/agreements/esc_1/usage")

    assert usage.json["items"][0]["quantity"] == "0.300000001"


async def test_an_answer_waits_for_the_commit(world):
    """Nobody is told "done" before it is on the disk."""
    world.store.hold()
    asked = asyncio.create_task(world.post("/v1/events", event()))
    await until(lambda: world.store.waiting > 0)
    done, _ = await asyncio.wait({asked}, timeout=0.05)

    assert not done
    world.store.let_go()
    assert (await asked).json["accepted"] == 1


async def test_a_client_that_hangs_up_does_not_undo_what_it_sent(world):
    """A cancelled request is still committed, and its repetition a duplicate."""
    world.store.hold()
    asked = asyncio.create_task(world.post("/v1/events", event()))
    await until(lambda: world.store.waiting > 0)
    asked.cancel()
    await asyncio.wait({asked})
    world.store.let_go()

    assert (await world.post("/v1/events", event())).json["duplicates"] == 1


async def test_a_request_under_way_is_answered_when_the_server_stops(world):
    """A stop waits for what has begun."""
    world.store.hold()
    asked = asyncio.create_task(world.post("/v1/events", event()))
    await until(lambda: world.store.waiting > 0)
    stopped = asyncio.create_task(world.runner.cleanup())
    await until(lambda: not world.runner.sites)
    world.store.let_go()

    assert (await asked).json["accepted"] == 1
    await stopped


async def test_a_full_disk_a_stop_and_too_much_waiting_answer_503_with_retry_after(make_world):
    """Whoever cannot be served is told to come again."""
    world = await make_world(pending_max=0)
    await world.bind()
    world.store.writable = False
    full = await world.post("/v1/events", event())
    world.store.writable = True
    world.store.hold()
    first = asyncio.create_task(world.post("/v1/events", event()))
    await until(lambda: world.store.waiting > 0)
    crowded = await world.post("/v1/events", event(id="b"))
    world.store.let_go()
    await first
    world.intake.stop()
    stopping = await world.post("/v1/events", event(id="c"))

    for answer in (full, crowded, stopping):
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        assert answer.json["type"] == "urn:meterd:problem:unavailable"


async def test_a_failed_commit_is_fatal_and_never_answered_200(world):
    """What may or may not be on the disk ends the process; the client comes again."""
    world.store.fail(StoreFailed("the disk said EIO"))
    answer = await world.post("/v1/events", event())

    assert (answer.status, answer.json["type"]) == (503, "urn:meterd:problem:restarting")
    assert [type(error) for error in world.fatal] == [StoreFailed]
    assert b"EIO" not in answer.body


async def test_a_mistake_of_our_own_while_recording_is_fatal_and_shows_no_trace(world):
    """Behind a half-applied batch memory may be ahead of the disk."""
    world.identities.fail(KeyError("secret inside"))
    answer = await world.post("/v1/events", event())

    assert answer.status == 503
    assert [type(error) for error in world.fatal] == [KeyError]
    assert b"secret" not in answer.body
    assert b"Traceback" not in answer.body


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "GZIP", "gzip, gzip"])
async def test_a_compressed_body_is_refused_unread(world, encoding):
    """A bomb is never unpacked."""
    bomb = gzip.compress(b" " * 10_000_000)
    answer = await world.post("/v1/events", bomb, headers={"Content-Encoding": encoding})

    assert (answer.status, answer.headers["Accept-Encoding"]) == (415, "identity")
    assert world.store.commits == 3  # Bound and adopted; nothing more.


CLOUD = {
    "specversion": "1.0",
    "type": "meterd.usage",
    "source": "svc",
    "id": "c",
    "subject": "esc_1",
    "data": {"meter": "tokens", "quantity": 1000},
}
BINARY = {
    "ce-specversion": "1.0",
    "CE-Type": "meterd.usage",
    "ce-source": "svc",
    "ce-id": "c",
    "ce-subject": "esc%5F1",
    "Content-Type": "application/json",
}
BATCH = {"Content-Type": "application/cloudevents-batch+json"}


async def test_a_cloudevent_is_the_same_event_in_each_mode(world):
    """Structured, batched and binary: one is accepted, the others are duplicates of it."""
    await world.bind()
    one = {"Content-Type": "application/cloudevents+json; charset=utf-8"}
    answers = [
        await world.post("/v1/events", CLOUD, headers=one),
        await world.post("/v1/events", CLOUD),
        await world.post("/v1/events", [CLOUD, {**CLOUD, "id": "d"}], headers=BATCH),
        await world.post("/v1/events", CLOUD["data"], headers=BINARY),
    ]

    assert [answer.status for answer in answers] == [200] * 4
    counts = [(answer.json["accepted"], answer.json["duplicates"]) for answer in answers]
    assert counts == [(1, 0), (0, 1), (1, 1), (0, 1)]


@pytest.mark.parametrize(
    ("headers", "body", "problem"),
    [
        (BATCH, CLOUD, "not-a-list"),
        ({"Content-Type": "application/cloudevents+json"}, [CLOUD], "not-an-object"),
        ({**BINARY, "ce-subject": "%ff"}, CLOUD["data"], "not-an-event"),
        ({**BINARY, "ce-data": "1"}, CLOUD["data"], "not-an-event"),
        ({**BINARY, "ce-no name": "1"}, CLOUD["data"], None),
    ],
)
async def test_a_cloudevent_in_no_mode_is_refused(world, headers, body, problem):
    """Whole, with what is wrong; a header that HTTP itself forbids never arrives."""
    answer = await world.post("/v1/events", body, headers=headers)

    assert answer.status == 400
    assert problem is None or answer.json["type"] == f"urn:meterd:problem:{problem}"


async def test_a_binary_event_whose_data_are_no_json_is_kept(world):
    """As base64, among the dead letters."""
    answer = await world.post("/v1/events", b"\xff{", headers=BINARY)

    (rejected,) = answer.json["rejected"]
    assert (rejected["id"], rejected["reason"]) == ("c", "malformed")
    (letter,) = world.store.letters.values()
    assert json.loads(letter.payload)["data_base64"] == "/3s="


async def test_openmeters_call_is_answered_as_openmeter_does(world):
    """204 after the commit; 400 where nothing of it could be taken, and it is kept all the same."""
    await world.bind()
    one = {"Content-Type": "application/cloudevents+json"}
    taken = await world.post("/api/v1/events", CLOUD, headers=one)
    again = await world.post("/api/v1/events", CLOUD, headers=one)
    part = await world.post("/api/v1/events", [CLOUD, {**CLOUD, "id": "x", "type": "y"}])
    none = await world.post("/api/v1/events", {**CLOUD, "id": "z", "type": "y"}, headers=one)

    assert (taken.status, taken.body) == (204, b"")
    assert (again.status, part.status) == (204, 204)
    assert part.headers["Meterd-Rejected"] == "1"
    assert (none.status, none.json["type"]) == (400, "urn:meterd:problem:rejected")
    assert "kept as dead letters: unknown_type: no meter has the event_type" in none.json["detail"]
    assert len(world.store.letters) == 2


def test_events_are_cut_out_as_they_came():
    """Blanks, spellings and the order of members stay what they were."""
    body = b' [ {"b" : 1.50,\n"a":"\\u00e9"} , {"x":1e5} ]'

    assert split(body, ndjson=False) == [b'{"b" : 1.50,\n"a":"\\u00e9"}', b'{"x":1e5}']
