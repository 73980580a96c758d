from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from meterd.api import Overview, overview
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


async def test_the_nearest_deadline_is_that_of_an_escrow_with_usage_to_pay(world):
    """Whoever owes nothing has none, however near it is."""
    world.clock.advance(5)
    reading = reading_of("esc_1", total=10**7, mono=world.clock.mono())
    reading = replace(reading, deadline=NOW_MS + 60_000)
    await world.bookkeeper.step("esc_1", Observed(reading, world.clock.mono(), NOW_MS, 0))
    idle = await world.overview.refresh()
    await world.post("/v1/events", {"id": "a", "quantity": 10, **USAGE})
    world.clock.advance(2)
    owing = await world.overview.refresh()
    world.clock.advance(100)
    passed = await world.overview.refresh()

    assert idle.deadline_ms is None
    assert owing.deadline_ms == NOW_MS + 60_000 - owing.at > 0
    assert passed.deadline_ms == 0


async def test_a_deposit_is_low_from_a_tenth_on_until_it_is_used_up(make_world):
    """Then it is exhausted, and counted as that."""
    world = await make_world()
    await world.bind("agr", total=2_000)
    found = []
    for number, quantity in enumerate((900, 1, 99), 1):
        event = {"escrow_id": "agr", "meter": "tokens", "quantity": quantity}
        await world.post("/v1/events", {"id": f"e{number}", **event})
        world.clock.advance(2)
        found.append((await Overview(world.bookkeeper).refresh()).low)
    usage = {"escrow_id": "agr", "meter": "tokens", "quantity": 1}
    await world.post("/v1/events", {"id": "e9", **usage})
    beyond = await Overview(world.bookkeeper).refresh()

    assert found == [0, 1, 1]
    assert (beyond.low, beyond.states.get("exhausted")) == (0, 1)


async def test_agreements_have_figures_of_their_own_where_asked_for(make_world, monkeypatch):
    """The first ones; what the others have is in one, and all of them make the sums."""
    monkeypatch.setattr(overview, "AGREEMENTS_MAX", 4)
    world = await make_world()
    await many(world, 6)
    plain = await Overview(world.bookkeeper).refresh()
    figures = await Overview(world.bookkeeper, per_agreement=True).refresh()
    each = figures.by_agreement

    assert plain.by_agreement == ()
    assert len(each) == 5
    assert [one.agreement for one in each][-1] == ""
    for name in ("accrued", "settled", "unsettled", "headroom", "in_doubt", "uncollectible"):
        assert sum(getattr(one, name) for one in each) == getattr(figures, name)
        assert getattr(figures, name) == getattr(plain, name)
