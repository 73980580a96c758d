"""Reservations and headroom: may this call be served, and what is set aside while it is served.

A *hold* sets headroom aside before the work is done. It is captured with the quantity that was
really used, voided, or it expires; in each case its amount is free again. The rule kept here: what
is owed and all live holds together never pass what the payer's escrows can still pay, plus the
overdraft that the plan allows. The answer and the new hold are one step, so that callers who ask at
the same moment cannot both be promised the last cent.

The price of work that is not done yet is an estimate upwards: rounded up to the quantum, behind all
usage that is counted and all that is held, at the cap where the event will bring its own price.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from meterd.core.accounts import Account
from meterd.core.changes import Hold
from meterd.core.ledger import Ledger
from meterd.core.money import MICROS
from meterd.core.pricing import OWN_METERS, Model
from meterd.core.settlement import EscrowStatus


@dataclass(frozen=True, slots=True)
class Ask:
    """What is about to be served: nanos of a meter, with the dimensions that its price looks at."""

    meter: str
    quantity: int
    dimensions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The gate's answer. `needed` and `headroom` in micros; None: the escrow is not read yet.

    `reason` says what is missing; "" where nothing is.
    """

    allowed: bool
    needed: int
    headroom: int | None
    reason: str = ""


class Holds:
    """All live holds. It has one owner, the bookkeeper. Times in wall ms."""

    def __init__(self, holds: Iterable[Hold] = ()) -> None:
        self.total = 0  # The amounts of all, micros.
        self._known: dict[str, Hold] = {}
        # By agreement: what one payer has set aside costs no look at what all others have.
        self._of: dict[str, dict[str, Hold]] = {}
        self._ends: list[tuple[int, str]] = []  # A heap.
        for hold in holds:
            self.add(hold)

    def __len__(self) -> int:
        return len(self._known)

    def __iter__(self) -> Iterator[Hold]:
        return iter(self._known.values())

    def get(self, hold_id: str) -> Hold | None:
        """Find a live hold."""
        return self._known.get(hold_id)

    def amount(self, agreement: str) -> int:
        """What is set aside for one agreement, micros."""
        return sum(hold.amount for hold in self._of.get(agreement, {}).values())

    def quantity(self, agreement: str, meter: str) -> int:
        """How much of one meter is set aside for one agreement, nanos."""
        mine = self._of.get(agreement, {}).values()
        return sum(hold.quantity for hold in mine if hold.meter == meter)

    def add(self, hold: Hold) -> None:
        """Set aside."""
        self._known[hold.id] = hold
        self._of.setdefault(hold.agreement, {})[hold.id] = hold
        self.total += hold.amount
        heapq.heappush(self._ends, (hold.expires_at, hold.id))

    def remove(self, hold_id: str) -> Hold | None:
        """Free what a hold has set aside; None when it is not live."""
        hold = self._known.pop(hold_id, None)
        if hold is not None:
            self.total -= hold.amount
            mine = self._of[hold.agreement]
            del mine[hold_id]
            if not mine:
                del self._of[hold.agreement]
        return hold

    def expire(self, now: int) -> list[Hold]:
        """Free what nobody captured in time."""
        gone = []
        while self._ends and self._ends[0][0] <= now:
            _, hold_id = heapq.heappop(self._ends)
            hold = self._known.get(hold_id)
            if hold is not None and hold.expires_at <= now:
                self.remove(hold_id)
                gone.append(hold)
        return gone

    # -- The gate -----------------------------------------------------------------------------

    def judge(self, ledger: Ledger, account: Account, ask: Ask, now: int) -> Verdict:
        """Say whether this may be served now. Pure."""
        plan = account.plan
        priced = price(ledger, account, ask, now, self.quantity(account.agreement.id, ask.meter))
        if isinstance(priced, str):
            return Verdict(not plan.gate.enforce, 0, None, priced)
        needed, role = priced
        room = headroom(ledger, account, role)
        if room is not None:
            room += plan.gate.overdraft - self.amount(account.agreement.id)
        reason = self._objection(ledger, account, ask, now) or _short(room, needed)
        if room is None and not reason:
            reason = "" if plan.gate.fail_open else "the escrow has not been read yet"
        return Verdict(not reason or not plan.gate.enforce, needed, room, reason)

    def _objection(self, ledger: Ledger, account: Account, ask: Ask, now: int) -> str:
        """Say what stands against more usage, whatever it costs; "" when nothing does."""
        if account.closing or ledger.is_closed(account):
            return "the agreement is closed"
        # Before a deadline a period is ended early: who has paid for it is served until its end.
        unpaid = account.period <= account.plan.period_at(account.opened_at, now)
        if account.plan.period is not None and unpaid and not ledger.is_covered(account):
            return "no escrow holds the fee of this period; the payer must renew"
        quota = account.plan.quota
        if quota is not None and quota[0] == ask.meter:
            period = account.plan.period_at(account.opened_at, now)
            used = sum(
                counter.quantity
                for (number, _, meter, _), counter in account.counters.items()
                if number == period and meter == ask.meter
            )
            used += self.quantity(account.agreement.id, ask.meter)
            if used + ask.quantity > quota[1]:
                return f"the quota of {ask.meter} for this period is used up"
        return ""


def _short(room: int | None, needed: int) -> str:
    return "" if room is None or needed <= room else "the headroom is not enough"


def headroom(ledger: Ledger, account: Account, role: str) -> int | None:
    """What the escrows of one role can still pay beyond what is owed on them, micros.

    None: none of them has been read yet.
    """
    escrows = [escrow for escrow in ledger.escrows_of(account) if escrow.role == role]
    live = [escrow for escrow in escrows if escrow.status is not EscrowStatus.CLOSED]
    if live and not any(escrow.total for escrow in live):
        return None
    paid = sum(max(escrow.observed, escrow.expected) - escrow.baseline for escrow in escrows)
    return sum(escrow.remaining for escrow in live) - (account.owed_by(role) - paid)


def price(
    ledger: Ledger, account: Account, ask: Ask, now: int, held: int = 0
) -> tuple[int, str] | str:
    """Estimate what more usage will cost, micros rounded up, and the role that pays; or why not.

    `held`: nanos of the same meter that are set aside already, which count before it.
    """
    plan = account.plan
    card = plan.card_at(now)
    if ask.meter in OWN_METERS or ask.meter not in card.meters or ask.meter not in ledger.meters:
        return f"plan {plan.name} has no meter {ask.meter[:80]!r}"
    place = card.match(ask.meter, ask.dimensions)
    if place is None:
        return f"no rate of plan {plan.name} fits the dimensions"
    rate = card.rates[place]
    line = account.lines.get((plan.period_at(account.opened_at, now), card.id, place))
    before = (line.quantity if line is not None else 0) + held
    if rate.model is Model.DYNAMIC:
        charge = card.line_charge(place, ask.quantity, ask.quantity * rate.price, ended=False)
    elif rate.linear:
        charge = card.line_charge(place, ask.quantity, 0, ended=False)
    else:
        more = card.line_charge(place, before + ask.quantity, 0, ended=False)
        charge = more - card.line_charge(place, before, 0, ended=False)
    return max(0, -(-charge * MICROS // card.denominator)), rate.role
