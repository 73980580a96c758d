"""The whole in a few figures: what is owed, paid, at risk and in need of a person.

There is one definition of each figure, here; status, dashboard and metrics all read it. A pass over
100,000 agreements takes longer than an event may wait, so it is made in slices with the loop's
other work in between, and kept for a second. Each agreement's own figures are of one instant,
therefore accrued - released = unsettled holds in the sums too, whatever comes in between two
slices.
"""

from __future__ import annotations

import asyncio
import bisect
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from meterd.bookkeeper import Bookkeeper
from meterd.core import advice
from meterd.core.accounts import Account
from meterd.core.advice import EXHAUSTED
from meterd.core.ledger import Ledger
from meterd.core.money import MICROS
from meterd.core.plans import BASE
from meterd.core.settlement import UNKNOWN_OUTCOME, Escrow, EscrowStatus

SLICE = 500  # Agreements between two breaths of the loop: about a millisecond.
AGE_MAX_S = 1.0
SHARE = 20  # A pass waits for 20 times what the last one took: it costs a twentieth at most.
AGREEMENTS_MAX = 1_000  # With figures of their own, where the configuration asks for them.
LOW = 10  # Less than a tenth of the deposit is left.
ATTENTION_MAX = 20  # Of each kind. Whoever has more has one cause, not twenty.


@dataclass(frozen=True, slots=True)
class Balance:
    """One agreement's money, in micros, as one instant shows it.

    `headroom` is remaining - unsettled, below zero when the payer used more than is left; None: the
    escrow is not adopted, or closed.
    """

    released: int
    unsettled: int
    in_doubt: int
    headroom: int | None
    uncollectible: int


def balance(ledger: Ledger, account: Account) -> Balance:
    """Work out an agreement's money. `released` counts from when meterd adopted the escrow.

    Of several escrows the figures are added up; headroom is that of those which usage draws on.
    """
    escrows = list(ledger.escrows_of(account))
    released = sum(max(escrow.observed, escrow.expected) - escrow.baseline for escrow in escrows)
    unsettled = account.owed - released
    in_doubt = sum(
        escrow.release.amount
        for escrow in escrows
        if escrow.release is not None and escrow.release.status in UNKNOWN_OUTCOME
    )
    if all(escrow.status is EscrowStatus.CLOSED for escrow in escrows):
        return Balance(released, unsettled, in_doubt, None, max(0, unsettled))
    live = [escrow for escrow in escrows if escrow.status is not EscrowStatus.CLOSED]
    if not any(escrow.total for escrow in live):
        return Balance(released, unsettled, in_doubt, None, 0)
    headroom, short = 0, 0
    for role in {escrow.role for escrow in escrows}:
        left = sum(escrow.remaining for escrow in live if escrow.role == role)
        paid = sum(
            max(escrow.observed, escrow.expected) - escrow.baseline
            for escrow in escrows
            if escrow.role == role
        )
        room = left - (account.owed_by(role) - paid)
        short += max(0, -room)
        headroom += 0 if role == BASE else room
    return Balance(released, unsettled, in_doubt, headroom, short)


_LOUDEST = (
    EscrowStatus.FROZEN,
    EscrowStatus.PAUSED,
    EscrowStatus.ADOPTING,
    EscrowStatus.ACTIVE,
    EscrowStatus.CLOSED,
)


def spokesman(ledger: Ledger, account: Account) -> Escrow:
    """Find the escrow whose state is the agreement's: one in doubt, else the worst off.

    Of equals the one that is drawn on now speaks: the first with something left.
    """
    if len(account.agreement.escrows) == 1:
        return ledger.escrows[account.escrow]
    return min(ledger.escrows_of(account), key=_loudness)


def _loudness(escrow: Escrow) -> tuple[bool, int, bool]:
    doubtful = escrow.release is not None and escrow.release.status in UNKNOWN_OUTCOME
    return not doubtful, _LOUDEST.index(escrow.status), not escrow.remaining


def state_word(escrow: Escrow, money: Balance) -> str:
    """Name the state as a person sees it: unsettled above remaining is `exhausted` too."""
    word = escrow.word
    if word == EscrowStatus.ACTIVE.value and money.uncollectible > 0:
        return EXHAUSTED
    return word


@dataclass(frozen=True, slots=True)
class Attention:
    """One agreement that wants a person, and the next command to type."""

    agreement: str
    escrow: str
    state: str  # What `core.advice.trouble` names it.
    reason: str
    next: str
    amount: int  # Micros that it is about: in doubt, landed late, unpaid or uncollectible.


@dataclass(frozen=True, slots=True)
class AgreementFigures:
    """One agreement's part of the figures, in micros unless it says otherwise."""

    agreement: str  # "": all those that are not shown by themselves.
    accrued: Fraction  # Exact USDC.
    settled: int
    unsettled: int
    headroom: int
    in_doubt: int
    uncollectible: int


@dataclass(frozen=True, slots=True)
class Figures:
    """Sums over all agreements, in micros unless they say otherwise."""

    at: int = 0  # Wall ms.
    agreements: int = 0
    accrued: Fraction = Fraction(0)  # Exact USDC.
    released: int = 0
    settled: int = (
        0  # Released by meterd, or accepted as payment: only a person can make it smaller.
    )
    unsettled: int = 0
    headroom: int = 0  # Of those that have some: one payer's credit is no other's.
    in_doubt: int = 0
    uncollectible: int = 0
    difference: int = 0  # What readings and ledger disagree on, where nothing is open.
    releases_in_doubt: int = 0
    releases_escalated: int = 0  # Of those in doubt: they wait for a person.
    lag_ms: int = 0  # Age of the oldest usage that is due and not paid.
    deadline_ms: int | None = None  # Until the nearest one of an escrow with usage to pay.
    low: int = 0  # Active ones with less than a tenth of their deposit left.
    states: dict[str, int] = field(default_factory=dict)
    by_agreement: tuple[AgreementFigures, ...] = ()  # The first ones, and the sum of the others.
    frozen: tuple[Attention, ...] = ()
    doubtful: tuple[Attention, ...] = ()
    exhausted: tuple[Attention, ...] = ()
    paused: tuple[Attention, ...] = ()  # Or not adopted, because the service does not let it.


class _Pass:
    """The sums of one pass, while it is made."""

    def __init__(self, bookkeeper: Bookkeeper, now: int, each_max: int) -> None:
        self._bookkeeper = bookkeeper
        self._each_max = each_max
        self._each: list[AgreementFigures] = []
        self._quantum = bookkeeper.rules.quantum
        self._deadline: int | None = None  # Wall ms.
        self._low = 0
        self._ledger = bookkeeper.ledger
        self._escrows = bookkeeper.ledger.escrows
        self._now = now
        self._mono = bookkeeper.clock.mono()
        self._margin = bookkeeper.margin
        self._numerators: dict[int, int] = {}
        self._count = 0
        self._released = self._settled = self._unsettled = self._headroom = 0
        self._in_doubt = self._uncollectible = self._difference = 0
        self._doubts = self._escalated = self._lag = 0
        self._states: dict[str, int] = {}
        self._attention: dict[str, list[Attention]] = {}

    def add(self, accounts: Sequence[Account]) -> None:
        """Add some agreements: the figures of `balance` and `state_word`, in one tight loop.

        It runs for every agreement every second, so sums are kept in locals and what is rare is
        looked at elsewhere.
        """
        escrows, numerators, states = self._escrows, self._numerators, self._states
        active, closed = EscrowStatus.ACTIVE, EscrowStatus.CLOSED
        released_sum = settled_sum = unsettled_sum = headroom_sum = low_sum = 0
        self._add_each(accounts)
        for account in accounts:
            if len(account.agreement.escrows) > 1:
                self._add_one(account)
                continue
            escrow = escrows[account.agreement.escrows[0][1]]
            numerator, denominator = account.numerator, account.denominator
            numerators[denominator] = numerators.get(denominator, 0) + numerator
            known = escrow.settled + escrow.credited
            released = escrow.observed - escrow.baseline
            difference = released - known
            if difference < 0:
                released = known
            unsettled = numerator * MICROS // denominator - released
            released_sum += released
            settled_sum += known
            unsettled_sum += unsettled
            status = escrow.status
            word = "active"
            if status is not active or escrow.closing or not escrow.remaining:
                word = escrow.word
            if status is closed:
                self._uncollectible += max(0, unsettled)
            elif escrow.total:
                headroom = escrow.remaining - unsettled
                if headroom >= 0:
                    headroom_sum += headroom
                    low_sum += word == "active" and headroom * LOW < escrow.total
                else:
                    self._uncollectible -= headroom
                    word = EXHAUSTED if word == "active" else word
            states[word] = states.get(word, 0) + 1
            if unsettled > 0 and account.unsettled_since:
                self._look_at_age(account, escrow, unsettled)
            if difference or escrow.release is not None or word in _ATTENTION:
                self._look_at_trouble(account, escrow, word, unsettled)
        self._count += len(accounts)
        self._released += released_sum
        self._settled += settled_sum
        self._unsettled += unsettled_sum
        self._headroom += headroom_sum
        self._low += low_sum

    def _add_one(self, account: Account) -> None:
        """Add an agreement with several escrows: there are few of these."""
        money = balance(self._ledger, account)
        denominator = account.denominator
        self._numerators[denominator] = self._numerators.get(denominator, 0) + account.numerator
        self._released += money.released
        self._unsettled += money.unsettled
        self._headroom += max(0, money.headroom or 0)
        self._uncollectible += money.uncollectible
        speaker = spokesman(self._ledger, account)
        word = state_word(speaker, money)
        self._states[word] = self._states.get(word, 0) + 1
        deposit = max(escrow.total for escrow in self._ledger.escrows_of(account))
        self._low += word == "active" and (money.headroom or 0) * LOW < deposit
        for escrow in self._ledger.escrows_of(account):
            self._settled += escrow.settled + escrow.credited
            unsettled = escrow.unsettled(self._ledger.owed_on(account, escrow))
            if unsettled > 0 and account.unsettled_since:
                self._look_at_age(account, escrow, unsettled)
            own = word if escrow is speaker else escrow.word
            if (
                escrow.observed != escrow.expected
                or escrow.release is not None
                or (own in _ATTENTION and (escrow is speaker or own == EscrowStatus.FROZEN.value))
            ):
                self._look_at_trouble(account, escrow, own, unsettled)

    def _add_each(self, accounts: Sequence[Account]) -> None:
        """Note the figures of single agreements, as far as these are shown; mostly none is."""
        for account in accounts[: self._each_max - len(self._each)]:
            money = balance(self._ledger, account)
            escrows = self._ledger.escrows_of(account)
            self._each.append(
                AgreementFigures(
                    account.agreement.id,
                    account.accrued,
                    sum(escrow.settled + escrow.credited for escrow in escrows),
                    money.unsettled,
                    max(0, money.headroom or 0),
                    money.in_doubt,
                    money.uncollectible,
                )
            )

    def _others(self, accrued: Fraction) -> tuple[AgreementFigures, ...]:
        """Sum up the agreements that are not shown by themselves."""
        shown = self._each
        if not shown or len(shown) == self._count:
            return ()
        rest = AgreementFigures(
            "",
            accrued - sum((one.accrued for one in shown), Fraction(0)),
            self._settled - sum(one.settled for one in shown),
            self._unsettled - sum(one.unsettled for one in shown),
            self._headroom - sum(one.headroom for one in shown),
            self._in_doubt - sum(one.in_doubt for one in shown),
            self._uncollectible - sum(one.uncollectible for one in shown),
        )
        return (rest,)

    def _may_be_due(self, account: Account, escrow: Escrow, unsettled: int, age: int) -> bool:
        """Rule out quickly what no threshold can ask for yet; `Bookkeeper.due` says the rest."""
        settle = account.plan.settle
        return (
            (settle.amount is not None and unsettled >= settle.amount)
            or settle.exposure_max is not None
            or (settle.interval is not None and age >= settle.interval)
            or (settle.units is not None and account.units - escrow.units_settled >= settle.units)
            or (
                settle.escrow_percent is not None
                and unsettled * 100 >= escrow.total * settle.escrow_percent
            )
            or (
                escrow.deadline is not None
                and escrow.deadline <= self._now + settle.before_deadline + self._margin
            )
            or unsettled >= escrow.remaining
            or escrow.closing
        )

    def _look_at_age(self, account: Account, escrow: Escrow, unsettled: int) -> None:
        """Usage is late when a threshold asks for it; frozen escrows are counted apart."""
        deadline = escrow.deadline
        if deadline is not None and (self._deadline is None or deadline < self._deadline):
            closed = escrow.status is EscrowStatus.CLOSED
            if not closed and min(unsettled, escrow.remaining) >= self._quantum:
                self._deadline = deadline
        age = self._now - account.unsettled_since
        if age <= self._lag or escrow.status in _NEVER_LATE:
            return
        if self._may_be_due(account, escrow, unsettled, age) and self._bookkeeper.due(escrow.id):
            self._lag = age

    def _look_at_trouble(self, account: Account, escrow: Escrow, word: str, unsettled: int) -> None:
        agreement, release = account.agreement.id, escrow.release
        if release is None and escrow.total and escrow.status is not EscrowStatus.CLOSED:
            self._difference += abs(escrow.observed - escrow.expected)
        kind = advice.trouble(escrow, word)
        command = advice.next_command(agreement, escrow, word, account.plan.name)

        def attention(reason: str, amount: int) -> Attention:
            return Attention(agreement, escrow.id, kind, reason, command, amount)

        if release is not None and release.status in UNKNOWN_OUTCOME:
            self._doubts += 1
            self._escalated += kind == advice.ESCALATED
            self._in_doubt += release.amount
            reason = advice.doubt(escrow, self._bookkeeper.rules, self._mono)
            self._note("in_doubt", attention(reason, release.amount))
        if word == advice.FROZEN:
            self._note(word, attention(escrow.reason, advice.late(escrow) or max(0, unsettled)))
        elif word == EXHAUSTED:
            money = balance(self._ledger, account)
            reason = "more is used than is left" if money.uncollectible else "nothing is left"
            self._note(word, attention(reason, money.uncollectible))
        elif kind in (advice.PAUSED, advice.ADOPTING):
            self._note(advice.PAUSED, attention(escrow.reason, max(0, unsettled)))

    def _note(self, kind: str, attention: Attention) -> None:
        noted = self._attention.setdefault(kind, [])
        if len(noted) < ATTENTION_MAX:
            noted.append(attention)

    def figures(self) -> Figures:
        """Close the sums."""
        accrued = sum(
            (
                Fraction(numerator, denominator)
                for denominator, numerator in self._numerators.items()
            ),
            Fraction(0),
        )
        return Figures(
            at=self._now,
            agreements=self._count,
            accrued=accrued,
            released=self._released,
            settled=self._settled,
            unsettled=self._unsettled,
            headroom=self._headroom,
            in_doubt=self._in_doubt,
            uncollectible=self._uncollectible,
            difference=self._difference,
            releases_in_doubt=self._doubts,
            releases_escalated=self._escalated,
            lag_ms=self._lag,
            deadline_ms=None if self._deadline is None else max(0, self._deadline - self._now),
            low=self._low,
            by_agreement=(*self._each, *self._others(accrued)),
            states=self._states,
            frozen=tuple(self._attention.get(EscrowStatus.FROZEN.value, ())),
            doubtful=tuple(self._attention.get("in_doubt", ())),
            exhausted=tuple(self._attention.get(EXHAUSTED, ())),
            paused=tuple(self._attention.get(advice.PAUSED, ())),
        )


_NEVER_LATE = frozenset({EscrowStatus.FROZEN, EscrowStatus.CLOSED})
_ATTENTION = frozenset({advice.FROZEN, advice.PAUSED, advice.ADOPTING, EXHAUSTED})


class Overview:
    """Keeps the figures for a second, and the agreements' ids in order for paging."""

    def __init__(self, bookkeeper: Bookkeeper, *, per_agreement: bool = False) -> None:
        self._bookkeeper = bookkeeper
        self._each_max = AGREEMENTS_MAX if per_agreement else 0
        self._figures = Figures()
        self._made_mono: float | None = None
        self._cost_s = 0.0
        self._one_at_a_time = asyncio.Lock()
        self._ids: list[str] = []

    def latest(self) -> Figures:
        """Hand out the figures of the last pass."""
        return self._figures

    async def refresh(self) -> Figures:
        """Make the figures anew unless they are fresh; all who come meanwhile share one pass."""
        async with self._one_at_a_time:
            mono = self._bookkeeper.clock.mono()
            age_max = max(AGE_MAX_S, self._cost_s * SHARE)
            if self._made_mono is None or mono - self._made_mono >= age_max:
                self._figures = await self._pass()
                self._made_mono = mono
            return self._figures

    async def _pass(self) -> Figures:
        sums = _Pass(self._bookkeeper, self._bookkeeper.clock.wall(), self._each_max)
        accounts = list(self._bookkeeper.ledger.accounts.values())
        self._cost_s = 0.0
        for start in range(0, len(accounts), SLICE):
            began = time.perf_counter()
            sums.add(accounts[start : start + SLICE])
            self._cost_s += time.perf_counter() - began
            await asyncio.sleep(0)
        return sums.figures()

    def ids_after(self, cursor: str) -> Sequence[str]:
        """List the agreements' ids behind `cursor`, in order.

        Agreements are never taken away, only added.
        """
        accounts = self._bookkeeper.ledger.accounts
        if len(self._ids) != len(accounts):
            self._ids = sorted(accounts)
        return self._ids[bisect.bisect_right(self._ids, cursor) :]
