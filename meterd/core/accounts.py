"""What the ledger is made of: agreements, their accounts and counters, and what a batch does.

Facts and nothing else. What follows from a fact alone (a row, a charge, what an escrow can pay) is
told here; whatever changes more than one of them at a time is the ledger's, which has one owner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from meterd.core.caps import PLAN, Caps, Windows, windows_text
from meterd.core.changes import AgreementRow, Change, CounterRow, SampleRow
from meterd.core.events import Reason, Rejection, UsageEvent
from meterd.core.meters import Meter, Samples
from meterd.core.money import MICROS
from meterd.core.plans import Plan
from meterd.core.pricing import Dimensions, RateCard
from meterd.core.settlement import ENDED, Escrow, EscrowStatus
from meterd.core.thresholds import Bursts

Why = tuple[Reason, str]
CounterKey = tuple[int, str, str, Dimensions]  # Period, card, meter, priced dimensions.


@dataclass(frozen=True, slots=True)
class Agreement:
    """A payer under a plan, with its escrows by role, as the configuration or the API has it.

    Escrows of one role stand in the order in which they are drawn on.
    """

    id: str
    plan: str
    payer: str
    escrows: tuple[tuple[str, str], ...]
    origin: str = "api"


@dataclass(eq=False, slots=True)
class Line:
    """One rate's usage in one period of an agreement, where the charge of a sum is no sum.

    `charge` is in 1 / account.denominator USDC. Without an event nothing is charged but a minimum:
    a score of 0 may cost something, and no score at all may not.
    """

    account: Account
    card: RateCard
    place: int
    quantity: int = 0
    amount: int = 0
    events: int = 0
    ended: bool = False
    charge: int = 0

    def work_out(self) -> int:
        """Price all of it anew; by how much the charge has changed."""
        charged = self.events or (self.ended and self.card.rates[self.place].minimum is not None)
        charge = self.charge_of(self.quantity, self.amount) if charged else 0
        before, self.charge = self.charge, charge
        return charge - before

    def charge_of(self, quantity: int, amount: int) -> int:
        """Price so much usage of one event or more, in 1 / account.denominator USDC."""
        charge = self.card.line_charge(self.place, quantity, amount, ended=self.ended)
        return charge * (self.account.denominator // self.card.denominator)


@dataclass(eq=False, slots=True)
class Counter:
    """Cumulative usage of one agreement by period, card, meter and priced dimensions.

    Hashed by identity. `line` is None where the rate is linear.
    """

    account: Account
    period: int
    card: str
    meter: Meter
    dimensions: Dimensions
    number: int
    weight: int = 0  # What one nano costs, in 1 / account.denominator USDC; for linear rates.
    role: str = ""
    line: Line | None = None
    samples: Samples | None = None
    # The event brings its price, up to so many picos: the weight is that of the amount.
    dynamic: bool = False
    price_max: int = 0
    quantity: int = 0
    amount: int = 0
    events: int = 0
    shared: int = 0  # Of the events, those that are counted for the agreement elsewhere.

    @property
    def row(self) -> CounterRow:
        """The counter as it is to be stored."""
        return CounterRow(
            self.account.agreement.id,
            self.card,
            self.meter.name,
            self.dimensions,
            self.quantity,
            self.events,
            self.period,
            self.amount,
            self.number,
            self.shared,
        )


@dataclass(eq=False, slots=True)
class Account:
    """One agreement's side of the ledger. Numerators are in 1 / denominator USDC."""

    agreement: Agreement
    plan: Plan
    opened_at: int
    denominator: int = 1  # Worked out anew, with the sums, wherever its counters or plan change.
    numerator: int = 0  # Accrued in all.
    events: int = 0
    units: int = 0
    unsettled_since: int = 0
    closing: bool = False
    period: int = 0
    # Only where the plan draws on more than one role: each one's part.
    by_role: dict[str, int] | None = None
    # Only where the plan bounds the exposure: how fast usage has been earned.
    bursts: Bursts | None = None
    # Only where there are caps: what was accrued in the windows of now, by whose caps they are.
    windows: dict[str, Windows] = field(default_factory=dict)
    counters: dict[CounterKey, Counter] = field(default_factory=dict)
    lines: dict[tuple[int, str, int], Line] = field(default_factory=dict)

    @property
    def accrued(self) -> Fraction:
        """Owed for usage so far, exact USDC."""
        return Fraction(self.numerator, self.denominator)

    @property
    def owed(self) -> int:
        """Accrued, floored to micros: what all its escrows together should have released."""
        micros: int = self.numerator * MICROS // self.denominator
        return micros

    def owed_by(self, role: str) -> int:
        """The part of it that is drawn on the escrows of one role."""
        if self.by_role is None:
            return self.owed
        return self.by_role.get(role, 0) * MICROS // self.denominator

    @property
    def escrow(self) -> str:
        """The first of its escrows: where there is one, it is this."""
        return self.agreement.escrows[0][1]

    @property
    def escrow_ids(self) -> tuple[str, ...]:
        """All its escrows, in the order in which they are drawn on."""
        return tuple(escrow for _, escrow in self.agreement.escrows)

    @property
    def row(self) -> AgreementRow:
        """The account as it is to be stored."""
        return AgreementRow(
            id=self.agreement.id,
            plan=self.plan.name,
            payer=self.agreement.payer,
            origin=self.agreement.origin,
            escrows=self.agreement.escrows,
            closing=self.closing,
            opened_at=self.opened_at,
            accrued=self.accrued,
            events=self.events,
            units=self.units,
            unsettled_since=self.unsettled_since,
            period=self.period,
            spent=windows_text(self.windows) if self.windows else "",
        )

    @property
    def is_racing(self) -> bool:
        """Whether it accrues faster than may be paid without a person's look."""
        caps, windows = self.plan.caps, self.windows.get(PLAN)
        return caps is not None and windows is not None and windows.is_racing(caps)

    def grow(self, role: str, charge: int) -> None:
        """Add to what is owed; a charge below zero is a credit."""
        self.numerator += charge
        if self.by_role is not None:
            self.by_role[role] = self.by_role.get(role, 0) + charge


@dataclass(frozen=True, slots=True)
class Charged:
    """One of the counters that a typed event feeds, and what it adds there.

    `quantity` in nanos; `amount` of a dynamic rate in 10^-21 USDC; `key` of the sample where the
    meter is not additive.
    """

    counter: Counter
    quantity: int
    amount: int = 0
    key: str = ""


@dataclass(slots=True)
class ResolvedBatch:
    """The events of a batch that may accrue, as parallel lists, and those that cannot.

    `quantities` in nanos; `buckets` are hours since the epoch. A counter of None marks a
    `meterd.close`, a `meterd.void`, or a typed event, which has its counters among the `parts`.
    What few events have is kept apart, by their place in the lists: `amounts` of dynamic rates in
    10^-21 USDC, sample `keys` of meters that are not additive, `parts`, and the `holds` that are
    captured. By the delivery's index, `fed` notes what a typed event feeds until its identity is
    known, and `refused` says why an event is rejected unless it turns out to be a duplicate.
    `limits` are the caps of their senders, by whom; `special`: there are events of special types;
    `late` are those, by the delivery's index, that
    are too old but have a number.
    """

    rejections: list[Rejection] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    events: list[UsageEvent] = field(default_factory=list)
    counters: list[Counter | None] = field(default_factory=list)
    quantities: list[int] = field(default_factory=list)
    buckets: list[int] = field(default_factory=list)
    amounts: dict[int, int] = field(default_factory=dict)
    keys: dict[int, str] = field(default_factory=dict)
    parts: dict[int, Sequence[Charged]] = field(default_factory=dict)
    fed: dict[int, list[tuple[Counter, int, str]]] = field(default_factory=dict)
    holds: dict[int, str] = field(default_factory=dict)
    refused: dict[int, Why] = field(default_factory=dict)
    late: set[int] = field(default_factory=set)
    limits: dict[int, tuple[str, Caps]] = field(default_factory=dict)
    special: bool = False


@dataclass(slots=True)
class Entry:
    """What a batch does: each delivery counts as one of accepted, duplicates, rejections.

    `fresh` says for each resolved event whether its identity is new; None: all of them are.
    `spent` is what is taken under caps, in 1 / denominator USDC, by whose caps they are.
    """

    accepted: int
    duplicates: int
    rejections: list[Rejection]
    fresh: list[bool] | None
    quantities: dict[Counter, int]
    events: dict[Counter, int]
    closes: list[Account]
    voids: list[UsageEvent] = field(default_factory=list)
    amounts: dict[Counter, int] = field(default_factory=dict)
    samples: dict[Counter, list[tuple[str, int]]] = field(default_factory=dict)
    # Of the events, those that fed another counter first.
    shared: dict[Counter, int] = field(default_factory=dict)
    spent: dict[tuple[Account, str], int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over all agreements. `accrued` exact USDC, the rest in micros."""

    accrued: Fraction
    settled: int
    held: int
    credited: int


@dataclass(slots=True)
class Touched:
    """What a change of the ledger leaves to be made durable."""

    counters: dict[Counter, None] = field(default_factory=dict)
    samples: list[SampleRow] = field(default_factory=list)
    accounts: dict[Account, None] = field(default_factory=dict)

    def change(self) -> Change:
        """The rows, as they are now."""
        return Change(
            agreements=tuple(account.row for account in self.accounts),
            counters=tuple(counter.row for counter in self.counters),
            samples=tuple(self.samples),
        )


def paid(escrow: Escrow) -> int:
    """What an escrow has paid under its agreement; an open release counts as paid."""
    return max(escrow.observed, escrow.expected) - escrow.baseline + escrow.held


def capacity(escrow: Escrow) -> int:
    """What an escrow can pay in all under its agreement; one that has ended, what it paid."""
    if escrow.status is EscrowStatus.CLOSED or escrow.service_status in ENDED:
        return paid(escrow)
    return max(paid(escrow), escrow.observed + escrow.remaining - escrow.baseline)
