from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace

import pytest

from meterd.bookkeeper import Bookkeeper
from meterd.core.accounts import Agreement
from meterd.core.events import EventDecoder
from meterd.core.ledger import Ledger
from meterd.core.openings import Census, Found, Locked, Opening, OpeningStatus, Wish
from meterd.core.plans import Pattern, Plan
from meterd.core.pricing import PERIOD_METER, Rate, RateCard
from meterd.core.settlement import Answer, AnswerKind, EscrowStatus, Rules
from meterd.errors import NotFound, Refused, Unavailable
from meterd.opener import Opener, Terms
from tests.fakes import METERS, WINDOW_MS, FakeClock, FakeIdentities, FakeStore, NoFacts, adopt

QUARANTINE, GAP = 60.0, 1.0
DAY = 86_400_000
HELD = (("main", 10_000_000),)
CARD = RateCard((Rate("calls", 10**9),))
FEE = Rate(PERIOD_METER, 5 * 10**12)
PLANS = {
    plan.name: plan
    for plan in (
        Plan("stream", Pattern.STREAMING, CARD, deposits=HELD, memo="s:1", renew=True),
        Plan("plain", Pattern.STREAMING, CARD, deposits=HELD),
        Plan("free", Pattern.PAY_PER_TOKEN, CARD),
        Plan("call", Pattern.PAY_PER_CALL, RateCard((Rate("calls", 10**9, role="wallet"),))),
        Plan("odd", Pattern.STREAMING, CARD, deposits=HELD, memo="two  blanks"),
        Plan(
            "mixed",
            Pattern.HYBRID,
            RateCard(
                (
                    Rate(PERIOD_METER, 5 * 10**12, role="base"),
                    Rate("calls", 10**9, role="overage"),
                )
            ),
            period=DAY,
            deposits=(("base", 5_000_000), ("overage", 2_000_000)),
        ),
        Plan(
            "daily",
            Pattern.SUBSCRIPTION,
            RateCard((FEE,)),
            period=DAY,
            deposits=(("main", 5_000_000),),
            auto_release_hours=24,
            renew=True,
        ),
    )
}
TERMS = Terms("me", payer_key=True, discover_interval=30.0)


class Refusal:
    """A list that gave nothing."""

    kind = "unavailable"
    detail = "503"


class FakeLocks:
    """A service that locks, refuses, or loses requests and answers, as it is told."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.sent: list[Opening] = []
        self.escrows: list[Found] = []
        self.answers: list[Callable[[Opening], Locked | Answer]] = []
        self.lists = 0
        self.census: Census | Refusal | None = None
        self.waits: asyncio.Event | None = None
        self.asked: list[str] = []

    def lock_now(self, opening: Opening) -> Locked:
        escrow = f"esc_{len(self.escrows) + 1}"
        found = Found(escrow, opening.memo, "ann", opening.provider, opening.amount, live=True)
        self.escrows.append(found)
        return Locked(escrow, "ann")

    def lose_answer(self, opening: Opening) -> Answer:
        self.lock_now(opening)
        return Answer(AnswerKind.DOUBT, "no answer")

    async def lock(self, opening: Opening) -> Locked | Answer:
        self.sent.append(opening)
        if self.waits is not None:
            await self.waits.wait()
        answer = self.answers.pop(0) if self.answers else self.lock_now
        return answer(opening)

    async def list_escrows(self, agent_id: str) -> Census | Refusal:
        self.lists += 1
        self.asked.append(agent_id)
        if not agent_id.isascii():
            raise ValueError("no agent")
        return self.census or Census(tuple(self.escrows), whole=True)


def lose_request(_: Opening) -> Answer:
    return Answer(AnswerKind.DOUBT, "no answer")


def refuse(_: Opening) -> Answer:
    return Answer(AnswerKind.EMPTY, "402 the wallet is empty", retry_after=100.0)


def break_off(_: Opening) -> Answer:
    raise ValueError("no memo")


class Stage:
    """An opener on a real bookkeeper."""

    def __init__(self, terms: Terms = TERMS, **found: object) -> None:
        self.clock, self.store = FakeClock(), FakeStore()
        self.started = False
        self.ledger = Ledger(PLANS, METERS)
        self.bookkeeper = Bookkeeper(
            self.ledger,
            self.store,
            FakeIdentities(),
            Rules(observe_gap=GAP, quarantine=QUARANTINE),
            self.clock,
            NoFacts(),
            decoder=EventDecoder(sentinel=7_777_777_777_777),
            window_ms=WINDOW_MS,
            positions={},
            dead_letters=0,
            dead_letter_next=1,
        )
        self.service = FakeLocks(self.clock)
        self.opener = Opener(self.bookkeeper, self.service, terms, **found)

    async def open(self, plan: str = "plain", name: str = "a", **fields: object) -> str:
        return await self.opener.open(Wish(plan, name, **fields), "tester")

    async def turn(self, seconds: int = 0) -> None:
        """Let time pass, and the loop come round once."""
        self.clock.advance(seconds)
        if self.started:
            self.opener._restart = _nothing  # type: ignore[method-assign]
        self.started = True
        task = asyncio.create_task(self.opener.run())
        for _ in range(20):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    def escrows(self, name: str = "a") -> tuple[tuple[str, str], ...]:
        account = self.ledger.accounts.get(name)
        return account.agreement.escrows if account is not None else ()

    @property
    def journalled(self) -> list[str]:
        return [entry.action for entry in self.store.entries]


async def test_an_opening_is_durable_before_it_is_sent():
    """Intend, then lock: while the commit is under way nothing leaves."""
    stage = Stage()
    stage.store.hold()
    opening = asyncio.create_task(stage.open())
    await asyncio.sleep(0)
    waiting = list(stage.service.sent)
    stage.store.let_go()
    await opening

    assert ([], 1) == (waiting, len(stage.service.sent))
    assert (("main", "esc_1"),) == stage.escrows()
    assert ["escrow_opening", "escrow_locked", "agreement_bound"] == stage.journalled


async def test_two_that_ask_at_once_lock_once():
    """Who comes second is told of the opening that is under way."""
    stage = Stage()
    stage.service.waits = asyncio.Event()
    first = asyncio.create_task(stage.open())
    await asyncio.sleep(0)
    second = await stage.open()
    (under_way,) = stage.opener.unfinished
    stage.service.waits.set()
    await first
    await stage.open()

    assert ("a", OpeningStatus.INTENDED, 1) == (second, under_way.status, len(stage.service.sent))
    assert ([], 1) == (stage.opener.unfinished, len(stage.service.sent))


async def test_an_agreement_without_an_id_is_given_one():
    """Each such call opens another one."""
    stage = Stage()
    names = [await stage.open(name="") for _ in range(2)]

    assert all(name.startswith("agr_") for name in names)
    assert names[0] != names[1]


@pytest.mark.parametrize(
    ("terms", "wish", "says"),
    [
        (TERMS, Wish("gold"), "there is no plan 'gold'"),
        (TERMS, Wish("call"), "draws on a wallet, which is not locked"),
        (TERMS, Wish("free"), "write plans.free.deposit"),
        (TERMS, Wish("odd"), "shorten plans.odd.memo"),
        (TERMS, Wish("plain", provider="you"), "the provider is escrow.agent_id, me"),
        (Terms(), Wish("plain", payer="ann"), "write escrow.agent_id, or name the provider"),
        (Terms("me"), Wish("plain"), "escrow.payer_api_key is not set"),
        (TERMS, Wish("plain", "esc_9"), "esc_9 is an escrow of agreement known"),
        (TERMS, Wish("stream", "known"), "agreement known is under plan plain"),
        (TERMS, Wish("plain", "shut", next=True), "agreement shut is closed"),
    ],
)
async def test_what_cannot_be_opened_says_what_to_write(terms, wish, says):
    """Nothing is intended, and nothing sent."""
    stage = Stage(terms)
    await stage.bookkeeper.bind(Agreement("known", "plain", "ann", (("main", "esc_9"),)), "t")
    await stage.bookkeeper.bind(Agreement("shut", "plain", "ann", (("main", "esc_8"),)), "t")
    await stage.bookkeeper.close(stage.ledger.accounts["shut"], "t")
    with pytest.raises(Refused) as caught:
        await stage.opener.open(wish, "tester")

    assert says in str(caught.value)
    assert ([], []) == (stage.service.sent, stage.opener.unfinished)


async def test_the_next_escrow_of_nobody_is_not_locked():
    """An unknown agreement has none; on a full disk nobody has."""
    stage = Stage()
    with pytest.raises(NotFound):
        await stage.open(next=True)
    stage.store.writable = False
    with pytest.raises(Unavailable):
        await stage.open()

    assert [] == stage.service.sent


async def test_a_deposit_that_is_asked_for_is_that_of_usage():
    """The fee's escrow keeps its own amount."""
    stage = Stage()
    await stage.open("mixed", deposit=7_000_000)
    await stage.open("free", "b", deposit=3_000_000)

    assert [("base", 5_000_000), ("overage", 7_000_000), ("main", 3_000_000)] == [
        (row.role, row.amount) for row in stage.service.sent
    ]


async def test_a_refusal_is_told_and_the_rest_is_kept_for_the_next_try():
    """Base is locked, overage refused: asked again, only the overage is locked."""
    stage = Stage()
    stage.service.answers = [stage.service.lock_now, refuse]
    with pytest.raises(Refused) as caught:
        await stage.open("mixed")
    with pytest.raises(Refused, match="being opened under plan mixed"):
        await stage.open("plain")
    before = stage.escrows()
    await stage.open("mixed")

    assert "402 the wallet is empty; base (esc_1) is locked and waits" in str(caught.value)
    assert ((), (("base", "esc_1"), ("overage", "esc_2"))) == (before, stage.escrows())


async def test_behind_a_refused_escrow_nothing_is_sent():
    """One escrow of two helps nobody; what never left is failed, not in doubt."""
    stage = Stage()
    stage.service.answers = [break_off]
    with pytest.raises(Refused, match="nothing was sent: no memo"):
        await stage.open("mixed")

    assert (1, []) == (len(stage.service.sent), stage.opener.unfinished)
    assert ["escrow_opening", "opening_failed", "opening_failed"] == stage.journalled


async def test_a_lost_answer_is_found_in_the_list():
    """The escrow is there: it is bound, and nothing is sent again."""
    stage = Stage()
    stage.service.answers = [stage.service.lose_answer]
    await stage.open()
    before = stage.escrows()
    await stage.turn()

    assert ((), (("main", "esc_1"),)) == (before, stage.escrows())
    assert (1, ["me"]) == (len(stage.service.sent), stage.service.asked)


async def test_a_lost_request_is_given_up_by_two_whole_lists_behind_two_quarantines():
    """Not before, and not by lists that are broken or cut."""
    stage = Stage()
    stage.service.answers = [lose_request]
    await stage.open()
    await stage.turn(10)  # A doubt begins anew when the loop does.
    await stage.turn(100)
    early = stage.opener.unfinished[0].sightings
    stage.service.census = Census((), whole=False)
    await stage.turn(100)
    stage.service.census = Refusal()
    await stage.turn(10)
    cut = stage.opener.unfinished[0].sightings
    stage.service.census = None
    await stage.turn(10)
    await stage.turn(10)

    assert (0, 0) == (early, cut)
    assert [OpeningStatus.ABSENT] == [row.status for row in stage.opener.unfinished]
    assert 1 == len(stage.service.sent)


async def _nothing() -> None:
    """The loop goes on: it was not started anew."""


async def test_an_absent_opening_is_opened_again_by_its_asker_and_bound_if_it_lands_late():
    """Both escrows are drawn on: neither is hidden."""
    stage = Stage()
    row = await absent(stage)
    await stage.open()
    stage.service.lock_now(row)
    await stage.turn(31)

    assert (("main", "esc_1"), ("main", "esc_2")) == stage.escrows()
    assert [] == stage.opener.unfinished


async def absent(stage: Stage, plan: str = "plain") -> Opening:
    """Leave an opening that was given up."""
    stage.service.answers = [lose_request]
    await stage.open(plan)
    (row,) = stage.opener.unfinished
    given_up = replace(row, status=OpeningStatus.ABSENT)
    stage.opener._openings[row.id] = given_up
    return given_up


async def test_a_request_that_the_network_doubled_is_bound_once_and_said():
    """The older escrow is drawn on; of the other one a person is told."""
    stage = Stage()
    stage.service.answers = [stage.service.lose_answer]
    await stage.open()
    first = stage.service.escrows[0]
    stage.service.escrows.insert(0, replace(first, escrow="esc_0", created_at=-1))
    await stage.turn()

    assert (("main", "esc_0"),) == stage.escrows()


async def test_what_the_store_held_goes_on_after_a_restart():
    """Intended: in doubt, and found. Locked: bound at once. Nothing is sent."""
    before = Stage()
    before.service.answers = [before.service.lose_answer]
    await before.open()
    (row,) = before.opener.unfinished
    intended = replace(row, status=OpeningStatus.INTENDED)
    locked = replace(row, id="k", agreement="b", status=OpeningStatus.LOCKED, escrow="esc_7")
    after = Stage(unbound=[intended, locked])
    after.service.escrows = before.service.escrows
    await after.turn()

    assert (("main", "esc_1"),) == after.escrows()
    assert (("main", "esc_7"),) == after.escrows("b")
    assert ([], []) == (after.service.sent, after.opener.unfinished)


async def test_a_locked_escrow_that_cannot_be_bound_waits_for_a_person():
    """Its agreement closed meanwhile: the money is where it is, and somebody is told once."""
    stage = Stage()
    await stage.open()
    stage.service.waits = asyncio.Event()
    coming = asyncio.create_task(stage.open(next=True))
    await asyncio.sleep(0)
    await stage.bookkeeper.close(stage.ledger.accounts["a"], "tester")
    stage.service.waits.set()
    await coming
    await stage.turn()

    assert [OpeningStatus.LOCKED] == [row.status for row in stage.opener.unfinished]
    assert (("main", "esc_1"),) == stage.escrows()


async def test_the_payers_own_daemon_looks_in_the_payers_list():
    """Without a payer's key the daemon's key is the payer's; an agent that is none is said."""
    stage = Stage(Terms())
    stage.service.answers = [lose_request, lose_request]
    await stage.open(payer="ann", provider="me")
    await stage.open(name="b", payer="ännchen", provider="me")
    await stage.turn()

    assert ["ann", "ännchen"] == stage.service.asked


async def test_escrows_that_the_list_shows_are_bound_and_those_in_doubt_are_left_alone():
    """A new one begins an agreement, one of ours that is under way is no find."""
    stage = Stage(replace(TERMS, patterns=(("s:*", "stream"), ("p", "plain"))))
    await stage.turn()
    stage.service.waits = asyncio.Event()
    coming = asyncio.create_task(stage.open("stream"))
    await asyncio.sleep(0)
    memo = stage.service.sent[0].memo
    lost = Found("esc_x", memo, "bob", "me", 10_000_000, live=True)
    stage.service.escrows = [
        lost,
        replace(lost, escrow="esc_y", memo="s:2"),
        replace(lost, escrow="esc_z", memo="p agreement=esc_y"),
        replace(lost, escrow="esc_p", memo="p", creator="", created_at=1),
    ]
    await stage.turn(31)
    bound = set(stage.ledger.accounts)
    coming.cancel()

    assert {"esc_y", "esc_p"} == bound


async def test_a_found_escrow_that_cannot_be_bound_is_told_once():
    """Its plan has gone since the configuration was read."""
    stage = Stage(replace(TERMS, patterns=(("s:*", "gone"),)))
    stage.service.escrows = [Found("esc_y", "s:2", "bob", "me", 10, live=True)]
    await stage.turn()
    await stage.turn(31)

    assert ({}, {"esc_y"}) == (stage.ledger.accounts, stage.opener._warned)


async def running_low(stage: Stage) -> None:
    """A stream of 10 USDC of which 9 are used."""
    await stage.open("stream")
    await adopt(stage.bookkeeper, stage.clock, "esc_1")
    account = stage.ledger.accounts["a"]
    account.numerator = 9 * account.denominator


async def test_a_stream_that_runs_low_is_given_its_next_escrow_once():
    """One that is locked and not read yet is enough."""
    stage = Stage()
    await running_low(stage)
    for _ in range(3):
        await stage.turn(5)

    assert (("main", "esc_1"), ("main", "esc_2")) == stage.escrows()
    assert "rollover" == stage.service.sent[-1].why


async def test_only_what_meterd_has_opened_is_renewed_and_only_with_the_payers_key():
    """Somebody else's agreement is not paid for with this payer's money."""
    own_key = Stage(Terms("me"))
    await own_key.open("stream", payer="ann")
    bound = Stage()
    await bound.bookkeeper.bind(Agreement("a", "stream", "ann", (("main", "esc_1"),)), "t")
    for stage in (own_key, bound):
        await adopt(stage.bookkeeper, stage.clock, "esc_1")
        stage.ledger.accounts["a"].numerator = 9 * stage.ledger.accounts["a"].denominator
        await stage.turn(5)

        assert (("main", "esc_1"),) == stage.escrows()


async def test_a_refused_renewal_is_tried_again_later_and_later():
    """As long as the service asked for, at least; and it is locked once when it may."""
    stage = Stage()
    await running_low(stage)
    stage.service.answers = [refuse, refuse]
    sent = []
    for seconds in (5, 60, 60, 10, 110):
        await stage.turn(seconds)
        sent.append(len(stage.service.sent) - 1)

    assert [1, 1, 2, 2, 3] == sent
    assert (("main", "esc_1"), ("main", "esc_2")) == stage.escrows()


async def test_a_renewal_that_was_given_up_waits_for_a_person():
    """No second one is sent by itself; `next` opens it again, and renewals go on."""
    stage = Stage()
    await running_low(stage)
    stage.service.answers = [lose_request]
    await stage.turn(5)
    (row,) = stage.opener.unfinished
    stage.opener._openings[row.id] = replace(row, status=OpeningStatus.ABSENT)
    await stage.turn(5)
    waiting = len(stage.service.sent)
    awaited = set(stage.ledger.awaited)
    await stage.open("stream", next=True)
    await stage.turn(5)

    assert (2, set(), {"a"}) == (waiting, awaited, stage.ledger.awaited)
    assert (("main", "esc_1"), ("main", "esc_2")) == stage.escrows()


async def test_a_period_waits_for_the_escrow_that_meterd_locks_and_lapses_without():
    """The wall clock jumps over two periods: each is billed once, in its turn, and stays so."""
    stage = Stage()
    await stage.open("daily")
    await adopt(stage.bookkeeper, stage.clock, "esc_1", total=5_000_000)
    account = stage.ledger.accounts["a"]
    stage.clock.wall_ms += 2 * DAY
    await stage.bookkeeper.end_periods()
    first = (account.period, account.owed)
    await stage.turn(5)
    await stage.bookkeeper.end_periods()
    unread = (account.period, account.owed)
    await adopt(stage.bookkeeper, stage.clock, "esc_2", total=5_000_000)
    await stage.bookkeeper.end_periods()
    second = (account.period, account.owed)
    stage.clock.wall_ms -= 3 * DAY
    await stage.bookkeeper.end_periods()

    assert [(1, 5_000_000), (1, 5_000_000), (2, 10_000_000)] == [first, unread, second]
    assert (2, 10_000_000, False) == (account.period, account.owed, account.closing)


async def test_a_period_that_nobody_will_pay_for_lapses():
    """Three refusals in a row: the agreement ends instead of owing what nobody has locked."""
    stage = Stage()
    await stage.open("daily")
    await adopt(stage.bookkeeper, stage.clock, "esc_1", total=5_000_000)
    account = stage.ledger.accounts["a"]
    stage.service.answers = [refuse] * 4
    stage.clock.wall_ms += DAY
    await stage.bookkeeper.end_periods()
    stage.clock.wall_ms += DAY
    await stage.bookkeeper.end_periods()
    waiting = account.closing
    for _ in range(4):
        await stage.turn(130)
    await stage.bookkeeper.end_periods()

    assert (False, True, 1) == (waiting, account.closing, account.period)
    assert EscrowStatus.ACTIVE is stage.ledger.escrows["esc_1"].status
