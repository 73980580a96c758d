"""Rate cards against a naive price made of fractions, in any order and any batching."""

from __future__ import annotations

from fractions import Fraction

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterd.core.money import NANOS, PICOS
from meterd.core.pricing import (
    MAIN,
    OTHER,
    OUTCOME_METER,
    PERIOD_METER,
    Line,
    Model,
    Rate,
    RateCard,
    Tier,
    Usage,
)
from tests.unit.core.naive import naive_charge

VALUES = ["", "a", "b", "c", OTHER, f"{OTHER}*", "zzz"]
PERS = [1, 3, 7, 10, 60, 1000, 3600]

_wheres = st.dictionaries(st.sampled_from(["kind", "model"]), st.sampled_from(VALUES), max_size=2)
_rates = st.builds(
    lambda meter, price, per, where: Rate(meter, price, per, tuple(sorted(where.items()))),
    st.sampled_from(["tokens", "calls"]),
    st.integers(0, 10**18),
    st.sampled_from(PERS),
    _wheres,
)
_events = st.tuples(
    st.sampled_from(["tokens", "calls"]),
    st.dictionaries(st.sampled_from(["kind", "model", "region"]), st.sampled_from(VALUES)),
    st.integers(1, 10**24),
)


def naive(rates, meter, dimensions, nanos):
    """Price one event by the first rate that fits; None when there is none."""
    for rate in rates:
        if rate.meter == meter and all(dimensions.get(n, "") == v for n, v in rate.where):
            return Fraction(nanos, NANOS) * Fraction(rate.price, PICOS) / rate.per
    return None


@given(st.lists(_rates, min_size=1, max_size=5), st.lists(_events, max_size=12), st.randoms())
def test_charge_of_the_counters_is_the_sum_of_naive_prices(rates, events, random):
    """Counters by priced dimensions hold all that the price needs, whatever the order."""
    card = RateCard(tuple(rates))
    expected = Fraction(0)
    usage: dict = {}
    random.shuffle(events)
    for meter, dimensions, nanos in events:
        price = naive(rates, meter, dimensions, nanos)
        assert (price is None) == (card.match(meter, dimensions) is None)
        if price is not None:
            expected += price
            key = meter, card.priced(meter, dimensions)
            usage[key] = Usage(usage.get(key, Usage(0)).quantity + nanos)

    assert expected == card.charge(usage).get(MAIN, 0)


@given(st.lists(_rates, min_size=1, max_size=5), _events)
def test_priced_dimensions_are_priced_as_the_event_itself(rates, event):
    """Reducing an event's dimensions never changes which rate fits, nor does reducing twice."""
    card = RateCard(tuple(rates))
    meter, dimensions, _ = event
    if meter not in card.meters:
        return
    priced = card.priced(meter, dimensions)

    assert card.match(meter, dimensions) == card.match(meter, dict(priced))
    assert priced == card.priced(meter, dict(priced))


@pytest.mark.parametrize("per", PERS)
def test_rate_for_a_lot_is_exact_when_the_lot_is_no_power_of_ten(per):
    """A price of 0.01 for `per` units, paid unit by unit, is 0.01 after `per` of them."""
    card = RateCard((Rate("tokens", PICOS // 100, per), Rate("calls", 1, 11)))
    one = card.weights[0] * NANOS

    assert Fraction(1, 100) == Fraction(one * per, card.denominator)
    assert Fraction(1, 100 * per) == card.charge({("tokens", ()): Usage(NANOS)})[MAIN]


def test_million_models_make_one_counter():
    """Values that no rate names are one."""
    card = RateCard((Rate("tokens", 5, 1, (("model", "large"),)), Rate("tokens", 1)))
    priced = {card.priced("tokens", {"model": f"m{n}"}) for n in range(1000)}

    assert {(("model", OTHER),)} == priced
    assert (("model", "large"),) == card.priced("tokens", {"model": "large", "region": "eu"})
    assert (("model", ""),) == card.priced("tokens", {})


def test_value_that_no_rate_names_is_never_priced_by_a_rate_for_the_word_other():
    """A rate may name the word that stands for all the rest."""
    card = RateCard((Rate("tokens", 5, 1, (("kind", OTHER),)), Rate("tokens", 1)))
    unnamed, named = card.priced("tokens", {"kind": "x"}), card.priced("tokens", {"kind": OTHER})

    assert unnamed != named
    used = {("tokens", unnamed): Usage(NANOS), ("tokens", named): Usage(NANOS)}
    assert {MAIN: Fraction(6, PICOS)} == card.charge(used)


def test_word_for_all_the_rest_stays_what_counters_were_stored_under():
    """It gets as many stars as it takes to be a word that no rate names, and nothing else."""
    named = tuple(
        Rate("tokens", 5, 1, (("kind", word),)) for word in (OTHER, f"{OTHER}*", f"{OTHER}***")
    )

    assert RateCard(named[:1]).priced("tokens", {"kind": "x"}) == (("kind", "other*"),)
    assert RateCard(named).priced("tokens", {"kind": "x"}) == (("kind", "other**"),)


def test_card_comes_back_from_its_text_with_the_same_name():
    """A card is named by its content, so that what was stored can be found again."""
    dear = Rate("tokens", 10**18, 3, (("kind", "output"), ("model", "m")))
    card = RateCard((dear, Rate("calls", 1)))

    again = RateCard.from_text(card.text)

    assert card == again
    assert card.id == again.id
    assert card.id != RateCard((dear,)).id
    assert frozenset({"tokens", "calls"}) == again.meters


def test_rate_is_worded_for_a_person():
    """The words name the meter, the price, the lot and the dimensions."""
    assert "calls: 0.001 USDC" == Rate("calls", 10**9).words
    assert (
        "tokens: 0.002 USDC per 1000, kind = output"
        == Rate("tokens", 2 * 10**9, 1000, (("kind", "output"),)).words
    )


def test_charge_refuses_usage_that_no_rate_prices():
    """Counted usage without a rate is a broken invariant."""
    with pytest.raises(AssertionError, match="tokens"):
        RateCard((Rate("calls", 1),)).charge({("tokens", ()): Usage(1)})


# -- All models, limits and periods ----------------------------------------------------------------


@st.composite
def _tiers(draw):
    ends = sorted(draw(st.sets(st.integers(1, 20 * NANOS), max_size=3)))
    prices = [draw(st.tuples(st.integers(0, 10**13), st.integers(0, 10**13))) for _ in ends]
    last = draw(st.tuples(st.integers(0, 10**13), st.just(0)))
    steps = zip(ends, prices, strict=True)
    return (*(Tier(end, *price) for end, price in steps), Tier(None, *last))


_limits = st.one_of(st.none(), st.integers(0, 10**7))
models = st.builds(
    lambda model, price, per, tiers, free, minimum, maximum: Rate(
        "tokens",
        price,
        per,
        model=model,
        tiers=tiers if model in (Model.GRADUATED, Model.VOLUME) else (),
        free_units=0 if model is Model.DYNAMIC else free,
        minimum=minimum,
        maximum=maximum,
    ),
    st.sampled_from(list(Model)),
    st.integers(0, 10**13),
    st.sampled_from(PERS),
    _tiers(),
    st.one_of(st.just(0), st.integers(0, 10 * NANOS)),
    _limits,
    _limits,
)


@given(
    st.lists(models, min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9 * NANOS), st.integers(0, 10**13))),
    st.booleans(),
    st.randoms(),
)
def test_charge_of_every_model_is_the_naive_one_in_any_order(rates, events, ended, random):
    """Six models, free units, minimum and maximum: the card's integers against fractions."""
    kinds = [
        msgspec.structs.replace(rate, where=(("kind", str(n)),)) for n, rate in enumerate(rates)
    ]
    card = RateCard((*kinds, Rate(PERIOD_METER, 7 * PICOS, role="base")))
    random.shuffle(events)
    usage = {(PERIOD_METER, ()): Usage(NANOS)} if ended else {}
    units, brought = [Fraction(0)] * len(rates), [Fraction(0)] * len(rates)
    for which, nanos, picos in events:
        place = which % len(rates)
        key = "tokens", (("kind", str(place)),)
        before = usage.get(key, Usage(0))
        usage[key] = Usage(before.quantity + nanos, before.amount + nanos * picos)
        units[place] += Fraction(nanos, NANOS)
        brought[place] += Fraction(nanos * picos, NANOS * PICOS)
    expected = sum(
        naive_charge(*each, ended=ended) for each in zip(rates, units, brought, strict=True)
    )

    charge = card.charge(usage)

    assert charge.get(MAIN, 0) == expected
    assert charge.get("base", 0) == (7 if ended else 0)


UP_TO_TEN = (Tier(10 * NANOS, PICOS // 10, PICOS), Tier(None, PICOS // 100))
EXAMPLES = {
    "graduated, on the border": (Model.GRADUATED, {}, 10, 2),
    "graduated, one beyond": (Model.GRADUATED, {}, 11, Fraction("2.01")),
    "graduated, nothing": (Model.GRADUATED, {}, 0, 0),
    "volume, on the border": (Model.VOLUME, {}, 10, 2),
    "volume, one beyond": (Model.VOLUME, {}, 11, Fraction("0.11")),
    "volume, nothing": (Model.VOLUME, {}, 0, 0),
    "volume, all of it free": (Model.VOLUME, {"free_units": 5 * NANOS}, 5, 0),
    "package, a whole one": (Model.PACKAGE, {"price": PICOS, "per": 5}, 5, 1),
    "package, one begun": (Model.PACKAGE, {"price": PICOS, "per": 5}, "5.000000001", 2),
    "percentage": (Model.PERCENTAGE, {"price": PICOS // 40}, 8, Fraction("0.2")),
    "free units": (Model.STANDARD, {"price": PICOS, "free_units": 3 * NANOS}, 5, 2),
    "at most": (Model.STANDARD, {"price": PICOS, "maximum": 4_000_000}, 5, 4),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_charge_is_what_a_person_works_out(name):
    """Borders of tiers belong to the tier below, and a package that was begun is whole."""
    model, fields, units, usdc = EXAMPLES[name]
    tiers = UP_TO_TEN if model in (Model.GRADUATED, Model.VOLUME) else ()
    card = RateCard((Rate("tokens", **{"price": 0, "model": model, "tiers": tiers, **fields}),))
    nanos = int(Fraction(units) * NANOS)

    assert card.charge({("tokens", ()): Usage(nanos)}) == {MAIN: usdc}


def test_minimum_counts_once_the_period_has_ended():
    """During the period usage is charged as it is, at its end the rest is made up."""
    card = RateCard((Rate("tokens", PICOS, minimum=3_000_000), Rate(PERIOD_METER, 0)))
    ended = {(PERIOD_METER, ()): Usage(NANOS)}
    used = {("tokens", ()): Usage(2 * NANOS)}

    assert card.charge({}) == {}
    assert card.charge(used) == {MAIN: 2}
    assert card.charge({**used, **ended}) == {MAIN: 3}
    assert card.charge(ended) == {MAIN: 3}


@pytest.mark.parametrize(("nanos", "usdc"), [(0, 2), (1, 3), (NANOS, 3), (2 * NANOS, 3)])
def test_period_has_ended_once_anything_is_counted_for_its_end(nanos, usdc):
    """Nothing counted is a period under way, whose minimum does not count yet."""
    card = RateCard((Rate("tokens", PICOS, minimum=3_000_000), Rate(PERIOD_METER, 0)))
    used = {("tokens", ()): Usage(2 * NANOS), (PERIOD_METER, ()): Usage(nanos)}

    assert card.charge(used)[MAIN] == usdc


def test_line_of_a_bill_holds_all_that_its_rate_prices():
    """Counters that no rate tells apart come together: what they count, and what they brought."""
    large = Rate("tokens", PICOS, where=(("model", "large"),))
    brought = Rate("tokens", 9 * PICOS, 7, model=Model.DYNAMIC)
    card = RateCard((large, Rate("calls", 1), brought))
    used = {
        ("tokens", (("model", "large"),)): Usage(2 * NANOS),
        ("tokens", (("model", OTHER),)): Usage(3, 30),
        ("tokens", (("model", ""),)): Usage(5, 400),
    }

    assert list(card.lines(used)) == [
        Line(0, large, 2 * NANOS, 2 * card.denominator),
        Line(2, brought, 3 + 5, 30 + 400),
    ]


def test_score_of_nothing_is_a_score_and_usage_of_nothing_is_none():
    """A curve may pay for a score of 0; a volume price has nothing to say about no usage."""
    tiers = (Tier(NANOS // 2, 0, PICOS), Tier(None, 0, 9 * PICOS))
    card = RateCard((Rate(OUTCOME_METER, 0, model=Model.VOLUME, tiers=tiers),))

    assert card.charge({(OUTCOME_METER, ()): Usage(0)}) == {MAIN: 1}
    assert card.charge({(OUTCOME_METER, ()): Usage(NANOS)}) == {MAIN: 9}


@given(models)
def test_card_of_any_model_comes_back_from_its_text(rate):
    """What the store keeps is the whole rate, and a card of old fields keeps its old name."""
    card = RateCard((rate, Rate("calls", 1)))

    assert RateCard.from_text(card.text) == card
    assert '{"meter":"calls","price":1,"per":1,"where":[]}' in card.text


@given(models)
def test_rate_is_linear_only_where_the_charge_of_a_sum_is_the_sum(rate):
    """Every other rate is worked out anew from the whole."""
    bare = (rate.free_units, rate.minimum, rate.maximum) == (0, None, None)

    assert rate.linear == (bare and rate.model in (Model.STANDARD, Model.PERCENTAGE, Model.DYNAMIC))


WORDS = {
    "tokens: graduated, up to 10 0.1 USDC + 1; beyond 0.01 USDC": Rate(
        "tokens", 0, model=Model.GRADUATED, tiers=UP_TO_TEN
    ),
    "tokens: 2.5 % of the amount, at least 1.00 a period": Rate(
        "tokens", PICOS // 40, model=Model.PERCENTAGE, minimum=1_000_000
    ),
    "tokens: the event's price, at most 2 USDC per 10, at most 0.00 a period": Rate(
        "tokens", 2 * PICOS, 10, model=Model.DYNAMIC, maximum=0
    ),
    "tokens: 1 USDC for each 5 begun, the first 3 free": Rate(
        "tokens", PICOS, 5, model=Model.PACKAGE, free_units=3 * NANOS
    ),
    "tokens: 1 USDC, the first 3 free, at least 2.00 a period, at most 4.00 a period": Rate(
        "tokens", PICOS, free_units=3 * NANOS, minimum=2_000_000, maximum=4_000_000
    ),
    "tokens: 1 USDC": Rate("tokens", PICOS, minimum=0),
}


@pytest.mark.parametrize("words", WORDS)
def test_every_model_is_worded_for_a_person(words):
    """Price, tiers and limits stand in one line."""
    assert WORDS[words].words == words
