"""Typed events: what they say to which meters, and what a plan makes of it."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from fractions import Fraction

import pytest

from meterd.core.accounts import Agreement, Touched
from meterd.core.envelopes import assemble
from meterd.core.feeds import DATA_DEPTH_MAX
from meterd.core.ledger import Ledger
from meterd.core.meters import Aggregation, Meter
from meterd.core.money import NANOS
from meterd.core.paths import BadPath, Path
from meterd.core.plans import Pattern, Plan
from meterd.core.pricing import MILESTONE_METER, OUTCOME_METER, Model, Rate, RateCard, Tier
from meterd.core.settlement import EscrowStatus
from tests.unit.core.books import NOW, Till

USED = "$.usage.total_tokens"
METERS = {
    "words": Meter(
        "words", event_type="completion", value=USED, dimensions=(("model", "$.model"),)
    ),
    "calls": Meter("calls", Aggregation.COUNT, event_type="completion"),
    "users": Meter("users", Aggregation.UNIQUE, event_type="completion", value="$.user"),
    "peak": Meter("peak", Aggregation.MAX, event_type="completion", value=USED),
    "audio": Meter("audio", event_type="completion", value="$.usage.audio"),
    "each": Meter("each", event_type="list", value="$.items[*].n"),
    "deep": Meter("deep", event_type="list", value="$['items'][0].n"),
    "tokens": Meter("tokens"),
    "spent": Meter("spent", event_type="spent", value="$.n"),
    "own": Meter("own", event_type="meterd.genai", value="$.output_tokens"),
}
USDC = 10**12
ALL = RateCard(
    (
        Rate("words", 2 * USDC, 1, (("model", "large"),)),
        Rate("words", USDC, 1, (("model", "small"),)),
        Rate("calls", 10 * USDC),
        Rate("users", 100 * USDC),
        Rate("peak", USDC),
    )
)
KINDS = RateCard(
    tuple(
        Rate("tokens", price * USDC, 1, (("kind", kind),))
        for kind, price in (("input", 100), ("cached", 10), ("output", 1000))
    )
)
WORDS = RateCard((Rate("words", USDC), Rate("audio", USDC), Rate("each", USDC), Rate("deep", USDC)))
PLANS = {
    "all": Plan("all", Pattern.STREAMING, ALL),
    "kinds": Plan("kinds", Pattern.PAY_PER_TOKEN, KINDS),
    "calls": Plan("calls", Pattern.STREAMING, RateCard((Rate("calls", USDC),))),
    "words": Plan("words", Pattern.STREAMING, WORDS),
    "own": Plan("own", Pattern.STREAMING, RateCard((Rate("own", USDC),))),
    "spent": Plan(
        "spent",
        Pattern.STREAMING,
        RateCard((Rate("spent", 5 * USDC, model=Model.DYNAMIC),)),
    ),
}


def till():
    """One agreement under each plan, named as it."""
    books = Ledger(PLANS, METERS)
    for name in PLANS:
        books.bind(Agreement(name, name, "payer", (("main", f"esc_{name}"),)), NOW)
    return Till(books)


def completion(event_id="e", subject="all", **fields):
    """A CloudEvent of a call that used 7 words of the large model."""
    event = {
        "specversion": "1.0",
        "type": "completion",
        "source": "svc",
        "id": event_id,
        "subject": subject,
        "data": {"model": "large", "user": "u1", "usage": {"total_tokens": 7}},
    }
    event.update(fields)
    return json.dumps({name: value for name, value in event.items() if value is not None}).encode()


def genai(event_id="g", subject="kinds", **data):
    """A call of a model."""
    return completion(event_id, subject, type="meterd.genai", data=data)


def accrued(till, name="all"):
    return till.books.accounts[name].accrued


def quantities(till, name):
    """What was counted, by meter and priced dimensions."""
    return {
        (counter.meter.name, *counter.dimensions): Fraction(counter.quantity, NANOS)
        for counter in till.books.accounts[name].counters.values()
        if counter.quantity
    }


def why(till, payload):
    """Why one event was rejected."""
    entry = till.take([payload])
    assert entry.accepted == 0
    (rejection,) = entry.rejections
    return f"{rejection.reason.value}: {rejection.detail}"


def test_one_event_feeds_each_meter_of_its_type():
    """A sum, a count, a number of users and a peak, of one event, each priced."""
    book = till()
    entry = book.take([completion()])
    assert (entry.accepted, entry.rejections) == (1, [])
    assert quantities(book, "all") == {
        ("words", ("model", "large")): 7,
        ("calls",): 1,
        ("users",): 1,
        ("peak",): 7,
    }
    assert accrued(book) == 7 * 2 + 10 + 100 + 7
    assert book.books.accounts["all"].events == 1


def test_what_is_restored_knows_of_each_event_once():
    """However many counters it fed; taken back, it leaves all of them."""
    book = till()
    book.take([completion("a"), completion("b")])
    counters = list(book.books.accounts["all"].counters.values())
    assert [(counter.events, counter.shared) for counter in counters] == [(2, 0)] + [(2, 2)] * 3
    assert book.restored().accounts["all"].events == 2
    touched = Touched()
    for number, counter in enumerate(counters):
        key = {"users": "u1", "peak": "7000000000"}.get(counter.meter.name, "")
        quantity = counter.quantity // 2 if counter.samples is None else 7 * NANOS
        book.books.take_back(counter, quantity, 0, key, touched, shared=number > 0)
    assert [(counter.events, counter.shared) for counter in counters] == [(1, 0)] + [(1, 1)] * 3
    assert book.books.accounts["all"].events == 1
    assert accrued(book) == 7 * 2 + 10 + 100 + 7


def test_one_identity_decides_for_all_that_an_event_feeds():
    """Sent again it is one duplicate; with other data it is a conflict, and nothing is added."""
    book = till()
    entry = book.take([completion(), completion()])
    assert (entry.accepted, entry.duplicates) == (1, 1)
    before = accrued(book)
    entry = book.take([completion(), completion("f")])
    assert (entry.accepted, entry.duplicates) == (1, 1)
    assert accrued(book) == before + 14 + 10
    other = {"model": "large", "user": "u1", "usage": {"total_tokens": 8}}
    assert why(book, completion(data=other)).startswith("conflict")
    assert accrued(book) == before + 14 + 10


def test_data_in_another_order_are_the_same_data():
    """A proxy may write JSON anew."""
    book = till()
    one = {"model": "small", "usage": {"total_tokens": 1.50, "x": [1, {"b": 1, "a": 2}]}}
    two = {"usage": {"x": [1, {"a": 2, "b": 1}], "total_tokens": 1.5}, "model": "small"}
    entry = book.take([completion(data=one), completion(data=two)])
    assert (entry.accepted, entry.duplicates) == (1, 1)


def test_a_meter_that_came_later_adds_nothing_to_an_event_that_was_taken_before():
    """A redelivery over a change of the configuration is a duplicate."""
    book = till()
    book.take([completion()])
    before = accrued(book)
    fresh = {**METERS, "more": Meter("more", Aggregation.COUNT, event_type="completion")}
    card = RateCard((*ALL.rates, Rate("more", USDC)))
    book.books.reload({**PLANS, "all": Plan("all", Pattern.STREAMING, card)}, fresh)
    entry = book.take([completion()])
    assert (entry.accepted, entry.duplicates) == (0, 1)
    assert accrued(book) == before
    book.take([completion("later")])
    assert accrued(book) == before + 14 + 10 + 100 + 7 + 1


def test_data_come_as_they_are_or_as_base64():
    """The same event either way."""
    book = till()
    data = {"model": "large", "user": "u1", "usage": {"total_tokens": 7}}
    packed = base64.b64encode(json.dumps(data).encode()).decode()
    entry = book.take([completion(), completion(data=None, data_base64=packed)])
    assert (entry.accepted, entry.duplicates) == (1, 1)


def test_an_escrow_is_a_subject_too_and_an_address_may_stand_beside_it():
    """The agreement is found by either id."""
    book = till()
    book.take([completion(subject="esc_all"), completion("b", subject=None, agreement="all")])
    book.take([completion("c", subject="esc_all", escrow_id="esc_all")])
    book.take([completion("d", subject="all", agreement="all")])
    assert book.accepted == 4
    assert why(book, completion("x", subject="all", agreement="words")).startswith("mismatch")
    assert why(book, completion("x", subject="all", escrow_id="esc_own")).startswith("mismatch")


def test_a_number_of_the_data_is_exact():
    """Decimals and numeric texts are read as texts; 0 adds nothing."""
    book = till()
    for place, number in enumerate(("0.000000001", '"12.5"', "1000000000000000", "0", '"0.0"')):
        data = f'{{"usage": {{"total_tokens": {number}}}}}'
        payload = completion(str(place), subject="words", data="D").replace(b'"D"', data.encode())
        assert book.take([payload]).accepted == 1, number
    assert accrued(book, "words") == Fraction("1000000000000012.500000001")


@pytest.mark.parametrize(
    ("data", "expected"),
    {
        "null": ("null", "bad_quantity: data: there is no $.usage.total_tokens, data, $.user"),
        "nothing": (None, "bad_quantity: data: there is no"),
        "a list": ("[]", "bad_quantity: data: there is no"),
        "another": ('{"usage": {"total": 5}}', "bad_quantity: data: there is no"),
        "null inside": ('{"usage": {"total_tokens": null}}', "bad_quantity: data: there is no"),
        "below zero": ('{"usage": {"total_tokens": -1}}', "bad_quantity: words: "),
        "an exponent": ('{"usage": {"total_tokens": 1e3}}', "bad_quantity: words: not a plain"),
        "too much": ('{"usage": {"total_tokens": 1000000000000001}}', "bad_quantity: words: "),
        "10 decimals": ('{"usage": {"total_tokens": 0.0000000001}}', "bad_quantity: words: more"),
        "a word": ('{"usage": {"total_tokens": "many"}}', "bad_quantity: words: not a plain"),
        "true": ('{"usage": {"total_tokens": true}}', f"bad_quantity: {USED} is no number"),
        "an object": ('{"usage": {"total_tokens": {}}}', f"bad_quantity: {USED} is no number"),
        "NaN": ('{"usage": {"total_tokens": NaN}}', "malformed: "),
        "deep": ("[" * 17 + "]" * 17, "malformed: data: nested more than 16 deep"),
        "a deep dimension": (
            '{"model": ["large"], "usage": {"total_tokens": 5}}',
            "malformed: the dimension model is not one text",
        ),
        "a long dimension": (
            '{"model": "%s", "usage": {"total_tokens": 5}}' % ("m" * 129),
            "malformed: words: at most 32 dimensions of 128 printable",
        ),
    }.values(),
)
def test_data_that_cannot_be_charged_are_rejected_with_the_place(data, expected):
    """Whole: no meter of a rejected event is fed."""
    meters = {name: meter for name, meter in METERS.items() if name != "calls"}
    books = Ledger(
        {"words": Plan("words", Pattern.STREAMING, ALL)}, {**meters, "calls": Meter("calls")}
    )
    books.bind(Agreement("words", "words", "payer", (("main", "esc_words"),)), NOW)
    book = Till(books)
    payload = completion(subject="words", data="D" if data else None)
    assert expected.replace(", data, $.user", "") in why(
        book, payload.replace(b'"D"', (data or "").encode())
    )
    assert accrued(book, "words") == 0


def test_depth_is_counted_to_the_last_allowed():
    """Sixteen levels are read."""
    book = till()
    inner = "[" * (DATA_DEPTH_MAX - 1) + "]" * (DATA_DEPTH_MAX - 1)
    data = f'{{"usage": {inner}}}'
    payload = completion(subject="calls", data="D").replace(b'"D"', data.encode())
    assert book.take([payload]).accepted == 1


def test_dimensions_are_texts_numbers_and_truth():
    """A model named 5 is the text "5"; one that is absent or null is left out."""
    card = RateCard(
        (
            Rate("words", USDC, 1, (("model", "5"),)),
            Rate("words", 2 * USDC, 1, (("model", "true"),)),
            Rate("words", 4 * USDC),
        )
    )
    books = Ledger({"p": Plan("p", Pattern.STREAMING, card)}, METERS)
    books.bind(Agreement("p", "p", "payer", (("main", "e"),)), NOW)
    book = Till(books)
    for place, model in enumerate((5, True, None, False, "1.5", 1.5)):
        book.take(
            [
                completion(
                    str(place), subject="p", data={"model": model, "usage": {"total_tokens": 1}}
                )
            ]
        )
    assert book.accepted == 6
    assert accrued(book, "p") == 1 + 2 + 4 * 4


def test_a_path_of_more_than_names_is_followed():
    """What finds one value is measured; what finds two is ambiguous."""
    book = till()
    assert (
        book.take([completion("a", "words", type="list", data={"items": [{"n": 3}]})]).accepted == 1
    )
    assert quantities(book, "words") == {("each",): 3, ("deep",): 3}
    assert "$.items[*].n finds 2 values" in why(
        book, completion("b", "words", type="list", data={"items": [{"n": 3}, {"n": 4}]})
    )


def test_meters_without_a_rate_in_the_plan_are_not_this_agreements():
    """A plan of calls counts the call; one that prices nothing of the type says so."""
    book = till()
    book.take([completion(subject="calls")])
    assert accrued(book, "calls") == 1
    assert why(book, completion("x", subject="own")) == (
        "no_rate: plan own prices none of words, calls, users, peak, audio"
    )


def test_a_call_of_a_model_under_a_plan_without_tokens_says_what_it_would_feed():
    """Those of the configuration, and the two that are meterd's own."""
    assert why(till(), genai(subject="words", output_tokens=1)) == (
        "no_rate: plan words prices none of own, tokens, calls"
    )


def test_a_value_that_no_rate_fits_is_never_given_away():
    """The plan prices the meter, and not for this model: all of the event waits for a person."""
    book = till()
    data = {"model": "huge", "usage": {"total_tokens": 5}}
    assert why(book, completion(data=data)).startswith("no_rate: words: ")
    assert accrued(book) == 0


def test_an_event_that_adds_nothing_is_an_event():
    """It is known by its id, and counted."""
    book = till()
    nothing = {"model": "huge", "usage": {"total_tokens": 0}}
    entry = book.take(
        [completion(subject="words", data=nothing), completion(subject="words", data=nothing)]
    )
    assert (entry.accepted, entry.duplicates) == (1, 1)
    assert accrued(book, "words") == 0


def test_a_peak_and_a_value_that_tells_apart_keep_their_samples():
    """The same user twice is one user."""
    book = till()
    for place, (user, words) in enumerate((("u1", 7), ("u1", 9), ("u2", 3))):
        data = {"model": "large", "user": user, "usage": {"total_tokens": words}}
        book.take([completion(str(place), data=data)])
    assert quantities(book, "all") == {
        ("words", ("model", "large")): 19,
        ("calls",): 3,
        ("users",): 2,
        ("peak",): 9,
    }
    assert why(book, completion("x", data={"user": ""})) == (
        "malformed: value: 1 to 256 printable characters to tell apart"
    )


def test_a_meter_named_by_the_address_is_the_only_one_that_is_fed():
    """A topic may say which."""
    book = till()
    book.take([completion(meter="calls")])
    assert accrued(book) == 10
    assert why(book, completion("x", meter="tokens")).startswith("no_rate")


def test_a_price_belongs_to_dynamic_rates():
    """An event may bring it as an extension attribute."""
    book = till()
    book.take([completion("a", "spent", type="spent", data={"n": 3}, price="0.5")])
    assert accrued(book, "spent") == Fraction(3, 2)
    assert why(book, completion("b", "spent", type="spent", data={"n": 3})).startswith("bad_price")
    assert why(book, completion("c", price="0.5")).startswith("bad_price")


def test_a_line_with_tiers_is_priced_for_typed_events_too():
    """The charge of a whole line is worked out anew for what they add."""
    tiers = (Tier(10 * NANOS, USDC), Tier(None, 2 * USDC))
    card = RateCard((Rate("words", 0, 1, model=Model.GRADUATED, tiers=tiers),))
    books = Ledger({"p": Plan("p", Pattern.STREAMING, card)}, METERS)
    books.bind(Agreement("p", "p", "payer", (("main", "e"),)), NOW)
    book = Till(books)
    book.take([completion("a", "p"), completion("b", "p")])
    assert accrued(book, "p") == 10 + 4 * 2


def test_usage_may_come_in_an_envelope():
    """`meterd.usage` is the bare event as data: one identity, whichever way it comes."""
    book = till()
    bare = {
        "id": "e",
        "agreement": "kinds",
        "meter": "tokens",
        "quantity": 1.5,
        "source": "svc",
        "dimensions": {"kind": "output"},
    }
    data = {"meter": "tokens", "quantity": 1.5, "dimensions": {"kind": "output"}}
    wrapped = completion(subject="kinds", type="meterd.usage", data=data)
    entry = book.take([json.dumps(bare).encode(), wrapped])
    assert (entry.accepted, entry.duplicates) == (1, 1)
    assert accrued(book, "kinds") == 1500
    assert why(book, completion("x", "kinds", type="meterd.usage", data=None)) == (
        "malformed: data: there is none, and meterd.usage needs it"
    )
    assert why(book, completion("x", "kinds", type="meterd.usage", data=[])).startswith(
        "malformed: data"
    )
    assert (
        why(
            book, completion("x", "kinds", type="meterd.usage", data={"meter": "tokens"})
        ).startswith("bad_quantity")
        is False
    )
    held = {
        "meter": "tokens",
        "quantity": "2",
        "dimensions": {"kind": "input"},
        "hold": "h",
        "value": "v",
    }
    assert book.take([completion("y", "kinds", type="meterd.usage", data=held)]).accepted == 1


def test_special_types_come_in_an_envelope():
    """Milestones, outcomes, voids and closes say in `data` what bare events say themselves."""
    card = RateCard((Rate(MILESTONE_METER, USDC, 1, (("name", "draft"),)),))
    steps = RateCard((Rate(OUTCOME_METER, 10 * USDC),))
    plans = {
        "m": Plan("m", Pattern.MILESTONE, card),
        "o": Plan("o", Pattern.PERFORMANCE, steps),
    }
    books = Ledger(plans, METERS)
    for name in plans:
        books.bind(Agreement(name, name, "payer", (("main", f"e_{name}"),)), NOW)
    book = Till(books)
    assert (
        book.take([completion("a", "m", type="meterd.milestone", data={"name": "draft"})]).accepted
        == 1
    )
    assert (
        book.take(
            [completion("b", "o", type="meterd.outcome", data={"score": 0.5, "signature": "s"})]
        ).accepted
        == 1
    )
    assert (accrued(book, "m"), accrued(book, "o")) == (1, 5)
    entry = book.take([completion("c", "m", type="meterd.void", data={"voids": "a"})])
    assert [event.voids for event in entry.voids] == ["a"]
    assert book.take([completion("d", "m", type="meterd.close", data=None)]).accepted == 1
    assert books.accounts["m"].closing
    assert why(book, completion("x", "m", type="meterd.void", data=7)).startswith("malformed: data")


@pytest.mark.parametrize(
    ("fields", "expected"),
    {
        "an older version": ({"specversion": "0.3"}, 'malformed: specversion: only "1.0"'),
        "no type": ({"type": None}, "malformed: type: "),
        "a type that no meter has": (
            {"type": "other"},
            "unknown_type: no meter has the event_type",
        ),
        "no subject": ({"subject": None}, "unknown_agreement"),
        "an unknown subject": ({"subject": "who"}, "unknown_agreement"),
        "no id": ({"id": None}, "no_id"),
        "data of another kind": (
            {"datacontenttype": "text/xml", "data": "<a/>"},
            "malformed: datacontenttype: text/xml cannot be read",
        ),
        "base64 that is none": ({"data": None, "data_base64": "?"}, "malformed: data_base64: no"),
        "base64 that is no JSON": ({"data": None, "data_base64": "AAAA"}, "malformed: data: "),
        "a time that is none": ({"time": "noon"}, "malformed"),
        "a time without a zone": ({"time": "2026-11-23T12:00:00"}, "malformed"),
    }.values(),
)
def test_a_cloudevent_that_is_none_is_rejected_with_its_attribute(fields, expected):
    """The sentence names what to mend."""
    assert why(till(), completion(**fields)).startswith(expected)


def test_what_an_event_leaves_out_may_be_null():
    """As OpenMeter's own clients write it."""
    one = json.loads(completion())
    nulls = dict.fromkeys(("datacontenttype", "data_base64", "dataschema", "time"))
    entry = till().take([json.dumps({**one, **nulls}).encode(), completion()])
    assert (entry.accepted, entry.duplicates) == (1, 1)
    assert why(till(), json.dumps({**one, "subject": None}).encode()).startswith("unknown_agr")


@pytest.mark.parametrize(
    "kind", ["application/json", "text/json; charset=utf-8", "application/x+json"]
)
def test_json_has_several_names(kind):
    """Whatever is JSON is read."""
    assert till().take([completion(datacontenttype=kind)]).accepted == 1


def test_tokens_of_a_call_are_in_one_kind_each():
    """The input includes what came from the cache, the output its reasoning."""
    book = till()
    book.take(
        [
            genai(
                model="m",
                input_tokens=100,
                cached_tokens=60,
                cache_creation_tokens=10,
                output_tokens=50,
                reasoning_tokens=20,
            )
        ]
    )
    # Reasoning and what was written to the cache have no rates here: they are output and input.
    assert quantities(book, "kinds") == {
        ("tokens", ("kind", "input")): 40,
        ("tokens", ("kind", "cached")): 60,
        ("tokens", ("kind", "output")): 50,
    }
    assert accrued(book, "kinds") == 40 * 100 + 60 * 10 + 50 * 1000


def test_a_zero_is_a_zero_and_what_is_missing_is_unknown():
    """Neither is charged; a part of a whole that is not given is the whole."""
    book = till()
    book.take([genai("a", input_tokens=0, output_tokens=0)])
    assert accrued(book, "kinds") == 0
    book.take([genai("b", cached_tokens="5")])
    assert quantities(book, "kinds") == {("tokens", ("kind", "cached")): 5}
    book.take([genai("c", output_tokens=2)])
    assert accrued(book, "kinds") == 50 + 2000
    assert book.accepted == 3


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, "bad_quantity: data: there is neither input_tokens nor output_tokens"),
        ({"input_tokens": 5, "cached_tokens": 6}, "bad_quantity: data: cached_tokens and cache"),
        ({"output_tokens": 5, "reasoning_tokens": 6}, "bad_quantity: data: reasoning_tokens are"),
        ({"output_tokens": -5}, "bad_quantity: data: output_tokens: "),
        ({"output_tokens": 1.5}, "malformed: data: "),
        ({"output_tokens": 5, "model": 7}, "malformed: data: "),
    ],
)
def test_a_call_whose_counts_cannot_be_is_rejected(data, expected):
    """With the name of the count."""
    assert why(till(), genai(**data)).startswith(expected)


def test_a_call_of_a_model_is_a_call():
    """The meter `calls` counts it, where the plan prices it and no other type feeds it."""
    meters = {name: meter for name, meter in METERS.items() if name != "calls"}
    books = Ledger(PLANS, {**meters, "calls": Meter("calls", Aggregation.COUNT)})
    books.bind(Agreement("calls", "calls", "payer", (("main", "e"),)), NOW)
    book = Till(books)
    book.take([genai("a", "calls", output_tokens=9), genai("b", "calls", output_tokens=0)])
    assert accrued(book, "calls") == 2


def test_meters_of_the_configuration_may_read_calls_of_models_their_own_way():
    """What it says of `tokens` or `calls` stands in for what meterd would make of them."""
    book = till()
    book.take([genai("a", "own", output_tokens=9)])
    assert accrued(book, "own") == 9
    mine = {
        "tokens": Meter("tokens", event_type="meterd.genai", value="$.output_tokens"),
        "calls": Meter("calls", Aggregation.COUNT, event_type="meterd.genai"),
    }
    card = RateCard((Rate("tokens", USDC), Rate("calls", USDC)))
    books = Ledger({"p": Plan("p", Pattern.STREAMING, card)}, mine)
    books.bind(Agreement("p", "p", "payer", (("main", "e"),)), NOW)
    book = Till(books)
    book.take([genai("a", "p", input_tokens=100, output_tokens=9)])
    assert accrued(book, "p") == 10


def test_a_closed_agreement_takes_no_typed_event():
    """As it takes no other; one that came before is a duplicate still."""
    book = till()
    book.take([completion("a", "calls")])
    escrow = book.books.escrows["esc_calls"]
    book.books.put(replace(escrow, status=EscrowStatus.CLOSED))
    assert book.take([completion("a", "calls")]).duplicates == 1
    assert why(book, completion("b", "calls")).startswith("closed")


def test_a_path_that_is_none_says_so():
    """One line, for a person who writes a configuration."""
    assert Path("$.items[?(@.n > 1)].n").find({"items": [{"n": 1}, {"n": 2}]}) == [2]
    assert Path("$").find(7) == (7,)
    for text, said in (("$.[", "selector"), ("$.a | $.b", "unexpected token")):
        with pytest.raises(BadPath, match=said) as caught:
            Path(text)
        assert "\n" not in str(caught.value)


def test_a_binary_event_becomes_the_structured_one():
    """Attributes beside the data are members around them; the data stay the bytes that came."""
    structured = assemble([("specversion", "1.0"), ("id", "a")], "application/json", b'{"n": 1.0}')
    assert structured == (
        b'{"specversion":"1.0","id":"a","datacontenttype":"application/json","data":{"n": 1.0}}'
    )
    assert assemble([("id", "a")], "", b"") == b'{"id":"a"}'
    assert assemble([("id", "a")], "", b"\xff") == b'{"id":"a","data_base64":"/w=="}'
    for attributes in ([("id", "a"), ("id", "b")], [("data", "1")], [("A b", "1")]):
        with pytest.raises(ValueError, match="attribute"):
            assemble(attributes, "", b"")
    with pytest.raises(ValueError, match=r"^'A{80}' cannot"):
        assemble([("A" * 99, "1")], "", b"")
