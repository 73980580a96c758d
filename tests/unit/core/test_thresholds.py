"""When a release is asked for, and when time alone may ask for one."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterd.core.accounts import Agreement
from meterd.core.events import UsageEvent
from meterd.core.ledger import Ledger
from meterd.core.meters import Meter
from meterd.core.plans import Pattern, Plan, Settle
from meterd.core.pricing import PERIOD_METER, Rate, RateCard
from meterd.core.settlement import Escrow, EscrowStatus, Release, ReleaseStatus
from meterd.core.simulate import Curve, Service, Step
from meterd.core.simulate import settle as pay
from meterd.core.thresholds import (
    PART_MS,
    REACTION_MS,
    WINDOW_MS,
    WINDOWS_ENOUGH,
    Bursts,
    Standing,
    due,
    next_look,
    reserve,
)

T = 1_000_000_000  # Now, wall ms.
MARGIN = 60_000
UNIT = 10**9

OPEN = Escrow("e", "a", "main", status=EscrowStatus.ACTIVE, total=1_000_000, remaining=1_000_000)
NEVER = Settle(min_release=100)
HELD = Release("r", "e", 900, 0, ReleaseStatus.IN_DOUBT, "", 0, 0, ())


def standing(owed, *, units=0, since=0):
    """What an agreement owes, in micros."""
    return Standing(owed, units * UNIT, since)


# Each row changes one column of the row above it, or of the first one of its group.
DUE = [
    ("nothing is asked for", NEVER, OPEN, standing(500_000), ""),
    ("below the amount", replace(NEVER, amount=1_000), OPEN, standing(999), ""),
    ("at the amount", replace(NEVER, amount=1_000), OPEN, standing(1_000), "amount"),
    (
        "at the amount, but settled",
        replace(NEVER, amount=1_000),
        replace(OPEN, settled=1, observed=1),
        standing(1_000),
        "",
    ),
    (
        "at the amount, but held",
        replace(NEVER, amount=1_000),
        replace(OPEN, release=HELD),
        standing(1_000),
        "",
    ),
    (
        "at the amount over the baseline",
        replace(NEVER, amount=1_000),
        replace(OPEN, baseline=50, observed=50, remaining=999_950),
        standing(1_000),
        "amount",
    ),
    ("below the units", replace(NEVER, units=100 * UNIT), OPEN, standing(500, units=99), ""),
    ("at the units", replace(NEVER, units=100 * UNIT), OPEN, standing(500, units=100), "units"),
    (
        "at the units, but settled",
        replace(NEVER, units=100 * UNIT),
        replace(OPEN, units_settled=UNIT),
        standing(500, units=100),
        "",
    ),
    ("below the interval", replace(NEVER, interval=1_000), OPEN, standing(500, since=T - 999), ""),
    (
        "at the interval",
        replace(NEVER, interval=1_000),
        OPEN,
        standing(500, since=T - 1_000),
        "interval",
    ),
    ("an interval of nothing", replace(NEVER, interval=1_000), OPEN, standing(500), ""),
    (
        "at the interval, below the least release",
        replace(NEVER, interval=1_000),
        OPEN,
        standing(99, since=T - 1_000),
        "",
    ),
    ("below the share", replace(NEVER, escrow_percent=10), OPEN, standing(99_999), ""),
    ("at the share", replace(NEVER, escrow_percent=10), OPEN, standing(100_000), "escrow_percent"),
    (
        "the first of two",
        replace(NEVER, amount=1, units=1),
        OPEN,
        standing(500, units=9),
        "amount",
    ),
    ("all that is left", NEVER, OPEN, standing(1_000_000), "exhausted"),
    ("more than is left", NEVER, OPEN, standing(2_000_000), "exhausted"),
    (
        "nothing is left",
        replace(NEVER, amount=1),
        replace(OPEN, remaining=0, observed=600, settled=600),
        standing(2_000_000),
        "",
    ),
    (
        "before the deadline's margin",
        replace(NEVER, before_deadline=1_000),
        replace(OPEN, deadline=T + MARGIN + 1),
        standing(1),
        "",
    ),
    (
        "at the deadline's margin, below the least release",
        replace(NEVER, before_deadline=1_000),
        replace(OPEN, deadline=T + MARGIN),
        standing(1),
        "deadline",
    ),
    (
        "at the plan's own margin",
        replace(NEVER, before_deadline=MARGIN + 5),
        replace(OPEN, deadline=T + MARGIN + 5),
        standing(1),
        "deadline",
    ),
    (
        "at the deadline with nothing to pay",
        NEVER,
        replace(OPEN, deadline=T),
        standing(0),
        "",
    ),
    ("closing", NEVER, replace(OPEN, closing=True), standing(1), "close"),
    ("closing with nothing to pay", NEVER, replace(OPEN, closing=True), standing(0), "close"),
    (
        "closed",
        NEVER,
        replace(OPEN, closing=True, status=EscrowStatus.CLOSED),
        standing(99),
        "",
    ),
]


@pytest.mark.parametrize(
    ("settle", "escrow", "owes", "why"), [row[1:] for row in DUE], ids=[row[0] for row in DUE]
)
def test_release_is_asked_for_by_the_first_threshold_that_is_reached(settle, escrow, owes, why):
    """Each row is one side of one threshold."""
    assert why == due(settle, escrow, owes, T, MARGIN)


LOOKS = [
    ("nothing that time decides", NEVER, OPEN, standing(500, since=T), None),
    ("an interval", replace(NEVER, interval=1_000), OPEN, standing(500, since=T), T + 1_000),
    ("an interval of nothing", replace(NEVER, interval=1_000), OPEN, standing(500), None),
    (
        "an interval below the least release",
        replace(NEVER, interval=1_000),
        OPEN,
        standing(99, since=T),
        None,
    ),
    (
        "a deadline below the least release",
        replace(NEVER, interval=1_000, before_deadline=0),
        replace(OPEN, deadline=T + 2 * MARGIN),
        standing(99, since=T),
        T + MARGIN,
    ),
    (
        "the earlier of two",
        replace(NEVER, interval=1_000, before_deadline=0),
        replace(OPEN, deadline=T + 2 * MARGIN),
        standing(500, since=T),
        T + 1_000,
    ),
    (
        "nothing to pay",
        replace(NEVER, interval=1_000),
        replace(OPEN, settled=500),
        standing(500, since=T),
        None,
    ),
    (
        "closed",
        replace(NEVER, interval=1_000),
        replace(OPEN, status=EscrowStatus.CLOSED),
        standing(500, since=T),
        None,
    ),
]


@pytest.mark.parametrize(
    ("settle", "escrow", "owes", "at"), [row[1:] for row in LOOKS], ids=[row[0] for row in LOOKS]
)
def test_next_look_is_when_time_alone_makes_something_due(settle, escrow, owes, at):
    """At that moment, and not a millisecond earlier, a threshold is reached."""
    assert at == next_look(settle, escrow, owes, MARGIN)
    if at is not None:
        assert "" == due(settle, escrow, owes, at - 1, MARGIN)
        assert due(settle, escrow, owes, at, MARGIN) in ("interval", "deadline")


def test_least_release_itself_is_released_and_looked_for():
    """The limit is in: at it, an interval that ends asks, and its end is a moment to look."""
    settle = replace(NEVER, interval=1_000)
    least = standing(100, since=T - 1_000)

    assert "interval" == due(settle, OPEN, least, T, MARGIN)
    assert T == next_look(settle, OPEN, least, MARGIN)


def test_interval_runs_from_the_first_moment_there_is():
    """0 alone says that nothing is unsettled."""
    settle = replace(NEVER, interval=1_000)

    assert "interval" == due(settle, OPEN, standing(500, since=1), 1_001, MARGIN)
    assert 1_001 == next_look(settle, OPEN, standing(500, since=1), MARGIN)


def test_deadline_is_looked_for_from_the_first_micro_on():
    """Nothing payable needs no look, and the least that can be paid does."""
    ending = replace(OPEN, deadline=T)

    assert next_look(NEVER, ending, standing(0), MARGIN) is None
    assert T - max(NEVER.before_deadline, MARGIN) == next_look(NEVER, ending, standing(1), MARGIN)


# -- Adaptive ------------------------------------------------------------------------------------

BOUND = 1_000_000
PACE = 2_000
LATENCY = REACTION_MS  # As late as the promise allows.
BOUNDED = Settle(min_release=1, exposure_max=BOUND)
HALF = Settle(min_release=1, amount=BOUND // 2)
PLAN = Plan("p", Pattern.STREAMING, RateCard((Rate("tokens", 10**9),)))


def lived(earnings, settle, latency=LATENCY):
    """What becomes of (moment, micros) under thresholds: the worst exposure, and the releases."""
    steps, owed = [], 0
    for at, micros in earnings:
        owed += micros
        steps.append(Step(at, (owed,), 0, closing=False, usage=True))
    curve = Curve("a", PLAN, ("main",), 10**15, steps)
    life = pay(curve, settle, Service(PACE, latency, 10**15))
    return max((exposure for _, exposure in life.points), default=0), life.paid


def most_within(earnings, ms):
    """The most that is earned within so many ms, wherever they begin."""
    most = 0
    for place, (begins, _) in enumerate(earnings):
        within = itertools.takewhile(lambda one: one[0] - begins <= ms, earnings[place:])  # noqa: B023
        most = max(most, sum(micros for _, micros in within))
    return most


def capped(draws, cap):
    """Earnings of (ms since the one before, micros), cut so that no window earns the cap."""
    earnings, at = [], T
    for after, micros in draws:
        at += after
        within = sum(part for then, part in earnings[-40:] if at - then <= REACTION_MS + PACE)
        allowed = min(micros, cap - 1 - within)
        if allowed > 0:
            earnings.append((at, allowed))
    return earnings


@st.composite
def usage(draw, most=BOUND // 4):
    """Calm usage up to anywhere under the bound, then a burst, and again: what is hardest."""
    found = []
    for _ in range(draw(st.integers(1, 6))):
        step = draw(st.integers(BOUND // 100, BOUND // 12))
        found += [(8_000, step)] * draw(st.integers(0, 3 * BOUND // (2 * step)))
        after, micros = draw(st.integers(250, 1_500)), draw(st.integers(BOUND // 50, most))
        found += [(after, micros)] * draw(st.integers(0, 20))
    return found


@given(usage())
def test_exposure_stays_under_the_bound_when_no_burst_earns_half_of_it(draws):
    """From the beginning, with what is earned while the money is on its way."""
    earnings = capped(draws, BOUND // 2)[: WINDOWS_ENOUGH - 1]
    assert most_within(earnings, REACTION_MS + PACE) < BOUND // 2

    worst, _ = lived(earnings, BOUNDED)

    assert worst < BOUND


@given(usage(), st.integers(2, 12), st.randoms(use_true_random=False))
def test_exposure_stays_under_the_bound_while_no_burst_is_greater_than_one_before(
    draws, share, random
):
    """Once a hundred windows were seen, the largest of them says how much is kept for a burst."""
    cap = BOUND // share
    window = REACTION_MS + PACE
    seen = [(window, 1)] * WINDOWS_ENOUGH
    seen.insert(random.randrange(len(seen)), (window, cap))
    usage = capped(draws, max(cap, BOUND // 10))
    before, at = [], T - 2 * window * (len(seen) + 1)
    for after, micros in seen:
        at += after
        before.append((at, micros))

    worst, _ = lived(before + usage, BOUNDED)

    assert worst < BOUND


@given(usage(), st.integers(0, LATENCY))
def test_adaptive_makes_no_more_calls_than_half_of_the_bound_as_a_fixed_amount(draws, latency):
    """Half of the bound is what the promise needs without a memory."""
    earnings = capped(draws, BOUND)

    _, adaptive_calls = lived(earnings, BOUNDED, latency)
    _, fixed_calls = lived(earnings, HALF, latency)

    assert len(adaptive_calls) <= len(fixed_calls)


def test_adaptive_makes_far_fewer_calls_than_half_of_the_bound_on_steady_usage():
    """A calm stream is paid near the bound, a few minutes after its beginning."""
    earnings = [(T + 1_000 * second, 5_000) for second in range(20_000)]

    worst, adaptive_calls = lived(earnings, BOUNDED)
    fixed_worst, fixed_calls = lived(earnings, HALF)

    assert worst < BOUND
    assert fixed_worst < BOUND
    assert len(adaptive_calls) <= 0.6 * len(fixed_calls)


def test_reserve_is_half_of_the_bound_until_enough_windows_were_seen():
    """A burst a moment old says nothing about the next one; a restart has seen none."""
    bursts, owed = Bursts(), 0
    for window in range(WINDOWS_ENOUGH):
        assert reserve(BOUND, bursts, PACE) == BOUND // 2
        owed += 10
        bursts.note(owed, T + window * WINDOW_MS)

    assert reserve(BOUND, bursts, PACE) == BOUND // 10
    assert reserve(BOUND, None, PACE) == BOUND // 2


@pytest.mark.parametrize(
    ("bound", "half", "tenth"),
    [(1_000_000, 500_000, 100_000), (1_000_001, 500_000, 100_001), (19, 9, 2), (1, 0, 0)],
)
def test_reserve_is_whole_micros_of_a_bound_that_does_not_divide(bound, half, tenth):
    """A tenth is rounded up, so that not less than it is kept; half is a limit, so it is not."""
    known = Bursts(seen=WINDOWS_ENOUGH)
    large = Bursts(seen=WINDOWS_ENOUGH, peak=bound)

    kept = [reserve(bound, bursts, PACE) for bursts in (None, known, large)]

    assert kept == [half, tenth, half]
    assert {type(micros) for micros in kept} == {int}


@pytest.mark.parametrize(("pace", "times"), [(0, 1), (2_000, 1), (2_001, 2), (30_000, 5)])
def test_reserve_grows_with_the_pace_of_the_calls(pace, times):
    """A release that waits for the one before it has more usage to wait for."""
    bursts = Bursts(seen=WINDOWS_ENOUGH, peak=100)

    assert bursts.expected(pace) == times * 100


def test_expected_burst_is_exact_however_large_it_is():
    """A number that a float cannot hold comes back to the micro."""
    bursts = Bursts(seen=WINDOWS_ENOUGH, peak=2**53 + 1)

    expected = bursts.expected(PACE)

    assert expected == 2**53 + 1
    assert type(expected) is int


def test_window_with_usage_is_counted_once_however_many_of_its_parts_have_some():
    """Four parts make a window, and its first part is the one that counts it."""
    bursts, seen = Bursts(), []
    for part in range(9):
        bursts.note(1 + part, part * PART_MS)
        seen.append(bursts.seen)

    assert seen == [1, 1, 1, 1, 2, 2, 2, 2, 3]
    assert type(bursts.seen) is int


def test_usage_of_one_part_is_kept_as_one_number():
    """From the first millisecond there is: a thousand events a second take no more memory."""
    bursts = Bursts()
    for owed, wall in ((1, 0), (3, PART_MS - 1), (7, PART_MS), (15, 2 * PART_MS - 1)):
        bursts.note(owed, wall)

    assert list(bursts.parts) == [(0, 1 + 2), (1, 4 + 8)]
    assert {type(number) for part in bursts.parts for number in part} == {int}
    assert (bursts.earned, bursts.peak, bursts.seen) == (15, 15, 1)


def test_look_that_finds_nothing_earned_changes_nothing():
    """Usage that costs nothing makes no window known: it says nothing about a burst."""
    bursts = Bursts()
    bursts.note(100, T)
    before = replace(bursts, parts=bursts.parts.copy())

    bursts.note(100, T + WINDOW_MS)

    assert bursts == before


@given(st.lists(st.tuples(st.integers(0, 4_000), st.integers(1, 1000)), min_size=1, max_size=60))
def test_peak_is_at_least_what_any_window_has_earned(draws):
    """And at most what a quarter more of time has earned."""
    earnings, at, owed, bursts = [], T, 0, Bursts()
    for after, micros in draws:
        at, owed = at + after, owed + micros
        earnings.append((at, micros))
        bursts.note(owed, at)

    assert most_within(earnings, WINDOW_MS) <= bursts.peak
    assert bursts.peak <= most_within(earnings, 5 * WINDOW_MS // 4)


def test_peak_is_of_usage_alone():
    """What was taken back, a clock that goes back and usage long ago are no burst."""
    bursts = Bursts()
    bursts.note(100, T)
    bursts.note(40, T + 1)  # A credit.
    bursts.note(60, T - 50_000)
    bursts.note(70, T + 10 * WINDOW_MS)

    assert (bursts.peak, bursts.earned) == (120, 10)


def test_adaptive_says_why():
    """The reason stands with the release, so it must tell a person enough."""
    owes = Standing(500_000, 0, T - 100_000, Bursts())

    why = due(BOUNDED, OPEN, owes, T, MARGIN, PACE)

    assert why == "adaptive: 0.50 of 1.00 at 18.00 an hour, 0.50 kept for a burst"
    assert due(BOUNDED, OPEN, replace(owes, owed=499_999), T, MARGIN, PACE) == ""


@pytest.mark.parametrize(
    ("elapsed", "hourly"),
    [(-1, "1800000.00"), (0, "1800000.00"), (1, "1800000.00"), (2, "900000.00")],
)
def test_adaptive_says_how_much_an_hour_from_the_first_millisecond_on(elapsed, hourly):
    """Usage of this very moment, or one of a clock that went back, is taken for a millisecond's."""
    owes = Standing(500_000, 0, T - elapsed)

    assert f"at {hourly} an hour" in due(BOUNDED, OPEN, owes, T, MARGIN, PACE)


@pytest.mark.parametrize("bound", [1, 2])
def test_least_bound_asks_at_its_first_micro(bound):
    """And never while nothing is owed."""
    least = replace(BOUNDED, exposure_max=bound)

    assert due(least, OPEN, Standing(1, 0, T), T, MARGIN, PACE).startswith("adaptive: 0.000001 of ")
    assert due(least, OPEN, Standing(0, 0, 0), T, MARGIN, PACE) == ""


HYBRID = Plan(
    "bounded",
    Pattern.HYBRID,
    RateCard((Rate(PERIOD_METER, 10**12, role="base"), Rate("tokens", 10**9, role="overage"))),
    BOUNDED,
    period=60_000,
)


def taken(books, *quantities, at=T):
    """Bring usage of agreement a into a ledger, one event each."""
    events = [
        UsageEvent(id=f"{at} {place}", agreement="a", meter="tokens", quantity=quantity)
        for place, quantity in enumerate(quantities)
    ]
    resolved = books.resolve(events, None, "s", 0, at)
    digests = [event.id.encode() for event in events]
    entry = books.decide(resolved, digests, [0] * len(events), [-1] * len(events))
    return books.apply(entry, at)


def test_ledger_notes_bursts_of_usage_and_no_fees():
    """A fee is owed at once and is no burst; what it adds is not taken for one later either."""
    books = Ledger({"bounded": HYBRID}, {"tokens": Meter("tokens")})
    books.bind(Agreement("a", "bounded", "p", (("base", "e1"), ("overage", "e2"))), T)
    account = books.accounts["a"]

    taken(books, 2, 3)
    books.end_periods(T + 60_000, 0)
    taken(books, 4, at=T + 120_000 - 1)

    assert account.owed == 1_009_000
    assert account.bursts.peak == 5_000
    assert books.standing(account, books.escrows["e2"]).bursts is account.bursts


def test_ledger_notes_no_bursts_where_no_bound_asks_for_them():
    """Whoever does not need them does not pay for them."""
    plain = replace(HYBRID, name="plain", settle=NEVER)
    books = Ledger({"plain": plain}, {"tokens": Meter("tokens")})
    books.bind(Agreement("a", "plain", "p", (("base", "e1"), ("overage", "e2"))), T)

    taken(books, 2)

    assert books.accounts["a"].bursts is None


def test_plan_that_is_changed_begins_to_learn_anew():
    """Another price is another burst."""
    books = Ledger({"bounded": HYBRID}, {"tokens": Meter("tokens")})
    books.bind(Agreement("a", "bounded", "p", (("base", "e1"), ("overage", "e2"))), T)
    taken(books, 2)

    dearer = Rate("tokens", 2 * 10**9, role="overage")
    changed = replace(HYBRID, card=RateCard((HYBRID.card.rates[0], dearer)))
    books.reload({"bounded": changed}, {"tokens": Meter("tokens")})
    taken(books, 3, at=T + 1)

    account = books.accounts["a"]
    assert account.owed == 8_000
    assert (account.bursts.peak, account.bursts.seen) == (6_000, 1)
