"""The meter against a meterd that fails on cue."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterd.sdk import (
    AsyncMeter,
    BadUsage,
    Meter,
    NotKept,
    Rejected,
    Unsent,
    delivery,
    new_id,
)
from meterd.sdk import meter as meters
from meterd.sdk.usage import nanos_of, text_of_nanos
from meterd.sdk.wire import Place, Reply
from tests.processes import free_port


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Pauses as in life, and shorter."""
    monkeypatch.setattr(delivery, "PAUSE_FIRST_S", 0.01)
    monkeypatch.setattr(delivery, "PAUSE_MAX_S", 0.05)


def nowhere() -> str:
    return f"http://127.0.0.1:{free_port()}"


def test_event_is_told_with_its_id_its_time_and_exact_figures(meterd):
    """The time is that of the telling, whenever it is sent."""
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    with Meter(meterd.url, source="svc-a") as meter:
        made = meter.emit("esc_1", "tokens", Decimal("0.1") * 3, dimensions={"kind": "output"})
        own = meter.emit("esc_1", "seconds", "2.50", id="mine", hold="hold_1", price="0.2")
        assert meter.flush()

    first, second = meterd.events[made], meterd.events[own]
    assert before <= datetime.fromisoformat(first.pop("time")) <= datetime.now(UTC)
    assert first == {
        "id": made,
        "source": "svc-a",
        "agreement": "esc_1",
        "meter": "tokens",
        "quantity": "0.3",
        "dimensions": {"kind": "output"},
    }
    assert (own, second["quantity"], second["hold"], second["price"]) == (
        "mine",
        "2.5",
        "hold_1",
        "0.2",
    )


def test_many_events_go_in_few_requests_in_their_order(meterd):
    """Up to `batch_events` in one, whole batches first."""
    with Meter(meterd.url, batch_events=100, batch_wait_s=5) as meter:
        ids = [meter.emit("esc_1", "calls") for _ in range(1000)]
        assert meter.flush()

    assert meterd.order == ids
    assert max(meterd.batches) == 100
    assert len(meterd.batches) == 10


def test_batch_is_bounded_by_its_bytes_too(meterd):
    """A request stays below what meterd takes."""
    with Meter(meterd.url, batch_bytes=1000, batch_wait_s=5) as meter:
        for _ in range(50):
            meter.emit("esc_1", "calls", dimensions={"model": "m" * 100})
        assert meter.flush()

    assert max(meterd.batches) <= 4
    assert sum(meterd.batches) == 50


@pytest.mark.parametrize(
    "failures",
    [
        [(503, {"Retry-After": "0"})] * 3,
        ["lose", "lose"],
        ["page"],
        [(500, {}), (401, {}), (429, {}), (404, {}), (302, {"Location": "/elsewhere"})],
    ],
)
@pytest.mark.parametrize("spooled", [True, False])
def test_whatever_fails_is_sent_again_with_the_same_ids(meterd, tmp_path, failures, spooled):
    """What was taken before its answer was lost is a duplicate."""
    meterd.script += failures
    spool = tmp_path / "spool" if spooled else None
    with Meter(meterd.url, spool=spool) as meter:
        ids = [meter.emit("esc_1", "calls") for _ in range(5)]
        assert meter.flush()
        assert meter.pending == 0

    assert meterd.order == ids
    assert (meterd.duplicates > 0) == ("lose" in failures)


def test_meter_leaves_meterd_alone_for_as_long_as_it_asks(meterd):
    """Retry-After comes before a flush that is waiting."""
    meterd.script.append((503, {"Retry-After": "1"}))
    with Meter(meterd.url, batch_wait_s=0) as meter:
        meter.emit("esc_1", "calls")
        assert not meter.flush(0.5)
        assert len(meterd.asked) == 1
        assert meter.flush()


@given(failures=st.integers(1, 10_000), after=st.one_of(st.none(), st.integers(0, 300)))
def test_pause_grows_to_its_limit_with_full_jitter_on_top_of_what_was_asked(failures, after):
    """Never shorter than meterd wants, never longer than half a minute beyond it."""
    pause = delivery.pause_s(failures, after)

    assert (after or 0) <= pause <= (after or 0) + 30


def test_batch_that_is_too_large_is_cut_in_half_until_it_is_taken(meterd):
    """A limit that meterd was given is learned, not fatal."""
    meterd.events_max = 10
    with Meter(meterd.url, batch_wait_s=5) as meter:
        ids = [meter.emit("esc_1", "calls") for _ in range(100)]
        assert meter.flush()

    assert meterd.order == ids
    assert max(meterd.batches) <= 10


def test_rejected_event_is_handed_over_with_its_reason_and_the_others_count(meterd):
    """Each alone; a callback that fails stops nothing."""
    found: list[Rejected] = []

    def note(one: Rejected) -> None:
        found.append(one)
        raise RuntimeError("of the program's own")

    with Meter(meterd.url, on_rejected=note) as meter:
        meter.emit("esc_1", "calls", id="a")
        meter.emit("esc_1", "unknown", id="b")
        meter.emit("esc_1", "calls", id="c")
        assert meter.flush()

    assert meterd.order == ["a", "c"]
    assert [(one.id, one.reason, one.event["meter"]) for one in found] == [
        ("b", "unknown_meter", "unknown")
    ]


def test_rejected_event_is_logged_where_nobody_asked_for_it(meterd, caplog):
    """Never silently."""
    with Meter(meterd.url) as meter:
        meter.emit("esc_1", "unknown", id="b")
        assert meter.flush()

    assert "the event b was not taken for usage: unknown_meter" in caplog.text


def test_event_that_is_refused_alone_is_handed_over_and_holds_nobody_up(meterd):
    """It would be refused for ever."""
    found: list[Rejected] = []
    meterd.script.append((400, {}))
    with Meter(meterd.url, on_rejected=found.append, batch_events=1) as meter:
        meter.emit("esc_1", "calls", id="a")
        meter.emit("esc_1", "calls", id="b")
        assert meter.flush()

    assert meterd.order == ["b"]
    assert [(one.id, one.reason) for one in found] == [("a", "not_sent")]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"quantity": 0.5}, "float"),
        ({"quantity": 0}, "0 is no usage"),
        ({"quantity": -1}, "0 to 1e15"),
        ({"quantity": True}, "bool"),
        ({"quantity": "1e3"}, "plain decimal"),
        ({"quantity": "0.0000000001"}, "9 decimals"),
        ({"quantity": Decimal("NaN")}, "0 to 1e15"),
        ({"quantity": Decimal("1e-400000")}, "9 decimals"),
        ({"quantity": 10**15 + 1}, "0 to 1e15"),
        ({"agreement": ""}, "agreement"),
        ({"meter": "a\nb"}, "meter"),
        ({"id": ""}, "id"),
        ({"dimensions": {"kind": 3}}, "dimension"),
        ({"dimensions": {"kind": "x" * 129}}, "dimension"),
        ({"time": datetime(2026, 1, 1)}, "time zone"),  # noqa: DTZ001
        ({"value": "x" * 70_000}, "bytes"),
    ],
)
def test_usage_that_meterd_would_refuse_is_refused_where_it_is_told(meterd, bad, said):
    """While the program can still be corrected; nothing is kept of it."""
    with Meter(meterd.url) as meter:
        with pytest.raises(BadUsage, match=said):
            meter.emit(**{"agreement": "esc_1", "meter": "calls", "quantity": 1, **bad})
        assert meter.pending == 0


@given(nanos=st.integers(0, 10**24))
def test_quantity_is_read_as_it_is_written(nanos):
    """Whatever its type."""
    text = text_of_nanos(nanos)

    assert nanos_of(text) == nanos_of(Decimal(text)) == nanos


def test_ids_never_come_twice_and_sort_by_time():
    """From any number of threads."""
    made: list[list[str]] = [[] for _ in range(4)]
    threads = [
        threading.Thread(target=lambda own=own: own.extend(new_id() for _ in range(2000)))
        for own in made
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len({one for own in made for one in own}) == 8000
    assert all([one[:12] for one in own] == sorted(one[:12] for one in own) for own in made)


def test_threads_share_a_meter(meterd):
    """Each event once."""
    with Meter(meterd.url) as meter:
        threads = [
            threading.Thread(target=lambda: [meter.emit("esc_1", "calls") for _ in range(300)])
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert meter.flush()

    assert len(meterd.events) == 2400
    assert meterd.duplicates == 0


def test_closing_without_meterd_and_without_a_spool_hands_the_events_back():
    """They are nowhere else."""
    meter = Meter(nowhere())
    made = [meter.emit("esc_1", "calls") for _ in range(3)]
    with pytest.raises(Unsent) as caught:
        meter.close(0.1)

    assert [event["id"] for event in caught.value.events] == made
    with pytest.raises(NotKept, match="closed"):
        meter.emit("esc_1", "calls")


def test_closing_without_meterd_leaves_the_events_in_the_spool_for_the_next(meterd, tmp_path):
    """With the ids and times that they have."""
    meter = Meter(nowhere(), spool=tmp_path)
    made = [meter.emit("esc_1", "calls") for _ in range(3)]
    assert meter.close(0.1) == 3

    with Meter(meterd.url, spool=tmp_path) as successor:
        made.append(successor.emit("esc_1", "calls"))
        assert successor.flush()

    assert meterd.order == made
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when_full", ["raise", "report"])
def test_full_meter_says_so_as_its_owner_chose(when_full):
    """An error at the call, or a rejection; never nothing."""
    found: list[Rejected] = []
    meter = Meter(nowhere(), bytes_max=250, when_full=when_full, on_rejected=found.append)
    meter.emit("esc_1", "calls", id="a")
    meter.emit("esc_1", "calls", id="b")
    if when_full == "raise":
        with pytest.raises(NotKept, match="bytes_max"):
            meter.emit("esc_1", "calls", id="c")
    else:
        assert meter.emit("esc_1", "calls", id="c") == "c"
        assert [(one.id, one.reason, one.event["id"]) for one in found] == [("c", "not_sent", "c")]
    with pytest.raises(Unsent, match="2 events"):
        meter.close(0)


def test_old_events_in_a_spool_are_warned_of(meterd, tmp_path, caplog):
    """Meterd keeps them as late; nobody should wonder why they are not charged."""
    meter = Meter(nowhere(), spool=tmp_path)
    meter.emit("esc_1", "calls", time=datetime.now(UTC) - timedelta(hours=80))
    meter.close(0)
    caplog.set_level(logging.WARNING, "meterd.sdk")
    with Meter(meterd.url, spool=tmp_path) as successor:
        assert successor.flush()

    assert "80 hours old" in caplog.text
    assert len(meterd.events) == 1


@pytest.mark.parametrize(("fsync", "flushed"), [("never", 0), ("second", 2), ("each", 4)])
def test_what_waits_is_flushed_to_the_disk_as_its_owner_chose(
    monkeypatch, tmp_path, fsync, flushed
):
    """Each event, or a file and its directory once a while, whatever becomes of meterd."""
    real, done = os.fsync, []
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(fd), real(fd)))
    monkeypatch.setattr(meters, "FLUSH_EVERY_S", 0.2)
    meter = Meter(nowhere(), spool=tmp_path, fsync=fsync)
    for _ in range(3):
        meter.emit("esc_1", "calls")
    if fsync == "second":
        deadline = time.monotonic() + 20
        while len(done) < flushed and time.monotonic() < deadline:
            time.sleep(0.01)

    assert len(done) == flushed
    meter.close(0)


def test_meter_goes_on_after_a_mistake_of_its_own(meterd, monkeypatch, caplog):
    """It says so, and sends the events all the same."""
    real, broken = delivery.read, [True]

    def read(*args):
        if broken:
            broken.pop()
            raise RuntimeError("a mistake")
        return real(*args)

    monkeypatch.setattr(delivery, "read", read)
    with Meter(meterd.url) as meter:
        made = meter.emit("esc_1", "calls")
        assert meter.flush()

    assert meterd.order == [made]
    assert "a mistake" in caplog.text


def test_numbered_events_count_up_across_lives(meterd, tmp_path):
    """Without a gap where nothing was lost, and each number once."""
    for url in (meterd.url, nowhere(), meterd.url):
        meter = Meter(url, source="svc-a", spool=tmp_path, numbered=True)
        for _ in range(3):
            meter.emit("esc_1", "calls")
        meter.flush(0.5)
        meter.close(0.1)

    assert [meterd.events[one]["sequence"] for one in meterd.order] == [*range(1, 10)]


@pytest.mark.parametrize(
    "options",
    [
        {"numbered": True},
        {"numbered": True, "spool": "x"},
        {"fsync": "always"},
        {"when_full": "drop"},
        {"batch_events": 0},
        {"batch_events": 20_001},
        {"timeout_s": 0},
        {"bytes_max": 0},
        {"url": "ftp://x"},
        {"url": "unix:relative"},
        {"url": "http://meterd.example", "token": "secret"},
        {"token": "two words"},
        {"secret": "c2VjcmV0"},
        {"secret": "whsec_!"},
    ],
)
def test_options_that_cannot_be_meant_are_refused_at_once(options):
    """Before anything is told."""
    with pytest.raises(BadUsage):
        Meter(**options)


def test_token_goes_where_it_is_safe_and_is_shown_nowhere(meterd):
    """To this machine, over TLS, over a socket, or where its owner says so."""
    for url in ("http://localhost:1", "http://[::1]:1", "https://m.example", "unix:/run/m.sock"):
        assert "secret" not in repr(Place(url, "secret"))
    Place("http://meterd.example", "secret", trusted=True)
    with Meter(meterd.url, "secret") as meter:
        meter.emit("esc_1", "calls")
        assert meter.flush()

    assert [headers["Authorization"] for _, headers, _ in meterd.asked] == ["Bearer secret"]


def test_child_of_a_fork_tells_its_own_events_and_not_the_parents(meterd, tmp_path):
    """As in servers that fork their workers."""
    program = """
import os, sys
from meterd.sdk import Meter
meter = Meter(sys.argv[1], spool=sys.argv[2], batch_wait_s=0.2)
meter.emit("esc_1", "calls", id="parent")
child = os.fork()
if not child:
    meter.emit("esc_1", "calls", id="child")
    os._exit(0 if meter.flush(10) else 1)
assert os.waitpid(child, 0)[1] == 0
assert meter.flush(10)
meter.close()
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, meterd.url, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=dict(os.environ),
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(meterd.order) == ["child", "parent"]
    assert meterd.duplicates == 0


def test_program_that_forgets_to_close_loses_nothing(meterd):
    """The end of the program closes."""
    program = "import sys; from meterd.sdk import Meter; Meter(sys.argv[1]).emit('esc_1', 'calls')"
    subprocess.run([sys.executable, "-c", program, meterd.url], timeout=60, check=True)

    assert len(meterd.events) == 1


async def test_program_that_awaits_tells_without_waiting_and_flushes_awaited(meterd):
    """The same meter, with an awaited end."""
    async with AsyncMeter(meterd.url) as meter:
        made = [meter.emit("esc_1", "calls") for _ in range(100)]
        assert await meter.aflush()

    assert meterd.order == made
    with pytest.raises(BadUsage, match="event loop"):
        AsyncMeter(meterd.url, fsync="each")


def test_typed_event_goes_as_it_is_told(meterd):
    """Milestones and outcomes too; id and time are put in, what is there stays."""
    with Meter(meterd.url, source="svc-a") as meter:
        told = meter.tell({"type": "meterd.milestone", "agreement": "e", "meter": "-", "name": "m"})
        assert meter.flush()

    assert meterd.events[told]["source"] == "svc-a"
    assert {"id", "time", "type", "name"} <= set(meterd.events[told])


@pytest.mark.parametrize(
    "body",
    [
        b'{"accepted": 1, "duplicates": 0, "rejected": []}',
        b'{"accepted": 3, "duplicates": 0, "rejected": []}',
        b'{"accepted": 1, "duplicates": 0, "rejected": [{"index": 7, "reason": "late"}]}',
        b"[]",
        b"",
    ],
)
def test_answer_that_counts_otherwise_than_the_batch_takes_nothing(body):
    """Whoever answers there, it is not the meterd that has these events."""
    read = delivery.read(Reply(200, body), [b'{"id":"a"}', b'{"id":"b"}'])

    assert isinstance(read, delivery.Again)


def test_importing_the_sdk_imports_no_daemon():
    """It runs inside other people's programs."""
    program = """
import sys, meterd.sdk, meterd.sdk.aiohttp, meterd.sdk.asgi
rooms = {name.split(".")[1] for name in sys.modules if name.startswith("meterd.")}
print(sorted(rooms))
print([name for name in ("numpy", "redis", "pydantic", "starlette") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    rooms, heavy = done.stdout.splitlines()

    assert rooms == "['core', 'errors', 'escrow', 'sdk']"
    assert heavy == "[]"


def test_events_of_the_memory_come_back_whole_when_the_program_ends(caplog):
    """The last resort is the log."""
    meter = Meter(nowhere())
    made = meter.emit("esc_1", "calls")
    meters._live.add(meter)
    meter_close, meter.close = meter.close, lambda: meter_close(0.1)
    meters._close_all()

    assert made in caplog.text


def test_second_process_under_one_numbered_source_is_refused_and_holds_nothing(meterd, tmp_path):
    """It would give the same number twice."""
    options = {"source": "svc-a", "spool": tmp_path, "numbered": True}
    with Meter(meterd.url, **options) as meter:
        with pytest.raises(NotKept, match="give each its source"):
            Meter(meterd.url, **options).open()
        meter.emit("esc_1", "calls")
        assert meter.flush()

    assert len(meterd.events) == 1


def test_disk_that_fails_after_the_answer_is_no_loss_and_no_charge(
    meterd, tmp_path, monkeypatch, caplog
):
    """What cannot be noted is sent again after a crash, and is a duplicate."""
    meter = Meter(meterd.url, spool=tmp_path, batch_events=1)
    real = os.ftruncate

    def refuse(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "ftruncate", refuse)
    ids = [meter.emit("esc_1", "calls") for _ in range(3)]
    assert meter.flush()
    monkeypatch.setattr(os, "ftruncate", real)
    ids.append(meter.emit("esc_1", "calls"))
    assert meter.flush()
    meter.close()

    assert meterd.order == ids
    assert "sent again after a crash" in caplog.text
    assert list(tmp_path.iterdir()) == []
