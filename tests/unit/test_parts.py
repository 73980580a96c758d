"""From settings to parts: what the core is told of each pattern, down to the worked bills."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterd import config, parts
from meterd.core.accounts import Agreement
from meterd.core.meters import Aggregation, Meter
from meterd.core.money import MICROS, NANOS
from meterd.core.plans import AtClose, Gate, Pattern, PeriodEnd, Plan, Settle, Version
from meterd.core.pricing import (
    MILESTONE_METER,
    OUTCOME_METER,
    PERIOD_METER,
    Dimensions,
    Model,
    Rate,
    RateCard,
    Tier,
    Usage,
)

EXAMPLES = Path(__file__).parents[2] / "config"
KEY = {"METERD_ESCROW__API_KEY": "key"}
WEEK_MS = 7 * 86_400_000
MICRO = 10**6  # In picos.


def example(name: str) -> Plan:
    """The one plan of a shipped example."""
    (plan,) = parts.plans_of(config.load(EXAMPLES / f"{name}.toml", KEY)).values()
    return plan


def made(text: str) -> Plan:
    """The one plan of a text."""
    (plan,) = parts.plans_of(config.parse(f"[meters.units]\n{text}", KEY)).values()
    return plan


def bill(card: RateCard, *used: tuple[str, Mapping[str, str], int]) -> dict[str, Fraction]:
    """What usage in nanos costs under a card, by role."""
    usage: dict[tuple[str, Dimensions], Usage] = {}
    for meter, dimensions, nanos in used:
        key = (meter, card.priced(meter, dimensions))
        usage[key] = Usage(usage.get(key, Usage(0)).quantity + nanos)
    return card.charge(usage)


# -- The worked bills of the seven patterns --------------------------------------------------------


def test_a_call_costs_a_thousandth_and_a_wallet_pays_ten_at_once():
    """pay_per_call: micro-fees are gathered to the wallet's minimum."""
    plan = example("pay_per_call")

    assert {"wallet": Fraction("0.010")} == bill(plan.card, ("calls", {}, 10 * NANOS))
    assert ("wallet",) == plan.roles
    assert Settle(amount=10_000, min_release=10_000) == plan.settle


def test_a_thousand_tokens_cost_what_their_model_and_kind_cost():
    """pay_per_token: the first rate that matches, and the plain one for all else."""
    card = example("pay_per_token").card
    thousand = 1000 * NANOS

    assert {"main": Fraction("0.002")} == bill(card, ("tokens", {"kind": "input"}, thousand))
    assert {"main": Fraction("0.0125")} == bill(
        card,
        ("tokens", {"model": "m-large", "kind": "output"}, thousand),
        ("tokens", {"model": "m-small", "kind": "output"}, thousand),
        ("tokens", {"model": "m-small", "kind": "cached"}, thousand),
    )


def test_a_week_costs_ten_whatever_is_used():
    """Subscription: the fee is the rate of the counter of ended periods; usage costs nothing."""
    plan = example("subscription")
    used = ("requests", {}, 900 * NANOS)

    assert {"main": Fraction(0)} == bill(plan.card, used)
    assert {"main": Fraction(20)} == bill(plan.card, used, (PERIOD_METER, {}, 2 * NANOS))
    assert (WEEK_MS, PeriodEnd.RELEASE, 168) == (
        plan.period,
        plan.period_end,
        plan.auto_release_hours,
    )
    assert ("requests", 1000 * NANOS) == plan.quota
    assert (("main", 10 * MICROS),) == plan.deposits
    assert Settle(amount=1, min_release=1) == plan.settle


def test_three_tranches_cost_ten_together():
    """Milestone: each is the rate of a counter of its own."""
    plan = example("milestone")
    reached = [(MILESTONE_METER, {"name": name}, NANOS) for name in plan.tranches]

    assert ("draft", "build", "launch") == plan.tranches
    assert [Fraction("2.5"), Fraction(5), Fraction("2.5")] == [
        bill(plan.card, one)["main"] for one in reached
    ]
    assert {"main": Fraction(10)} == bill(plan.card, *reached)
    assert plan.card.match(MILESTONE_METER, {"name": "other"}) is None
    assert not plan.ordered


def test_ten_thousand_units_cost_the_budget_of_ten():
    """Streaming: batches of 100 units or a minute; the rest goes back."""
    plan = example("streaming")

    assert {"main": Fraction(10)} == bill(plan.card, ("units", {}, 10_000 * NANOS))
    assert Settle(units=100 * NANOS, interval=60_000) == plan.settle
    assert AtClose.REFUND is plan.at_close
    assert (("main", 10 * MICROS),) == plan.deposits


@pytest.mark.parametrize(
    ("score", "paid"),
    [
        ("1", "10"),
        ("0.9", "10"),
        ("0.899999999", "7"),
        ("0.7", "7"),
        ("0.699999999", "0"),
        ("0", "0"),
    ],
)
def test_a_score_earns_the_share_of_its_step(score: str, paid: str):
    """Performance: lower bounds belong to their step; below the lowest nothing is earned."""
    nanos = int(Fraction(score) * NANOS)

    assert {"main": Fraction(paid)} == bill(example("performance").card, (OUTCOME_METER, {}, nanos))


@pytest.mark.parametrize(
    ("units", "overage"), [(999, "0"), (1000, "0"), (1001, "0.01"), (1500, "5"), (1501, "5.01")]
)
def test_a_week_of_five_covers_a_thousand_units(units: int, overage: str):
    """Hybrid: the fee from one escrow, each unit beyond from the other."""
    plan = example("hybrid")

    assert {"base": Fraction(5), "overage": Fraction(overage)} == bill(
        plan.card, ("units", {}, units * NANOS), (PERIOD_METER, {}, NANOS)
    )
    assert (("base", 5 * MICROS), ("overage", 5 * MICROS)) == plan.deposits
    assert ("base", "overage") == plan.roles


@pytest.mark.parametrize("name", sorted(file.stem for file in EXAMPLES.glob("*.toml")))
def test_an_agreement_has_the_roles_that_its_cards_draw_on(name: str):
    """What the configuration asks of an agreement is what the core's plan has."""
    settings = config.load(EXAMPLES / f"{name}.toml", KEY)
    plans = parts.plans_of(settings)

    assert [plan.roles for plan in settings.plans.values()] == [
        plan.roles for plan in plans.values()
    ]
    assert all(
        set(plans[agreement.plan].roles) == {role for role, _ in agreement.escrows}
        for agreement in parts.agreements_of(settings)
    )


def test_every_pattern_has_its_example():
    """Seven files, each named for its pattern."""
    assert [pattern.value for pattern in Pattern] == [
        example(pattern.value).pattern.value for pattern in Pattern
    ]


# -- Rates -----------------------------------------------------------------------------------------


def test_each_charge_model_becomes_its_rate():
    """Tiers, shares and caps in the core's scales; what a rate leaves out stays out."""
    card = made(
        """
[plans.one]
pattern = "pay_per_token"
settle = { amount = "0.50" }

[[plans.one.rates]]
meter = "units"
model = "package"
price = "0.5"
per = 10
where = { z = "1", a = "2" }

[[plans.one.rates]]
meter = "units"
model = "percentage"
percent = "2.5"
where = { kind = "share" }

[[plans.one.rates]]
meter = "units"
model = "dynamic"
price_max = "0.05"
where = { kind = "asked" }

[[plans.one.rates]]
meter = "units"
model = "graduated"
minimum = "1"
maximum = "2.50"
free_units = "0.5"
tiers = [{ up_to = 1000, price = "0.01", flat = "0.10" }, { price = "0.005" }]
"""
    ).card

    assert (
        Rate(PERIOD_METER, 0),
        Rate("units", 500_000 * MICRO, 10, (("a", "2"), ("z", "1")), Model.PACKAGE),
        Rate("units", 25_000 * MICRO, where=(("kind", "share"),), model=Model.PERCENTAGE),
        Rate("units", 50_000 * MICRO, where=(("kind", "asked"),), model=Model.DYNAMIC),
        Rate(
            "units",
            0,
            model=Model.GRADUATED,
            tiers=(Tier(1000 * NANOS, 10_000 * MICRO, 100_000 * MICRO), Tier(None, 5_000 * MICRO)),
            free_units=NANOS // 2,
            minimum=MICROS,
            maximum=2_500_000,
        ),
    ) == card.rates
    assert card == RateCard.from_text(card.text)


def test_a_plan_of_plain_rates_has_the_card_that_it_always_had():
    """Nothing is added to a plan without periods and minimums, so its card keeps its name."""
    assert (Rate("units", 1_000 * MICRO),) == example("streaming").card.rates


def test_a_period_without_a_fee_is_counted_all_the_same():
    """Free units and minimums are of a period, so periods are counted, at no price."""
    plan = made(
        """
[plans.one]
pattern = "pay_per_call"
period = "30d"
rates = [{ meter = "units", price = "0.01", free_units = 100 }]
"""
    )

    assert Rate(PERIOD_METER, 0, role="wallet") == plan.card.rates[0]
    assert {"wallet": Fraction("0.01")} == bill(plan.card, ("units", {}, 101 * NANOS))


def test_a_later_version_goes_on_with_what_it_does_not_name():
    """Rates or a fee of its own, the others as before; each card from its own moment."""
    plan = made(
        """
[plans.one]
pattern = "hybrid"
fee = "5.00"
deposit = "2.00"
rates = [{ meter = "units", price = "0.01" }]
settle = { units = 10 }

[[plans.one.versions]]
effective_from = 2026-12-01T00:00:00Z
fee = "6.00"

[[plans.one.versions]]
effective_from = 2027-01-01T00:00:00Z
rates = [{ meter = "units", price = "0.02" }]
"""
    )
    period, units = Rate(PERIOD_METER, 0, role="base"), Rate("units", 0, role="overage")

    def card(fee: int, price: int) -> RateCard:
        return RateCard(
            (
                Rate(period.meter, fee * MICROS * MICRO, role="base"),
                Rate(units.meter, price * MICRO, role="overage"),
            )
        )

    assert card(5, 10_000) == plan.card
    assert (
        Version(1_796_083_200_000, card(6, 10_000)),
        Version(1_798_761_600_000, card(6, 20_000)),
    ) == plan.later
    assert (("base", 6 * MICROS), ("overage", 2 * MICROS)) == plan.deposits


@given(
    steps=st.dictionaries(
        st.integers(min_value=0, max_value=NANOS),
        st.integers(min_value=1, max_value=10**6),
        min_size=1,
        max_size=8,
    ),
    score=st.integers(min_value=0, max_value=NANOS),
    falling=st.booleans(),
)
def test_any_curve_of_steps_pays_what_the_highest_step_reached_says(
    steps: dict[int, int], score: int, falling: bool
):
    """Whatever the steps, in either order: the share of the greatest bound that is not above."""
    listed = ", ".join(
        f'{{ score = "{bound // NANOS}.{bound % NANOS:09d}",'
        f' share = "{share // 10**6}.{share % 10**6:06d}" }}'
        for bound, share in sorted(steps.items(), reverse=falling)
    )
    plan = made(f'[plans.one]\npattern = "performance"\ndeposit = "3.000001"\nsteps = [{listed}]\n')
    reached = [share for bound, share in sorted(steps.items()) if bound <= score]
    expected = Fraction(3_000_001, MICROS) * Fraction(reached[-1] if reached else 0, 10**6)

    assert {"main": expected} == bill(plan.card, (OUTCOME_METER, {}, score))


# -- Thresholds, gate, agreements ------------------------------------------------------------------

RATES = 'rates = [{ meter = "units", price = "0.01" }]'


@pytest.mark.parametrize(
    ("keys", "settle"),
    [
        (f'pattern = "pay_per_call"\n{RATES}', Settle(amount=20_000, min_release=20_000)),
        (
            f'pattern = "pay_per_call"\nsettle = {{ interval = "1m" }}\n{RATES}',
            Settle(interval=60_000, min_release=20_000),
        ),
        (
            f'pattern = "pay_per_call"\nsettle = "adaptive"\nexposure_max = "1"\n{RATES}',
            Settle(exposure_max=MICROS, min_release=20_000),
        ),
        (
            f'pattern = "streaming"\nsettle = "adaptive"\nexposure_max = "1"\n{RATES}',
            Settle(exposure_max=MICROS),
        ),
        (
            'pattern = "subscription"\nfee = "10"\nsettle = { before_deadline = "40m" }',
            Settle(amount=1, min_release=1, before_deadline=2_400_000),
        ),
        (
            'pattern = "subscription"\nfee = "10"\nsettle = { amount = "1", min_release = "0.5" }',
            Settle(amount=MICROS, min_release=500_000),
        ),
        (
            f'pattern = "pay_per_token"\nsettle = {{ escrow_percent = 5 }}\n{RATES}',
            Settle(escrow_percent=5),
        ),
    ],
)
def test_thresholds_follow_from_the_pattern_where_the_file_names_none(keys: str, settle: Settle):
    """A wallet's minimum, payments that are due at once, adaptive bounds."""
    assert settle == made(f'[wallet]\nminimum = "0.02"\n[plans.one]\n{keys}\n').settle


def test_the_gate_is_told_as_the_file_has_it():
    """In micros and ms; "open" is failing open."""
    gate = 'gate = { enforce = false, overdraft = "0.50", hold = "5s", on_unknown = "open" }'
    plan = made(f'[plans.one]\npattern = "pay_per_call"\n{RATES}\n{gate}\n')

    assert Gate(enforce=False, overdraft=500_000, hold=5_000, fail_open=True) == plan.gate
    assert Gate() == example("pay_per_call").gate


def test_agreements_have_their_escrows_by_role_and_the_oldest_first():
    """Ids default to the first escrow's."""
    text = f"""
[meters.units]
[plans.week]
pattern = "hybrid"
fee = "5"
deposit = "5"
settle = {{ units = 10 }}
{RATES}
[plans.call]
pattern = "pay_per_call"
{RATES}
[[agreements]]
plan = "week"
payer = "agent-a"
escrows = {{ overage = ["esc_3", "esc_1"], base = "esc_2" }}
[[agreements]]
id = "b"
plan = "call"
escrows = {{ wallet = "agent:b" }}
"""
    pairs = (("base", "esc_2"), ("overage", "esc_3"), ("overage", "esc_1"))

    assert [
        Agreement("esc_2", "week", "agent-a", pairs, "config"),
        Agreement("b", "call", "", (("wallet", "agent:b"),), "config"),
    ] == parts.agreements_of(config.parse(text, KEY))


def test_meters_and_discoveries_are_those_of_the_file():
    """Aggregations by their names, memos in their order."""
    meters = parts.meters_of(config.load(EXAMPLES / "subscription.toml", KEY))
    found = parts.discoveries_of(config.load(EXAMPLES / "streaming.toml", KEY))

    assert {"requests": Meter("requests", Aggregation.COUNT, "request")} == meters
    assert [("inference_stream:*", "stream")] == found
