"""Caps and velocity: exact to the last unit, whatever the price model, and through a restart."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from fractions import Fraction

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterd.core.accounts import Agreement
from meterd.core.caps import DAY_MS, MINUTE_MS, PLAN, Caps, Windows, windows_of, windows_text
from meterd.core.events import EventDecoder, Reason
from meterd.core.ledger import Ledger
from meterd.core.meters import Aggregation, Meter
from meterd.core.money import MICROS, NANOS, PICOS
from meterd.core.plans import Pattern, Plan
from meterd.core.pricing import MILESTONE_METER, Model, Rate, RateCard, Tier
from tests.unit.core.books import NOW, SENTINEL, Till, usage

CENT = PICOS // 100
METERS = {
    meter.name: meter
    for meter in (
        Meter("tokens"),
        Meter("calls", Aggregation.COUNT),
        Meter("peak", Aggregation.MAX),
        Meter("users", Aggregation.UNIQUE),
        Meter("seats", Aggregation.LATEST),
        Meter("own"),
    )
}
TIERS = (Tier(10 * NANOS, CENT), Tier(None, CENT // 10, 30_000))
PLAIN = (Tier(10 * NANOS, CENT), Tier(None, CENT // 10))  # Ten for a cent each, then ten a cent.
RATES = (
    Rate("tokens", CENT, 3),
    Rate("calls", CENT, model=Model.GRADUATED, tiers=TIERS),
    Rate("peak", CENT, free_units=2 * NANOS),
    Rate("users", CENT, 2, model=Model.PACKAGE),
    Rate("seats", CENT, maximum=200_000),
    Rate("own", CENT, model=Model.DYNAMIC),
)
START = NOW - NOW % DAY_MS + 5 * MINUTE_MS


def till(caps, *rates, pattern=Pattern.STREAMING, **fields):
    """A ledger with one agreement under caps."""
    plan = Plan("p", pattern, RateCard(rates or RATES), caps=caps, **fields)
    books = Ledger({"p": plan}, METERS)
    books.bind(Agreement("a", "p", "payer", (("main", "esc_a"),)), START)
    return Till(books)


def cents(number):
    return number * MICROS // 100


def send(box, *quantities, now=START, prefix="e"):
    """Send events of a cent for a unit; how many were taken of these."""
    events = [usage(f"{prefix}-{now}-{at}", each) for at, each in enumerate(quantities)]
    return box.take(events, now=now).accepted


# -- Caps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantity", [1, 3, 4, 300])
def test_an_event_is_taken_up_to_its_cap_exactly(quantity):
    """One nano-unit beyond the cap is too much, and what is refused names the key to raise."""
    box = till(Caps(event=cents(quantity)), Rate("tokens", CENT))
    entry = box.take([usage("a", quantity), usage("b", f"{quantity}.000000001")], now=START)

    assert entry.accepted == 1
    assert box.rejections[0].reason is Reason.OVER_CAP
    assert box.books.accounts["a"].accrued == Fraction(quantity, 100)


@pytest.mark.parametrize("span", ["event", "minute", "day", "lifetime"])
def test_the_sentence_says_what_was_passed_and_what_to_do(span):
    """With the limit, the key to raise and the command that takes the event in again."""
    box = till(Caps(**{span: cents(150)}), Rate("tokens", CENT))
    send(box, 151)
    words = {"event": "one event", "minute": "a minute", "day": "a day", "lifetime": "its life"}

    assert box.rejections[0].detail == (
        f"more than 1.50 USDC in {words[span]}; raise {span}_max of plans.p.caps,"
        " then: meterd dead-letters replay"
    )


def test_the_smallest_charge_passes_a_cap_of_nothing():
    """One unit of the exact fraction is something."""
    box = till(Caps(event=0), Rate("tokens", 1))

    assert send(box, "0.000000001") == 0


@pytest.mark.parametrize("rate", [Rate("tokens", CENT, free_units=9 * NANOS), Rate("tokens", 0)])
def test_what_costs_nothing_is_taken_where_a_cap_was_lowered_below_what_is_owed(rate):
    """It makes nothing worse."""
    box = till(Caps(lifetime=cents(9)), rate, Rate("calls", CENT))
    box.take([usage("c", meter="calls")], now=START)
    plan = replace(box.books.plans["p"], caps=Caps(lifetime=0))
    box.books.reload({"p": plan}, METERS)

    assert send(box, 5) == 1


def test_a_value_that_was_seen_before_costs_nothing():
    """In this batch or an earlier one."""
    box = till(Caps(day=cents(3)), Rate("users", CENT))

    def users(prefix, *names):
        events = [usage(f"{prefix}{at}", meter="users", value=n) for at, n in enumerate(names)]
        return box.take(events, now=START).accepted

    assert users("a", "ann", "bob", "ann", "bob") == 4
    assert users("b", "ann", "eve", "joe", "bob", "eve") == 4
    assert box.rejections[0].index == 2


def test_prices_of_events_under_a_maximum_are_added_up():
    """What a batch and the next one bring is charged until the greatest amount is reached."""
    own = Rate("own", CENT, model=Model.DYNAMIC, maximum=200_000)
    box = till(Caps(day=cents(20)), own, Rate("tokens", CENT, 3))
    account = box.books.accounts["a"]
    for batch, quantities in enumerate(((10, 5), (3, 7, 4))):
        events = [
            usage(f"{batch}-{at}", quantity, meter="own", price="0.01")
            for at, quantity in enumerate(quantities)
        ]
        before = account.numerator
        entry = box.take(events, now=START)
        assert entry.accepted == len(quantities)
        assert sum(entry.spent.values()) == account.numerator - before

    assert account.accrued == Fraction(20, 100)


def test_a_cap_on_a_price_that_no_cent_divides_is_exact():
    """A third of a cent each: three fit into a cent, whoever rounds would take a fourth."""
    box = till(Caps(minute=cents(1)), Rate("tokens", CENT, 3))

    assert send(box, 1, 1, 1, 1) == 3
    assert box.books.accounts["a"].accrued == Fraction(1, 100)


def test_a_smaller_event_still_fits_behind_one_that_did_not():
    """What is refused uses nothing up."""
    box = till(Caps(minute=cents(5)), Rate("tokens", CENT))

    assert send(box, 4, 2, 1, 1) == 2
    assert [one.index for one in box.rejections] == [1, 3]


@pytest.mark.parametrize(
    ("caps", "span", "cap"),
    [
        (Caps(minute=cents(5)), MINUTE_MS, "minute_max"),
        (Caps(day=cents(5)), DAY_MS, "day_max"),
    ],
)
def test_a_window_ends_with_its_span_of_utc_and_the_next_begins_empty(caps, span, cap):
    """Batches of one span share its cap; the next span has it again."""
    box = till(caps, Rate("tokens", CENT))
    begins = START - START % span
    taken = [
        send(box, 3, now=begins),
        send(box, 3, 2, now=begins + span - 1),
        send(box, 5, 1, now=begins + span),
    ]

    assert taken == [1, 1, 1]
    assert all(cap in one.detail for one in box.rejections)


def test_a_life_is_all_that_was_accrued_and_a_void_gives_room_back():
    """Years later it is still the same life."""
    box = till(Caps(lifetime=cents(5)), Rate("tokens", CENT))
    first = send(box, 5)
    later = send(box, 1, now=START + 400 * DAY_MS)
    box.take_back(f"e-{START}-0")

    assert (first, later) == (1, 0)
    assert send(box, 5, now=START + 401 * DAY_MS) == 1


def test_what_was_over_a_cap_is_taken_once_the_cap_is_raised():
    """The same event, sent again after a reload, counts; its identity was never used up."""
    box = till(Caps(event=cents(1)), Rate("tokens", CENT))
    before = box.take([usage("x", 5)], now=START).accepted
    plan = replace(box.books.plans["p"], caps=Caps(event=cents(9)))
    box.books.reload({"p": plan}, METERS)

    assert before == 0
    assert box.take([usage("x", 5)], now=START).accepted == 1


def test_an_event_that_was_refused_makes_no_duplicate_of_its_repetition():
    """Twice in one batch it is refused twice: neither counts, and both are kept."""
    box = till(Caps(event=cents(1)), Rate("tokens", CENT))
    entry = box.take([usage("x", 5), usage("x", 5)], now=START)

    assert (entry.accepted, entry.duplicates) == (0, 0)
    assert [one.reason for one in box.rejections] == [Reason.OVER_CAP] * 2


def test_a_tranche_over_a_cap_is_not_reached():
    """The next one of an ordered plan stays out of order, in the same batch too."""
    rates = [Rate(MILESTONE_METER, PICOS, where=(("name", name),)) for name in ("one", "two")]
    plan = {"pattern": Pattern.MILESTONE, "ordered": True}
    box = till(Caps(event=cents(50)), *rates, **plan)
    tranche = {"meter": "", "quantity": "", "type": MILESTONE_METER}
    box.take([usage("a", **{**tranche, "name": "one"}), usage("b", **{**tranche, "name": "two"})])

    assert [one.reason for one in box.rejections] == [Reason.OVER_CAP, Reason.OUT_OF_ORDER]


def test_usage_without_caps_is_not_looked_at():
    """An agreement under another plan pays nothing for the caps of its neighbour."""
    box = till(Caps(event=1), Rate("tokens", CENT))
    box.books.plans["free"] = Plan("free", Pattern.STREAMING, RateCard((Rate("tokens", CENT),)))
    box.books.bind(Agreement("b", "free", "payer", (("main", "esc_b"),)), START)
    entry = box.take([usage("x", 5, agreement="b")], now=START)

    assert (entry.accepted, entry.spent) == (1, {})
    assert box.books.accounts["b"].row.spent == ""


# -- The caps of a producer --------------------------------------------------------------------


def take_from(box, sender, *payloads, now=START):
    """Take a batch of one sender with caps of his own."""
    decoded = EventDecoder(SENTINEL).decode(payloads)
    resolved = box.books.resolve(decoded, None, "s", now - DAY_MS, now)
    resolved.limits = dict.fromkeys(resolved.indices, sender)
    digests = [event.id.encode() for event in resolved.events]
    none = [-1] * len(digests)
    entry = box.books.decide(resolved, digests, none, none, now)
    box.keep(box.books.apply(entry, now))
    return entry


def test_each_producer_has_its_own_windows_for_each_agreement():
    """One that has used his day up leaves the other's alone; the lower of two caps counts."""
    box = till(Caps(event=cents(4)), Rate("tokens", CENT))
    one, two = ("one", Caps(day=cents(5), lifetime=cents(6))), ("two", Caps(event=cents(9)))
    taken = [
        take_from(box, one, usage("a", 4), usage("b", 2), usage("c", 1)).accepted,
        take_from(box, two, usage("d", 5), usage("e", 4)).accepted,
        take_from(box, one, usage("f", 1), usage("g", 1), now=START + DAY_MS).accepted,
    ]

    assert taken == [2, 1, 1]
    assert (
        "producer one: caps"
        in take_from(box, one, usage("h", 1), now=START + DAY_MS).rejections[0].detail
    )
    assert box.books.accounts["a"].windows["one"].lifetime == Fraction(6, 100)


def test_usage_without_caps_moves_the_tiers_for_what_comes_behind_it():
    """Of two senders in one batch one has caps: his event is charged what it really adds."""
    box = till(None, Rate("tokens", CENT, model=Model.GRADUATED, tiers=PLAIN), Rate("users", CENT))
    account, own = box.books.accounts["a"], Caps(event=cents(1))
    events = [
        usage("a", 10),
        usage("b", 10),
        usage("c", meter="users", value="ann"),
        usage("d", meter="users", value="ann"),
    ]
    decoded = EventDecoder(SENTINEL).decode(events)
    resolved = box.books.resolve(decoded, None, "s", START - DAY_MS, START)
    resolved.limits = {1: ("one", own), 3: ("one", own)}
    digests = [event.id.encode() for event in resolved.events]
    none = [-1] * len(digests)
    entry = box.books.decide(resolved, digests, none, none, START)

    assert entry.rejections == []
    assert entry.spent == {(account, "one"): account.denominator // 100}


def test_windows_of_a_producer_do_not_follow_the_velocity_of_the_plan():
    """The plan's window begins anew after its own length, and only the plan's."""
    box = till(Caps(velocity=cents(5), window=MINUTE_MS), Rate("tokens", CENT))
    sender = ("one", Caps(day=cents(9)))
    take_from(box, sender, usage("a", 1))
    take_from(box, sender, usage("b", 2), now=START + MINUTE_MS)
    windows = box.books.accounts["a"].windows

    assert (windows[PLAN].since, windows[PLAN].in_window) == (START + MINUTE_MS, Fraction(2, 100))
    assert (windows["one"].since, windows["one"].in_window) == (START, Fraction(3, 100))


# -- Exactness ---------------------------------------------------------------------------------

EVENTS = st.lists(
    st.tuples(
        st.sampled_from(sorted(METERS)),
        st.integers(1, 12),
        st.sampled_from(["ann", "bob", "eve", "joe"]),
        st.booleans(),
    ),
    min_size=1,
    max_size=40,
)


@given(events=EVENTS, size=st.integers(1, 7), cap=st.integers(1, 60))
def test_what_is_tried_is_what_is_accrued_for_every_model(events, size, cap):
    """Tiers, packages, maxima, greatest, last and different values: no window passes its cap."""
    box = till(Caps(event=cents(25), minute=cents(cap), day=cents(cap), lifetime=cents(cap)))
    payloads = [
        usage(
            f"e{at}",
            quantity,
            meter=meter,
            value=value,
            **({"price": "0.01"} if meter == "own" else {}),
        )
        for at, (meter, quantity, value, _) in enumerate(events)
    ]
    account, grown = box.books.accounts["a"], Fraction(0)
    for begin in range(0, len(payloads), size):
        before = account.accrued
        entry = box.take(payloads[begin : begin + size], now=START)
        rise = account.accrued - before
        spent = Fraction(sum(entry.spent.values()), account.denominator)
        grown += spent
        # A smaller last value is the one thing that lowers what is owed, and makes no room.
        assert spent >= rise
        if all(meter != "seats" for meter, *_ in events):
            assert spent == rise

    assert all(one.reason in (Reason.OVER_CAP, Reason.BAD_PRICE) for one in box.rejections), (
        box.rejections
    )
    assert grown <= Fraction(cap, 100)
    if account.windows:
        assert account.windows[PLAN].in_minute == account.windows[PLAN].in_day == grown


# -- Velocity ----------------------------------------------------------------------------------


def test_usage_that_comes_too_fast_is_metered_and_noted_as_racing():
    """Nothing is refused; the account says that a person has to look."""
    box = till(Caps(velocity=cents(5), window=MINUTE_MS), Rate("tokens", CENT))
    account = box.books.accounts["a"]
    slow = (send(box, 5), account.is_racing)
    fast = (send(box, 1, now=START + MINUTE_MS - 1), account.is_racing)

    assert slow == (1, False)
    assert fast == (1, True)


def test_a_window_that_was_passed_ends_with_a_persons_look_alone():
    """Time does not make it good; `begin` does, and the next window is a whole one."""
    caps = Caps(velocity=cents(5), window=MINUTE_MS)
    windows = Windows()
    windows.note(Fraction(6, 100), START, caps)
    windows.note(Fraction(1, 100), START + DAY_MS, caps)
    waiting = windows.is_racing(caps)
    windows.begin(START + DAY_MS)
    windows.note(Fraction(5, 100), START + DAY_MS + 1, caps)

    assert waiting
    assert not windows.is_racing(caps)


def test_a_window_begins_with_usage_and_ends_after_its_length():
    """Two bursts further apart than the window are two."""
    box = till(Caps(velocity=cents(5), window=MINUTE_MS), Rate("tokens", CENT))
    send(box, 5, now=START)
    send(box, 5, now=START + MINUTE_MS)

    assert not box.books.accounts["a"].is_racing


def test_what_comes_in_the_same_millisecond_is_in_the_same_window():
    """Batches may follow each other faster than the clock moves."""
    windows, caps = Windows(), Caps(velocity=cents(5))
    windows.note(Fraction(3, 100), START, caps)
    windows.note(Fraction(3, 100), START, caps)

    assert windows.is_racing(caps)


def test_a_clock_that_was_put_back_begins_a_window_anew():
    """A window that lies in the future would never end."""
    windows, caps = Windows(), Caps(velocity=cents(5), window=MINUTE_MS)
    windows.note(Fraction(5, 100), START + DAY_MS, caps)
    windows.note(Fraction(5, 100), START, caps)

    assert not windows.is_racing(caps)
    assert windows.since == START


def test_a_higher_limit_or_none_ends_the_race():
    """A reload that raises velocity_max lets the window end by its length again."""
    box = till(Caps(velocity=cents(5)), Rate("tokens", CENT))
    send(box, 6)
    account = box.books.accounts["a"]
    racing = account.is_racing
    for caps in (Caps(velocity=cents(6)), None):
        box.books.reload({"p": replace(box.books.plans["p"], caps=caps)}, METERS)
        assert not account.is_racing

    assert racing


# -- A restart ---------------------------------------------------------------------------------


def test_windows_survive_a_restart():
    """A crash gives nobody his minute, his day or his velocity again."""
    box = till(Caps(day=cents(5), velocity=cents(4)), Rate("tokens", CENT))
    send(box, 5)
    again = Till(box.restored())

    assert send(again, 1, prefix="later") == 0
    assert again.books.accounts["a"].is_racing


@given(
    st.dictionaries(
        st.text(max_size=5),
        st.builds(
            Windows,
            st.integers(0, 10**8),
            st.fractions(0),
            st.integers(0, 10**6),
            st.fractions(0),
            st.fractions(0),
            st.integers(0, 10**13),
            st.fractions(0),
        ),
    )
)
def test_windows_are_read_back_as_they_were_written(windows):
    """Exact, whatever their denominators."""
    assert windows_of(windows_text(windows)) == windows


def test_windows_are_never_read_through_a_float():
    """What was stored are texts; a number there is refused."""
    with pytest.raises(msgspec.ValidationError):
        windows_of('{"": ["1", 0.1, "1", "0", "0", "0", "0"]}')


# -- Events of every kind ----------------------------------------------------------------------


def test_an_event_without_usage_passes_every_cap():
    """An agreement that has used its life up can still be closed."""
    box = till(Caps(lifetime=cents(1)), Rate("tokens", CENT))
    send(box, 1)
    entry = box.take([usage("end", type="meterd.close", meter="", quantity="")], now=START)

    assert (entry.accepted, entry.closes) == (1, [box.books.accounts["a"]])


def typed(event_id, tokens):
    """A CloudEvent that feeds two meters."""
    event = {"id": event_id, "source": "svc", "type": "llm", "subject": "a", "specversion": "1.0"}
    return json.dumps({**event, "data": {"tokens": tokens}}).encode()


def test_an_event_that_feeds_several_meters_is_taken_or_refused_whole():
    """Its charges are added up; refused, it leaves no part behind on any of them."""
    meters = {
        "tokens": Meter("tokens", event_type="llm", value="$.tokens"),
        "calls": Meter("calls", Aggregation.COUNT, event_type="llm"),
    }
    rates = (Rate("tokens", CENT), Rate("calls", 5 * CENT, 2, model=Model.PACKAGE))
    plan = Plan("p", Pattern.STREAMING, RateCard(rates), caps=Caps(event=cents(8)))
    books = Ledger({"p": plan}, meters)
    books.bind(Agreement("a", "p", "payer", (("main", "esc_a"),)), START)
    box = Till(books)
    # The first call opens a package of two for 5 cents, so the second may have more tokens.
    entry = box.take([typed("a", 4), typed("b", 3), typed("c", 8), typed("d", 1)], now=START)

    assert [one.index for one in box.rejections] == [0]
    assert entry.accepted == 3
    assert books.accounts["a"].accrued == Fraction(3 + 5 + 8 + 1 + 5, 100)
    assert sum(entry.spent.values()) == books.accounts["a"].numerator


def test_parts_of_an_event_that_share_the_tiers_of_a_rate_follow_each_other():
    """The tokens that a model wrote come behind those that it read."""
    rate = Rate("tokens", CENT, model=Model.GRADUATED, tiers=PLAIN)
    box = till(Caps(event=cents(11)), rate)
    data = {"input_tokens": 10, "output_tokens": 10}
    call = {"id": "a", "source": "svc", "type": "meterd.genai", "subject": "a"}
    entry = box.take([json.dumps({**call, "specversion": "1.0", "data": data}).encode()], now=START)

    assert (entry.accepted, sum(entry.spent.values())) == (1, box.books.accounts["a"].numerator)
    assert box.books.accounts["a"].accrued == Fraction(11, 100)


def test_an_older_value_of_a_meter_that_shows_the_last_costs_nothing():
    """It changes nothing of what is owed, so no cap can stand against it."""
    box = till(Caps(day=cents(5)), Rate("seats", CENT))
    times = [f"2026-11-{day:02}T12:00:00Z" for day in (16, 15)]
    now = int(datetime(2026, 11, 16, 13, tzinfo=UTC).timestamp() * 1000)
    events = [usage(at, 5, meter="seats", time=at) for at in times]
    entry = box.take(events, now=now)

    assert entry.accepted == 2
    assert box.books.accounts["a"].accrued == Fraction(5, 100)
