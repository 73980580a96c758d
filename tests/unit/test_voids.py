"""Taking events back, through the bookkeeper over a fake store with real packing."""

from __future__ import annotations

import asyncio
import json

import pytest

from meterd.core.accounts import Agreement
from meterd.sources import Deliveries
from tests.fakes import FakeIdentities, FakeStore, adopt, make_bookkeeper


def event(event_id, quantity=1000, **fields):
    """One delivery in bare JSON."""
    base = {"id": event_id, "agreement": "a", "meter": "tokens", "quantity": quantity}
    return json.dumps({**base, **fields}).encode()


def void(event_id, voids, **fields):
    """One `meterd.void`."""
    return json.dumps(
        {"id": event_id, "agreement": "a", "type": "meterd.void", "voids": voids, **fields}
    ).encode()


@pytest.fixture
async def books():
    """A bookkeeper with one adopted agreement, and its loop that takes events back."""
    store = FakeStore()
    bookkeeper = make_bookkeeper(store, identities=FakeIdentities())
    await bookkeeper.bind(Agreement("a", "stream", "p", (("main", "esc_a"),)), "test")
    await adopt(bookkeeper, bookkeeper.clock, "esc_a", total=10**7)
    loop = asyncio.create_task(bookkeeper.take_back_voided())
    yield bookkeeper
    loop.cancel()


async def settled(bookkeeper):
    """Let the loop do all that it has."""
    for _ in range(50):
        await asyncio.sleep(0)
    assert not bookkeeper._voids


def record(bookkeeper, *payloads):
    return bookkeeper.record("s", Deliveries(payloads=list(payloads)))


async def test_void_takes_exactly_its_event_back(books):
    """The counters are as if it had never come."""
    account = books.ledger.accounts["a"]
    record(books, event("x", 1000), event("y", "250.5"))
    before = account.accrued
    record(books, event("z", "33.3"))
    recorded = record(books, void("v", "z"))
    await settled(books)

    assert (1, 0) == (recorded.accepted, len(recorded.rejections))
    assert before == account.accrued
    assert 2 == account.events
    assert 1_250_500_000_000 == account.units


async def test_void_and_its_event_may_come_in_one_batch(books):
    """The event is there before the void is looked at."""
    record(books, event("x"), event("y"), void("v", "y"))
    await settled(books)

    assert 1 == books.ledger.accounts["a"].events


async def test_event_is_taken_back_once_whatever_the_ids_of_the_voids(books):
    """A second void is refused; the same void again is a duplicate."""
    record(books, event("x"), event("y"))
    record(books, void("v", "x"))
    again = record(books, void("v", "x"))
    other = record(books, void("w", "x"), void("u", "x"))
    both = record(books, void("p", "y"), void("q", "y"))
    await settled(books)

    assert 1 == again.duplicates
    assert ["unknown_event"] * 2 == [one.reason for one in other.rejections]
    assert (1, 1) == (both.accepted, len(both.rejections))
    assert 0 == books.ledger.accounts["a"].events
    assert 0 == books.ledger.accounts["a"].accrued


async def test_void_of_what_never_came_is_refused(books):
    """Nothing is taken back, and the reason says of whom nothing is remembered."""
    (rejection,) = record(books, void("v", "nothing")).rejections

    assert "unknown_event" == rejection.reason
    assert "'nothing' of s" in rejection.detail


async def test_void_of_another_agreements_event_takes_nothing_back(books):
    """The void is accepted, since its id is good, and ends with an alarm and a journal entry."""
    await books.bind(Agreement("b", "stream", "p", (("main", "esc_b"),)), "test")
    record(books, event("x", agreement="b"))
    record(books, void("v", "x"))
    await settled(books)

    assert 1 == books.ledger.accounts["b"].events
    assert "void_failed" in [entry.action for entry in books.store.entries]


async def test_usage_that_was_paid_becomes_a_credit(books):
    """What is owed falls below what was released, so that later usage is paid by less."""
    account, escrow = books.ledger.accounts["a"], books.ledger.escrows["esc_a"]
    record(books, event("x", 100_000), event("y", 50_000))
    owed = account.owed
    record(books, void("v", "y"))
    await settled(books)

    assert owed * 2 == account.owed * 3
    assert account.owed == books.ledger.owed_on(account, escrow)


@pytest.mark.parametrize("voids", ["", "\n", "\0x", "\ud800", "x" * 257, 5, None])
async def test_void_of_what_can_be_no_id_is_refused_and_takes_nothing_back(books, voids):
    """Whatever stands there is a rejection with a reason, and never a mistake of meterd's own."""
    record(books, event("x"))
    recorded = record(books, void("v", voids))
    await settled(books)

    assert (0, 1) == (recorded.accepted, len(recorded.rejections))
    assert 1 == books.ledger.accounts["a"].events
