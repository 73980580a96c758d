"""Prices that look at more than one dimension of a meter."""

from __future__ import annotations

from meterd.core.ledger import Agreement, Ledger
from meterd.core.plans import Pattern, Plan
from meterd.core.pricing import Rate, RateCard
from tests.unit.core.books import METERS, NOW, Till, usage

CARD = RateCard(
    (
        Rate("tokens", 5 * 10**12, 1, (("kind", "output"), ("model", "big"))),
        Rate("tokens", 10**12, 1),
    )
)


def test_event_is_priced_by_all_the_dimensions_that_its_rate_names():
    """Both must fit, in whatever order they come; else the next rate counts."""
    books = Ledger({"two": Plan("two", Pattern.STREAMING, CARD)}, METERS)
    books.bind(Agreement("a", "two", "payer", (("main", "esc_a"),)), NOW)
    till = Till(books)

    till.take(
        [
            usage("1", dimensions={"kind": "output", "model": "big"}),
            usage("2", dimensions={"model": "big", "kind": "output"}),
            usage("3", dimensions={"kind": "output"}),
            usage("4", dimensions={"model": "big"}),
        ]
    )

    assert 5 + 5 + 1 + 1 == books.accounts["a"].accrued
