"""Agreements in the ledger: in which words they are refused, what is stored, when periods end."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meterd.core import ledger as module
from meterd.core.accounts import Agreement
from meterd.core.changes import CardRow
from meterd.core.ledger import Conflict, Ledger
from meterd.core.meters import Aggregation, Meter
from meterd.core.money import MICROS, NANOS, PICOS
from meterd.core.plans import Pattern, Plan, Settle
from meterd.core.pricing import PERIOD_METER, Model, Rate, RateCard, Tier
from meterd.core.settlement import Escrow, EscrowStatus, Release, ReleaseStatus
from tests.unit.core.books import METERS, NOW, PLANS, Till, ledger, usage
from tests.unit.core.test_ledger_patterns import HOUR, HYBRID, SCORE, ends, scored, till

AGREEMENT = Agreement("a", "stream", "payer", (("main", "esc_a"),))
STORED = [CardRow(plan.card.id, plan.card.text) for plan in PLANS.values()]
FEE = 5 * MICROS
WEEKLY = Plan(
    "weekly", Pattern.SUBSCRIPTION, RateCard((Rate(PERIOD_METER, 5 * PICOS),)), period=HOUR
)


# -- Words ----------------------------------------------------------------------------------------


def refused(act, *args):
    """In which words something is refused."""
    with pytest.raises(Conflict) as refusal:
        act(*args)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            replace(AGREEMENT, id="c", plan="gold"),
            "there is no plan 'gold'; known: stream, strict",
        ),
        (
            replace(AGREEMENT, escrows=(("main", "esc_a"), ("main", "esc_2"), ("base", "x"))),
            "plan stream draws on main, the agreement has base and main",
        ),
        (
            replace(AGREEMENT, id="c", escrows=()),
            "plan stream draws on main, the agreement has no escrow",
        ),
        (
            replace(AGREEMENT, escrows=(("main", "esc_n"),)),
            (
                "agreement a is bound to main esc_a, main esc_2; name these too, with the"
                " new escrow behind them, or bind it under another id"
            ),
        ),
    ],
)
def test_bind_is_refused_in_these_words(asked, words):
    """A person reads them, and knows what to name instead."""
    books = ledger()
    books.bind(replace(AGREEMENT, escrows=(("main", "esc_a"), ("main", "esc_2"))), NOW)

    assert words == refused(books.bind, asked, NOW)


def test_bind_says_which_roles_a_plan_draws_on_and_that_there_is_no_plan():
    """All of them, in their order."""
    books = Ledger({"h": HYBRID}, METERS)

    assert "plan h draws on base and overage, the agreement has main" == refused(
        books.bind, replace(AGREEMENT, plan="h"), NOW
    )
    assert "there is no plan 'h'; known: none" == Ledger({}, METERS).objection(
        replace(AGREEMENT, plan="h"), {}
    )


def test_reload_is_refused_in_these_words():
    """With the names of all that is in use and missing."""
    books = till(WEEKLY).books
    changed = {"weekly": replace(WEEKLY, period=2 * HOUR)}

    assert "plans in use are missing: stream, strict; put them back" == refused(
        ledger().reload, {}, METERS
    )
    assert (
        "plan weekly is in use: its period and the escrows that it draws on "
        "stay; write a plan of another name"
    ) == refused(books.reload, changed, METERS)


def test_meter_in_use_is_refused_another_aggregation_in_these_words():
    """Also behind a counter whose meter is gone, and when it is read back from the store."""
    card = RateCard((Rate("tokens", PICOS), Rate("calls", PICOS)))
    plan = Plan("p", Pattern.STREAMING, card)
    books = till(plan)
    books.take([usage("x"), usage("y", meter="calls")])
    changed = {"calls": Meter("calls", Aggregation.MAX)}

    assert ("meter calls is in use: it stays count; write a meter of another name") == refused(
        books.books.reload, {"p": plan}, changed
    )
    assert (
        "agreement a: its meter 'calls' was counted otherwise than by max; put back its "
        "aggregation as it was, or write a meter of another name"
    ) == refused(books.restored, None, changed)


# -- What is stored and read back -----------------------------------------------------------------


def test_bind_of_a_further_escrow_hands_out_its_row_and_finds_the_agreement_by_it():
    """The plan and the origin are those of the last one who bound it."""
    books = Ledger(PLANS, METERS)
    books.bind(AGREEMENT, NOW)
    both = (("main", "esc_a"), ("main", "esc_2"))
    change = books.bind(Agreement("a", "strict", "other", both, "config"), NOW)

    assert (Escrow("esc_2", "a", "main"),) == change.escrows
    assert [STORED[1]] == list(change.cards), "its card has never been stored"
    assert (("strict", "other", "config"),) == tuple(
        (row.plan, row.payer, row.origin) for row in change.agreements
    )
    assert books.accounts["a"] is books.account("esc_2")


def test_restore_gives_back_who_bound_an_agreement():
    """What the configuration has bound is not taken for a person's."""
    books = Ledger(PLANS, METERS)
    books.bind(replace(AGREEMENT, origin="config"), NOW)

    assert "config" == Till(books).restored().accounts["a"].agreement.origin


def test_restore_adds_up_all_counters_of_a_line_and_all_agreements():
    """Two counters in one line, one of them taken back; two agreements in the totals."""
    kinds = (Rate("calls", PICOS, where=(("kind", "x"),)),)
    tiers = Rate("calls", 0, model=Model.GRADUATED, tiers=(Tier(3 * NANOS, PICOS), Tier(None, 0)))
    capped = Rate("tokens", PICOS, model=Model.DYNAMIC, maximum=3 * MICROS)
    other = Rate("tokens", PICOS, where=(("kind", "x"),))
    plan = Plan("p", Pattern.STREAMING, RateCard((*kinds, tiers, other, capped)))
    books = till(plan)
    books.books.bind(Agreement("b", "p", "payer", (("main", "esc_b"),)), NOW)
    for agreement, kind in (("a", ""), ("a", "y"), ("b", ""), ("b", "y")):
        named = {"agreement": agreement, "dimensions": {"kind": kind}}
        books.take([usage(f"{agreement}{kind}{n}", meter="calls", **named) for n in range(2)])
        books.take([usage(f"{agreement}{kind}p", price=1, **named)])
    for event in ("by0", "by1", "byp"):
        books.take_back(event)
    restored = books.restored()

    assert [3 + 2, 2 + 1] == [restored.accounts[name].accrued for name in "ab"]
    assert 8 == restored.totals().accrued == books.books.totals().accrued


def test_event_that_is_taken_back_after_a_restart_leaves_no_charge_behind():
    """A score costs something though it is 0; that it is gone is known from its count."""
    books = till(SCORE)
    books.take([scored("x", 0)])
    books.books = books.restored()
    books.take_back("x")

    assert 0 == books.books.accounts["a"].accrued


def test_counters_are_numbered_from_1_without_a_gap():
    """Behind a restart too: taken events remember their counter by its number."""
    books = Till()
    books.take([usage("x"), usage("y", meter="calls")])
    again = Till(books.restored(), rows=dict(books.rows))
    again.take([usage("z", dimensions={"kind": "output"})])

    assert [1, 2, 3] == sorted(again.rows)


def test_parts_by_role_are_kept_only_where_there_are_several_and_add_up_to_the_whole():
    """And bursts only where the exposure is bounded."""
    hybrid, plain = till(HYBRID, total=FEE), Till()
    hybrid.take([usage("x", 1500)])
    ends(hybrid, NOW + HOUR)
    account, alone = hybrid.books.accounts["a"], plain.books.accounts["a"]

    assert sum(account.by_role.values()) == account.numerator
    assert alone.by_role is None
    assert plain.books.standing(alone, plain.books.escrows["esc_a"]).bursts is None


def test_totals_add_up_what_was_credited_on_every_escrow():
    """And are exact without any agreement."""
    books = ledger()
    for name, credited in (("esc_a", 3), ("esc_b", 2)):
        books.put(replace(books.escrows[name], credited=credited))

    assert 5 == books.totals().credited
    assert 0 == Ledger({}, {}).totals().accrued


def test_counter_of_an_outcome_has_no_dimensions_and_whole_periods():
    """Whatever name it brings, and to whatever fraction of a millisecond its time is told."""
    books = till(replace(SCORE, period=HOUR))
    books.take([scored("x", 1, name="best", time="2026-11-18T11:06:40.0005Z")])
    card = RateCard((*WEEKLY.card.rates, Rate("tokens", PICOS)))
    plain = till(replace(WEEKLY, card=card, period=60_000))
    plain.take([usage("y", time="2026-11-18T11:07:40.0005Z")])

    assert [()] == [row.dimensions for row in books.rows.values()]
    assert ["1"] == [str(row.period) for row in plain.rows.values()]


def test_memory_of_spellings_never_passes_its_limit(monkeypatch):
    """It fills, and is begun anew."""
    monkeypatch.setattr(module, "RESOLVED_MAX", 3)
    books, sizes = Till(), set()
    for n in range(9):
        books.take([usage(f"e{n}", dimensions={"kind": f"k{n}"})])
        sizes.add(len(books.books._resolved))

    assert {1, 2, 3} == sizes


def test_closed_agreement_refuses_each_usage_of_one_spelling():
    """A refusal is not remembered as if it were a counter."""
    books = Till()
    books.books.put(replace(books.books.escrows["esc_a"], status=EscrowStatus.CLOSED))

    assert ["closed"] == books.verdicts([usage("x")])
    assert ["closed"] == books.verdicts([usage("y")])


# -- Periods --------------------------------------------------------------------------------------


def weekly(total=4 * FEE, **fields):
    """Two agreements under it, whose first periods end together."""
    books = till(replace(WEEKLY, **fields), total=total)
    books.books.bind(Agreement("b", "weekly", "payer", (("main", "esc_b"),)), NOW)
    read(books.books, "esc_b", total)
    return books


def read(books, name, total, status=EscrowStatus.ACTIVE, **figures):
    """The service has told what an escrow holds."""
    figures = {"total": total, "remaining": total, **figures}
    books.put(replace(books.escrows[name], status=status, **figures))


def test_period_of_one_agreement_is_looked_at_whatever_becomes_of_another():
    """One that is not over yet, or waits for its escrow, keeps nobody from his."""
    books = weekly(total=FEE)
    ends(books, NOW)
    assert NOW + HOUR == books.books.next_period_end
    ends(books, NOW + HOUR - 1)
    read(books.books, "esc_main", FEE - 1)
    books.books.awaited.add("a")
    ends(books, NOW + HOUR)

    assert [0, FEE] == [books.books.accounts[name].owed for name in "ab"]


def test_agreement_without_periods_is_never_looked_at():
    """Nor is one that is closing."""
    books = weekly()
    for account in books.books.accounts.values():
        books.books.close(account)
    ends(books, NOW + HOUR)
    read(books.books, "esc_main", FEE, deadline=NOW)

    assert (None, None) == (ledger().next_period_end, books.books.next_period_end)


@pytest.mark.parametrize(
    ("lead", "remaining", "ends_at"),
    [
        (0, 0, HOUR),
        (0, 1, HOUR // 2),
        (0, FEE, HOUR // 2),
        (HOUR // 2, FEE, HOUR),
        (HOUR // 2 - 1, FEE, 1),
    ],
)
def test_deadline_that_is_told_later_ends_the_period_before_it(lead, remaining, ends_at):
    """Within the period, and where there is money that it would take; else the period's own end."""
    books = weekly(settle=Settle(before_deadline=lead))
    ends(books, NOW)
    figures = {"remaining": remaining, "observed": FEE - remaining}
    read(books.books, "esc_main", FEE, deadline=NOW + HOUR // 2, **figures)
    ends(books, NOW + ends_at - 1)
    before = books.books.accounts["a"].owed
    ends(books, NOW + ends_at)

    assert (0, FEE) == (before, books.books.accounts["a"].owed)


def test_fee_of_a_fraction_of_a_micro_is_covered_by_whole_ones():
    """What is below a micro is never released, and nobody lapses for it."""
    card = RateCard((Rate(PERIOD_METER, 5 * PICOS + 1),))
    books = till(replace(WEEKLY, card=card), total=FEE)

    assert [] == ends(books, NOW + HOUR)
    assert 1 == books.books.accounts["a"].period


def test_fee_of_one_role_is_covered_by_what_its_escrows_hold_beyond_the_fees_before():
    """Seven of a base escrow hold one fee of five and no second one."""
    books = till(HYBRID, total=7 * MICROS)

    assert ([], ["a"]) == (ends(books, NOW + HOUR), ends(books, NOW + 2 * HOUR))


def test_fee_of_a_plan_without_periods_is_owed_at_its_close_and_since_its_opening():
    """The agreement's whole life is one period."""
    books = till(replace(WEEKLY, period=None), total=FEE)
    account = books.books.accounts["a"]
    books.books.close(account)

    assert (FEE, NOW) == (account.owed, account.unsettled_since)


# -- Shares ---------------------------------------------------------------------------------------

PENNY = Plan("penny", Pattern.STREAMING, RateCard((Rate("tokens", PICOS // MICROS),)))


def shares(*escrows, used=0, plan=PENNY):
    """An agreement with escrows of (role, id, total, paid), and so many micros used."""
    books = till(plan, *((role, name) for role, name, *_ in escrows))
    for _, name, total, released in escrows:
        figures = {"remaining": total - released, "observed": released, "settled": released}
        read(books.books, name, total, **figures)
    if used:
        books.take([usage("x", used)])
    return books.books, books.books.accounts["a"]


def test_share_of_the_first_escrow_is_what_all_others_together_have_not_paid():
    """Two later ones have paid four each while it was away; two of ten are its own."""
    books, account = shares(("main", "1", 10, 0), ("main", "2", 9, 4), ("main", "3", 9, 4), used=10)

    assert 2 == books.owed_on(account, books.escrows["1"])


def test_share_counts_all_escrows_of_the_role_past_those_of_another():
    """Those of two roles may stand in any order."""
    card = RateCard((Rate("tokens", PICOS // MICROS, role="b"), Rate("calls", 0, role="a")))
    plan = Plan("two", Pattern.HYBRID, card)
    books, account = shares(
        ("b", "1", 6, 0), ("a", "2", 9, 0), ("b", "3", 9, 0), used=10, plan=plan
    )

    assert [10, 0, 4] == [books.owed_on(account, escrow) for escrow in books.escrows_of(account)]
    assert {"b": account.numerator} == account.by_role
    later, payer = shares(("a", "1", 9, 0), ("b", "2", 6, 0), ("b", "3", 9, 4), used=5, plan=plan)
    assert [0, 1, 0] == [later.owed_on(payer, escrow) for escrow in later.escrows_of(payer)]


def test_free_is_what_an_escrow_holds_beyond_what_it_owes_or_has_paid():
    """What is paid too much is free of nothing; what is open counts as paid."""
    books, account = shares(("main", "1", 10, 0), used=4)
    assert 6 == books.free_on(account, books.escrows["1"])
    ahead, payer = shares(("main", "1", 10, 7), used=4)
    assert 3 == ahead.free_on(payer, ahead.escrows["1"])
    short, debtor = shares(("main", "1", 3, 0), used=4)
    assert 0 == short.free_on(debtor, short.escrows["1"])
    release = Release("r", "1", 9, 0, ReleaseStatus.SENT, "", 0, 0, ())
    books.put(replace(books.escrows["1"], release=release))
    assert 1 == books.free_on(account, books.escrows["1"])
    both, owner = shares(("main", "1", 10, 0), ("main", "2", 10, 0), used=14)
    assert [0, 6] == [both.free_on(owner, escrow) for escrow in both.escrows_of(owner)]


def test_interval_goes_on_while_a_micro_is_unpaid_on_any_escrow():
    """Of two, the first is spent and the second owes one."""
    books, account = shares(("main", "1", 4, 4), ("main", "2", 9, 0), used=5)
    row = books.settled_from(account, NOW + 9)

    assert row is not None
    assert NOW + 9 == row.unsettled_since
    assert NOW + 9 == books.standing(account, books.escrows["2"]).unsettled_since
