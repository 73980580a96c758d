"""The whole ledger against a naive one: any batches, any order, any duplication, any taking back.

What is owed is held against two other ways to come to it: the rate cards' charge of the stored
counters from scratch, and a sum in fractions over the events that are still there.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from fractions import Fraction

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from meterd.core.accounts import Agreement
from meterd.core.ledger import Ledger
from meterd.core.meters import Aggregation, Meter
from meterd.core.money import NANOS, PICOS
from meterd.core.plans import BASE, OVERAGE, Pattern, Plan, Version
from meterd.core.pricing import OWN_METERS, PERIOD_METER, Model, Rate, RateCard, Tier, Usage
from tests.unit.core.books import NOW, Till, usage
from tests.unit.core.naive import naive_charge

HOUR = 3_600_000
METERS = {
    meter.name: meter
    for meter in (
        Meter("tokens"),
        Meter("calls", Aggregation.COUNT),
        Meter("peak", Aggregation.MAX),
        Meter("users", Aggregation.UNIQUE),
        Meter("seats", Aggregation.LATEST),
    )
}
TIERS = (Tier(3 * NANOS, PICOS // 7, PICOS // 10), Tier(8 * NANOS, PICOS // 9), Tier(None, 5))


def card(price, *, minimum=None):
    """Rates of every model and every meter; the fee and one of them are drawn on `base`."""
    kinds = {
        "plain": {"price": price, "per": 3},
        "tiers": {"price": 0, "model": Model.GRADUATED, "tiers": TIERS, "free_units": NANOS},
        "volume": {"price": 0, "model": Model.VOLUME, "tiers": TIERS},
        "package": {"price": price, "per": 2, "model": Model.PACKAGE},
        "share": {"price": price, "model": Model.PERCENTAGE, "maximum": 2_000_000},
        "priced": {"price": 2 * PICOS, "per": 7, "model": Model.DYNAMIC},
        "capped": {"price": 2 * PICOS, "model": Model.DYNAMIC, "maximum": 1_500_000},
        "least": {"price": price, "minimum": minimum},
    }
    return RateCard(
        (
            Rate(PERIOD_METER, price, role=BASE),
            *(
                Rate("tokens", where=(("kind", kind),), role=OVERAGE, **fields)
                for kind, fields in kinds.items()
            ),
            Rate("tokens", price // 3, 11, role=BASE),
            *(Rate(name, price, 13, role=OVERAGE) for name in METERS if name != "tokens"),
        )
    )


FIRST, SECOND = card(PICOS, minimum=1_000_000), card(PICOS // 17)
PLAN = Plan("p", Pattern.HYBRID, FIRST, period=HOUR, later=(Version(NOW + HOUR // 2, SECOND),))
CHANGED = replace(PLAN, card=card(2 * PICOS))
KINDS = ["plain", "tiers", "volume", "package", "share", "priced", "capped", "least", "other"]


@dataclass(frozen=True)
class Event:
    """One event as the naive ledger knows it."""

    id: str
    source: str
    meter: str
    nanos: int
    at: int
    kind: str
    picos: int
    value: str
    card: RateCard

    def payload(self):
        """The event in bare JSON."""
        fields = {"source": self.source, "meter": self.meter, "value": self.value}
        if self.meter == "tokens":
            fields["dimensions"] = {"kind": self.kind}
        if self.picos:
            fields["price"] = f"0.{self.picos:012d}"
        time = datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=self.at)
        return usage(self.id, decimal(self.nanos), time=time.isoformat(), **fields)


def decimal(nanos):
    """Nanos as a plain decimal."""
    return f"{nanos // NANOS}.{nanos % NANOS:09d}"


class Whole(RuleBasedStateMachine):
    """A ledger under a plan with everything in it."""

    @initialize()
    def begin(self):
        """One agreement under it."""
        self.till = Till(Ledger({"p": PLAN}, METERS))
        pairs = (("base", "1"), ("overage", "2"))
        self.till.books.bind(Agreement("a", "p", "payer", pairs), NOW)
        self.plan = PLAN
        self.now = NOW
        self.there = {}  # Events that count, by (source, id).
        self.ever = []  # All that were delivered.
        self.fees = {}  # Ended periods, with the card whose fee is owed.

    @property
    def account(self):
        return self.till.books.accounts["a"]

    def event(self, number, data):
        """A new event at some time since the opening."""
        meter = data.draw(st.sampled_from([*METERS, "tokens", "tokens"]))
        kind = data.draw(st.sampled_from(KINDS))
        priced = meter == "tokens" and kind in ("priced", "capped")
        at = data.draw(st.integers(NOW, self.now))
        return Event(
            str(number),
            data.draw(st.sampled_from(["s", "t"])),
            meter,
            data.draw(st.integers(1, 6 * NANOS)),
            at,
            kind,
            data.draw(st.integers(1, PICOS - 1)) if priced else 0,
            data.draw(st.sampled_from(["ada", "bob"])),
            self.plan.card_at(at),
        )

    @rule(data=st.data(), fresh=st.integers(0, 4), again=st.integers(0, 3))
    def batch(self, data, fresh, again):
        """New events and old ones, in any order, each perhaps twice."""
        events = [self.event(len(self.ever) + n, data) for n in range(fresh)]
        for event in events:
            self.there[event.source, event.id] = event
        self.ever += events
        if self.ever:
            events += [data.draw(st.sampled_from(self.ever)) for _ in range(again)]
        before = self.till.accepted
        self.till.take([each.payload() for each in data.draw(st.permutations(events))],
                       now=self.now)  # fmt: skip
        assert self.till.accepted == before + fresh
        assert self.till.rejections == []

    @rule(data=st.data())
    def void(self, data):
        """One event is taken back."""
        if self.there:
            source, event_id = data.draw(st.sampled_from(sorted(self.there)))
            del self.there[source, event_id]
            self.till.take_back(event_id, source)

    @rule(minutes=st.integers(1, 90))
    def time(self, minutes):
        """Time goes on, and periods end."""
        self.now += minutes * 60_000
        touched, lapsed = self.till.books.end_periods(self.now, 0)
        self.till.keep(touched)
        assert lapsed == []
        for period in range(self.plan.period_at(NOW, self.now)):
            self.fees.setdefault(period, self.plan.card_at(NOW + period * HOUR))

    @rule()
    def change(self):
        """The prices of the first version are changed: for what comes from now on."""
        self.plan = CHANGED if self.plan is PLAN else PLAN
        self.till.books.reload({"p": self.plan}, METERS)

    @rule()
    def restart(self):
        """The ledger is thrown away and read back."""
        books = self.till.restored()
        self.till.books = books

    @invariant()
    def ledger_agrees_with_both_other_ways(self):
        """By role, exactly."""
        if not hasattr(self, "till"):
            return
        owed = self.naive()
        for role in PLAN.roles:
            micros = owed[role].numerator * 10**6 // owed[role].denominator
            assert self.account.owed_by(role) == micros
        assert self.account.accrued == sum(owed.values())
        assert self.account.accrued == self.from_scratch()
        assert self.account.events == len(self.there)
        assert self.till.books.totals().accrued == self.account.accrued

    @invariant()
    def restart_finds_the_same(self):
        """Every figure of the row, and every counter with what it shows."""
        if not hasattr(self, "till"):
            return
        restored = self.till.restored({"p": self.plan})
        stored = set(self.till.rows)

        assert restored.accounts["a"].row == self.account.row
        assert [each.row for each in restored.accounts["a"].counters.values()] == [
            self.till.rows[number] for number in self.till.rows
        ]
        assert stored == {
            each.number for each in self.account.counters.values() if each.number in stored
        }

    def naive(self):
        """Sum up what the events that are there cost, by role."""
        groups = {}
        for event in self.there.values():
            period = (event.at - NOW) // HOUR
            kind = event.kind if event.meter == "tokens" else ""
            groups.setdefault((period, event.card, event.meter, kind), []).append(event)
        owed = Counter({role: Fraction(0) for role in PLAN.roles})
        for period, paid_card in self.fees.items():
            owed[BASE] += Fraction(paid_card.rates[0].price, PICOS)
            for rate in paid_card.rates:
                used = (period, paid_card, rate.meter, dict(rate.where).get("kind", "")) in groups
                if rate.minimum is not None and not used:
                    owed[rate.role] += Fraction(rate.minimum, 10**6)
        for (period, of_card, meter, kind), events in groups.items():
            place = of_card.match(meter, {"kind": kind})
            rate = of_card.rates[place]
            brought = sum(Fraction(each.nanos * each.picos, NANOS * PICOS) for each in events)
            ended = self.fees.get(period) is of_card
            units = Fraction(naive_reading(meter, events), NANOS)
            owed[rate.role] += naive_charge(rate, units, brought, ended=ended)
        return owed

    def from_scratch(self):
        """Price the stored counters by their cards, each period by itself."""
        usages = {}
        for row in self.till.rows.values():
            if row.events or row.meter in OWN_METERS:
                of_period = usages.setdefault((row.period, row.card), {})
                of_period[row.meter, row.dimensions] = Usage(row.quantity, row.amount)
        cards = self.till.books.cards
        return sum(
            (
                charge
                for (_, name), used in usages.items()
                for charge in cards[name].charge(used).values()
            ),
            Fraction(0),
        )


def naive_reading(meter, events):
    """What a meter shows of some events, in nanos."""
    if meter == "calls":
        return NANOS * len(events)
    if meter == "users":
        return NANOS * len({each.value for each in events})
    if meter == "peak":
        return max(each.nanos for each in events)
    if meter == "seats":
        return max(events, key=lambda each: (each.at, each.id, each.source)).nanos
    return sum(each.nanos for each in events)


TestWhole = Whole.TestCase
TestWhole.settings = settings(max_examples=60, stateful_step_count=15, deadline=None)
