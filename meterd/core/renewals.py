"""When an agreement needs its payer's next escrow, and for which role.

An escrow cannot be topped up, so an agreement goes on by another one, drawn on behind those before
it. Two reasons ask for it:

    renewal    the fee of the period behind the running one is held by nobody, and the running one
               ends soon;
    rollover   of what usage draws on, less than a fifth of the deposit is left.

What a deadline takes before the money is needed does not count. An escrow that has not been read
yet may hold anything, so nothing is asked for while there is one. Where the last one went back to
its payer, in whole or in part, he has had enough: nothing more of his is locked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from meterd.core.accounts import Account
from meterd.core.ledger import Ledger
from meterd.core.money import MICROS, PICOS
from meterd.core.pricing import PERIOD_METER, Rate
from meterd.core.settlement import Escrow, EscrowStatus

RENEWAL, ROLLOVER = "renewal", "rollover"
LOW_SHARE = 5  # A fifth of the deposit: at the pace of a busy hour that is minutes, not seconds.
HOUR_MS = 3_600_000
# How many escrows of a role may wait beside the one that is drawn on. A service that gives shorter
# deadlines than it was asked for would otherwise have one locked after the other.
SPARE_MAX = 1


def lacking(ledger: Ledger, account: Account, now: int, ahead: int) -> Iterator[tuple[str, str]]:
    """Yield (role, why) for each role that needs another escrow, at wall ms `now`.

    `ahead`: how long, in ms, before a period's end or a deadline the next escrow must be asked for.
    """
    if account.closing:
        return
    fee = _fee(account, account.period + 1)
    for role in account.plan.roles:
        escrows = [escrow for escrow in ledger.escrows_of(account) if escrow.role == role]
        if any(escrow.status is EscrowStatus.ADOPTING for escrow in escrows):
            continue
        if escrows and _went_back(escrows[-1]):
            continue
        if sum(_untouched(ledger, account, escrow) for escrow in escrows) > SPARE_MAX:
            continue
        if fee is not None and role == fee.role:
            if _renews(ledger, account, escrows, now, ahead):
                yield role, RENEWAL
        elif _runs_low(ledger, account, role, escrows, now + ahead):
            yield role, ROLLOVER


def amount_for(ledger: Ledger, account: Account, role: str) -> int:
    """How much the next escrow of a role holds: the plan's deposit, else as much as the last."""
    deposit = dict(account.plan.deposits).get(role)
    if deposit:
        return deposit
    totals = [escrow.total for escrow in ledger.escrows_of(account) if escrow.role == role]
    return totals[-1] if totals else 0


def hours_for(account: Account, now: int) -> int | None:
    """After how many hours the next escrow's service acts: never before the period it is for ends.

    So the escrows of one agreement do not creep ahead of its periods.
    """
    plan = account.plan
    ends = plan.period_ends(account.opened_at, account.period + 1)
    if plan.auto_release_hours is None or ends is None:
        return plan.auto_release_hours
    return max(plan.auto_release_hours, -(-(ends - now) // HOUR_MS))


def _renews(
    ledger: Ledger, account: Account, escrows: Sequence[Escrow], now: int, ahead: int
) -> bool:
    """Whether the running period ends soon and the fee of the next one is held by nobody."""
    ends = account.plan.period_ends(account.opened_at, account.period)
    assert ends is not None, "a plan with a fee has periods"
    if now < min([ends, *_deadlines(escrows, now)]) - ahead:
        return False
    # The fee of the running period is drawn on the oldest; those that outlive it pay it only where
    # the others cannot.
    lasting = [escrow for escrow in escrows if _lasts(escrow, ends)]
    free = sum(ledger.free_on(account, escrow) for escrow in escrows)
    free_later = sum(ledger.free_on(account, escrow) for escrow in lasting)
    running = max(0, _fee_micros(account, account.period) - (free - free_later))
    return free_later - running < _fee_micros(account, account.period + 1)


def _runs_low(
    ledger: Ledger, account: Account, role: str, escrows: Sequence[Escrow], horizon: int
) -> bool:
    """Whether less than a fifth of the deposit is left that lives beyond the horizon, wall ms."""
    left = sum(ledger.free_on(account, escrow) for escrow in escrows if _lasts(escrow, horizon))
    return left * LOW_SHARE < amount_for(ledger, account, role)


def _went_back(escrow: Escrow) -> bool:
    """Whether it ended with something unspent, or before it could be adopted."""
    spent = escrow.total > 0 and escrow.observed >= escrow.total
    return escrow.status is EscrowStatus.CLOSED and not spent


def _untouched(ledger: Ledger, account: Account, escrow: Escrow) -> bool:
    return escrow.total > 0 and ledger.free_on(account, escrow) == escrow.total


def _lasts(escrow: Escrow, moment: int) -> bool:
    return escrow.deadline is None or escrow.deadline > moment


def _deadlines(escrows: Sequence[Escrow], now: int) -> Iterator[int]:
    """The deadlines to come of escrows that still hold something: each may end a period early."""
    for escrow in escrows:
        live = escrow.status is not EscrowStatus.CLOSED and escrow.remaining > 0
        if live and escrow.deadline is not None and escrow.deadline > now:
            yield escrow.deadline


def _fee_micros(account: Account, period: int) -> int:
    rate = _fee(account, period)
    return 0 if rate is None else rate.price * MICROS // PICOS


def _fee(account: Account, period: int) -> Rate | None:
    """The rate of what a period costs by itself; None: nothing."""
    plan = account.plan
    if plan.period is None:
        return None
    card = plan.card_at(account.opened_at + period * plan.period)
    place = card.match(PERIOD_METER, {})
    return None if place is None or not card.rates[place].price else card.rates[place]
