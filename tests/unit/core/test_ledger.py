"""The ledger: the same totals in any order, with any duplication and in any batches."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterd.core import ledger as module
from meterd.core.accounts import Agreement
from meterd.core.changes import CardRow, Change
from meterd.core.ledger import Conflict, Ledger
from meterd.core.meters import Aggregation, Meter
from meterd.core.plans import Pattern, Plan
from meterd.core.pricing import OTHER, Rate, RateCard
from meterd.core.settlement import Escrow, EscrowStatus, Release, ReleaseStatus
from tests.unit.core.books import CARD, METERS, NOW, PLANS, Till, ledger, usage

A, B = "a", "b"
CARDS = [CardRow(plan.card.id, plan.card.text) for plan in PLANS.values()]


def streaming(price, *rates):
    """The plan `stream` with another price of its tokens."""
    card = RateCard((*rates, Rate("tokens", price)))
    return {**PLANS, "stream": Plan("stream", Pattern.STREAMING, card)}


_events = st.lists(
    st.tuples(
        st.integers(0, 30),
        st.sampled_from(["1", "7", "0.000000001", "12.5", "999999999999999"]),
        st.sampled_from(["tokens", "calls", "gpus"]),
        st.sampled_from([{}, {"kind": "output"}, {"kind": "x"}, {"region": "eu"}]),
        st.sampled_from(["agreement", "escrow_id"]),
    ),
    max_size=25,
    unique_by=lambda event: event[0],
)


def _payload(event):
    number, quantity, meter, dimensions, name = event
    fields = {"meter": meter, "dimensions": dimensions, "agreement": "", "escrow_id": ""}
    fields[name] = "a" if name == "agreement" else "esc_a"
    return usage(f"e{number}", quantity, **fields)


@given(_events, st.randoms(use_true_random=False), st.integers(1, 9))
def test_totals_are_the_same_in_any_order_with_any_duplication_and_any_batching(
    events, random, size
):
    """One event after the other, or shuffled, doubled and cut into batches: the books are equal."""
    payloads = [_payload(event) for event in events]
    plain, wild = Till(), Till()
    for payload in payloads:
        plain.take([payload])
    mixed = payloads * 2
    random.shuffle(mixed)
    for start in range(0, len(mixed), size):
        wild.take(mixed[start : start + size])
    expected = sum(map(_price, events), Fraction(0))

    assert _unnumbered(plain.rows) == _unnumbered(wild.rows)
    assert plain.accepted == wild.accepted
    assert wild.duplicates == wild.accepted
    assert 2 * len(plain.rejections) == len(wild.rejections)
    assert expected == plain.books.accounts[A].accrued == wild.books.accounts[A].accrued
    assert expected == wild.books.totals().accrued
    assert plain.books.accounts[A].row == wild.books.accounts[A].row


def _unnumbered(rows):
    """Counters are numbered in the order of their first event."""
    return {
        (r.period, r.card, r.meter, r.dimensions): (r.quantity, r.events) for r in rows.values()
    }


def _price(event):
    """What one event costs, worked out without the ledger."""
    _, quantity, meter, dimensions, _ = event
    if meter == "calls":
        return Fraction(1, 1000)
    if meter != "tokens":
        return Fraction(0)
    price = Fraction(3, 7000) if dimensions.get("kind") == "output" else Fraction(1, 3000)
    return Fraction(quantity) * price


def test_agreement_is_the_same_whether_it_is_named_by_its_id_or_by_its_escrow():
    """Both names in one batch make one content and one counter."""
    till = Till()
    by_escrow = usage("x", 5, agreement="", escrow_id="esc_a")
    entry = till.take([usage("x", 5), by_escrow, usage("x", 5, escrow_id="esc_a"), by_escrow])

    assert (1, 3, []) == (entry.accepted, entry.duplicates, entry.rejections)
    assert [5 * 10**9] == [row.quantity for row in till.rows.values()]


@pytest.mark.parametrize(
    "again",
    [
        usage("x", "5"),
        usage("x", "5.000"),
        usage("x", 5).replace(b": 5", b": 5.0"),
        usage("x", 5, dimensions={}),
        usage("x", 5, source="s"),
        usage("x", 5, unknown="?"),
    ],
)
def test_event_is_a_duplicate_when_only_its_spelling_differs(again):
    """5, "5" and 5.0 are the same content, in one batch and in two."""
    one, two = Till(), Till()
    one.take([usage("x", 5), again])
    two.take([usage("x", 5)])
    two.take([again])

    assert (1, 1, []) == (one.accepted, one.duplicates, one.rejections)
    assert (1, 1, []) == (two.accepted, two.duplicates, two.rejections)


@pytest.mark.parametrize("quantity", [1, 7, "x", "", 2**70, 2**64, None, [1], {"a": [1, 2]}])
@pytest.mark.parametrize("fields", [{"meter": "calls"}, {"type": "meterd.close"}])
def test_quantity_that_nobody_reads_is_no_content(quantity, fields):
    """Neither a count nor a close looks at the quantity, in whatever company it comes."""
    till = Till()
    payload = usage("x", quantity, **fields).replace(b", 2", b",\n2")
    till.take([payload])
    till.take([payload, usage("y", 5).replace(b": 5", b": 2.5")])

    assert (2, 1, []) == (till.accepted, till.duplicates, till.rejections)


@pytest.mark.parametrize(
    "other",
    [
        usage("x", 6),
        usage("x", 5, meter="calls"),
        usage("x", 5, agreement="b", dimensions={"kind": "output"}),
        usage("x", 5, dimensions={"region": "eu"}),
        usage("x", 5, time="2026-11-18T11:00:00Z"),
        usage("x", 5, type="meterd.close"),
    ],
)
def test_event_is_a_conflict_when_its_identity_is_known_with_other_content(other):
    """The first content stays, in one batch and in two."""
    one, two = Till(), Till()
    assert ["", "conflict"] == one.verdicts([usage("x", 5), other], now=1_794_999_900_000)
    assert [""] == two.verdicts([usage("x", 5)])
    assert ["conflict"] == two.verdicts([other])
    assert [5 * 10**9] == [row.quantity for row in two.rows.values()]
    assert one.rows == two.rows


def test_same_id_of_another_source_is_another_event():
    """An identity is source and id; the source's own name stands in where the event has none."""
    till = Till()
    till.take([usage("x", 5), usage("x", 5, source="t"), usage("x", 6, source="u")])
    till.take([usage("x", 5)], source="t")

    assert (3, 1, []) == (till.accepted, till.duplicates, till.rejections)


def test_transport_id_serves_where_the_event_has_none():
    """The event's own id comes first."""
    till = Till()
    till.take([usage("", 5), usage("own", 5)], ids=["t-1", "t-2"])
    entry = till.take([usage("t-1", 5), usage("own", 5), usage("t-2", 5)])

    assert (1, 2) == (entry.accepted, entry.duplicates)
    assert ["no_id"] == till.verdicts([usage("", 5)], ids=[""])


def test_decide_changes_nothing_but_apply_does():
    """Deciding twice decides the same."""
    books = ledger()
    event = module.UsageEvent(id="x", agreement=A, meter="tokens", quantity=5)
    other = module.UsageEvent(id="x", agreement=A, meter="tokens", quantity=6)
    resolved = books.resolve([event, other], None, "s", 0, NOW)
    first = books.decide(resolved, [b"x", b"x"], [1, 2], [-1, -1])
    again = books.decide(resolved, [b"x", b"x"], [1, 2], [-1, -1])

    assert first == again
    assert 1 == len(again.rejections)
    assert 0 == books.accounts[A].owed
    books.apply(again, NOW)
    assert 1666 == books.accounts[A].owed


def test_decide_takes_an_empty_batch():
    """Nothing in, nothing out."""
    entry = Till().take([])

    assert (0, 0, []) == (entry.accepted, entry.duplicates, entry.rejections)


def test_million_values_of_a_dimension_make_one_counter():
    """What no rate names is counted together."""
    till = Till()
    till.take([usage(f"e{n}", 1, dimensions={"kind": f"k{n}"}) for n in range(500)])

    assert [(("kind", OTHER),)] == [row.dimensions for row in till.rows.values()]
    assert [500] == [row.events for row in till.rows.values()]


def test_spellings_are_forgotten_when_there_are_too_many(monkeypatch):
    """The memory of spellings has a limit, and the books do not depend on it."""
    monkeypatch.setattr(module, "RESOLVED_MAX", 3)
    till = Till()
    till.take([usage(f"e{n}", 1, dimensions={"kind": f"k{n % 9}"}) for n in range(90)])

    assert len(till.books._resolved) <= 3
    assert [90] == [row.events for row in till.rows.values()]


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"dimensions": {f"d{n}": "" for n in range(33)}}, "malformed"),
        ({"dimensions": {"region": "r" * 999}}, ""),
        ({"dimensions": {"region": "\0"}}, ""),
        ({"escrow_id": "esc_b"}, "mismatch"),
        ({"type": "?"}, "unknown_type"),
    ],
)
def test_verdict_does_not_depend_on_what_was_seen_before(fields, reason, warm):
    """A spelling that is remembered is no way around a check."""
    till = Till()
    if warm:
        till.take([usage("before")])

    assert [reason] == till.verdicts([usage("x", **fields)])


def test_value_named_other_has_the_price_of_its_rate_in_any_order():
    """A rate for the word that stands for all the rest prices that word alone."""
    plans = streaming(10**9, Rate("tokens", 5 * 10**9, 1, (("kind", OTHER),)))
    payloads = [usage("x", dimensions={"kind": "foo"}), usage("y", dimensions={"kind": OTHER})]
    for order in (payloads, payloads[::-1]):
        till = Till(Ledger(plans, METERS))
        till.books.bind(Agreement(A, "stream", "p", (("main", "esc_a"),)), NOW)
        till.take(order)

        assert Fraction(6, 1000) == till.books.accounts[A].accrued


# -- Binding and reloading -------------------------------------------------------------------------


def test_bind_hands_out_all_that_must_be_stored():
    """The card, the agreement and its escrow, once."""
    books = Ledger(PLANS, METERS)
    agreement = Agreement(A, "stream", "payer", (("main", "esc_a"),))
    change = books.bind(agreement, NOW)

    assert (CARDS[0],) == change.cards
    assert (books.accounts[A].row,) == change.agreements
    assert (Escrow("esc_a", A, "main"),) == change.escrows
    assert Change() == books.bind(agreement, NOW + 1)
    assert books.account("esc_a") is books.account(A) is books.accounts[A]


@pytest.mark.parametrize(
    ("agreement", "words"),
    [
        (Agreement("c", "gold", "p", (("main", "esc_c"),)), "known: stream, strict"),
        (Agreement("c", "stream", "p", (("main", "esc_a"),)), "esc_a belongs to agreement a"),
        (Agreement("c", "stream", "p", (("main", "b"),)), "b belongs to agreement b"),
        (Agreement("esc_b", "stream", "p", (("main", "e"),)), "esc_b belongs to agreement b"),
        (Agreement("a", "stream", "p", (("main", "esc_n"),)), "is bound to main esc_a; name these"),
        (Agreement("a", "stream", "p", (("base", "esc_a"),)), "in another role"),
    ],
)
def test_bind_refuses_what_contradicts_the_books(agreement, words):
    """Nothing changes, and the words say what to do."""
    books = ledger()
    before = {name: account.row for name, account in books.accounts.items()}
    with pytest.raises(Conflict, match=words):
        books.bind(agreement, NOW)

    assert before == {name: account.row for name, account in books.accounts.items()}
    assert books.account("esc_c") is None


def test_bind_of_a_known_agreement_moves_it_to_another_plan_and_keeps_what_it_owes():
    """What was accrued under the first plan stays, and the way back works too."""
    till = Till()
    till.take([usage("x", 3, dimensions={"kind": "output"})])
    moved = Agreement(A, "strict", "payer", (("main", "esc_a"),))
    change = till.books.bind(moved, NOW)

    assert Fraction(9, 7000) == till.books.accounts[A].accrued
    assert ("strict", ()) == (change.agreements[0].plan, change.escrows)
    assert ["no_rate", ""] == till.verdicts([usage("y"), usage("z", dimensions={"kind": "output"})])
    till.books.bind(dataclasses.replace(moved, plan="stream"), NOW)
    till.take([usage("y2", 3, dimensions={"kind": "output"}), usage("z2", 3)])
    assert Fraction(9 + 3 + 9 + 7, 7000) == till.books.accounts[A].accrued
    assert till.books.accounts[A].accrued == till.books.totals().accrued


def test_reload_never_prices_again_what_was_accrued():
    """A changed price holds from the next event on, on a card and a counter of its own."""
    till = Till()
    till.take([usage("x", 3), usage("y", 3, agreement="b", dimensions={"kind": "output"})])
    change = till.books.reload(streaming(5), METERS)

    assert Fraction(1, 1000) == till.books.accounts[A].accrued
    assert [A] == [row.id for row in change.agreements]
    assert [streaming(5)["stream"].card.id] == [card.id for card in change.cards]
    till.take([usage("z", 1)])
    assert Fraction(1, 1000) + Fraction(5, 10**12) == till.books.accounts[A].accrued
    assert 3 == len(till.rows)
    assert Fraction(1, 1000) + Fraction(5, 10**12) + Fraction(9, 7000) == (
        till.books.totals().accrued
    )
    assert Change() == till.books.reload(streaming(5), METERS)


def test_reload_back_and_forth_counts_on_the_first_card_again():
    """The old price is the same card, so that its counter goes on."""
    till = Till()
    till.take([usage("x", 3)])
    till.books.reload(streaming(5), METERS)
    till.take([usage("y", 1)])
    assert () == till.books.reload(PLANS, METERS).cards
    till.take([usage("z", 6)])

    assert {9 * 10**9, 10**9} == {row.quantity for row in till.rows.values()}
    assert Fraction(3, 1000) + Fraction(5, 10**12) == till.books.accounts[A].accrued


def test_reload_refuses_to_lose_a_plan_in_use():
    """Nothing has changed then."""
    till = Till()
    with pytest.raises(Conflict, match="strict"):
        till.books.reload({"stream": streaming(5)["stream"]}, {})
    till.take([usage("x", 3)])

    assert Fraction(1, 1000) == till.books.accounts[A].accrued


def test_reload_of_a_meter_holds_for_counters_that_exist():
    """Counting begins with the next event, whether or not the counter was there before."""
    till = Till()
    till.take([usage("x", 3)])
    till.books.reload(PLANS, {**METERS, "tokens": Meter("tokens", Aggregation.COUNT)})
    till.take([usage("y", 3)])

    assert [4 * 10**9] == [row.quantity for row in till.rows.values()]


# -- Restoring -------------------------------------------------------------------------------------


def _used():
    till = Till()
    till.take([usage("x", "3.5"), usage("y", 1, dimensions={"kind": "output"})])
    till.take([usage("z", 2, agreement="b", dimensions={"kind": "output"})])
    till.books.reload(streaming(5), METERS)
    till.take([usage("w", 2), usage("v", meter="calls"), usage("u", type="meterd.close")])
    cards = [*CARDS, CardRow(streaming(5)["stream"].card.id, streaming(5)["stream"].card.text)]
    return till, cards


def test_restore_gives_back_the_same_books():
    """Totals, rows and what the next event costs are as they were."""
    till, cards = _used()
    restored = Ledger.restore(streaming(5), METERS, till.state(cards))
    again = Till(restored, dict(till.known), rows=dict(till.rows))

    assert till.state(cards) == again.state(cards)
    assert till.books.totals() == restored.totals()
    for one in (till, again):
        one.take([usage("n", 9), usage("x", "3.5")])
    assert till.state(cards) == again.state(cards)
    assert restored.accounts[A].closing


def test_restore_under_changed_prices_hands_out_the_card_before_it_is_counted_on():
    """A price that changed while the daemon was down: no counter is stored before its card."""
    till = Till()
    till.take([usage("x", 3)])
    restored = Ledger.restore(streaming(7), METERS, till.state(CARDS))
    new = CardRow(streaming(7)["stream"].card.id, streaming(7)["stream"].card.text)
    bound = Agreement(A, "stream", "payer", (("main", "esc_a"),))

    assert Change(cards=(new,)) == restored.bind(bound, NOW)
    assert Change() == restored.bind(bound, NOW)
    reloaded = Ledger.restore(streaming(7), METERS, till.state(CARDS))
    assert Change(cards=(new,)) == reloaded.reload(streaming(7), METERS)
    again = Till(restored, rows=dict(till.rows))
    again.take([usage("y", 1)])
    assert Fraction(1, 1000) + Fraction(7, 10**12) == restored.accounts[A].accrued
    Ledger.restore(streaming(7), METERS, again.state([*CARDS, new]))


def _tampered(state, **fields):
    state.counters[0] = dataclasses.replace(state.counters[0], **fields)
    return state


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: _tampered(state, quantity=state.counters[0].quantity + 1),
        lambda state: _tampered(state, dimensions=(("kind", "output"),)),
        lambda state: _tampered(state, meter="gpus"),
        lambda state: _tampered(state, card="0" * 16),
        lambda state: state.counters.pop(0),
        lambda state: state.cards.pop(0),
        lambda state: state.escrows.clear(),
        lambda state: state.agreements.__setitem__(
            0, dataclasses.replace(state.agreements[0], accrued=Fraction(1, 3))
        ),
        lambda state: state.agreements.__setitem__(
            0, dataclasses.replace(state.agreements[0], plan="gold")
        ),
    ],
    ids=[
        *("one nano more", "another price", "a meter without a rate", "a card that is not there"),
        *(
            "a counter lost",
            "a card lost",
            "the escrows lost",
            "another sum",
            "a plan that is gone",
        ),
    ],
)
def test_restore_refuses_books_that_do_not_add_up(spoil):
    """A sum that does not follow from its counters is a person's to look at."""
    till, cards = _used()
    state = till.state(cards)
    spoil(state)

    with pytest.raises(Conflict, match="agreement a"):
        Ledger.restore(streaming(5), METERS, state)


def test_restore_keeps_a_meter_that_the_configuration_has_no_more():
    """Its usage is still owed."""
    till = Till()
    till.take([usage("x", 3)])
    restored = Ledger.restore(PLANS, {"calls": METERS["calls"]}, till.state(CARDS))

    assert Fraction(1, 1000) == restored.accounts[A].accrued
    assert ["unknown_meter"] == Till(restored).verdicts([usage("y", 3)])


# -- Closing and settling --------------------------------------------------------------------------


def test_close_event_marks_its_agreement_once_and_counts_as_accepted():
    """Usage in its batch is counted, before it and behind it; a second one is a duplicate."""
    till = Till()
    close = usage("end", type="meterd.close", agreement="", escrow_id="esc_a")
    entry = till.take([usage("x"), close, usage("y"), close, usage("x")])

    assert (3, 2, []) == (entry.accepted, entry.duplicates, entry.rejections)
    assert [till.books.accounts[A]] == entry.closes
    assert till.books.accounts[A].closing
    assert till.books.accounts[A].row.closing
    assert 2 == till.books.accounts[A].events
    assert not till.books.accounts[B].closing
    assert [] == till.take([close]).closes


def test_close_event_alone_touches_its_agreement():
    """Its row must be stored though no counter changed."""
    books = ledger()
    close = module.UsageEvent(id="x", agreement=A, type="meterd.close")
    entry = books.decide(books.resolve([close], None, "s", 0, NOW), [b"x"], [1], [-1])
    change = books.apply(entry, NOW).change()

    assert ((), (books.accounts[A].row,)) == (change.counters, change.agreements)
    assert 0 == books.accounts[A].unsettled_since


def test_closed_agreement_refuses_usage_even_in_a_remembered_spelling():
    """Nothing accrues that could never be paid; others go on."""
    till = Till()
    till.take([usage("x")])
    closed = dataclasses.replace(till.books.escrows["esc_a"], status=EscrowStatus.CLOSED)
    before = till.books.put(closed)

    assert EscrowStatus.ADOPTING is before.status
    other = usage("z", agreement="b", dimensions={"kind": "output"})
    close = usage("end", type="meterd.close")
    assert ["closed", "", "closed"] == till.verdicts([usage("y"), other, close])
    till.books.put(closed)
    assert 1 == till.books.accounts[A].events


def test_close_by_a_person_takes_usage_until_the_escrow_is_closed():
    """Closing is asked for; usage under way is still counted."""
    till = Till()
    (row,) = till.books.close(till.books.accounts[A]).change().agreements

    assert row.closing
    assert [""] == till.verdicts([usage("x")])


def test_interval_begins_with_the_first_usage_and_anew_behind_each_release():
    """`unsettled_since` is the time of the oldest usage that is not settled."""
    till = Till()
    account = till.books.accounts[A]
    till.take([usage("x", 300)], now=NOW)
    till.take([usage("y", 300)], now=NOW + 5)
    assert NOW == account.unsettled_since
    escrow = till.books.escrows["esc_a"]
    till.books.put(dataclasses.replace(escrow, settled=100_000))
    row = till.books.settled_from(account, NOW + 9)
    assert row is not None
    assert NOW + 9 == row.unsettled_since == account.unsettled_since
    assert till.books.settled_from(account, NOW + 9) is None
    till.books.put(dataclasses.replace(escrow, settled=200_000))
    row = till.books.settled_from(account, NOW + 10)

    assert row is not None
    assert 0 == row.unsettled_since
    standing = till.books.standing(account, till.books.escrows["esc_a"])
    assert 200_000 == standing.owed == account.owed
    assert 600 * 10**9 == standing.units


def test_totals_add_up_what_is_settled_held_and_credited():
    """Over all escrows."""
    books = ledger()
    release = Release("r", "esc_a", 7, 0, ReleaseStatus.SENT, "", 0, 0, ())
    books.put(dataclasses.replace(books.escrows["esc_a"], settled=5, release=release))
    books.put(dataclasses.replace(books.escrows["esc_b"], settled=6, credited=2))
    totals = books.totals()

    assert (0, 11, 7, 2) == (totals.accrued, totals.settled, totals.held, totals.credited)


def test_card_of_the_ledger_is_the_card_of_its_plan():
    """The fixture and the plan agree, so that the prices above mean something."""
    assert CARD is PLANS["stream"].card
