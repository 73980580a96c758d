"""Past usage under other plans and thresholds: what would have been owed, called and paid.

The rule kept here: nothing is reckoned a second way. What is owed comes from the ledger, what is
due from the thresholds, what may be asked for from the escrow; only the service is made up. It has
one escrow for each role, grants every call, and the money is there a constant time after the call
was decided on. So there are no doubts, no outages and no deadlines in here, and an escrow is
exhausted only where the deposit is given.

It goes in two steps, since many thresholds are tried on one plan: `price` says what each agreement
owed from moment to moment, and `settle` pays that under thresholds. All numbers are integers:
micros, nanos of units, and ms.
"""

from __future__ import annotations

import collections
import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise

from meterd.core.accounts import Account, Agreement
from meterd.core.events import Reason, UsageEvent
from meterd.core.ledger import Ledger
from meterd.core.meters import Meter
from meterd.core.plans import Plan, Settle
from meterd.core.settlement import Escrow, EscrowStatus
from meterd.core.thresholds import Bursts, Standing, due, next_look

# Enough for any history, where nobody names a deposit: a billion USDC.
ENDLESS = 10**15
BPS = 10_000  # Hundredths of a percent.
EVENTS_AT_ONCE = 1000  # Between two reports of the progress.

# -- What was owed -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Past:
    """One usage event with its time, wall ms."""

    at: int
    event: UsageEvent


@dataclass(frozen=True, slots=True)
class Step:
    """What an agreement owed from a moment on, by role; `usage`: no fee and no minimum did it."""

    at: int
    owed: tuple[int, ...]
    units: int
    closing: bool
    usage: bool


@dataclass(frozen=True, slots=True)
class Curve:
    """What one agreement owed under one plan, from its first usage to its end."""

    agreement: str
    plan: Plan
    roles: tuple[str, ...]
    total: int  # What each of its escrows holds.
    steps: list[Step]


@dataclass(slots=True)
class Priced:
    """What all agreements owed; and how many events had no price, by the reason."""

    curves: list[Curve] = field(default_factory=list)
    events: int = 0
    rejected: dict[Reason, int] = field(default_factory=dict)
    example: str = ""  # Why the first of them was rejected.


def price(
    plans: Mapping[str, Plan],
    meters: Mapping[str, Meter],
    chosen: Mapping[str, str],
    past: Sequence[Past],
    deposit: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Priced:
    """Bring usage into a ledger of its own, in the order of its time.

    `chosen`: each agreement's plan. Events of other agreements are rejected, as the daemon would.
    Each identity must be there once. `progress` is told how many events were done.
    """
    pricing = _Pricing(plans, meters, chosen, past, ENDLESS if deposit is None else deposit)
    done = 0
    for at, group in groupby(past, key=_moment):
        batch = [item.event for item in group]
        pricing.take(batch, at)
        done += len(batch)
        if done >= EVENTS_AT_ONCE:
            progress(done)
            done = 0
    progress(done)
    return pricing.ended(past[-1].at if past else 0)


def _moment(item: Past) -> int:
    return item.at


def _full(escrow: Escrow, total: int) -> Escrow:
    """An escrow as the service would show it before the first release."""
    return replace(escrow, status=EscrowStatus.ACTIVE, total=total, remaining=total)


class _Pricing:
    """A ledger with the curves that it draws."""

    def __init__(
        self,
        plans: Mapping[str, Plan],
        meters: Mapping[str, Meter],
        chosen: Mapping[str, str],
        past: Iterable[Past],
        total: int,
    ) -> None:
        self._ledger = Ledger(plans, meters)
        self._found = Priced()
        self._curves: dict[Account, Curve] = {}
        opened: dict[str, int] = {}
        for item in past:
            opened.setdefault(item.event.agreement, item.at)
        for name in sorted(chosen.keys() & opened.keys()):
            self._open(name, plans[chosen[name]], opened[name], total)

    def _open(self, name: str, plan: Plan, at: int, total: int) -> None:
        escrows = tuple((role, f"{name}\n{role}") for role in plan.roles)
        ledger = self._ledger
        ledger.bind(Agreement(name, plan.name, name, escrows), at)
        for _, escrow in escrows:
            ledger.put(_full(ledger.escrows[escrow], total))
        self._curves[ledger.accounts[name]] = Curve(name, plan, plan.roles, total, [])

    def take(self, batch: Sequence[UsageEvent], at: int) -> None:
        """Take the events of one moment."""
        self._end_periods(at)
        ledger, found = self._ledger, self._found
        resolved = ledger.resolve(batch, None, "simulation", 0, at)
        count = len(resolved.events)
        digests = [str(place).encode() for place in range(count)]  # Each identity came once.
        entry = ledger.decide(resolved, digests, [0] * count, [-1] * count)
        found.events += entry.accepted
        for rejection in entry.rejections:
            found.rejected[rejection.reason] = found.rejected.get(rejection.reason, 0) + 1
            found.example = found.example or rejection.detail
        self._draw(ledger.apply(entry, at).accounts, at, usage=True)

    def _end_periods(self, at: int) -> None:
        while (ends := self._ledger.next_period_end) is not None and ends <= at:
            touched, _ = self._ledger.end_periods(ends, 0)
            self._draw(touched.accounts, ends, usage=False)

    def _draw(self, accounts: Iterable[Account], at: int, *, usage: bool) -> None:
        ledger = self._ledger
        for account in accounts:
            if len(account.agreement.escrows) == 1:
                owed: tuple[int, ...] = (account.owed,)
            else:
                escrows = ledger.escrows_of(account)
                owed = tuple(ledger.owed_on(account, escrow) for escrow in escrows)
            step = Step(at, owed, account.units, account.closing, usage)
            self._curves[account].steps.append(step)

    def ended(self, at: int) -> Priced:
        """Close all agreements at one moment, so that every variant pays to the last micro."""
        self._end_periods(at)
        for account in self._curves:
            self._ledger.close(account)
        self._draw(self._curves, at, usage=False)
        self._found.curves = list(self._curves.values())
        return self._found


# -- What was paid -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Service:
    """The escrow service, made up: the pace of calls, and when the money is there."""

    pace: int = 2_000
    latency: int = 1_000
    release_max: int = 1_000_000_000
    quantum: int = 1
    wallet_minimum: int = 1


@dataclass(frozen=True, slots=True)
class Paid:
    """One release: decided on at a moment, and why."""

    agreement: str
    at: int
    amount: int
    why: str


@dataclass(slots=True)
class Life:
    """What became of one agreement. `points`: the exposure from a moment on, micros.

    `waits`: how long an amount waited from its usage to its payment, (ms, micros).
    """

    agreement: str
    paid: list[Paid] = field(default_factory=list)
    points: list[tuple[int, int]] = field(default_factory=list)
    waits: list[tuple[int, int]] = field(default_factory=list)
    charged: int = 0
    unpaid: int = 0


def settle(curve: Curve, thresholds: Settle, service: Service) -> Life:
    """Pay what an agreement owed, under these thresholds."""
    return _Settling(curve, thresholds, service).run()


def without_share(thresholds: Settle, deposit: int | None) -> Settle:
    """Write a share of the deposit as an amount: an escrow without an end has no shares.

    Without a deposit it is a share of nothing, and asks for nothing.
    """
    percent = thresholds.escrow_percent
    if percent is None:
        return thresholds
    amounts = [thresholds.amount] if thresholds.amount is not None else []
    if deposit is not None:
        amounts.append(-(-deposit * percent // 100))
    return replace(thresholds, escrow_percent=None, amount=min(amounts, default=None))


@dataclass(slots=True)
class _Role:
    """One escrow on its way, and what of it is not paid yet: (since when, micros), oldest first."""

    escrow: Escrow
    owed: int = 0
    asked: int = 0  # The micros of the release that is on its way; 0: there is none.
    units: int = 0  # Those that it settles.
    arrives: int = 0  # When it is there.
    next_call: int = 0
    looked_for: int = -1  # The oldest unsettled usage whose interval's end is noted.
    waiting: collections.deque[tuple[int, int]] = field(default_factory=collections.deque)


class _Settling:
    """One agreement's life: usage, payments and looks, in the order of time."""

    def __init__(self, curve: Curve, thresholds: Settle, service: Service) -> None:
        self._curve, self._service, self._settle = curve, service, thresholds
        self._roles = [
            _Role(_full(Escrow(role, curve.agreement, role), curve.total)) for role in curve.roles
        ]
        self._life = Life(curve.agreement)
        self._bursts = None if thresholds.exposure_max is None else Bursts()
        self._timers: list[int] = []
        self._noted: set[int] = set()
        self._units = self._since = self._exposure = 0

    def run(self) -> Life:
        """Live it to its end."""
        for step in self._curve.steps:
            while self._timers and self._timers[0] <= step.at:
                self._wake()
            self._use(step)
        while self._timers:
            self._wake()
        self._life.charged = sum(role.owed for role in self._roles)
        self._life.unpaid = self._exposure
        return self._life

    def _use(self, step: Step) -> None:
        for role, owed in zip(self._roles, step.owed, strict=True):
            grown, role.owed = owed - role.owed, owed
            self._exposure += grown
            if grown > 0:
                role.waiting.append((step.at, grown))
            else:
                _take_back(role.waiting, -grown)
            if step.closing and not role.escrow.closing:
                role.escrow = replace(role.escrow, closing=True)
        self._units = step.units
        self._since = self._since or step.at
        if self._bursts is not None:
            level = sum(step.owed)
            if step.usage:
                self._bursts.note(level, step.at)
            self._bursts.level = level
        self._life.points.append((step.at, self._exposure))
        self._look(step.at)

    def _wake(self) -> None:
        """Money arrives, or time alone has made something due."""
        at = heapq.heappop(self._timers)
        self._noted.discard(at)
        for role in self._roles:
            if role.asked and role.arrives <= at:
                self._arrive(role, at)
        self._look(at)

    def _arrive(self, role: _Role, at: int) -> None:
        escrow, amount = role.escrow, role.asked
        role.asked = 0
        role.escrow = replace(
            escrow,
            observed=escrow.observed + amount,
            remaining=escrow.remaining - amount,
            units_settled=role.units,
        )
        self._exposure -= amount
        self._life.points.append((at, self._exposure))
        self._life.waits += [(at - since, part) for since, part in _pay(role.waiting, amount)]
        unsettled = any(other.escrow.unsettled(other.owed) > 0 for other in self._roles)
        self._since = at if unsettled else 0

    def _look(self, at: int) -> None:
        for role in self._roles:
            if not role.asked:
                self._look_at(role, at)

    def _look_at(self, role: _Role, at: int) -> None:
        escrow = role.escrow
        standing = Standing(role.owed, self._units, self._since, self._bursts)
        why = due(self._settle, escrow, standing, at, 0, self._service.pace)
        if not why:
            if role.looked_for == self._since:
                return  # The end of this interval is noted; each event would ask for it again.
            moment = next_look(self._settle, escrow, standing, 0)
            if moment is not None and moment > at:
                role.looked_for = self._since
                self._wake_at(moment)
        elif at < role.next_call:
            self._wake_at(role.next_call)
        else:
            self._release(role, at, why)

    def _release(self, role: _Role, at: int, why: str) -> None:
        service, escrow = self._service, role.escrow
        payable = escrow.payable(role.owed)
        amount = min(payable, service.release_max) // service.quantum * service.quantum
        if amount < (service.wallet_minimum if escrow.refillable else 1):
            return  # A wallet's service takes no less, not even at the end.
        # A piece of the most that one call may ask for settles no units yet: see the settler.
        role.units = escrow.units_settled if payable > service.release_max else self._units
        role.asked = amount
        role.arrives, role.next_call = at + service.latency, at + service.pace
        self._life.paid.append(Paid(self._curve.agreement, at, amount, why))
        self._wake_at(role.arrives)

    def _wake_at(self, moment: int) -> None:
        """Note a moment to look at, once: several roles may ask for the same one."""
        if moment not in self._noted:
            self._noted.add(moment)
            heapq.heappush(self._timers, moment)


def _pay(waiting: collections.deque[tuple[int, int]], amount: int) -> Iterator[tuple[int, int]]:
    """Take what a payment pays from the oldest: (since when, micros)."""
    while amount > 0 and waiting:
        since, part = waiting.popleft()
        if part > amount:
            waiting.appendleft((since, part - amount))
            part = amount
        amount -= part
        yield since, part


def _take_back(waiting: collections.deque[tuple[int, int]], amount: int) -> None:
    """A price that falls with the quantity is taken from the newest."""
    while amount > 0 and waiting:
        since, part = waiting.pop()
        if part > amount:
            waiting.append((since, part - amount))
        amount -= min(part, amount)


# -- What it comes to ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spread:
    """The mean, the 95th percentile and the worst of something."""

    mean: int = 0
    p95: int = 0
    worst: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one variant comes to. Micros and ms.

    exposure  of one agreement, over the time of all of them; `together`: of all at once.
    wait      from the usage to its payment, by the micro.
    points    the exposure of all agreements together, from a moment on.
    """

    releases: int
    whys: tuple[tuple[str, int], ...]
    charged: int
    paid: int
    fee: int
    exposure: Spread
    together: Spread
    wait: Spread
    points: tuple[tuple[int, int], ...]


def outcome(lives: Sequence[Life], fee_bps: int) -> Outcome:
    """Sum up what became of all agreements under one variant."""
    paid = [one for life in lives for one in life.paid]
    whys = collections.Counter(one.why.partition(":")[0] for one in paid)
    points = _together(lives)
    exposure = spread([span for life in lives for span in _spans(life.points)])
    return Outcome(
        releases=len(paid),
        whys=tuple(sorted(whys.items())),
        charged=sum(life.charged for life in lives),
        paid=sum(one.amount for one in paid),
        fee=sum(one.amount * fee_bps // BPS for one in paid),
        exposure=exposure,
        together=exposure if len(lives) == 1 else spread(list(_spans(points))),
        wait=spread([wait for life in lives for wait in life.waits]),
        points=tuple(points),
    )


def _together(lives: Sequence[Life]) -> list[tuple[int, int]]:
    if len(lives) == 1:
        return lives[0].points
    changes: list[tuple[int, int]] = []
    for life in lives:
        before = 0
        for at, exposure in life.points:
            changes.append((at, exposure - before))
            before = exposure
    changes.sort(key=lambda change: change[0])
    points, exposure = [], 0
    for at, change in changes:
        exposure += change
        points.append((at, exposure))
    return points


def _spans(points: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield (exposure, for how long) of points in their order; one of a moment lasts 0 ms."""
    for (at, exposure), (until, _) in pairwise(points):
        yield exposure, until - at


def spread(weighed: Sequence[tuple[int, int]]) -> Spread:
    """Mean, 95th percentile and worst of (value, weight). What lasted no time can be the worst."""
    if not weighed:
        return Spread()
    total = sum(weight for _, weight in weighed)
    worst = max(value for value, _ in weighed)
    if not total:
        return Spread(worst, worst, worst)
    mean = sum(value * weight for value, weight in weighed) // total
    ordered = sorted(weighed, reverse=True)
    high = under = 0
    while under * 100 < total * 95:
        high, weight = ordered.pop()
        under += weight
    return Spread(mean, high, worst)
