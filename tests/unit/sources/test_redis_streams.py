from __future__ import annotations

import msgspec
import pytest

from meterd.core.events import Reason
from meterd.errors import ConfigurationError, SourceUnavailable
from meterd.sources.redis_streams import (
    EntryIds,
    Position,
    RedisStreamSettings,
    RedisStreamSource,
    StreamFacts,
    entries_lost,
    payload_of,
    payloads_of,
    resume,
)


def facts(length=10, last=(100_000, 0), first=(50_000, 0), added=10):
    return StreamFacts(length=length, last=last, first=first, added=added)


def test_position_is_written_and_read_back():
    """A position survives the store, with and without a count."""
    for position in (Position((5, 7), "run", 12), Position((5, 0)), Position((0, 0), "", 0)):
        assert Position.parse(str(position)) == position


def test_position_is_read_from_a_bare_entry_id():
    """A person may store just an entry id."""
    assert Position.parse("1700-3") == Position((1700, 3))


@pytest.mark.parametrize("text", ["", "session meterd-x", "1-2|run|many", "{}"])
def test_position_of_another_kind_is_refused(text):
    """A text that is no position raises ValueError and nothing else."""
    with pytest.raises(ValueError, match="invalid literal"):
        Position.parse(text)


@pytest.mark.parametrize(
    ("stream", "position", "lost"),
    [
        (facts(), Position((0, 0), "", 0), 0),
        (facts(length=7, added=10), Position((0, 0), "", 0), 3),
        (facts(length=7, added=10, first=(60_000, 0)), Position((55_000, 0), "", 1), 2),
        (facts(length=7, added=10), Position((60_000, 0), "", 5), 0),
        (facts(added=10), Position((100_000, 0), "", 10), 0),
        (facts(added=10), Position((100_000, 0), "", 8), 2),
        (facts(length=0, first=None, added=10), Position((60_000, 0), "", 4), 6),
        (facts(added=10), Position((60_000, 0), "", 11), -1),
        (facts(added=None), Position((0, 0), "", 0), 0),
        (facts(), Position((0, 0), "", None), 0),
    ],
)
def test_entries_lost_are_counted_when_the_stream_tells(stream, position, lost):
    """What was added, less what was read and what waits, was lost; unknown counts as nothing."""
    assert entries_lost(stream, position) == lost


def test_resume_starts_at_the_beginning_the_first_time():
    """Without a position the whole stream is read, and what is already trimmed is not a loss."""
    resumption = resume(None, facts(length=4, added=10), "run", 60)

    assert (resumption.start, resumption.warnings) == (Position((0, 0), "run", 6), ())


def test_resume_goes_on_behind_the_position():
    """An ordinary reconnect says nothing and reads nothing twice."""
    position = Position((60_000, 0), "run", 5)

    assert (resume(position, facts(), "run", 60).start) == position
    assert resume(position, facts(), "run", 60).warnings == ()


@pytest.mark.parametrize(
    ("position", "run_id", "stream", "start", "words"),
    [
        (Position((90_000, 0), "a", 5), "b", facts(), (30_000, 0), "restarted"),
        (Position((200_000, 0), "a", 5), "a", facts(), (40_000, 0), "stands before"),
        (Position((90_000, 0), "a", 11), "a", facts(), (30_000, 0), "recreated"),
        (Position((9_000, 0), "a", 11), "a", facts(), (0, 0), "recreated"),
    ],
)
def test_resume_reads_a_minute_again_when_in_doubt(position, run_id, stream, start, words):
    """Another run, an older end or a smaller count means: from a minute before, said aloud."""
    resumption = resume(position, stream, run_id, 60)

    assert resumption.start == Position(start, run_id, None)
    assert words in resumption.warnings[0]


def test_resume_tells_what_was_trimmed_and_counts_it_once():
    """A loss is told with its number, and the count goes on behind it."""
    stream = facts(length=7, added=10, first=(60_000, 0))
    resumption = resume(Position((55_000, 0), "run", 1), stream, "run", 60)

    assert "2 entries left it" in resumption.warnings[0]
    assert resumption.start == Position((55_000, 0), "run", 3)
    assert resume(resumption.start, stream, "run", 60).warnings == ()


def test_payloads_pass_as_they_are_when_every_entry_holds_event():
    """The bytes of the field event are handed on untouched, whatever they are."""
    entries = [[b"1-0", [b"event", b'{"id":"a"}']], [b"2-0", [b"event", b"\xff not json"]]]

    assert payloads_of(entries) == ([b'{"id":"a"}', b"\xff not json"], {})


def test_payloads_of_mixed_entries_keep_their_places():
    """A bad entry is a fault at its own index and spoils no other."""
    entries = [
        [b"1-0", [b"event", b"{}"]],
        [b"2-0", [b"meter", b"tokens", b"quantity", b"12"]],
        [b"3-0", [b"nothing", b"known"]],
        [b"4-0", None],
    ]
    payloads, faults = payloads_of(entries)

    assert payloads[:2] == [b"{}", b'{"meter":"tokens","quantity":"12"}']
    assert {index: fault.reason for index, fault in faults.items()} == {
        2: Reason.MALFORMED,
        3: Reason.MALFORMED,
    }


def test_flat_fields_become_one_object_with_their_dimensions():
    """Quantities stay text; dimensions come as JSON, as fields of their own, or both."""
    usage = [b"escrow_id", b"e", b"meter", b"tokens", b"quantity", b"0.50"]
    dimensions = [b"dimensions.model", b"large", b"dimensions", b'{"kind": "output"}']
    payload, fault = payload_of([*usage, *dimensions])

    assert fault is None
    assert msgspec.json.decode(payload) == {
        "escrow_id": "e",
        "meter": "tokens",
        "quantity": "0.50",
        "dimensions": {"kind": "output", "model": "large"},
    }


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ([b"quantity", b"1"], "neither"),
        ([b"event", b"{}", b"meter", b"m"], "alone"),
        ([b"meter", b"m", b"meter", b"n"], "twice"),
        ([b"meter", b"\xff"], "UTF-8"),
        ([b"\xff", b"m"], "UTF-8"),
        ([b"meter", b"m", b"dimensions", b"[1]"], "JSON object"),
        ([b"meter", b"m", b"dimensions", b"{"], "JSON object"),
        ([b"meter", b"m", b"dimensions", b"[" * 100_000], "JSON object"),
        ([b"meter", b"m", b"dimensions", b'{"a":"1"}', b"dimensions.a", b"2"], "twice"),
        ([b"meter", b"m", b"dimensions.", b"2"], "no name"),
    ],
)
def test_bad_fields_are_a_fault_and_are_kept(fields, words):
    """Whatever cannot be one JSON object is malformed, with its fields kept for a person."""
    payload, fault = payload_of(fields)

    assert fault is not None
    assert (fault.reason, words in fault.detail) == (Reason.MALFORMED, True)
    assert len(msgspec.json.decode(payload)) == len(fields)


def test_entry_ids_are_texts():
    """Ids are decoded one by one or by slice."""
    ids = EntryIds([b"1-0", b"2-0"])

    assert (len(ids), ids[1], ids[:1], list(ids)) == (2, "2-0", ["1-0"], ["1-0", "2-0"])


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://u:s3cret@h:7000/2", "redis://h:7000/2"),
        ("rediss://:s3cret@h", "rediss://h:6379"),
        ("redis://[::1]:1/0?password=s3cret", "redis://[::1]:1/0"),
        ("unix:///run/redis.sock?db=1", "unix:///run/redis.sock"),
    ],
)
def test_address_never_shows_a_password(url, address):
    """Neither the address nor the settings' repr shows what the URL hides."""
    settings = RedisStreamSettings("r", url)

    assert RedisStreamSource(settings).address == address
    assert "s3cret" not in repr(settings)


def test_url_that_is_none_is_a_mistake_with_its_key():
    """A wrong URL is a configuration mistake that does not repeat the URL."""
    with pytest.raises(ConfigurationError) as caught:
        RedisStreamSource(RedisStreamSettings("r", "http://u:s3cret@h"))

    assert "sources.r.url" in str(caught.value)
    assert "s3cret" not in str(caught.value)


async def test_calls_without_a_connection_say_so():
    """Before connect every call raises SourceUnavailable; close does nothing."""
    source = RedisStreamSource(RedisStreamSettings("r", "redis://127.0.0.1:1"))
    await source.close()
    for call in (source.read, source.lag):
        with pytest.raises(SourceUnavailable, match="not connected"):
            await call()
