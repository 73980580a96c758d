"""A store that an older meterd wrote goes up the ladder and keeps every figure."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from fractions import Fraction
from pathlib import Path

import pytest

from meterd.core.changes import (
    Change,
    CounterRow,
    SampleRow,
    TakenBlock,
    VoidRow,
)
from meterd.core.ledger import Ledger
from meterd.core.plans import Pattern, Plan
from meterd.core.pricing import Rate, RateCard
from meterd.store import schema
from meterd.store.identities import digest
from meterd.store.sqlite import SqliteStore

CARD = RateCard((Rate("calls", 10**9), Rate("tokens", 2 * 10**9, 1000, (("kind", "in"),))))
PLANS = {"stream": Plan("stream", Pattern.STREAMING, CARD)}
NANOS = 10**9
NOW = 1_800_000_000_000


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A directory with a file as version 1 made it: two agreements, three counters, a release."""
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    with contextlib.closing(sqlite3.connect(state / "meterd.db", isolation_level=None)) as file:
        file.executescript(
            f"PRAGMA journal_mode = WAL; PRAGMA application_id = {schema.APPLICATION_ID};"
            f" BEGIN; {schema.LADDER[0]} PRAGMA user_version = 1; COMMIT;"
        )
        file.execute("INSERT INTO card VALUES (?, ?)", (CARD.id, CARD.text))
        counters = (
            ("b", "calls", "[]", 3 * NANOS, 3),
            ("a", "tokens", '[["kind","in"]]', str(10**20), 2),
            ("a", "calls", "[]", NANOS, 1),
        )
        for name, accrued, events, units in (
            ("a", Fraction(1, 1000) + Fraction(10**11) * 2 / 10**6, 3, str(10**20 + NANOS)),
            ("b", Fraction(3, 1000), 3, 3 * NANOS),
        ):
            row = (
                name,
                "stream",
                "Ada",
                "api",
                f'[["main","esc_{name}"]]',
                0,
                NOW,
                f"{accrued.numerator}/{accrued.denominator}",
                events,
                units,
                NOW,
            )
            file.execute(f"INSERT INTO agreement VALUES ({', '.join('?' * len(row))})", row)
            file.execute(
                "INSERT INTO escrow VALUES (?, ?, 'main', 'active', '', 0, 10000000, 0, 1000, 0,"
                " 1000, 9999000, 'active', NULL, NULL, 1, 1000000000, 5)",
                (f"esc_{name}", name),
            )
        for agreement, meter, dimensions, quantity, events in counters:
            row = (agreement, CARD.id, meter, dimensions, quantity, events)
            file.execute("INSERT INTO counter VALUES (?, ?, ?, ?, ?, ?)", row)
        file.execute(
            "INSERT INTO release VALUES (1, 'rel_1', 'esc_a', 1000, 0, 'confirmed', 'amount',"
            ' 1000000000, 1, 2, \'[[1,"intended",""],[2,"confirmed",""]]\')'
        )
    return state


async def test_store_of_version_1_climbs_and_keeps_every_figure(old: Path) -> None:
    """Counters belong to the first period and have a number each; nothing else has changed."""
    store = SqliteStore.open(old, entries_max=100)
    state = store.load()
    await store.close()
    (first, second) = sorted(state.agreements, key=lambda row: row.id)

    assert sorted((row.agreement, row.meter, row.quantity) for row in state.counters) == [
        ("a", "calls", NANOS),
        ("a", "tokens", 10**20),
        ("b", "calls", 3 * NANOS),
    ]
    assert sorted(row.number for row in state.counters) == [1, 2, 3]
    assert {(row.period, row.amount) for row in state.counters} == {(0, 0)}
    assert (first.period, first.events, first.units) == (0, 3, 10**20 + NANOS)
    assert second.accrued == Fraction(3, 1000)
    assert [escrow.refund for escrow in state.escrows] == [False, False]
    assert state.escrows[0].settled == 1000
    assert (state.samples, state.voids, state.holds, state.void_next) == ([], [], [], 1)


async def test_climbed_store_believes_no_numbers_of_what_it_counted_before(old: Path) -> None:
    """Until five minutes from now, as far as a clock may be ahead; a new store believes all."""
    with contextlib.closing(sqlite3.connect(old / "meterd.db", isolation_level=None)) as file:
        file.execute("INSERT INTO mark_block VALUES (1, 5, 1, zeroblob(20))")
    before = time.time_ns() // 1_000_000
    store = SqliteStore.open(old, entries_max=100)
    state = store.load()
    await store.close()
    fresh = SqliteStore.open(old.parent / "fresh", entries_max=100)
    believing = fresh.load()
    await fresh.close()

    assert [] == state.producers
    assert before - 1000 <= state.numbers_from - 300_000 <= time.time_ns() // 1_000_000
    assert 0 == believing.numbers_from


async def test_ledger_of_a_climbed_store_goes_on_counting(old: Path) -> None:
    """What its counters are worth is what was stored, and new ones get numbers behind them."""
    store = SqliteStore.open(old, entries_max=100)
    ledger = Ledger.restore(PLANS, {}, store.load())
    await store.close()
    numbers = [ledger.counter(number) for number in (1, 2, 3)]

    assert None not in numbers
    assert ledger.accounts["b"].accrued == Fraction(3, 1000)
    assert ledger.counter(4) is None


async def test_climbing_is_done_once(old: Path) -> None:
    """A second start finds the new form, with the numbers that the first one gave."""
    store = SqliteStore.open(old, entries_max=100)
    before = store.load()
    await store.close()
    store = SqliteStore.open(old, entries_max=100)
    after = store.load()
    await store.close()

    assert after.counters == before.counters
    with contextlib.closing(sqlite3.connect(old / "meterd.db")) as file:
        assert file.execute("PRAGMA user_version").fetchone() == (schema.VERSION,)
        assert file.execute("PRAGMA foreign_key_check").fetchall() == []
        assert file.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


async def test_climbed_store_takes_the_new_rows(old: Path) -> None:
    """A counter of a later period beside the old one, samples, taken events and voids."""
    store = SqliteStore.open(old, entries_max=100)
    known = next(row for row in store.load().counters if row.agreement == "b")
    later = CounterRow("b", CARD.id, "calls", (), NANOS, 1, 1, 7, 4)
    identity = digest("svc", "e1")
    block = TakenBlock(5, False, identity[:8] + (4).to_bytes(4, "little") + bytes(8))
    change = Change(
        counters=(later,),
        samples=(SampleRow(4, "key", NANOS, 1), SampleRow(4, "gone", NANOS, 0)),
        taken=(block,),
        voids=(VoidRow(1, "b", "svc", "e1", NOW),),
    )
    await store.commit(change)
    (taken,) = await store.find_taken(identity)
    await store.close()
    store = SqliteStore.open(old, entries_max=100)
    state = store.load()
    await store.close()

    assert taken.counter == 4
    assert {known, later} <= set(state.counters)
    assert [row.key for row in state.samples if row.count] == ["key"]
    assert [row.voids for row in state.voids] == ["e1"]
    assert state.void_next == 2


async def test_a_store_that_is_made_now_has_the_same_tables_as_one_that_climbed(
    old: Path, tmp_path: Path
) -> None:
    """There is one form, however a file came to it."""
    for place in (old, tmp_path / "new"):
        await SqliteStore.open(place, entries_max=100).close()
    forms = []
    for place in (old, tmp_path / "new"):
        with contextlib.closing(sqlite3.connect(place / "meterd.db")) as file:
            query = "SELECT type, name, sql FROM sqlite_schema ORDER BY type, name"
            forms.append(file.execute(query).fetchall())

    assert forms[0] == forms[1]


async def test_a_number_belongs_to_one_counter(old: Path) -> None:
    """Taken events remember their counter by it, so the table refuses a second one."""
    await SqliteStore.open(old, entries_max=100).close()
    statement = "UPDATE counter SET number = 1"
    with (
        contextlib.closing(sqlite3.connect(old / "meterd.db")) as file,
        pytest.raises(sqlite3.IntegrityError),
    ):
        file.execute(statement)
