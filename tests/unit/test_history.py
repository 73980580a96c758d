"""Past usage read from files and from a store, and what is said of what is not there."""

from __future__ import annotations

import json
import sqlite3

import pytest

from meterd.core.accounts import Agreement
from meterd.core.changes import CardRow, Change, TakenBlock
from meterd.core.ledger import Ledger
from meterd.core.meters import Aggregation, Meter
from meterd.core.money import NANOS, PICOS
from meterd.core.plans import Pattern, Plan
from meterd.core.pricing import Model, Rate, RateCard
from meterd.core.simulate import price
from meterd.errors import NotFound
from meterd.history import HOUR_MS, from_lines, from_store
from meterd.store import taken
from meterd.store.sqlite import SqliteStore

T = 1_795_000_000_000 // HOUR_MS * HOUR_MS
METERS = {
    "units": Meter("units"),
    "calls": Meter("calls", Aggregation.COUNT),
    "users": Meter("users", Aggregation.UNIQUE),
    "tools": Meter("tools"),
}
CARD = RateCard(
    (
        Rate("units", PICOS // 1000, where=(("kind", "dear"),)),
        Rate("units", PICOS // 10_000),
        Rate("calls", PICOS // 100),
        Rate("users", PICOS),
        Rate("tools", PICOS, model=Model.DYNAMIC),
    )
)
PLANS = {"stream": Plan("stream", Pattern.STREAMING, CARD)}


def line(event_id, second=0, **fields):
    """One event in bare JSON."""
    minute, rest = divmod(second, 60)
    time = f"2026-11-24T10:{minute:02}:{rest:02}Z"
    event = {"id": event_id, "agreement": "a", "meter": "units", "quantity": 1, "time": time}
    return json.dumps({**event, **fields}).encode() + b"\n"


# -- Files ---------------------------------------------------------------------------------------


def test_events_of_files_come_in_the_order_of_their_time_and_once():
    """However they stand in the files; the same identity again is the same event."""
    lines = [line("late", 90), line("early", 30), b"\n", line("late", 90), line("mid", 60)]

    found = from_lines(lines, {})

    assert [item.event.id for item in found.past] == ["early", "mid", "late"]
    assert found.past[1].at - found.past[0].at == 30_000
    assert found.notes == ["1 events came twice and are counted once"]


def test_event_of_an_escrow_is_its_agreements():
    """As the configuration binds it; an escrow that it does not know stands for itself."""
    lines = [
        line("1", agreement="", escrow_id="esc_1"),
        line("2", agreement="", escrow_id="esc_9"),
        line("3", agreement="esc_1"),
    ]

    found = from_lines(lines, {"esc_1": "a"})

    assert [(item.event.agreement, item.event.escrow_id) for item in found.past] == [
        ("a", ""),
        ("esc_9", ""),
        ("a", ""),
    ]


def test_what_a_file_does_not_say_is_told():
    """Lines that are no events, events without a time, and those that were taken back."""
    void = line("v", 99, type="meterd.void", voids="1", meter="", quantity="")
    lines = [line("1"), line("2"), line("3", time=None), b"no json\n", void]

    found = from_lines(lines, {})

    assert [item.event.id for item in found.past] == ["2"]
    assert [note.partition(",")[0] for note in found.notes] == [
        "1 events that were taken back are left out from the beginning",
        "1 lines are no usage events",
        "1 events have no time and are left out",
    ]


# -- A store -------------------------------------------------------------------------------------


@pytest.fixture
async def store_dir(tmp_path):
    """A closed store with two hours of usage of one agreement, and one older event."""
    books = Ledger(PLANS, METERS)
    change = books.bind(Agreement("a", "stream", "payer", (("main", "esc"),)), T)
    store = SqliteStore.open(tmp_path / "data", entries_max=1000)
    store.load()
    await store.commit(change)
    events = [
        ("units", 5 * NANOS, {"kind": "dear"}, 0, ""),
        ("units", 7 * NANOS, {}, 0, ""),
        ("calls", NANOS, {}, 0, ""),
        ("users", NANOS, {}, 0, "ada"),
        ("users", NANOS, {}, 0, "ada"),
        ("tools", 2 * NANOS, {}, 2 * NANOS * (PICOS // 4), ""),
    ]
    past = from_lines(
        [
            line(
                f"{place}",
                meter=meter,
                quantity=str(quantity // NANOS),
                dimensions=dimensions,
                value=key,
                **({"price": "0.25"} if amount else {}),
            )
            for place, (meter, quantity, dimensions, amount, key) in enumerate(events)
        ],
        {},
    ).past
    batch = [item.event for item in past]
    resolved = books.resolve(batch, None, "s", 0, past[0].at)
    assert not resolved.rejections
    digests = [b"%016d" % place for place in range(len(batch))]
    entry = books.decide(resolved, digests, [0] * len(batch), [-1] * len(batch))
    touched = books.apply(entry, past[0].at)
    change = touched.change()
    numbers = [counter.number for counter in resolved.counters]
    extras = {3: (0, "ada"), 4: (0, "ada"), 5: (events[5][3], "")}
    half = 2
    hour = T // HOUR_MS
    first = taken.pack(
        hour, b"".join(digests[:half]), numbers[:half], resolved.quantities[:half], {}
    )
    second = taken.pack(
        hour + 1,
        b"".join(digests[half:]),
        numbers[half:],
        resolved.quantities[half:],
        {place - half: extra for place, extra in extras.items()},
    )
    await store.commit(
        Change(
            cards=(CardRow(CARD.id, CARD.text),),
            agreements=change.agreements,
            counters=change.counters,
            samples=change.samples,
            taken=(*first, *second),
        )
    )
    await store.close()
    return tmp_path / "data", books.accounts["a"].accrued


async def test_usage_of_a_store_is_worth_what_the_store_says(store_dir):
    """Each event is written anew from what it added: priced again, it is the same sum."""
    place, accrued = store_dir

    found = from_store(place, METERS)
    priced = price(PLANS, METERS, found.plans, found.past)

    assert found.plans == {"a": "stream"}
    assert priced.rejected == {}
    assert priced.events == 6
    assert priced.curves[0].steps[-1].owed == (int(accrued * 10**6),)


async def test_usage_of_an_hour_is_spread_evenly_over_it_and_that_is_said(store_dir):
    """Two events of an hour stand at its quarters; nothing is closer to the truth than another."""
    place, _ = store_dir

    found = from_store(place, METERS)

    moments = [item.at - T for item in found.past]
    assert moments[:2] == [HOUR_MS // 4, 3 * HOUR_MS // 4]
    assert moments[2] == HOUR_MS + HOUR_MS // 8
    assert found.notes == ["6 events are known by their hour alone and are spread evenly over it"]


async def test_usage_that_a_store_has_forgotten_is_told(store_dir):
    """Single events are forgotten with the dedupe window; the counters go on."""
    place, _ = store_dir
    connection = sqlite3.connect(place / "meterd.db")
    connection.execute("DELETE FROM taken_block WHERE bucket = ?", (T // HOUR_MS,))
    connection.commit()
    connection.close()

    found = from_store(place, METERS)

    assert found.notes[1].startswith("2 events are older than the store's memory")


def test_store_that_is_not_there_is_named(tmp_path):
    """Nothing is made where nothing was."""
    with pytest.raises(NotFound, match=r"meterd\.db"):
        from_store(tmp_path, METERS)
    assert list(tmp_path.iterdir()) == []


def test_blocks_are_read_in_the_order_in_which_they_were_written():
    """Narrow and wide ones alike."""
    digests = bytes(range(48))
    (narrow,) = taken.pack(1, digests, [3, 1, 2], [10, 2**63, 30], {})
    (wide,) = taken.pack(1, digests, [3, 1, 2], [10, 2**70, 30], {1: (5, "key")})

    assert isinstance(narrow, TakenBlock)
    assert [(one.counter, one.quantity) for one in taken.unpack(narrow.data, wide=False)] == [
        (3, 10),
        (1, 2**63),
        (2, 30),
    ]
    assert [
        (one.counter, one.quantity, one.amount, one.sample)
        for one in taken.unpack(wide.data, wide=True)
    ] == [(3, 10, 0, ""), (1, 2**70, 5, "key"), (2, 30, 0, "")]
