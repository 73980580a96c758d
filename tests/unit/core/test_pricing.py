"""Rate cards against a naive price made of fractions, in any order and any batching."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterd.core.money import NANOS, PICOS
from meterd.core.pricing import MAIN, OTHER, Rate, RateCard, Usage

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
