"""What a receipt states, line by line."""

from __future__ import annotations

from dataclasses import replace

from meterd.core.accounts import Agreement
from meterd.core.ledger import Ledger
from meterd.core.plans import Pattern, Plan
from meterd.core.pricing import Model, Rate, RateCard, Tier
from meterd.core.settlement import Release, ReleaseStatus
from meterd.core.statements import CLOSE, FORM, RELEASE, statement
from tests.unit.core.books import METERS, NOW, PLANS, Till, usage

TIERS = (Tier(5 * 10**9, 10**9), Tier(None, 10**8))
MIXED = RateCard(
    (
        Rate("tokens", 0, model=Model.GRADUATED, tiers=TIERS),
        Rate("calls", 10**10, model=Model.DYNAMIC),
    )
)
PAID = Release("rel_1", "esc_a", 1500, 0, ReleaseStatus.CONFIRMED, "amount", 0, NOW, ())


def mixed() -> Till:
    """An agreement whose tokens have tiers and whose calls bring their price."""
    books = Ledger({**PLANS, "mixed": Plan("mixed", Pattern.STREAMING, MIXED)}, METERS)
    books.bind(Agreement("a", "mixed", "payer", (("main", "esc_a"),)), NOW)
    return Till(books)


def test_statement_says_who_owes_what_and_what_was_paid():
    """Exact money, by meter and rate card; dimensions are added up."""
    till = Till()
    till.take([usage("1", 7, dimensions={"kind": "output"}), usage("2", 3), usage("3", 2)])
    till.take([usage("4", 1, meter="calls")])
    books, account = till.books, till.books.accounts["a"]
    books.put(replace(books.escrows["esc_a"], baseline=10, settled=1500, credited=2))
    said = statement(books, account, RELEASE, NOW, PAID)

    assert {
        "form": FORM,
        "kind": "release",
        "agreement": "a",
        "plan": "stream",
        "payer": "payer",
        "at": NOW,
        "events": 4,
        "released": "0.001502",
    } == {name: said[name] for name in said if name not in {"usage", "release", "accrued"}}
    assert {"id": "rel_1", "escrow": "esc_a", "amount": "0.0015", "why": "amount"} == said[
        "release"
    ]
    calls, tokens = said["usage"]
    assert ("calls", "1", 1, "0.001") == tuple(
        calls[name] for name in ("meter", "quantity", "events", "accrued")
    )
    assert ("tokens", "token", "12", 3) == tuple(
        tokens[name] for name in ("meter", "unit", "quantity", "events")
    )
    # Seven at 0.003 for seven, and five at 0.001 for three, under one card.
    assert (next(iter(books.cards)), "0.004666666666666666666666") == (
        tokens["card"],
        tokens["accrued"],
    )


def test_statement_of_tiers_has_no_price_of_a_meter():
    """Only the whole bill has one; a price that the event brings is its own."""
    till = mixed()
    till.take([usage("1", 7), usage("2", 3, dimensions={"kind": "x"})])
    till.take([usage("3", 2, meter="calls", price="0.004")])
    calls, tokens = statement(till.books, till.books.accounts["a"], CLOSE, NOW, None)["usage"]

    assert ("1", "0.004") == (calls["quantity"], calls["accrued"])
    assert ("10", None) == (tokens["quantity"], tokens["accrued"])


def test_statement_without_a_release_closes():
    """Nothing was used and nothing paid: it says so."""
    books = Till().books
    said = statement(books, books.accounts["b"], CLOSE, NOW, None)

    assert (None, [], "0.00", "0.00") == (
        said["release"],
        said["usage"],
        said["accrued"],
        said["released"],
    )
