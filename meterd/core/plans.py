"""Plans: a billing pattern with its rates and the thresholds at which money moves.

This version knows two of the seven patterns. Both meter usage and draw it out of one escrow, the
role `main`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from meterd.core.pricing import RateCard


class Pattern(enum.StrEnum):
    """The billing patterns that this version can run."""

    STREAMING = "streaming"
    PAY_PER_TOKEN = "pay_per_token"  # noqa: S105  # The name of a pattern, no secret.


@dataclass(frozen=True, slots=True)
class Settle:
    """Thresholds, whichever comes first; None: not used. In micros, nanos of units, and ms."""

    amount: int | None = None
    units: int | None = None
    interval: int | None = None
    escrow_percent: int | None = None
    before_deadline: int = 15 * 60 * 1000
    min_release: int = 10_000


@dataclass(frozen=True, slots=True)
class Plan:
    """One plan of the configuration."""

    name: str
    pattern: Pattern
    card: RateCard
    settle: Settle = field(default_factory=Settle)
