"""What must agree between the keys of one plan, for each of the seven patterns.

The rule: a check yields every mistake that it finds and looks at no key that is a mistake by
itself, so that whoever repairs the list is done. Places are relative to the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from meterd.config.plans import (
    HOUR_MS,
    PATTERNS_OF,
    PlanSettings,
    RateSettings,
    StepSettings,
    TierSettings,
)
from meterd.config.table import REQUIRED, Found, Place
from meterd.config.values import EXAMPLE_PRICE, MORE_THAN_NOTHING
from meterd.core import money

# Keys that a pattern cannot do without.
REQUIRED_OF: dict[str, tuple[str, ...]] = {
    "pay_per_call": ("rates",),
    "pay_per_token": ("rates",),
    "subscription": ("fee",),
    "milestone": ("tranches",),
    "streaming": ("rates",),
    "performance": ("deposit", "steps"),
    "hybrid": ("fee", "rates", "deposit"),
}
# What each charge model is told by, in the place of `price`.
PRICED_BY: dict[str, str] = {
    "graduated": "tiers",
    "volume": "tiers",
    "percentage": "percent",
    "dynamic": "price_max",
}
# What else a model has no use for.
USELESS: dict[str, tuple[str, ...]] = {"percentage": ("per",), "dynamic": ("per", "free_units")}

# What is said of each contradiction: what is wrong, and what to write instead.
KEY_OF_OTHERS = "is no key of a {pattern} plan; remove it, or write pattern = {others}"
IS_REQUIRED = "is required; write {example}"
OVERAGE_WITHOUT_BUDGET = (
    "is required: usage beyond the fee is drawn on an escrow of its own, which is the budget for"
    ' it; write deposit = "5.00"'
)
PRICE_OF_OTHERS = 'says nothing under model = "{model}", which is priced by {key}; remove it'
TIERS_OUT_OF_ORDER = (
    "is not above the {before} of the tier before; write the tiers in ascending order"
)
TIERS_WITHOUT_END = "has no price for more than {last} units; add a last tier without up_to"
TIER_WITHOUT_BOUND = "is required on all tiers but the last; write up_to = 1000"
TIER_WITHOUT_PRICE = 'has no price; write price = "0.01", or price = "0" where it is free'
MINIMUM_ABOVE_MAXIMUM = "is above maximum ({maximum}); lower it, or raise maximum"
AMOUNT_BELOW_MIN_RELEASE = (
    "is below min_release ({least}), which holds it back; raise it, or lower min_release"
)
MIN_RELEASE_BELOW_WALLET = (
    "is below wallet.minimum ({minimum}), the least that the wallet's service takes; raise it,"
    " or lower wallet.minimum"
)
PERCENT_OF_A_WALLET = "has no deposit to be a share of, since the plan draws on a wallet; remove it"
STREAM_WITHOUT_THRESHOLD = (
    "a streaming plan is paid in batches; write at least one of units, interval and amount,"
    ' such as settle = { units = 100, interval = "60s" }'
)
PLAN_WITHOUT_THRESHOLD = (
    "has no threshold, so nothing would be paid before the deadline; write at least one of"
    ' amount, units, interval and escrow_percent, such as settle = { amount = "0.50" }'
)
ADAPTIVE_WITHOUT_BOUND = (
    'is required by settle = "adaptive", which keeps the exposure below it;'
    ' write exposure_max = "1.00"'
)
ADAPTIVE_FOR_NOTHING = (
    "each payment of a {pattern} plan is due at once, so no threshold can adapt; remove it"
)
BOUND_WITHOUT_ADAPTIVE = 'is the bound of settle = "adaptive" alone; write that, or remove it'
VERSIONS_OUT_OF_ORDER = "is not after the version before it; write the versions oldest first"
VERSION_WITHOUT_CHANGE = "changes nothing; write rates, fee or both, or remove it"
FEE_OF_OTHERS = 'is no key of a {pattern} plan; remove it, or write pattern = "subscription"'
WALLET_IS_NOT_LOCKED = 'a wallet is not locked; remove it, or write draws_on = "escrow"'
DEPOSIT_BELOW_FEE = "is below the fee ({fee}), so no period could be paid; raise it, or remove it"
TRANCHES_ABOVE_DEPOSIT = (
    "sum up to {total}, which is above deposit ({deposit}); lower them, or raise deposit"
)
TRANCHE_TWICE = 'tranches[{first}] is named "{name}" too; write another name'
STEPS_OUT_OF_ORDER = (
    "is out of order: the scores must fall (or rise) from step to step; sort the steps"
)
SHARE_WITHOUT_AN_AMOUNT = (
    "of the deposit ({deposit}) is no amount with twelve decimals; write fewer decimals"
)
HOURS_BELOW_PERIOD = (
    "the service would act before the period ({period}) has ended; write at least {hours}"
)
DEADLINE_WITHIN_A_DOUBT = (
    "the service acts after {hours} h, which is no longer than a doubt takes (twice"
    " escrow.in_doubt_quarantine and a minute), so no fee could be released before; write at least"
    " {least}, or lower escrow.in_doubt_quarantine"
)
AUTO_TO_THE_PAYER = (
    '"auto" leaves the fee to the service, which gives it back (escrow.on_deadline = "consumer");'
    ' write at_period_end = "release"'
)
# Besides two quarantines, what the readings between them take.
DOUBT_MARGIN_MS = 60_000


def mistakes_in(plan: PlanSettings) -> Found:
    """Yield every contradiction inside one plan, with what to write instead."""
    for check in CHECKS:
        yield from check(plan)


def rates_of(plan: PlanSettings) -> Iterator[tuple[Place, Sequence[RateSettings], RateSettings]]:
    """Yield each rate of each version: its place, those before it in its version, itself."""
    lists: list[tuple[Place, Sequence[RateSettings]]] = [(("rates",), plan.rates)]
    lists += [
        (("versions", index, "rates"), entry.rates) for index, entry in enumerate(plan.versions)
    ]
    for place, rates in lists:
        for index, rate in enumerate(rates):
            yield (*place, index), rates[:index], rate


def _keys_belong(plan: PlanSettings) -> Found:
    for key, patterns in PATTERNS_OF.items():
        if plan.wrote(key) and plan.pattern not in patterns:
            others = " or ".join(f'"{pattern}"' for pattern in patterns)
            yield (key,), KEY_OF_OTHERS.format(pattern=plan.pattern, others=others)
    for index, entry in enumerate(plan.versions):
        if entry.fee_micros is not None and plan.pattern not in PATTERNS_OF["fee"]:
            yield ("versions", index, "fee"), FEE_OF_OTHERS.format(pattern=plan.pattern)


def _keys_are_there(plan: PlanSettings) -> Found:
    for key in REQUIRED_OF[plan.pattern]:
        if plan.wrote(key):
            continue
        if (plan.pattern, key) == ("hybrid", "deposit"):
            yield (key,), OVERAGE_WITHOUT_BUDGET
        else:
            yield (key,), IS_REQUIRED.format(example=REQUIRED[key])


# Rates


def _rates_are_priced(plan: PlanSettings) -> Found:
    """Each charge model by its own key, and by no other."""
    for place, _, rate in rates_of(plan):
        wanted, given = PRICED_BY.get(rate.model, "price"), _given_to_price(rate)
        useless = {*PRICED_BY.values(), "price"} - {wanted} | {*USELESS.get(rate.model, ())}
        if wanted not in given:
            yield (*place, wanted), IS_REQUIRED.format(example=REQUIRED[wanted])
        elif wanted == "price" and rate.price_picos == 0 and plan.pattern != "subscription":
            yield (*place, wanted), MORE_THAN_NOTHING.format(example=EXAMPLE_PRICE)
        for key in given:
            if key in useless:
                yield (*place, key), PRICE_OF_OTHERS.format(model=rate.model, key=wanted)


def _given_to_price(rate: RateSettings) -> list[str]:
    """The keys of a rate that say something about its price, in a fixed order."""
    keys = {
        "price": rate.price_picos is not None,
        "tiers": bool(rate.tiers),
        "percent": rate.percent_picos is not None,
        "price_max": rate.price_max_picos is not None,
        "per": rate.per != 1,
        "free_units": rate.free_units_nanos is not None,
    }
    return [key for key, given in keys.items() if given]


def _tiers_ascend(plan: PlanSettings) -> Found:
    for place, _, rate in rates_of(plan):
        for inner, sentence in _tier_mistakes(rate.tiers):
            yield (*place, "tiers", *inner), sentence


def _tier_mistakes(tiers: Sequence[TierSettings]) -> Found:
    for index, tier in enumerate(tiers):
        if not tier.model_fields_set & {"price_picos", "flat_picos"}:
            yield (index,), TIER_WITHOUT_PRICE
        if tier.up_to_nanos is None and index < len(tiers) - 1:
            yield (index, "up_to"), TIER_WITHOUT_BOUND
    for index, (before, tier) in enumerate(pairwise(tiers), start=1):
        bounds = before.up_to_nanos, tier.up_to_nanos
        if bounds[0] is not None and bounds[1] is not None and bounds[1] <= bounds[0]:
            before_text = money.format_quantity(bounds[0])
            yield (index, "up_to"), TIERS_OUT_OF_ORDER.format(before=before_text)
    if tiers and (last := tiers[-1].up_to_nanos) is not None:
        yield (), TIERS_WITHOUT_END.format(last=money.format_quantity(last))


def _minimum_below_maximum(plan: PlanSettings) -> Found:
    for place, _, rate in rates_of(plan):
        maximum = rate.maximum_micros
        if maximum is not None and (rate.minimum_micros or 0) > maximum:
            text = money.format_amount(maximum)
            yield (*place, "minimum"), MINIMUM_ABOVE_MAXIMUM.format(maximum=text)


def _versions_follow(plan: PlanSettings) -> Found:
    for index, entry in enumerate(plan.versions):
        place: Place = ("versions", index)
        if not entry.rates and entry.fee_micros is None:
            yield place, VERSION_WITHOUT_CHANGE
        if index and entry.effective_from_ms <= plan.versions[index - 1].effective_from_ms:
            yield (*place, "effective_from"), VERSIONS_OUT_OF_ORDER


# Thresholds


def _plan_settles(plan: PlanSettings) -> Found:
    """Something other than the deadline must make money move; a stream wants steady batches."""
    if plan.adaptive or plan.at_once or plan.on_wallet or plan.settle.counts:
        return
    if plan.pattern == "streaming":
        yield ("settle",), STREAM_WITHOUT_THRESHOLD
    elif not plan.settle.asks:
        yield ("settle",), PLAN_WITHOUT_THRESHOLD


def _adaptive_has_its_bound(plan: PlanSettings) -> Found:
    if plan.pattern not in PATTERNS_OF["exposure_max"]:
        if plan.adaptive:
            yield ("settle",), ADAPTIVE_FOR_NOTHING.format(pattern=plan.pattern)
    elif plan.adaptive and plan.exposure_max_micros is None:
        yield ("exposure_max",), ADAPTIVE_WITHOUT_BOUND
    elif plan.exposure_max_micros is not None and not plan.adaptive:
        yield ("exposure_max",), BOUND_WITHOUT_ADAPTIVE


def release_mistakes(plan: PlanSettings, wallet_minimum: int) -> Found:
    """Yield what would be held back for ever, or refused by the wallet's service."""
    least = plan.least_release(wallet_minimum)
    if plan.on_wallet and least < wallet_minimum:
        minimum = money.format_amount(wallet_minimum)
        yield ("settle", "min_release"), MIN_RELEASE_BELOW_WALLET.format(minimum=minimum)
    sentence = AMOUNT_BELOW_MIN_RELEASE.format(least=money.format_amount(least))
    if plan.settle.amount_micros is not None and plan.settle.amount_micros < least:
        yield ("settle", "amount"), sentence
    if plan.exposure_max_micros is not None and plan.exposure_max_micros < least:
        yield ("exposure_max",), sentence


# What is drawn on


def _wallet_is_no_escrow(plan: PlanSettings) -> Found:
    if not plan.on_wallet:
        return
    for key in ("deposit", "auto_release_hours", "renew"):
        if plan.wrote(key):
            yield (key,), WALLET_IS_NOT_LOCKED
    if plan.at_close == "refund":
        yield ("at_close",), WALLET_IS_NOT_LOCKED
    if plan.settle.escrow_percent is not None:
        yield ("settle", "escrow_percent"), PERCENT_OF_A_WALLET


def _deposit_pays_the_fee(plan: PlanSettings) -> Found:
    deposit = plan.deposit_micros
    if plan.pattern == "subscription" and deposit is not None and deposit < plan.fee_max:
        yield ("deposit",), DEPOSIT_BELOW_FEE.format(fee=money.format_amount(plan.fee_max))


def _tranches_fit(plan: PlanSettings) -> Found:
    names: dict[str, int] = {}
    for index, tranche in enumerate(plan.tranches):
        first = names.setdefault(tranche.name, index)
        if first != index:
            sentence = TRANCHE_TWICE.format(first=first, name=tranche.name)
            yield ("tranches", index, "name"), sentence
    deposit = plan.deposit_micros
    if plan.pattern == "milestone" and deposit is not None and plan.tranche_total > deposit:
        total, text = money.format_amount(plan.tranche_total), money.format_amount(deposit)
        yield ("tranches",), TRANCHES_ABOVE_DEPOSIT.format(total=total, deposit=text)


def _steps_are_a_curve(plan: PlanSettings) -> Found:
    yield from _step_order(plan.steps)
    deposit = plan.deposit_micros
    for index, step in enumerate(plan.steps):
        if deposit is not None and deposit * step.share_picos % money.MICROS:
            sentence = SHARE_WITHOUT_AN_AMOUNT.format(deposit=money.format_amount(deposit))
            yield ("steps", index, "share"), sentence


def _step_order(steps: Sequence[StepSettings]) -> Found:
    """The first two steps say which way the scores go."""
    scores = [step.score_nanos for step in steps]
    falling = len(scores) < 2 or scores[1] < scores[0]
    for index, (before, score) in enumerate(pairwise(scores), start=1):
        if score == before or (score < before) != falling:
            yield ("steps", index, "score"), STEPS_OUT_OF_ORDER


# Periods


def _service_waits_for_the_period(plan: PlanSettings) -> Found:
    if plan.span is None or plan.pattern not in PATTERNS_OF["fee"]:
        return
    hours = -(-plan.span.ms // HOUR_MS)
    if plan.auto_release_hours is not None and plan.auto_release_hours < hours:
        sentence = HOURS_BELOW_PERIOD.format(period=plan.span, hours=hours)
        yield ("auto_release_hours",), sentence


def period_mistakes(plan: PlanSettings, quarantine_ms: int, on_deadline: str) -> Found:
    """Yield what keeps a period's fee from being paid.

    A period may be as short as one likes: it is the service's own deadline that takes the fee away,
    and a release so near to it that a doubt could not be resolved is never made.
    """
    if plan.pattern not in PATTERNS_OF["fee"] or plan.hours is None:
        return
    needed = 2 * quarantine_ms + DOUBT_MARGIN_MS
    if plan.hours * HOUR_MS <= needed:
        least = needed // HOUR_MS + 1
        sentence = DEADLINE_WITHIN_A_DOUBT.format(hours=plan.hours, least=least)
        yield ("auto_release_hours",), sentence
    if plan.at_period_end == "auto" and on_deadline == "consumer":
        yield ("at_period_end",), AUTO_TO_THE_PAYER


CHECKS: tuple[Callable[[PlanSettings], Found], ...] = (
    _keys_belong,
    _keys_are_there,
    _rates_are_priced,
    _tiers_ascend,
    _minimum_below_maximum,
    _versions_follow,
    _plan_settles,
    _adaptive_has_its_bound,
    _wallet_is_no_escrow,
    _deposit_pays_the_fee,
    _tranches_fit,
    _steps_are_a_curve,
    _service_waits_for_the_period,
)
