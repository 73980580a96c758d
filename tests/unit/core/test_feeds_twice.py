"""A call of a model is told of by its span and by its log record, each made at its own time."""

from __future__ import annotations

import json

import pytest

from meterd.core.accounts import Agreement
from meterd.core.ledger import Ledger
from meterd.core.meters import Aggregation, Meter
from meterd.core.plans import Pattern, Plan
from meterd.core.pricing import Rate, RateCard
from tests.unit.core.books import NOW, Till

FIRST, SECOND = "2026-11-18T11:00:00.25Z", "2026-11-18T11:00:01.5Z"  # NOW is some minutes later.
LONG_AGO, TOMORROW = "2026-11-10T11:00:00Z", "2026-11-19T11:00:00Z"
METERS = {
    "tokens": Meter("tokens"),
    "words": Meter("words", event_type="completion", value="$.output_tokens"),
    "last": Meter("last", Aggregation.LATEST, event_type="meterd.genai", value="$.output_tokens"),
}
CARD = RateCard((Rate("tokens", 10**12), Rate("words", 10**12), Rate("last", 10**12)))


@pytest.fixture
def till() -> Till:
    """One agreement that pays a dollar a token."""
    books = Ledger({"p": Plan("p", Pattern.STREAMING, CARD)}, METERS)
    books.bind(Agreement("p", "p", "payer", (("main", "esc"),)), NOW)
    return Till(books)


def call(output: int = 2, **fields: object) -> bytes:
    """A call of a model as a CloudEvent."""
    event = {
        "specversion": "1.0",
        "type": "meterd.genai",
        "source": "svc",
        "id": "g",
        "subject": "p",
        "data": {"output_tokens": output},
    }
    return json.dumps({**event, **fields}).encode()


def test_a_call_that_is_told_of_at_two_times_is_one(till):
    """In one batch or in another, and without a time too."""
    till.take([call(time=FIRST), call(time=SECOND)])
    till.take([call()])
    till.take([call(time=SECOND)])

    assert (till.accepted, till.duplicates, till.rejections) == (1, 3, [])
    assert till.books.accounts["p"].accrued == 2 + 2  # Tokens, and the latest count.


def test_another_count_under_the_id_of_a_call_is_a_conflict(till):
    """At whatever time."""
    verdicts = [*till.verdicts([call(time=FIRST)]), *till.verdicts([call(3, time=FIRST)])]

    assert verdicts == ["", "conflict"]


def test_the_time_of_a_call_is_looked_at_before_it_is_left_out(till):
    """What is older than the memory of its id, or not yet, is not counted."""
    assert till.verdicts([call(time=LONG_AGO), call(time=TOMORROW)]) == ["late", "early"]


def test_the_time_of_the_latest_call_decides_and_not_its_place(till):
    """A batch in another order ends with the same figure."""
    till.take([call(7, time=SECOND, id="b"), call(5, time=FIRST, id="a")])

    assert till.books.accounts["p"].accrued == 12 + 7


def test_the_time_of_any_other_event_is_part_of_what_it_says(till):
    """Under one id an event of a type of its own cannot happen twice."""
    typed = {"type": "completion"}
    verdicts = till.verdicts([call(time=FIRST, **typed), call(time=SECOND, **typed)])

    assert verdicts == ["", "conflict"]
