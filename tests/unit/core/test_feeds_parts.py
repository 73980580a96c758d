"""What a typed event says to each meter, part by part, and the sentences that refuse it."""

from __future__ import annotations

import msgspec
import pytest

from meterd.core.events import NO_DATA, Reason, UsageEvent
from meterd.core.feeds import Feeds, Part, open_special, open_usage, unwrap
from meterd.core.meters import Aggregation, Meter

METERS = (
    Meter("calls", Aggregation.COUNT, event_type="llm", dimensions=(("a", "$.a"), ("b", "$.b"))),
    Meter("words", event_type="llm", value="$.words"),
    Meter("users", Aggregation.UNIQUE, event_type="llm", value="$.user"),
    Meter("long", event_type="long", value="$.n"),
    Meter("longer", event_type="long", value="$.m"),
    Meter("more", event_type="long", value="$.k"),
)
GENAI = "meterd.genai"
CALL = {"model": "m", "provider": "p", "operation": "chat"}


def event(kind: str, data: str, **fields: str) -> UsageEvent:
    """An event of a type, with data as they came."""
    return UsageEvent(type=kind, data=msgspec.Raw(data.encode()), **fields)


def parts(kind: str, data: str) -> object:
    """What an event says to the meters above, or why it says nothing."""
    return Feeds(METERS).parts(event(kind, data))


def test_each_meter_is_told_its_own_part_of_an_event():
    """Events are counted by one, sums have a quantity, and different values a value."""
    said = parts("llm", '{"words": 7, "user": 5, "b": false}')

    assert said == [
        Part("calls", 1, "", {"b": "false"}),
        Part("words", 7, "", {}),
        Part("users", 1, "5", {}),
    ]


def test_a_call_of_a_model_is_told_by_kind_and_as_a_call():
    """Each kind beside the one that includes it; each with the model, provider and operation."""
    data = {
        **CALL,
        "input_tokens": 100,
        "cached_tokens": "60.5",
        "cache_creation_tokens": 10,
        "output_tokens": 50,
        "reasoning_tokens": 20,
    }
    read, written = {**CALL, "kind": "input"}, {**CALL, "kind": "output"}

    assert parts(GENAI, msgspec.json.encode(data).decode()) == [
        Part("calls", 1, "", CALL),
        Part("tokens", "29.5", "", read),
        Part("tokens", "60.5", "", {**CALL, "kind": "cached"}, read),
        Part("tokens", "10", "", {**CALL, "kind": "cache_creation"}, read),
        Part("tokens", "30", "", written),
        Part("tokens", "20", "", {**CALL, "kind": "reasoning"}, written),
    ]


def test_data_may_be_nested_in_objects_as_deep_as_in_lists():
    """Sixteen levels are read, and no more, whichever they are."""
    for inner, depth, taken in (("1", 16, True), ("1", 17, False), ("{}", 16, False)):
        data = '{"words": 1, "x":' + '{"x":' * (depth - 1) + inner + "}" * depth
        assert isinstance(parts("llm", data), list) is taken, (inner, depth)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"type": ""}, "malformed: type: a CloudEvent must say what it is"),
        (
            {"subject": "a", "agreement": "b"},
            "mismatch: subject and agreement name different agreements",
        ),
        (
            {"datacontenttype": "x" * 99},
            f"malformed: datacontenttype: {'x' * 80} cannot be read; send application/json",
        ),
    ],
)
def test_a_sentence_says_which_attribute_of_a_cloudevent_is_wrong(fields, why):
    """With what would be right, and no more of what came than can be read."""
    refused = unwrap(UsageEvent(**{"specversion": "1.0", "type": "t", **fields}))

    assert refused is not None
    assert ": ".join(refused) == why


NOT_AN_OBJECT = "data: it must be an object, and is a list"


@pytest.mark.parametrize(
    ("open_it", "data", "why"),
    [
        (open_usage, "[]", NOT_AN_OBJECT),
        (open_special, "[]", NOT_AN_OBJECT),
        (open_usage, "", "data: there is none, and t needs it"),
        (open_usage, "{", "data: no JSON: it breaks off before its end"),
        (open_special, "{", "data: no JSON: it breaks off before its end"),
        (open_special, '{"name": 1}', "data: name: it must be a text, and is a number"),
    ],
)
def test_a_sentence_says_what_is_wrong_with_the_data_of_an_envelope(open_it, data, why):
    """In words, with the place."""
    assert open_it(event("t", data)) == (Reason.MALFORMED, why)


@pytest.mark.parametrize(
    ("kind", "data", "why"),
    [
        ("llm", "{", "malformed: data: no JSON: it breaks off before its end"),
        (GENAI, "[]", f"malformed: {NOT_AN_OBJECT}"),
        (GENAI, "", "malformed: data: there is none, and meterd.genai needs it"),
        (GENAI, '{"model": 1}', "malformed: data: model: it must be a text, and is a number"),
        ("long", "{}", "bad_quantity: data: there is no $.n, $.m, $.k"),
        (
            "llm",
            '{"a": []}',
            "malformed: the dimension a is not one text, number, true or false",
        ),
    ],
)
def test_a_sentence_says_why_an_event_says_nothing(kind, data, why):
    """The places where something could have stood are named as the configuration names them."""
    reason, detail = parts(kind, data)

    assert f"{reason}: {detail}" == why


def test_what_an_envelope_says_stands_before_what_is_beside_it():
    """A milestone, an outcome, a void or a close; what it leaves out stays as it was."""
    said = event("t", '{"signature": "inner", "score": 0.5}', signature="outer", name="beside")

    assert open_special(said) is None
    assert (said.signature, said.name, said.voids) == ("inner", "beside", "")
    assert (bytes(said.score), said.data) == (b"0.5", NO_DATA)
    kept = event("t", "{}", signature="outer")
    assert open_special(kept) is None
    assert kept.signature == "outer"
