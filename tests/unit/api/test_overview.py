from __future__ import annotations

from fractions import Fraction

from meterd.api import Overview
from meterd.api.overview import SLICE, balance, spokesman, state_word
from meterd.core.accounts import Agreement
from meterd.core.settlement import AnswerKind, Observed
from tests.fakes import NOW_MS, reading_of

USAGE = {"escrow_id": "esc_1", "meter": "tokens"}


async def many(world, count):
    """Agreements in every state that usage and persons can bring about."""
    for number in range(count):
        await world.bind(f"agr{number}", total=2_000_000)
        usage = {"escrow_id": f"agr{number}", "meter": "tokens", "quantity": 1 + 370_001 * number}
        await world.post("/v1/events", {"id": f"e{number}", **usage})
    await world.post("/v1/agreements/agr1/freeze", {"reason": "x"})
    await world.release("agr2", "rel_1", AnswerKind.CONFIRMED)
    await world.release("agr3", "rel_2", AnswerKind.DOUBT)


async def test_the_sums_are_the_sums_of_the_agreements(make_world):
    """What the pass adds up in its own quick way is what each agreement shows of itself."""
    world = await make_world()
    await many(world, 6)
    figures = await Overview(world.bookkeeper).refresh()
    ledger = world.bookkeeper.ledger
    accounts = list(ledger.accounts.values())
    balances = [balance(ledger, account) for account in accounts]

    assert figures.accrued == sum((account.accrued for account in accounts), Fraction(0))
    assert figures.released == sum(money.released for money in balances)
    assert figures.unsettled == sum(money.unsettled for money in balances)
    assert figures.in_doubt == sum(money.in_doubt for money in balances) > 0
    assert figures.uncollectible == sum(money.uncollectible for money in balances) > 0
    assert figures.headroom == sum(max(0, money.headroom or 0) for money in balances) > 0
    words = [state_word(spokesman(ledger, one), balance(ledger, one)) for one in accounts]
    assert figures.states == {word: words.count(word) for word in set(words)}
    assert {"active", "frozen", "exhausted"} <= set(words)


async def test_figures_are_kept_for_a_second(world):
    """Whoever asks within a second gets the same pass."""
    first = await world.overview.refresh()
    await world.post("/v1/events", {"id": "a", "quantity": 1, **USAGE})
    same = await world.overview.refresh()
    world.clock.advance(1)
    later = await world.overview.refresh()

    assert same is first
    assert (first.accrued, later.accrued) == (0, Fraction(2, 10**6))


async def test_lag_is_the_age_of_the_oldest_usage_that_is_due(world):
    """Usage below every threshold is not late, however old."""
    await world.post("/v1/events", {"id": "a", "quantity": 1, **USAGE})
    world.clock.advance(100)
    not_due = await world.overview.refresh()
    await world.post("/v1/events", {"id": "b", "quantity": 10**6, **USAGE})
    world.clock.advance(7)
    due = await world.overview.refresh()

    assert (not_due.lag_ms, due.lag_ms) == (0, 107_000)
    assert due.at == NOW_MS + 111_000


async def test_a_reading_that_differs_is_a_reconciliation_difference(world):
    """The service shows more than meterd released."""
    world.clock.advance(5)
    reading = reading_of("esc_1", total=10**7, mono=world.clock.mono(), released=123)
    await world.bookkeeper.step("esc_1", Observed(reading, world.clock.mono(), NOW_MS, 0))

    assert (await world.overview.refresh()).difference == 123


async def test_a_pass_lets_others_work_in_between(world):
    """More agreements than a slice: the loop breathes."""
    for number in range(SLICE + 1):
        world.bookkeeper.ledger.bind(
            Agreement(f"x{number}", "stream", "", (("main", f"x{number}"),)), NOW_MS
        )
    figures = await Overview(world.bookkeeper).refresh()

    assert (figures.agreements, figures.states["adopting"]) == (SLICE + 2, SLICE + 1)
