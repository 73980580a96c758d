"""From settings to parts: what the configuration says, as the core's own facts.

The rule: everything that a plan says by leaving a key out is decided here or in the settings, and
nowhere behind. The core is told rates, roles, deposits and thresholds; it never sees a default.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from meterd.config import (
    AgreementSettings,
    DiscoverSettings,
    PlanSettings,
    RateSettings,
    Settings,
    WalletSettings,
)
from meterd.config.plans import CapsSettings, LimitSettings
from meterd.config.values import webhook_key
from meterd.core.accounts import Agreement
from meterd.core.caps import Caps
from meterd.core.meters import Aggregation, Meter
from meterd.core.money import MICROS, PICOS
from meterd.core.plans import AtClose, Gate, Pattern, PeriodEnd, Plan, Settle, Version
from meterd.core.pricing import (
    MILESTONE_METER,
    OUTCOME_METER,
    PERIOD_METER,
    Model,
    Rate,
    RateCard,
    Tier,
)
from meterd.core.settlement import Rules
from meterd.producers import Producer, Producers

PICOS_PER_MICRO = PICOS // MICROS


def meters_of(settings: Settings) -> dict[str, Meter]:
    """Make the meters of the configuration."""
    return {
        name: Meter(
            name,
            Aggregation(meter.aggregation),
            meter.unit,
            meter.event_type,
            meter.value or "",
            tuple(meter.dimensions.items()),
        )
        for name, meter in settings.meters.items()
    }


def plans_of(settings: Settings) -> dict[str, Plan]:
    """Make the plans of the configuration."""
    return {name: plan_of(name, plan, settings.wallet) for name, plan in settings.plans.items()}


def agreements_of(settings: Settings) -> list[Agreement]:
    """Make the agreements of the configuration."""
    return [_agreement(entry) for entry in settings.agreements]


def discoveries_of(settings: Settings) -> list[tuple[str, str]]:
    """Make (memo, plan) of the configuration, in its order; the memo is a shell-style pattern."""
    return [_discovery(entry) for entry in settings.discover]


def producers_of(settings: Settings) -> Producers:
    """Make the producers of the configuration."""
    made = (
        Producer(
            name=entry.name,
            token=entry.token,
            sources=entry.sources,
            keys=tuple(webhook_key(secret) for secret in entry.secrets),
            agreements=entry.agreements,
            caps=caps_of(entry.caps),
        )
        for entry in settings.producers
    )
    return Producers(made, required=settings.ingest.require_producer)


def rules_of(settings: Settings) -> Rules:
    """Make the rules of the state table."""
    escrow = settings.escrow
    return Rules(
        quarantine=escrow.in_doubt_quarantine.ms / 1000,
        observe_gap=escrow.observe_gap.ms / 1000,
        min_interval=escrow.min_interval.ms / 1000,
        voids_per_day=escrow.voids_per_day,
        release_max=escrow.release_max_micros,
        quantum=escrow.quantum_micros,
        wallet_minimum=settings.wallet.minimum_micros,
        strict=escrow.strict,
        honoured=escrow.idempotency == "honoured",
        credit_foreign=escrow.on_foreign_release == "credit",
        provider=escrow.agent_id or None,
    )


def plan_of(name: str, plan: PlanSettings, wallet: WalletSettings) -> Plan:
    """Make one plan."""
    card, *later = _versions(plan)
    return Plan(
        name=name,
        pattern=Pattern(plan.pattern),
        card=card.card,
        settle=_settle(plan, wallet),
        later=tuple(later),
        period=None if plan.span is None else plan.span.ms,
        period_end=PeriodEnd(plan.at_period_end),
        deposits=plan.deposits,
        auto_release_hours=plan.hours,
        memo=plan.memo,
        at_close=AtClose(plan.close),
        quota=None if plan.quota is None else (plan.quota.meter, plan.quota.units_nanos),
        ordered=plan.ordered,
        outcome_key=plan.outcome_key,
        renew=plan.renew,
        caps=caps_of(plan.caps),
        gate=Gate(
            enforce=plan.gate.enforce,
            overdraft=plan.gate.overdraft_micros,
            hold=plan.gate.hold.ms,
            fail_open=plan.gate.on_unknown == "open",
        ),
    )


def caps_of(given: LimitSettings | None) -> Caps | None:
    """Make the caps of a plan or a producer; None where there is not one."""
    if given is None:
        return None
    caps = Caps(
        event=given.event_max_micros,
        minute=given.minute_max_micros,
        day=given.day_max_micros,
        lifetime=given.lifetime_max_micros,
    )
    if isinstance(given, CapsSettings):
        window = given.velocity_window.ms
        caps = replace(caps, velocity=given.velocity_max_micros, window=window)
    return None if caps == Caps(window=caps.window) else caps


def _agreement(entry: AgreementSettings) -> Agreement:
    return Agreement(entry.id, entry.plan, entry.payer, entry.escrows.pairs, "config")


def _discovery(entry: DiscoverSettings) -> tuple[str, str]:
    return entry.memo, entry.plan


# Thresholds


def _settle(plan: PlanSettings, wallet: WalletSettings) -> Settle:
    """What is due at once, and what a wallet takes, needs no threshold in the file."""
    settle = plan.settle
    least = plan.least_release(wallet.minimum_micros)
    by_itself = plan.at_once or plan.on_wallet
    amount = least if by_itself and not (settle.asks or plan.adaptive) else settle.amount_micros
    return Settle(
        amount=amount,
        units=settle.units_nanos,
        interval=None if settle.interval is None else settle.interval.ms,
        escrow_percent=settle.escrow_percent,
        before_deadline=settle.before_deadline.ms,
        min_release=least,
        exposure_max=plan.exposure_max_micros,
    )


# Rate cards


def _versions(plan: PlanSettings) -> Iterator[Version]:
    """The card from the beginning, then one for each later version.

    A version that names no rates, or no fee, goes on with those before it.
    """
    rates, fee = plan.rates, plan.fee_micros
    yield Version(0, _card(plan, rates, fee))
    for entry in plan.versions:
        rates, fee = entry.rates or rates, entry.fee_micros or fee
        yield Version(entry.effective_from_ms, _card(plan, rates, fee))


def _card(plan: PlanSettings, rates: Sequence[RateSettings], fee: int | None) -> RateCard:
    if plan.pattern == "milestone":
        return RateCard(tuple(_tranches(plan)))
    if plan.pattern == "performance":
        return RateCard((_outcome(plan),))
    usage = [_rate(rate, plan.usage_role) for rate in rates]
    return RateCard((*_period(plan, usage, fee), *usage, *_quota(plan, usage)))


def _rate(rate: RateSettings, role: str) -> Rate:
    prices = (rate.price_picos, rate.percent_picos, rate.price_max_picos)
    return Rate(
        meter=rate.meter,
        price=next((price for price in prices if price is not None), 0),
        per=rate.per,
        where=tuple(sorted(rate.where.items())),
        model=Model(rate.model),
        tiers=tuple(
            Tier(tier.up_to_nanos, tier.price_picos, tier.flat_picos) for tier in rate.tiers
        ),
        free_units=rate.free_units_nanos or 0,
        minimum=rate.minimum_micros,
        maximum=rate.maximum_micros,
        role=role,
    )


def _period(plan: PlanSettings, usage: Sequence[Rate], fee: int | None) -> Iterator[Rate]:
    """The rate of the counter of ended periods: the fee, or nothing where there is none.

    A minimum counts once a period has ended, so it needs that counter too.
    """
    if plan.span is not None or any(rate.minimum is not None for rate in usage):
        yield Rate(PERIOD_METER, (fee or 0) * PICOS_PER_MICRO, role=plan.roles[0])


def _quota(plan: PlanSettings, usage: Sequence[Rate]) -> Iterator[Rate]:
    """A rate of nothing, so that usage that only counts against the quota is counted at all."""
    if plan.quota is not None and plan.quota.meter not in {rate.meter for rate in usage}:
        yield Rate(plan.quota.meter, 0, role=plan.usage_role)


def _tranches(plan: PlanSettings) -> Iterator[Rate]:
    for tranche in plan.tranches:
        price = tranche.amount_micros * PICOS_PER_MICRO
        yield Rate(MILESTONE_METER, price, where=(("name", tranche.name),))


def _outcome(plan: PlanSettings) -> Rate:
    """The curve of steps, as tiers on the score: each step begins where the tier below it ends."""
    deposit = plan.deposit_micros or 0
    tiers, flat = [], 0
    for step in sorted(plan.steps, key=lambda step: step.score_nanos):
        if step.score_nanos:
            tiers.append(Tier(step.score_nanos - 1, 0, flat))
        flat = deposit * step.share_picos // MICROS
    return Rate(OUTCOME_METER, 0, model=Model.VOLUME, tiers=(*tiers, Tier(None, 0, flat)))
