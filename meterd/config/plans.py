"""`[plans.NAME]`: a billing pattern with its rates, fees, tranches or steps, and its thresholds.

The rule: one model serves all seven patterns, and a table says which key belongs to which. So a key
of another pattern is refused with the patterns that take it, and whoever changes a pattern changes
one word of the file. What lies between two keys of a plan is in `patterns`.

What a plan says by leaving a key out is said by the properties of its model, for the checks and for
the parts that are made of it alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from meterd.config.table import Listed, Table, one_of
from meterd.config.values import (
    Charge,
    Duration,
    Line,
    Memo,
    Micros,
    MicrosOrZero,
    Moment,
    Name,
    Nanos,
    Percent,
    Picos,
    PicosOrZero,
    PublicKey,
    Score,
    Share,
    Span,
    SpanOrZero,
    read_amount,
    read_duration,
    refuse,
)

PATTERNS = (
    "pay_per_call",
    "pay_per_token",
    "subscription",
    "milestone",
    "streaming",
    "performance",
    "hybrid",
)
MODELS = ("standard", "graduated", "volume", "package", "percentage", "dynamic")

# The patterns that each key belongs to; a key that is not here belongs to all.
_RATED = ("pay_per_call", "pay_per_token", "subscription", "streaming", "hybrid")
_WITH_FEE = ("subscription", "hybrid")
PATTERNS_OF: Mapping[str, tuple[str, ...]] = {
    "rates": _RATED,
    "versions": _RATED,
    "period": _RATED,
    "renew": _RATED,
    "exposure_max": ("pay_per_call", "pay_per_token", "streaming", "hybrid"),
    "draws_on": ("pay_per_call",),
    "fee": _WITH_FEE,
    "at_period_end": _WITH_FEE,
    "quota": ("subscription",),
    "tranches": ("milestone",),
    "ordered": ("milestone",),
    "steps": ("performance",),
    "outcome_key": ("performance",),
}
# Patterns whose every payment is due at once: they need no threshold.
DUE_AT_ONCE = frozenset({"subscription", "milestone", "performance"})
# Patterns whose rest goes back to the payer at close, unless the plan says otherwise.
REFUNDING = frozenset({"streaming", "performance", "hybrid"})

PERIOD_DEFAULT = read_duration("7d")
HOUR_MS = 3_600_000
ENTRIES_MAX = 1000


class TierSettings(Table):
    """One entry of `tiers`: up to and with `up_to` units; the last one has no `up_to`."""

    up_to_nanos: Nanos | None = Field(default=None, alias="up_to")
    price_picos: PicosOrZero = Field(default=0, alias="price")
    flat_picos: PicosOrZero = Field(default=0, alias="flat")


class RateSettings(Table):
    """One entry of `rates`: the price of one meter, for events whose dimensions match `where`."""

    meter: Name
    price_picos: PicosOrZero | None = Field(default=None, alias="price")
    per: int = Field(default=1, ge=1, le=10**12)
    where: dict[Name, Line] = Field(default_factory=dict)
    model: Annotated[
        Literal["standard", "graduated", "volume", "package", "percentage", "dynamic"],
        one_of(MODELS, "charge model"),
    ] = "standard"
    tiers: Listed[TierSettings] = Field(default=(), max_length=ENTRIES_MAX)
    percent_picos: Percent | None = Field(default=None, alias="percent")
    price_max_picos: Picos | None = Field(default=None, alias="price_max")
    free_units_nanos: Nanos | None = Field(default=None, alias="free_units")
    minimum_micros: Charge | None = Field(default=None, alias="minimum")
    maximum_micros: Charge | None = Field(default=None, alias="maximum")


class SettleSettings(Table):
    """`settle`: the thresholds at which usage is paid, whichever comes first; None: not used."""

    amount_micros: Micros | None = Field(default=None, alias="amount")
    units_nanos: Nanos | None = Field(default=None, alias="units")
    interval: Span | None = None
    escrow_percent: int | None = Field(default=None, ge=1, le=100)
    before_deadline: SpanOrZero = read_duration("15m")
    min_release_micros: Micros = Field(default=read_amount("0.01"), alias="min_release")

    @property
    def counts(self) -> bool:
        """Whether an amount, a number of units or a time asks for a release."""
        return bool(self.amount_micros or self.units_nanos or self.interval)

    @property
    def asks(self) -> bool:
        """Whether anything but the deadline does."""
        return self.counts or self.escrow_percent is not None


class AdaptiveSettle(SettleSettings):
    """`settle = "adaptive"`: thresholds that follow the usage, under the plan's exposure_max."""


def _adaptive(value: object) -> object:
    if isinstance(value, str):
        if value != "adaptive":
            refuse('write "adaptive", or a table such as settle = { amount = "0.50" }')
        return AdaptiveSettle()
    return value


class GateSettings(Table):
    """`gate`: how the question "may this call be served?" is answered."""

    enforce: bool = True
    overdraft_micros: MicrosOrZero = Field(default=0, alias="overdraft")
    hold: Span = read_duration("60s")
    on_unknown: Literal["closed", "open"] = "closed"


class LimitSettings(Table):
    """`caps` of a producer: how much it may make each agreement accrue."""

    event_max_micros: Micros | None = Field(default=None, alias="event_max")
    minute_max_micros: Micros | None = Field(default=None, alias="minute_max")
    day_max_micros: Micros | None = Field(default=None, alias="day_max")
    lifetime_max_micros: Micros | None = Field(default=None, alias="lifetime_max")

    @model_validator(mode="after")
    def _a_wider_cap_is_not_lower(self) -> LimitSettings:
        before, least = "", 0
        for name in ("event", "minute", "day", "lifetime"):
            cap = getattr(self, f"{name}_max_micros")
            if cap is not None and cap < least:
                key = f"{name}_max"
                refuse(f"is below {before}_max, which could never be reached; raise it", at=key)
            if cap is not None:
                before, least = name, cap
        return self


class CapsSettings(LimitSettings):
    """`caps` of a plan: how much, and how fast, an agreement under it may accrue."""

    velocity_max_micros: Micros | None = Field(default=None, alias="velocity_max")
    velocity_window: Span = read_duration("1h")

    @model_validator(mode="after")
    def _a_window_has_its_limit(self) -> CapsSettings:
        if "velocity_window" in self.model_fields_set and self.velocity_max_micros is None:
            refuse(
                'says nothing without velocity_max; write it, such as velocity_max = "5.00"',
                at="velocity_window",
            )
        return self


class VersionSettings(Table):
    """One entry of `versions`: the rates and the fee from a moment on."""

    effective_from_ms: Moment = Field(alias="effective_from")
    rates: Listed[RateSettings] = Field(default=(), min_length=1, max_length=ENTRIES_MAX)
    fee_micros: Charge | None = Field(default=None, alias="fee")


class QuotaSettings(Table):
    """`quota`: how many units of a meter a period of a subscription allows."""

    meter: Name
    units_nanos: Nanos = Field(alias="units")


class TrancheSettings(Table):
    """One entry of `tranches`: what a milestone pays."""

    name: Name
    amount_micros: Charge = Field(alias="amount")


class StepSettings(Table):
    """One entry of `steps`: the share of the deposit that a score earns."""

    score_nanos: Score = Field(alias="score")
    share_picos: Share = Field(alias="share")


class PlanSettings(Table):
    """`[plans.NAME]`: a billing pattern with its rates and thresholds."""

    pattern: Annotated[
        Literal[
            "pay_per_call",
            "pay_per_token",
            "subscription",
            "milestone",
            "streaming",
            "performance",
            "hybrid",
        ],
        one_of(PATTERNS, "pattern"),
    ]
    rates: Listed[RateSettings] = Field(default=(), min_length=1, max_length=ENTRIES_MAX)
    versions: Listed[VersionSettings] = Field(default=(), max_length=ENTRIES_MAX)
    settle: Annotated[
        SettleSettings,
        BeforeValidator(_adaptive, json_schema_input_type=SettleSettings | Literal["adaptive"]),
    ] = Field(default_factory=SettleSettings)
    exposure_max_micros: Micros | None = Field(default=None, alias="exposure_max")
    gate: GateSettings = Field(default_factory=GateSettings)
    draws_on: Literal["wallet", "escrow"] = "wallet"
    fee_micros: Charge | None = Field(default=None, alias="fee")
    period: Span | None = None
    at_period_end: Literal["release", "auto"] = "release"
    quota: QuotaSettings | None = None
    tranches: Listed[TrancheSettings] = Field(default=(), min_length=1, max_length=ENTRIES_MAX)
    ordered: bool = False
    steps: Listed[StepSettings] = Field(default=(), min_length=1, max_length=ENTRIES_MAX)
    outcome_key: PublicKey | None = None
    deposit_micros: Charge | None = Field(default=None, alias="deposit")
    auto_release_hours: int | None = Field(default=None, ge=1, le=87_600)
    renew: bool = False
    memo: Memo = ""
    at_close: Literal["refund", "leave"] | None = None
    caps: CapsSettings | None = None

    @property
    def on_wallet(self) -> bool:
        """Whether usage is drawn from the payer's wallet."""
        return self.pattern == "pay_per_call" and self.draws_on == "wallet"

    @property
    def at_once(self) -> bool:
        """Whether each payment is due as soon as it is known."""
        return self.pattern in DUE_AT_ONCE

    @property
    def adaptive(self) -> bool:
        """Whether the thresholds follow the usage."""
        return isinstance(self.settle, AdaptiveSettle)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of the escrows of an agreement under it, sorted."""
        if self.pattern == "hybrid":
            return ("base", "overage")
        return ("wallet",) if self.on_wallet else ("main",)

    @property
    def usage_role(self) -> str:
        """The role that metered usage draws on."""
        return self.roles[-1]

    @property
    def span(self) -> Duration | None:
        """How long a period lasts; None: as long as the agreement."""
        if self.period is None and self.pattern in _WITH_FEE:
            return PERIOD_DEFAULT
        return self.period

    @property
    def fee_max(self) -> int:
        """The highest fee of any version, in micros; 0 where there is none."""
        return max(self.fee_micros or 0, *(entry.fee_micros or 0 for entry in self.versions), 0)

    @property
    def tranche_total(self) -> int:
        """The sum of the tranches, in micros."""
        return sum(tranche.amount_micros for tranche in self.tranches)

    @property
    def deposits(self) -> tuple[tuple[str, int], ...]:
        """What is locked when an agreement is opened: (role, micros); empty where nothing is."""
        if self.pattern == "hybrid":
            return (("base", self.fee_max), ("overage", self.deposit_micros or 0))
        usual = {"subscription": self.fee_max, "milestone": self.tranche_total}
        deposit = self.deposit_micros or usual.get(self.pattern, 0)
        return (("main", deposit),) if deposit and not self.on_wallet else ()

    @property
    def hours(self) -> int | None:
        """After how many hours the service acts by itself; never before a period has ended."""
        if self.auto_release_hours is None and self.pattern in _WITH_FEE:
            assert self.span is not None  # A plan with a fee has periods.
            return -(-self.span.ms // HOUR_MS)
        return self.auto_release_hours

    @property
    def close(self) -> str:
        """What becomes of the rest at close."""
        return self.at_close or ("refund" if self.pattern in REFUNDING else "leave")

    def least_release(self, wallet_minimum: int) -> int:
        """What is released at least at once, in micros, where not all is paid."""
        if "min_release_micros" in self.settle.model_fields_set:
            return self.settle.min_release_micros
        if self.on_wallet:
            return wallet_minimum
        return 1 if self.at_once else self.settle.min_release_micros

    def wrote(self, key: str) -> bool:
        """Whether the file gives this key."""
        fields: dict[str, Any] = type(self).model_fields
        return any((fields[name].alias or name) == key for name in self.model_fields_set)
