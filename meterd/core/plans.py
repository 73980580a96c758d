"""Plans: the seven billing patterns, as rate cards, periods, deposits and thresholds.

A pattern is no code path of its own. Each comes down to counters and rates: a subscription's fee is
the rate of a counter of ended periods, a tranche is the rate of a counter of one milestone, a score
is the quantity of a counter whose rate has tiers. So the price, the recovery, the audit and the
settlement are the same for all seven; what differs is said in the table of fields below.

| pattern       | draws on        | period | events of its own  | at close |
|---------------|-----------------|--------|--------------------|----------|
| pay_per_call  | wallet, or main | -      |                    | leave    |
| pay_per_token | main            | -      |                    | leave    |
| subscription  | main, one each  | yes    |                    | leave    |
| milestone     | main            | -      | `meterd.milestone` | leave    |
| streaming     | main            | -      |                    | refund   |
| performance   | main            | -      | `meterd.outcome`   | refund   |
| hybrid        | base, overage   | yes    |                    | refund   |
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field

from meterd.core.caps import Caps
from meterd.core.pricing import MILESTONE_METER, RateCard

BASE = "base"
OVERAGE = "overage"


class Pattern(enum.StrEnum):
    """The billing patterns."""

    PAY_PER_CALL = "pay_per_call"
    PAY_PER_TOKEN = "pay_per_token"  # noqa: S105  # The name of a pattern, no secret.
    SUBSCRIPTION = "subscription"
    MILESTONE = "milestone"
    STREAMING = "streaming"
    PERFORMANCE = "performance"
    HYBRID = "hybrid"


class PeriodEnd(enum.StrEnum):
    """Who moves the fee when a period ends."""

    RELEASE = "release"  # meterd, just before the service's own deadline.
    AUTO = "auto"  # The service, at the escrow's deadline; meterd takes it as payment.


class AtClose(enum.StrEnum):
    """What becomes of the rest of an escrow when its agreement is settled to the last unit."""

    REFUND = "refund"  # meterd asks the service to refund it.
    LEAVE = "leave"  # It is the payer's and the service's affair.


@dataclass(frozen=True, slots=True)
class Settle:
    """Thresholds, whichever comes first; None: not used. In micros, nanos of units, and ms.

    `exposure_max` makes the amount adaptive: see `thresholds`.
    """

    amount: int | None = None
    units: int | None = None
    interval: int | None = None
    escrow_percent: int | None = None
    before_deadline: int = 15 * 60 * 1000
    min_release: int = 10_000
    exposure_max: int | None = None


@dataclass(frozen=True, slots=True)
class Gate:
    """How the question "may this call be served?" is answered."""

    enforce: bool = True  # False: never refuse, only tell.
    overdraft: int = 0  # Micros by which unsettled and holds may pass what is left.
    hold: int = 60_000  # Ms that a hold lives when the caller names no time.
    fail_open: bool = False  # While the escrow has not been read yet.


@dataclass(frozen=True, slots=True)
class Version:
    """The rates from a moment on, wall ms."""

    effective_from: int
    card: RateCard


@dataclass(frozen=True, slots=True)
class Plan:
    """One plan of the configuration.

    card       the rates in force from the beginning; `later` ones, oldest first, follow it.
    period     ms from the agreement's opening to the end of its first period, and so on; None: the
               agreement's whole life is one.
    deposits   micros to be locked when an agreement is opened, by role.
    quota      of a subscription: (meter, nanos a period); beyond it the gate refuses.
    ordered    of a milestone plan: its tranches must come in their order.
    outcome_key  of a performance plan: the evaluator's Ed25519 public key, 32 bytes.
    renew      meterd locks the next escrow itself, for agreements that it has opened.
    caps       how much, and how fast, an agreement under it may accrue; None: no limits.
    """

    name: str
    pattern: Pattern
    card: RateCard
    settle: Settle = field(default_factory=Settle)
    later: tuple[Version, ...] = ()
    period: int | None = None
    period_end: PeriodEnd = PeriodEnd.RELEASE
    deposits: tuple[tuple[str, int], ...] = ()
    auto_release_hours: int | None = None
    memo: str = ""
    at_close: AtClose = AtClose.LEAVE
    quota: tuple[str, int] | None = None
    ordered: bool = False
    outcome_key: bytes | None = None
    gate: Gate = field(default_factory=Gate)
    renew: bool = False
    caps: Caps | None = None

    @property
    def cards(self) -> Iterator[RateCard]:
        """All its rate cards, oldest first."""
        yield self.card
        for version in self.later:
            yield version.card

    def card_at(self, at: int) -> RateCard:
        """The card that prices an event of this time, wall ms."""
        card = self.card
        for version in self.later:
            if version.effective_from <= at:
                card = version.card
        return card

    @property
    def timed(self) -> bool:
        """Whether an event's time decides what it costs."""
        return self.period is not None or bool(self.later)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of the escrows that an agreement under it has, in a fixed order."""
        return tuple(sorted({role for card in self.cards for role in card.roles}))

    @property
    def tranches(self) -> tuple[str, ...]:
        """The names of a milestone plan's tranches, in their order."""
        return tuple(
            value
            for rate in self.card.rates
            if rate.meter == MILESTONE_METER
            for name, value in rate.where
            if name == "name"
        )

    def period_at(self, opened_at: int, at: int) -> int:
        """The number of the period that holds a moment, from 0; earlier ones belong to the first.

        Both moments in wall ms.
        """
        return 0 if self.period is None else max(0, (at - opened_at) // self.period)

    def period_ends(self, opened_at: int, number: int) -> int | None:
        """When a period ends, wall ms; None: with the agreement."""
        return None if self.period is None else opened_at + (number + 1) * self.period
