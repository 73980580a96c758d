"""Holds and the gate: nobody is promised what the payer's escrows cannot pay, or promised twice."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from meterd.core.accounts import Agreement
from meterd.core.changes import Hold
from meterd.core.holds import Ask, Holds, Verdict, headroom, price
from meterd.core.ledger import Ledger
from meterd.core.money import MICROS, NANOS, PICOS
from meterd.core.plans import Gate, Pattern, PeriodEnd, Plan, Version
from meterd.core.pricing import MILESTONE_METER, PERIOD_METER, Model, Rate, RateCard, Tier
from meterd.core.settlement import EscrowStatus
from tests.unit.core.books import METERS, NOW, Till, usage

HOUR = 3_600_000
CENT = MICROS // 100
TOKEN = Rate("tokens", PICOS // 100)  # A cent each.


def till(*rates, total=MICROS, gate=None, **fields):
    """An agreement under a plan of these rates, with an escrow that was read."""
    plan = Plan("p", Pattern.STREAMING, RateCard(rates or (TOKEN,)), gate=gate or Gate(), **fields)
    books = Ledger({"p": plan}, METERS)
    books.bind(Agreement("a", "p", "payer", tuple((r, f"esc_{r}") for r in plan.roles)), NOW)
    for role in plan.roles:
        read(books, f"esc_{role}", total)
    return Till(books)


def read(books, name, total, **figures):
    """The service has told what an escrow holds."""
    escrow = replace(books.escrows[name], status=EscrowStatus.ACTIVE, total=total, remaining=total)
    books.put(replace(escrow, **figures))


def hold(name="h", amount=CENT, agreement="a", ends=NOW + 60_000, **fields):
    """A hold of one token."""
    facts = {"meter": "tokens", "dimensions": (), "quantity": NANOS, **fields}
    return Hold(name, agreement, amount, created_at=NOW, expires_at=ends, **facts)


def judge(books, tokens=1, holds=(), now=NOW, meter="tokens", **dimensions):
    """Ask the gate."""
    ask = Ask(meter, tokens * NANOS, dimensions)
    return Holds(holds).judge(books, books.accounts["a"], ask, now)


# -- Holds by themselves ------------------------------------------------------------------------


def test_hold_sets_its_amount_aside_until_it_is_removed():
    """By agreement, and by meter in quantity; removed twice it frees nothing more."""
    mine = hold("h1"), hold("h2", 2 * CENT), hold("h3", 4 * CENT, meter="calls")
    holds = Holds((*mine, hold("h4", 8 * CENT, "b")))

    assert (4, 15 * CENT, 7 * CENT) == (len(holds), holds.total, holds.amount("a"))
    assert (2 * NANOS, NANOS, 0) == tuple(
        holds.quantity(*which) for which in (("a", "tokens"), ("b", "tokens"), ("b", "calls"))
    )
    assert mine[1] == holds.get("h2") == holds.remove("h2")
    assert holds.get("h2") is None
    assert holds.remove("h2") is None
    assert (5 * CENT, NANOS) == (holds.amount("a"), holds.quantity("a", "tokens"))
    assert {"h1", "h3", "h4"} == {one.id for one in holds}


def test_agreement_without_holds_has_nothing_set_aside():
    """And asking for it leaves nothing behind."""
    holds = Holds()

    assert (0, 0, 0, 0) == (
        holds.amount("a"),
        holds.quantity("a", "tokens"),
        holds.total,
        len(holds),
    )


def test_hold_of_nothing_still_counts_its_quantity():
    """What is free of charge has an amount of 0; another one's end does not make it forgotten."""
    holds = Holds((hold("free", 0), hold("paid", CENT)))
    holds.remove("paid")

    assert (0, NANOS) == (holds.amount("a"), holds.quantity("a", "tokens"))
    assert holds.remove("free")
    assert 0 == holds.quantity("a", "tokens")


def test_hold_expires_at_its_end_and_no_moment_before():
    """Each one once, the earliest first; one that was captured before is not named."""
    holds = Holds((hold("late", ends=NOW + 2), hold("soon", ends=NOW + 1), hold("gone", ends=NOW)))
    holds.remove("gone")

    assert [] == holds.expire(NOW)
    assert ["soon"] == [one.id for one in holds.expire(NOW + 1)]
    assert ["late"] == [one.id for one in holds.expire(NOW + 9)]
    assert [] == holds.expire(NOW + 9)
    assert 0 == holds.total == len(holds)


def test_hold_that_was_set_aside_anew_under_its_id_lives_until_its_new_end():
    """The end of the one before is not its own."""
    holds = Holds((hold("h", ends=NOW + 1),))
    holds.remove("h")
    holds.add(hold("h", ends=NOW + 5))

    assert [] == holds.expire(NOW + 4)
    assert CENT == holds.total
    assert ["h"] == [one.id for one in holds.expire(NOW + 5)]


# -- The gate -----------------------------------------------------------------------------------


def test_gate_allows_to_the_last_micro_and_no_further():
    """An escrow of one USDC pays a hundred tokens of a cent."""
    books = till().books

    assert Verdict(True, MICROS, MICROS) == judge(books, 100)
    assert Verdict(False, MICROS + CENT, MICROS, "the headroom is not enough") == judge(books, 101)


def test_gate_counts_what_is_owed_and_what_is_held():
    """Sixty owed and thirty held leave ten."""
    books = till()
    books.take([usage("x", 60)])
    held = [hold(amount=30 * CENT)]

    assert 10 * CENT == judge(books.books, holds=held).headroom
    assert judge(books.books, 10, held).allowed
    assert not judge(books.books, 11, held).allowed


def test_gate_allows_as_much_more_as_the_plan_overdraws():
    """By the plan's word, not by a micro more."""
    books = till(gate=Gate(overdraft=5 * CENT)).books

    assert Verdict(True, 105 * CENT, 105 * CENT) == judge(books, 105)
    assert not judge(books, 106).allowed


@pytest.mark.parametrize("tokens", [1, 101])
def test_gate_that_does_not_enforce_only_tells(tokens):
    """It allows what the headroom does not pay, and says so."""
    verdict = judge(till(gate=Gate(enforce=False)).books, tokens)

    assert verdict.allowed
    assert ("the headroom is not enough" if tokens > 100 else "") == verdict.reason


@pytest.mark.parametrize("enforce", [True, False])
def test_gate_has_no_price_for_what_the_plan_does_not_name(enforce):
    """A meter of meterd's own, one without a rate, one nobody knows: long names are cut."""
    gate = Gate(enforce=enforce)
    books = till(TOKEN, Rate(MILESTONE_METER, PICOS), Rate("elsewhere", 1), gate=gate).books
    reasons = {
        name: judge(books, meter=name)
        for name in (MILESTONE_METER, "unpriced", "elsewhere", "nothing" * 99)
    }

    for name, verdict in reasons.items():
        wanted = f"plan p has no meter {name[:80]!r}"
        assert Verdict(not enforce, 0, None, wanted) == verdict


def test_gate_says_that_no_rate_fits_the_dimensions():
    """The meter is there, for other dimensions."""
    books = till(replace_where(TOKEN, kind="output")).books

    assert judge(books, kind="output").allowed
    assert (False, "no rate of plan p fits the dimensions") == (
        judge(books, kind="input").allowed,
        judge(books, kind="input").reason,
    )


def replace_where(rate, **where):
    return Rate(rate.meter, rate.price, where=tuple(sorted(where.items())))


@pytest.mark.parametrize("fail_open", [True, False])
def test_gate_opens_before_the_escrow_is_read_only_where_the_plan_says_so(fail_open):
    """Nothing is known to be missing, and nothing to be there."""
    books = till(total=0, gate=Gate(fail_open=fail_open)).books

    reason = "" if fail_open else "the escrow has not been read yet"
    assert Verdict(fail_open, CENT, None, reason) == judge(books)


def test_gate_that_fails_open_is_still_shut_by_a_close():
    """What was not read yet is no answer to who has closed."""
    books = till(total=0, gate=Gate(fail_open=True)).books
    books.close(books.accounts["a"], NOW)

    assert Verdict(False, CENT, None, "the agreement is closed") == judge(books)


def test_gate_denies_an_agreement_that_closes_or_has_no_escrow_left():
    """Its usage could not be charged to anybody."""
    closing, ended = till().books, till().books
    closing.close(closing.accounts["a"], NOW)
    read(ended, "esc_main", MICROS)
    ended.put(replace(ended.escrows["esc_main"], status=EscrowStatus.CLOSED))

    assert "the agreement is closed" == judge(closing).reason == judge(ended).reason


def weekly(**fields):
    """A subscription of five a week with tokens beside it."""
    return till(
        Rate(PERIOD_METER, 5 * PICOS), TOKEN, total=20 * MICROS, period=168 * HOUR, **fields
    )


def test_gate_asks_for_no_renewal_where_a_plan_has_no_periods():
    """A fee that is never charged needs no escrow that could hold it."""
    rates = Rate(PERIOD_METER, 5 * PICOS), TOKEN

    assert judge(till(*rates, total=MICROS).books).allowed
    verdict = judge(till(*rates, total=MICROS, period=HOUR).books)
    assert "no escrow holds the fee of this period; the payer must renew" == verdict.reason


def test_quota_is_of_one_meter_and_one_period():
    """Ten a week: counted and held usage of it both use it up; the next week has its own."""
    books = weekly(quota=("tokens", 10 * NANOS), period_end=PeriodEnd.AUTO)
    books.take([usage("x", 4), usage("y", 2, model="m")])
    used_up = "the quota of tokens for this period is used up"
    held = [hold("h", quantity=3 * NANOS)]

    assert ("", used_up) == tuple(judge(books.books, n).reason for n in (4, 5))
    assert ("", used_up) == tuple(judge(books.books, n, held).reason for n in (1, 2))
    books.books.end_periods(NOW + 168 * HOUR, 0)
    next_week = NOW + 168 * HOUR
    assert ("", used_up) == tuple(judge(books.books, n, now=next_week).reason for n in (10, 11))


def test_quota_of_one_meter_does_not_count_another():
    """Neither what was used of it nor what is asked for."""
    books = weekly(quota=("calls", NANOS))
    books.take([usage("x", 4)])

    assert judge(books.books, 100).allowed


# -- Headroom -----------------------------------------------------------------------------------


def pair(**second):
    """An agreement on two escrows of one role: 1 USDC each, unless said otherwise."""
    books = till()
    known = books.books.accounts["a"].agreement.escrows
    books.books.bind(Agreement("a", "p", "payer", (*known, ("main", "esc_2"))), NOW)
    read(books.books, "esc_2", second.pop("total", MICROS), **second)
    return books


def room(books, role="main"):
    return headroom(books.books, books.books.accounts["a"], role)


def test_headroom_is_what_all_escrows_of_a_role_can_still_pay():
    """Behind usage, a release moves it from what is owed to what was paid: nothing changes."""
    books = pair()
    books.take([usage("x", 30)])
    before = room(books)
    paid = {"total": MICROS, "remaining": 70 * CENT, "observed": 30 * CENT, "settled": 30 * CENT}
    read(books.books, "esc_main", **paid)

    assert 170 * CENT == before == room(books)


def test_headroom_counts_neither_what_was_paid_before_meterd_nor_a_closed_escrow():
    """A baseline is another's settlement; what a closed escrow has left is out of reach."""
    books = pair(remaining=80 * CENT, observed=20 * CENT, baseline=20 * CENT)
    books.take([usage("x", 30)])
    assert 150 * CENT == room(books)

    main = books.books.escrows["esc_main"]
    paid = {"remaining": 70 * CENT, "observed": 30 * CENT, "settled": 30 * CENT}
    books.books.put(replace(main, status=EscrowStatus.CLOSED, **paid))
    assert 80 * CENT == room(books)


def test_headroom_counts_a_release_from_when_it_is_expected():
    """An answer that the next reading has not shown yet was paid all the same."""
    books = till()
    books.take([usage("x", 30)])
    read(books.books, "esc_main", MICROS, remaining=70 * CENT, settled=30 * CENT)

    assert 70 * CENT == room(books)


def test_headroom_is_unknown_until_one_escrow_is_read():
    """Where one of two is read, that one is what can be promised."""
    assert room(till(total=0)) is None
    assert MICROS == room(pair(total=0))


def test_headroom_is_of_one_role():
    """What the overage escrow holds does not pay the base."""
    base, over = (Rate("tokens", PICOS // 100, role="base"), Rate("calls", PICOS, role="overage"))
    books = till(base, over)
    books.take([usage("x", 30)])

    assert (70 * CENT, MICROS) == (room(books, "base"), room(books, "overage"))
    assert ("", "the headroom is not enough") == tuple(
        judge(books.books, tokens, meter="calls").reason for tokens in (1, 2)
    )


# -- What more usage will cost ------------------------------------------------------------------


def cost(books, quantity, held=0, meter="tokens", **dimensions):
    """An estimate, in micros."""
    account = books.books.accounts["a"]
    found = price(books.books, account, Ask(meter, quantity, dimensions), NOW, held)
    return found[0]


def test_price_of_the_smallest_usage_is_one_micro():
    """Rounded up: what is promised must be enough. What costs nothing is free."""
    assert (1, CENT, CENT + 1) == tuple(cost(till(), nanos) for nanos in (1, NANOS, NANOS + 1))
    assert 0 == cost(till(Rate("tokens", 0)), NANOS)


def test_price_of_a_dynamic_rate_is_at_its_cap():
    """The event brings its own price, which nobody knows before."""
    books = till(Rate("tokens", PICOS // 50, model=Model.DYNAMIC))

    assert 6 * CENT == cost(books, 3 * NANOS)


TIERS = (Tier(10 * NANOS, PICOS // 100), Tier(None, PICOS // 10))


def test_price_in_tiers_is_behind_all_that_is_counted_and_held():
    """Ten at a cent, all beyond at ten."""
    books = till(Rate("tokens", 0, model=Model.GRADUATED, tiers=TIERS))
    assert (10 * CENT, 20 * CENT) == (cost(books, 10 * NANOS), cost(books, 11 * NANOS))
    assert 10 * CENT + CENT == cost(books, 2 * NANOS, held=9 * NANOS)

    account = books.books.accounts["a"]
    alone = price(books.books, account, Ask("tokens", 10 * NANOS), NOW)
    assert (10 * CENT, "main") == alone, "where nothing is held, nothing counts before it"

    books.take([usage("x", 8)])
    assert (2 * CENT, 12 * CENT) == (cost(books, 2 * NANOS), cost(books, 3 * NANOS))
    assert 12 * CENT - CENT == cost(books, 2 * NANOS, held=NANOS)


@pytest.mark.parametrize("model", [Model.STANDARD, Model.DYNAMIC])
def test_price_is_that_of_the_usage_and_not_the_minimum_of_a_period(model):
    """A minimum counts when the period has ended, and not for whoever asks first."""
    books = till(Rate("tokens", PICOS // 100, model=model, minimum=50 * CENT))

    assert CENT == cost(books, NANOS)


def test_price_is_the_one_in_force_when_it_is_asked_for():
    """A version of later prices what is served then."""
    dear = RateCard((Rate("tokens", PICOS // 10),))
    books = till(later=(Version(NOW + 1, dear),)).books

    assert (CENT, 10 * CENT) == tuple(judge(books, now=NOW + ms).needed for ms in (0, 1))


def test_price_where_more_usage_makes_all_of_it_cheaper_is_not_below_nothing():
    """A volume rate at which the eleventh token makes the ten before cheap."""
    tiers = (Tier(10 * NANOS, PICOS // 10), Tier(None, PICOS // 100))
    books = till(Rate("tokens", 0, model=Model.VOLUME, tiers=tiers))
    books.take([usage("x", 10)])

    assert 0 == cost(books, NANOS)


def test_gate_prices_behind_the_holds_of_the_same_meter_alone():
    """Nine free tokens are held: the next is the last at the low price; a held call counts not."""
    books = till(Rate("tokens", 0, model=Model.GRADUATED, tiers=TIERS), Rate("calls", 0)).books
    held = [hold(amount=0, quantity=9 * NANOS), hold("c", 0, meter="calls", quantity=9 * NANOS)]

    assert 11 * CENT == judge(books, 2, held).needed
    assert 2 * CENT == judge(books, 2, held[1:]).needed


@settings(max_examples=100)
@given(
    counted=st.integers(0, 30),
    parts=st.lists(st.integers(1, 10**10), min_size=1, max_size=5),
    model=st.sampled_from([Model.GRADUATED, Model.STANDARD, Model.PACKAGE]),
)
def test_holds_together_are_never_less_than_what_their_usage_costs(counted, parts, model):
    """Whatever the model, and however the usage is cut into holds."""
    tiers = TIERS if model is Model.GRADUATED else ()
    books = till(Rate("tokens", PICOS // 7, per=3, model=model, tiers=tiers))
    if counted:
        books.take([usage("x", counted)])
    before, held, amounts = books.books.accounts["a"].accrued, 0, 0
    for part in parts:
        amounts += cost(books, part, held)
        held += part
    whole, rest = divmod(held, NANOS)
    books.take([usage("y", f"{whole}.{rest:09}")])

    assert books.books.accounts["a"].accrued - before <= Fraction(amounts, MICROS)


class Gates(RuleBasedStateMachine):
    """Callers ask, capture, give up and come late, in any order."""

    @initialize(overdraft=st.integers(0, 20))
    def open(self, overdraft):
        """An escrow of half a dollar."""
        self.overdraft = overdraft * CENT
        self.till = till(total=50 * CENT, gate=Gate(overdraft=self.overdraft))
        self.holds, self.number, self.now = Holds(), 0, NOW

    @rule(tokens=st.integers(1, 40), lives=st.integers(1, 5))
    def ask(self, tokens, lives):
        """A caller who is allowed holds what he needs."""
        account = self.till.books.accounts["a"]
        ask = Ask("tokens", tokens * NANOS)
        verdict = self.holds.judge(self.till.books, account, ask, self.now)
        assert verdict.allowed == (verdict.needed <= verdict.headroom)
        if verdict.allowed:
            self.number += 1
            facts = {"quantity": ask.quantity, "ends": self.now + lives}
            self.holds.add(hold(f"h{self.number}", verdict.needed, **facts))

    @rule(place=st.integers(0, 9), serve=st.booleans())
    def end(self, place, serve):
        """A hold is captured in full, or voided."""
        if not len(self.holds):
            return
        one = list(self.holds)[place % len(self.holds)]
        assert one == self.holds.remove(one.id)
        if serve:
            self.till.take([usage(one.id, one.quantity // NANOS)])

    @rule(passed=st.integers(0, 3))
    def wait(self, passed):
        """What nobody captured in time is free."""
        self.now += passed
        gone = self.holds.expire(self.now)
        assert all(one.expires_at <= self.now for one in gone)
        assert all(one.expires_at > self.now for one in self.holds)

    @invariant()
    def nobody_is_promised_what_is_not_there(self):
        """Owed and held together stay under what the escrow pays and the plan overdraws."""
        owed = self.till.books.accounts["a"].owed
        assert self.holds.total == sum(one.amount for one in self.holds)
        assert owed + self.holds.total <= 50 * CENT + self.overdraft


TestGates = Gates.TestCase
TestGates.settings = settings(max_examples=30, stateful_step_count=20)
