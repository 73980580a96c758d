"""A payer who fills his wallet up: when the gate denies, the wallet is read again."""

from __future__ import annotations

import pytest

from meterd.core.accounts import Agreement
from meterd.core.holds import Ask
from meterd.core.money import NANOS
from meterd.core.plans import Pattern, Plan
from meterd.core.pricing import Rate, RateCard
from tests.fakes import FakeStore, adopt, make_bookkeeper


@pytest.fixture
async def books():
    """Two agreements for tokens of a cent, with a cent each: on a wallet, and on an escrow."""
    bookkeeper = make_bookkeeper(FakeStore())
    plans = {
        role: Plan(role, Pattern.PAY_PER_CALL, RateCard((Rate("tokens", 10**10, role=role),)))
        for role in ("wallet", "main")
    }
    await bookkeeper.reload({**bookkeeper.ledger.plans, **plans}, bookkeeper.ledger.meters)
    for name, role in (("agent_p", "wallet"), ("esc_a", "main")):
        await bookkeeper.bind(Agreement(name, role, "p", ((role, name),)), "test")
        await adopt(bookkeeper, bookkeeper.clock, name, total=10_000)
    bookkeeper.take_due()
    return bookkeeper


async def ask(bookkeeper, name, tokens):
    """Ask the gate; whether it allows, and whom it wants visited."""
    verdict, _ = await bookkeeper.authorize(
        bookkeeper.ledger.accounts[name], Ask("tokens", tokens * NANOS)
    )
    return verdict.allowed, bookkeeper.take_due()


async def test_caller_who_is_denied_lets_the_wallet_be_read(books):
    """Not for each question: a reading that is fresh will do."""
    books.clock.advance(2)

    assert (True, []) == await ask(books, "agent_p", 1)
    assert (False, ["agent_p"]) == await ask(books, "agent_p", 2)
    await adopt(books, books.clock, "agent_p", total=10_000)
    books.take_due()
    assert (False, []) == await ask(books, "agent_p", 2)


async def test_caller_who_is_denied_on_an_escrow_lets_nothing_be_read(books):
    """There is no top-up."""
    books.clock.advance(60)

    assert (False, []) == await ask(books, "esc_a", 2)
