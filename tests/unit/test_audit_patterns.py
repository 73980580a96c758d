"""The auditor on a store with all patterns: what meterd wrote agrees, one changed row does not.

Its figures are held against bills that are worked out here by hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from meterd.audit import Audit, audit
from meterd.bookkeeper import Bookkeeper
from meterd.core.accounts import Agreement
from meterd.core.events import EventDecoder
from meterd.core.ledger import Ledger
from meterd.core.meters import Aggregation, Meter
from meterd.core.plans import Pattern, Plan
from meterd.core.pricing import (
    MILESTONE_METER,
    OUTCOME_METER,
    PERIOD_METER,
    Model,
    Rate,
    RateCard,
    Tier,
)
from meterd.core.settlement import Rules
from meterd.sources import Deliveries
from meterd.store import schema
from meterd.store.sqlite import SqliteStore
from tests.fakes import WINDOW_MS, FakeClock, NoFacts, adopt

NANOS, PICOS = 10**9, 10**12
WEEK = 7 * 24 * 3_600_000
METERS = {
    meter.name: meter
    for meter in (
        Meter("units"),
        Meter("jobs"),
        Meter("peak", Aggregation.MAX),
        Meter("users", Aggregation.UNIQUE),
        Meter("seats", Aggregation.LATEST),
    )
}
TIERS = (Tier(10 * NANOS, PICOS // 100, PICOS // 10), Tier(None, PICOS // 1000))
HYBRID = (
    Rate(PERIOD_METER, 5 * PICOS, role="base"),
    Rate("units", PICOS // 100, role="overage", free_units=1000 * NANOS),
)
ALL_MODELS = (
    Rate(PERIOD_METER, 0),
    Rate("units", 0, where=(("kind", "tiered"),), model=Model.GRADUATED, tiers=TIERS),
    Rate("units", 0, where=(("kind", "volume"),), model=Model.VOLUME, tiers=TIERS),
    Rate("units", PICOS // 10, 5, (("kind", "package"),), Model.PACKAGE, free_units=NANOS),
    Rate("units", PICOS // 40, where=(("kind", "share"),), model=Model.PERCENTAGE),
    Rate("units", PICOS, 3, (("kind", "priced"),), Model.DYNAMIC),
    Rate("units", PICOS // 100, where=(("kind", "least"),), minimum=2_000_000),
    Rate("units", PICOS, where=(("kind", "most"),), maximum=3_000_000),
    Rate("peak", PICOS // 100),
    Rate("users", PICOS // 10),
    Rate("seats", PICOS // 20),
)
PLANS = {
    plan.name: plan
    for plan in (
        Plan("hybrid", Pattern.HYBRID, RateCard(HYBRID), period=WEEK),
        Plan("all", Pattern.SUBSCRIPTION, RateCard(ALL_MODELS), period=WEEK),
        Plan(
            "project",
            Pattern.MILESTONE,
            RateCard((Rate(MILESTONE_METER, 25 * PICOS // 10, where=(("name", "design"),)),)),
        ),
        Plan(
            "score",
            Pattern.PERFORMANCE,
            RateCard(
                (
                    Rate(
                        OUTCOME_METER,
                        0,
                        model=Model.VOLUME,
                        tiers=(Tier(NANOS // 2, 0, PICOS), Tier(None, 0, 10 * PICOS)),
                    ),
                )
            ),
        ),
        Plan("plain", Pattern.STREAMING, RateCard((Rate("units", PICOS // 100),))),
    )
}


class Life:
    """A real bookkeeper on a real store with all patterns."""

    def __init__(self, data_dir: Path) -> None:
        self.clock = FakeClock()
        self.store = SqliteStore.open(data_dir, entries_max=10_000)
        self.books = Bookkeeper(
            Ledger(PLANS, METERS),
            self.store,
            self.store.identities,
            Rules(observe_gap=1.0, quarantine=60.0),
            self.clock,
            NoFacts(),
            decoder=EventDecoder(sentinel=7_777_777_777_777),
            window_ms=WINDOW_MS,
            positions={},
            dead_letters=0,
            dead_letter_next=1,
        )

    async def bind(self, name: str, plan: str, *escrows: str) -> None:
        pairs = tuple((role, f"esc_{name}_{place}") for place, role in enumerate(escrows))
        await self.books.bind(Agreement(name, plan, "Ada", pairs), "test")
        for _, escrow in pairs:
            await adopt(self.books, self.clock, escrow, total=20_000_000)

    async def send(self, *events: dict[str, Any]) -> None:
        payloads = [json.dumps(event).encode() for event in events]
        recorded = self.books.record("svc", Deliveries(payloads=payloads))
        assert list(recorded.rejections) == []
        await recorded.durable


def kinds(**quantities: Any) -> Iterator[dict[str, Any]]:
    """One event of `units` for each kind."""
    for kind, quantity in quantities.items():
        yield {
            "id": kind,
            "agreement": "all",
            "meter": "units",
            "quantity": quantity,
            "dimensions": {"kind": kind},
        }


async def _fill(data_dir: Path) -> None:
    life = Life(data_dir)
    await life.bind("hybrid", "hybrid", "base", "overage", "overage")
    await life.bind("all", "all", "main", "main")
    await life.bind("project", "project", "main")
    await life.bind("score", "score", "main")
    await life.bind("plain", "plain", "main")
    hybrid = {"agreement": "hybrid", "meter": "units"}
    await life.send(*({"id": f"h{n}", "quantity": 601, **hybrid} for n in range(2)))
    priced = {"agreement": "all", "meter": "units", "dimensions": {"kind": "priced"}}
    await life.send(
        *kinds(tiered="12.5", volume=20, package=7, share=8, least=1, most=4),
        {"id": "p1", "quantity": 3, "price": "0.5", **priced},
        {"id": "p2", "quantity": 1, "price": "0.25", **priced},
    )
    of_all = {"agreement": "all"}
    await life.send(
        *({"id": f"m{n}", "meter": "peak", "quantity": n, **of_all} for n in (3, 9, 4)),
        *({"id": f"u{n}", "meter": "users", "value": f"user {n % 2}", **of_all} for n in range(3)),
        *({"id": f"s{n}", "meter": "seats", "quantity": n, **of_all} for n in (7, 5)),
    )
    await life.send(
        {"id": "d", "agreement": "project", "type": MILESTONE_METER, "name": "design"},
        {"id": "o", "agreement": "score", "type": OUTCOME_METER, "score": 0},
        {"id": "v1", "agreement": "plain", "meter": "units", "quantity": 5},
        {"id": "v2", "agreement": "plain", "meter": "units", "quantity": 2},
    )
    await life.send({"id": "v", "agreement": "plain", "type": "meterd.void", "voids": "v1"})
    back = asyncio.ensure_future(life.books.take_back_voided())
    while life.books.ledger.accounts["plain"].events > 1:
        await asyncio.sleep(0.01)
    life.clock.advance(WEEK // 1000 + 60)
    await life.books.end_periods()
    await life.store.close()
    back.cancel()


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state directory with all patterns in it, each behind the end of a period."""
    data_dir = tmp_path_factory.mktemp("patterns") / "state"
    asyncio.run(_fill(data_dir))
    return data_dir


@pytest.fixture
def state(filled: Path, tmp_path: Path) -> Path:
    """A copy of it, to be tampered with."""
    data_dir = tmp_path / "state"
    data_dir.mkdir()
    (data_dir / "meterd.db").write_bytes((filled / "meterd.db").read_bytes())
    return data_dir


def broken(found: Audit) -> list[tuple[str, str]]:
    return [(each.invariant, each.row) for each in found.findings.breaks]


def test_auditor_agrees_with_every_pattern_and_with_bills_by_hand(filled: Path) -> None:
    """Six models, three kinds of samples, both ends of a period, roles, a score of nothing."""
    found = audit(filled)

    assert [str(each) for each in found.findings.breaks] == []
    assert found.books.owed["hybrid"] == {"base": 5, "overage": Fraction("2.02")}
    assert found.books.accrued["all"] == sum(
        map(
            Fraction,
            (
                "0.2025",  # Ten units at 0.01 and 0.1 for being there, 2.5 at 0.001.
                "0.02",  # Twenty at 0.001, the tier that the last one reaches.
                "0.2",  # Six beyond the free one: two packages of five were begun.
                "0.2",  # A fortieth of 8 USDC.
                "7/12",  # 3 x 0.5 + 0.25, for three units each.
                "2",  # The least of a period.
                "3",  # The most of a period.
                "0.09",  # A peak of nine.
                "0.2",  # Two users.
                "0.35",  # Seven seats: of two events at one time the greater id is the later one.
            ),
        )
    )
    assert found.books.accrued["project"] == Fraction("2.5")
    assert found.books.accrued["score"] == 1
    assert found.books.accrued["plain"] == Fraction("0.02")
    assert found.findings.checked["events that can be taken back"] == 22


TAMPERED = {
    "a counter of another period": (
        "UPDATE counter SET period = 3 WHERE dimensions GLOB '*least*'",
        ("accrued", "agreement all"),
    ),
    "a period's end that is gone": (
        "DELETE FROM counter WHERE agreement = 'all' AND meter = 'meterd.period'",
        ("accrued", "agreement all"),
    ),
    "a period that ended twice": (
        "UPDATE counter SET quantity = 2000000000 WHERE meter = 'meterd.period'",
        ("counters", "counter (hybrid, card @hybrid@, meterd.period)"),
    ),
    "a period that ended before its time": (
        "UPDATE counter SET period = 1 WHERE agreement = 'hybrid' AND meter = 'meterd.period'",
        ("periods", "agreement hybrid"),
    ),
    "an agreement in another period": (
        "UPDATE agreement SET period = 2 WHERE id = 'hybrid'",
        ("periods", "agreement hybrid"),
    ),
    "a tranche that was reached twice": (
        "UPDATE counter SET quantity = 2000000000, events = 2 WHERE meter = 'meterd.milestone'",
        ("counters", "counter (project, card @project@, meterd.milestone, name = design)"),
    ),
    "a score beyond one": (
        "UPDATE counter SET quantity = 2000000000 WHERE meter = 'meterd.outcome'",
        ("counters", "counter (score, card @score@, meterd.outcome)"),
    ),
    "an amount that events brought": (
        "UPDATE counter SET amount = 1 WHERE amount <> 0",
        ("taken events", "counter (all, card @all@, units, kind = priced)"),
    ),
    "usage that no event said": (
        "UPDATE counter SET quantity = quantity + 1 WHERE agreement = 'hybrid' AND events > 0",
        ("taken events", "counter (hybrid, card @hybrid@, units)"),
    ),
    "what is left of an event that was taken back": (
        "UPDATE counter SET events = 0 WHERE agreement = 'plain'",
        ("counters", "counter (plain, card @plain@, units)"),
    ),
    "a peak": (
        "UPDATE sample SET quantity = 10000000000, key = '10000000000' WHERE key = '9000000000'",
        ("counters", "counter (all, card @all@, peak)"),
    ),
    "a user that was there before": (
        "UPDATE sample SET count = 0 WHERE key = 'user 1'",
        ("counters", "counter (all, card @all@, users)"),
    ),
    "a seat": (
        "UPDATE sample SET quantity = 1 WHERE key GLOB '* s7*'",
        ("counters", "counter (all, card @all@, seats)"),
    ),
    "a sample of no kind": (
        "UPDATE sample SET key = 'x' WHERE key = '9000000000'",
        ("counters", "counter (all, card @all@, peak)"),
    ),
    "a sample of no counter": (
        "UPDATE sample SET counter = 99",
        ("references", "sample of counter 99"),
    ),
    "a block of events that is gone": (
        "DELETE FROM mark_block WHERE number = 1",
        ("marks", "mark_block"),
    ),
    "a block of events that is cut": (
        "UPDATE taken_block SET data = x'00' WHERE number = 1",
        ("taken events", "taken_block 1"),
    ),
    "a wide block of events that is cut": (
        "UPDATE taken_block SET data = x'00' WHERE wide = 1",
        ("taken events", "taken_block 2"),
    ),
    "a block of events from before the window": (
        "INSERT INTO setting VALUES ('marks_from', 999999)",
        ("taken events", "taken_block 1"),
    ),
    "a block of events twice": (
        "INSERT INTO taken_block SELECT 99, bucket, wide, data FROM taken_block WHERE number = 1",
        ("taken events", "counter (hybrid, card @hybrid@, units)"),
    ),
    "an event of no counter": (
        "UPDATE taken_block SET data = zeroblob(20) WHERE number = 1",
        ("taken events", "counter 0"),
    ),
    "a release that never was": (
        "UPDATE escrow SET settled = 1, observed = 1 WHERE id = 'esc_plain_0'",
        ("settled", "escrow esc_plain_0"),
    ),
    "more of one role than was used, and not in all": (
        "UPDATE escrow SET settled = 2500000 WHERE id = 'esc_hybrid_1'",
        ("released <= used", "agreement hybrid, overage"),
    ),
    "an escrow in another role": (
        "UPDATE escrow SET role = 'overage', settled = 5000000 WHERE id = 'esc_hybrid_0'",
        ("released <= used", "agreement hybrid, overage"),
    ),
    "a way to charge": (
        "UPDATE card SET text = replace(text, '\"volume\"', '\"gift\"') WHERE id = '@all@'",
        ("readable", "card @all@"),
    ),
    "tiers out of order": (
        "UPDATE card SET text = replace(text, '10000000000,', 'null,') WHERE id = '@all@'",
        ("readable", "card @all@"),
    ),
    "a hold of less than nothing": (
        "INSERT INTO hold (@hold@) VALUES (@none@)",
        ("holds", "hold h"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERED)
def test_one_changed_row_is_named(state: Path, name: str) -> None:
    """The invariant with the very row that breaks it."""
    statement, (invariant, row) = TAMPERED[name]
    with contextlib.closing(sqlite3.connect(state / "meterd.db", isolation_level=None)) as other:
        other.execute("PRAGMA ignore_check_constraints = ON")
        cards = dict(other.execute("SELECT DISTINCT agreement, card FROM counter"))
        columns = schema.HOLD_COLUMNS.split(", ")
        values = {"id": "'h'", "agreement": "'all'", "amount": "-1", "meter": "''"}
        places = {f"@{agreement}@": card for agreement, card in cards.items()}
        places["@hold@"] = ", ".join(columns)
        places["@none@"] = ", ".join(values.get(column, "0") for column in columns)
        for place, value in places.items():
            statement, row = statement.replace(place, value), row.replace(place, value)
        assert other.execute(statement).rowcount >= 1
    found = audit(state)

    assert (invariant, row) in broken(found)


def test_what_was_paid_before_usage_was_taken_back_is_a_note(state: Path) -> None:
    """It is credit, and the next releases are smaller: nothing was lost to anybody."""
    with contextlib.closing(sqlite3.connect(state / "meterd.db", isolation_level=None)) as other:
        other.execute("UPDATE escrow SET settled = 70000 WHERE id = 'esc_plain_0'")
    found = audit(state)

    assert ("released <= used", "agreement plain") not in broken(found)
    assert any("agreement plain" in note and "credit" in note for note in found.findings.notes)


@pytest.mark.parametrize(("service_status", "agrees"), [("released", True), ("active", False)])
def test_what_the_service_paid_out_at_its_end_is_payment_that_nobody_has_to_vouch_for(
    state: Path, service_status: str, agrees: bool
) -> None:
    """A deadline paid the rest; of a live escrow a credit needs an act and a name."""
    with contextlib.closing(sqlite3.connect(state / "meterd.db", isolation_level=None)) as other:
        other.execute(
            "UPDATE escrow SET status = 'closed', service_status = ?, credited = 20000000,"
            " observed = 20000000, remaining = 0 WHERE id = 'esc_plain_0'",
            (service_status,),
        )
    named = ("journal", "escrow esc_plain_0") in broken(audit(state))

    assert named != agrees
