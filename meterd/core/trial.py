"""What each event of a batch would accrue, in its turn, held against the caps of its agreement.

The rule: the sum of what is tried is exactly what the batch accrues when it is applied. Most rates
are linear, and an event's charge is a product. Where the charge of a line is no sum (tiers,
packages, minimums) an event is charged what the line grows by when it comes behind those that were
taken before it; where a meter shows no sum (the greatest, the last, different values), what that
grows by. Nothing of the ledger is changed here: lines and meters are looked at through a copy of
the few figures that the batch touches.

Each cap is turned into one whole number of 1 / account.denominator USDC, once for a batch; an event
then costs comparisons of whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from meterd.core.accounts import Account, Charged, Counter, Line, ResolvedBatch, Why
from meterd.core.caps import PLAN, Caps, Windows
from meterd.core.events import Reason
from meterd.core.meters import Aggregation
from meterd.core.money import MICROS, NANOS, format_amount

SPANS = {"event": "one event", "minute": "a minute", "day": "a day", "lifetime": "its life"}


@dataclass(slots=True)
class _Budget:
    """What is left of some caps, in 1 / denominator USDC, and what this batch has used of it."""

    name: str  # Whose caps they are.
    caps: Caps
    left: dict[str, int]  # By the cap's name; those that are no caps are missing.
    used: int = 0

    def passed(self, charge: int) -> str:
        """Name the cap that an event would pass; "" for none."""
        for name, left in self.left.items():
            before = 0 if name == "event" else self.used
            if before + charge > left:
                return name
        return ""


Figures = tuple[int, int, int]  # Of a line: quantity, amount, charge.
Shown = tuple[int, str]  # Of a meter that shows no sum: what it shows, and the key of the last.


class Trial:
    """One batch on trial, at wall ms. Asked for each event that is new, in their order."""

    def __init__(self, resolved: ResolvedBatch, now: int) -> None:
        self._resolved = resolved
        self._now = now
        self._budgets: dict[tuple[Account, str], _Budget] = {}
        # Lines and meters as they are with all that was taken so far.
        self._lines: dict[Line, Figures] = {}
        self._shown: dict[Counter, Shown] = {}
        self._new: dict[Counter, set[str]] = {}  # Values that `unique` had not seen.

    @property
    def spent(self) -> dict[tuple[Account, str], int]:
        """What was taken under caps, by account and the name of its windows."""
        return {key: budget.used for key, budget in self._budgets.items() if budget.used}

    def refusal(self, place: int) -> Why | None:
        """Say why an event is over a cap; one that is not is taken from now on."""
        charged = self._charged(place)
        if not charged:
            return None
        account = charged[0].counter.account
        limits = self._limits(account, place)
        if not limits and all(_is_linear(part.counter) for part in charged):
            return None
        lines: dict[Line, Figures] = {}
        shown: dict[Counter, Shown] = {}
        charge = sum(self._charge(part, lines, shown) for part in charged)
        budgets = [self._budget(account, name, caps) for name, caps in limits]
        for budget in budgets:
            cap = budget.passed(charge) if charge > 0 else ""
            if cap:
                return Reason.OVER_CAP, _sentence(account, budget.name, budget.caps, cap)
        for budget in budgets:
            budget.used += max(0, charge)
        self._lines.update(lines)
        self._shown.update(shown)
        for counter, (_, key) in shown.items():
            self._new.setdefault(counter, set()).add(key)
        return None

    def _charged(self, place: int) -> Sequence[Charged] | None:
        """All counters that an event feeds; None or none: it is no usage."""
        resolved, counter = self._resolved, self._resolved.counters[place]
        if counter is None:
            return resolved.parts.get(place)
        amount, key = resolved.amounts.get(place, 0), resolved.keys.get(place, "")
        return (Charged(counter, resolved.quantities[place], amount, key),)

    def _limits(self, account: Account, place: int) -> list[tuple[str, Caps]]:
        limits = [(PLAN, account.plan.caps)] if account.plan.caps is not None else []
        sender = self._resolved.limits.get(self._resolved.indices[place])
        return limits if sender is None else [*limits, sender]

    def _budget(self, account: Account, name: str, caps: Caps) -> _Budget:
        budget = self._budgets.get((account, name))
        if budget is None:
            windows = account.windows.get(name) or Windows()
            before = {
                "event": Fraction(0),
                "minute": windows.of_minute(self._now),
                "day": windows.of_day(self._now),
                "lifetime": account.accrued if name == PLAN else windows.lifetime,
            }
            left = {
                span: math.floor((Fraction(cap, MICROS) - accrued) * account.denominator)
                for span, accrued in before.items()
                if (cap := getattr(caps, span)) is not None
            }
            budget = self._budgets[account, name] = _Budget(name, caps, left)
        return budget

    # -- Charges -------------------------------------------------------------------------------

    def _charge(
        self, part: Charged, lines: dict[Line, Figures], shown: dict[Counter, Shown]
    ) -> int:
        """What one counter of an event would be charged, noted in `lines` and `shown`."""
        counter, quantity = part.counter, part.quantity
        if counter.samples is not None:
            quantity = self._grown(part, shown)
        line = counter.line
        if line is None:
            return (part.amount if counter.dynamic else quantity) * counter.weight
        before = lines.get(line) or self._lines.get(line)
        if before is None:
            before = line.quantity, line.amount, line.charge
        total, amount = before[0] + quantity, before[1] + part.amount
        charge = line.charge_of(total, amount)
        lines[line] = total, amount, charge
        return charge - before[2]

    def _grown(self, part: Charged, shown: dict[Counter, Shown]) -> int:
        """By how much what the meter shows would grow."""
        counter, samples = part.counter, part.counter.samples
        assert samples is not None
        known = self._shown.get(counter)
        if known is None:
            known = samples.quantity, max(samples.known, default="")
        before, last = known
        quantity, key = before, last
        if samples.aggregation is Aggregation.MAX:
            quantity = max(before, part.quantity)
        elif samples.aggregation is Aggregation.LATEST:
            if part.key > last:
                quantity, key = part.quantity, part.key
        elif part.key not in samples.known and part.key not in self._new.get(counter, ()):
            quantity, key = before + NANOS, part.key
        shown[counter] = quantity, key
        return quantity - before


def _is_linear(counter: Counter) -> bool:
    return counter.line is None and counter.samples is None


def _sentence(account: Account, name: str, caps: Caps, cap: str) -> str:
    limit = format_amount(getattr(caps, cap))
    table = f"plans.{account.plan.name}.caps" if name == PLAN else f"producer {name}: caps"
    return (
        f"more than {limit} USDC in {SPANS[cap]}; raise {cap}_max of {table},"
        " then: meterd dead-letters replay"
    )
