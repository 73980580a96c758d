"""Typed events in the ledger: which counters they come to, by whose price, and what is left out."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from meterd.core.accounts import Agreement, Charged
from meterd.core.events import EventDecoder
from meterd.core.ledger import Ledger
from meterd.core.meters import Aggregation, Meter
from meterd.core.money import NANOS
from meterd.core.plans import Pattern, Plan, Version
from meterd.core.pricing import Model, Rate, RateCard
from meterd.core.settlement import EscrowStatus
from tests.unit.core.books import NOW, SENTINEL, Till, usage

METERS = {
    meter.name: meter
    for meter in (
        Meter("words", event_type="answer", value="$.words"),
        Meter("audio", event_type="answer", value="$.audio"),
        Meter("peak", Aggregation.MAX, event_type="answer", value="$.peak"),
        Meter("calls", Aggregation.COUNT, event_type="answer", value="$.calls"),
        Meter("spent", event_type="spent", value="$.n"),
    )
}
PICOS = 10**12
CARD = RateCard(
    (
        Rate("words", PICOS),
        Rate("audio", PICOS),
        Rate("peak", PICOS),
        Rate("calls", PICOS),
        Rate("spent", 5 * PICOS, model=Model.DYNAMIC),
    )
)
PLAN = Plan("p", Pattern.STREAMING, CARD)


def till(plan=PLAN):
    """Two agreements under it."""
    books = Ledger({"p": plan}, METERS)
    for name in "ab":
        books.bind(Agreement(name, "p", "payer", (("main", f"esc_{name}"),)), NOW)
    return Till(books)


def answer(event_id="x", agreement="a", kind="answer", **data):
    """A bare event with a type and data."""
    event = {"id": event_id, "agreement": agreement, "type": kind}
    price = {"price": data.pop("price")} if "price" in data else {}
    return json.dumps({**event, **price, "data": data}).encode()


def counted(of, agreement="a"):
    """What was counted of an agreement, in whole units by meter."""
    counters = of.books.accounts[agreement].counters.values()
    return {counter.meter.name: counter.quantity // 10**9 for counter in counters}


def test_typed_events_of_two_agreements_are_counted_for_each():
    """One type and one spelling: what is remembered of one says nothing of the other."""
    books = till()
    for turn in range(2):
        books.take([answer(f"{turn}{name}", name, words=2) for name in "ab"])

    assert [{"words": 4}] * 2 == [counted(books, name) for name in "ab"]


def test_typed_event_finds_its_counter_again_without_a_look_at_its_card():
    """Of nearly all events the spelling came before."""
    books = till()
    books.take([answer(words=2)])
    books.books._counter_of = None

    assert [""] == books.verdicts([answer("y", words=3)])
    assert {"words": 5} == counted(books)


def test_typed_event_is_priced_by_its_own_time():
    """One that comes late has the price of its day."""
    dear = RateCard((Rate("words", 3 * PICOS),))
    books = till(replace(PLAN, later=(Version(NOW, dear),)))
    early = json.loads(answer("x", words=2)) | {"time": "2026-11-18T11:06:39.999Z"}
    books.take([json.dumps(early).encode(), answer("y", words=2)])

    assert 2 + 6 == books.books.accounts["a"].accrued


def test_closed_agreement_takes_no_usage_in_the_spelling_of_a_typed_event():
    """A refusal is not remembered as if it were a counter."""
    books = till()
    books.books.put(replace(books.books.escrows["esc_a"], status=EscrowStatus.CLOSED))

    assert ["closed"] == books.verdicts([answer(words=2)])
    assert ["closed"] == books.verdicts([usage("y", 2, meter="words")])


def test_sum_that_grows_by_nothing_is_left_out_beside_one_that_grows():
    """It needs no rate then; a greatest value of 0 is a value, and one call is one call."""
    rates = (replace_where(rate) if rate.meter == "audio" else rate for rate in CARD.rates)
    books = till(replace(PLAN, card=RateCard(tuple(rates))))
    books.take([answer(words=2, audio=0, peak=0, calls=5)])

    assert {"words": 2, "peak": 0, "calls": 1} == counted(books)
    assert [] == books.rejections


def replace_where(rate):
    """The same rate, for events of one kind that none of these is."""
    return Rate(rate.meter, rate.price, where=(("kind", "speech"),))


def test_event_whose_sums_all_grow_by_nothing_is_counted_once():
    """Under the first of its meters."""
    books = till()
    books.take([answer(words=0, audio=0)])

    assert {"words": 0} == counted(books)
    assert 1 == books.books.accounts["a"].events


def test_prices_that_typed_events_bring_add_up_in_a_batch():
    """Two of one counter, each with its own."""
    books = till()
    books.take(
        [answer("x", kind="spent", n=2, price=3), answer("y", kind="spent", n=1, price="0.5")]
    )

    assert 2 * 3 + 0.5 == books.books.accounts["a"].accrued


def test_part_of_a_typed_event_is_what_it_adds_and_nothing_else():
    """A sum has no sample and no amount; both are remembered so, to be taken back."""
    books = till()
    (event,) = EventDecoder(SENTINEL).decode([answer(words=2, peak=3)])
    found = books.books.resolve([event], None, "s", 0, NOW)
    words, peak = books.books.accounts["a"].counters.values()

    key = str(3 * NANOS)
    assert {0: [Charged(words, 2 * NANOS), Charged(peak, 3 * NANOS, 0, key)]} == found.parts


def test_counters_are_read_back_with_how_many_of_their_events_fed_another_one_first():
    """So that an event that fed two of them is still one event of its agreement."""
    books = till()
    books.take([answer(words=2, audio=1)])
    restored = books.restored().accounts["a"]

    assert [0, 1] == [counter.shared for counter in restored.counters.values()]
    assert 1 == restored.events


def test_usage_by_its_type_needs_no_envelope():
    """A bare event may say that it is usage, and have its meter among its data."""
    books = till()

    assert [""] == books.verdicts([answer(kind="meterd.usage", meter="words", quantity=2)])
    assert {"words": 2} == counted(books)
    nobody = usage("y", agreement="", meter="words")
    assert ["unknown_agreement"] == books.verdicts([nobody]), "its spelling is its agreement's own"
    books.books._counter = None
    assert [""] == books.verdicts([usage("z", 2, meter="words")]), "and is remembered"


def test_typed_event_is_refused_at_its_own_place_and_belongs_to_its_agreement():
    """By its index and id; and its content names the agreement, however it was addressed."""
    books = till()
    books.take([answer("x", words=2), answer("y", words=2, price=1)])
    (event,) = EventDecoder(SENTINEL).decode([answer("z", agreement="esc_b", words=1)])
    found = books.books.resolve([event], None, "s", 0, NOW)

    assert [(1, "y", "bad_price")] == [
        (rejection.index, rejection.id, rejection.reason) for rejection in books.rejections
    ]
    assert ["b"] == [event.agreement for event in found.events]


@pytest.mark.parametrize("more", [{}, {"quantity": 7}])
def test_quantity_beside_the_data_of_a_typed_event_is_no_content(more):
    """Its data alone are looked at."""
    books = till()
    plain = json.loads(answer(words=2))

    assert ["", ""] == books.verdicts([json.dumps(plain | more).encode(), answer(words=2)])
    assert (1, {"words": 2}) == (books.duplicates, counted(books))
