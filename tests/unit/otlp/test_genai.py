from __future__ import annotations

import json
from typing import Any

import pytest

from meterd.core.events import Reason
from meterd.otlp import genai, reading
from meterd.otlp.genai import AROUND, COUNTED, EVENT, TOKENS, WANTED, Ignored, Usage, usage_of
from meterd.otlp.reading import Encoding, Signal
from tests import otlp
from tests.otlp import CALL, SPAN, TRACE

ENCODINGS = list(Encoding)
ID = f"{TRACE}-{SPAN}"
TOKENS_OF_CALL = {"gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"}
WHO = {name: text for name, text in CALL.items() if name not in TOKENS_OF_CALL}


def read(message: Any, signal: Signal = Signal.TRACES, encoding: Encoding = Encoding.PROTOBUF):
    body = otlp.written(message, encoding)
    return reading.read(signal, encoding, body, wanted=WANTED, items_max=1000)


def verdict(attributes: Any, encoding: Encoding = Encoding.PROTOBUF, **options: Any):
    resource = options.pop("resource", None)
    message = otlp.traces(otlp.span(attributes, **options), resource=resource)
    (item,) = read(message, encoding=encoding)
    return usage_of(item)


def verdict_of_log(attributes: Any, encoding: Encoding = Encoding.PROTOBUF, **options: Any):
    resource = options.pop("resource", None)
    message = otlp.logs(otlp.record(attributes, **options), resource=resource)
    (item,) = read(message, Signal.LOGS, encoding)
    return usage_of(item)


def document(usage: Usage | Ignored) -> Any:
    assert isinstance(usage, Usage)
    assert usage.fault is None
    return json.loads(usage.document)


# -- What a span says ------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_call_of_a_model_is_one_cloud_event_in_either_encoding(encoding):
    """Everything that it says, to the last member."""
    assert document(verdict(CALL, encoding)) == {
        "specversion": "1.0",
        "type": "meterd.genai",
        "source": "shop/checkout",
        "id": ID,
        "subject": "customer-1",
        "time": "2026-11-22T12:00:00.123456Z",
        "data": {
            "model": "large-2026-11",
            "provider": "openai",
            "operation": "chat",
            "input_tokens": 1000,
            "output_tokens": 80,
        },
    }


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("field", "spelling"), [(field, name) for field, names in TOKENS.items() for name in names]
)
def test_a_count_is_read_by_each_name_that_it_has_had(field, spelling, encoding):
    """Names of today, of yesterday and of other libraries; and only by its own."""
    data = document(verdict({**WHO, spelling: 7}, encoding))["data"]

    assert {name: count for name, count in data.items() if name.endswith("_tokens")} == {field: 7}


@pytest.mark.parametrize("field", TOKENS)
def test_the_name_of_today_counts_where_a_count_has_several(field):
    """Libraries in the middle of a change write both."""
    counts = dict(zip(TOKENS[field], range(5, 50), strict=False))
    data = document(verdict({**WHO, **dict(reversed(counts.items()))}))["data"]

    assert data[field] == 5


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_subsets_come_as_they_are_told_beside_the_whole(encoding):
    """What the cache had is part of the input, reasoning is part of the output; no sums here."""
    parts = {
        "gen_ai.usage.cache_read.input_tokens": 600,
        "gen_ai.usage.cache_creation.input_tokens": 50,
        "gen_ai.usage.reasoning.output_tokens": 30,
    }
    data = document(verdict({**CALL, **parts}, encoding))["data"]

    assert {name: count for name, count in data.items() if name.endswith("_tokens")} == {
        "input_tokens": 1000,
        "cached_tokens": 600,
        "cache_creation_tokens": 50,
        "output_tokens": 80,
        "reasoning_tokens": 30,
    }


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("zero", [0, "0", 0.0, -0.0])
def test_an_explicit_zero_is_a_zero(zero, encoding):
    """It is usage, of a call without tokens; and it hides an older name's count."""
    data = document(
        verdict(
            {**WHO, "gen_ai.usage.output_tokens": zero, "gen_ai.usage.completion_tokens": 9},
            encoding,
        )
    )["data"]

    assert data["output_tokens"] == 0
    assert "input_tokens" not in data


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("told", "count"),
    [
        (12, 12),
        ("12", 12),
        ("0012", 12),
        (12.0, 12),
        (2.0**53, 2**53),
        (2**53 + 1, 2**53 + 1),
        (2**63 - 1, 2**63 - 1),
        ("999999999999999999", 10**18 - 1),
    ],
)
def test_a_whole_number_is_exact_however_it_is_told(told, count, encoding):
    """Text, integer or double: the very number, beyond what a double could hold too."""
    data = document(verdict({**WHO, "gen_ai.usage.input_tokens": told}, encoding))["data"]

    assert data["input_tokens"] == count


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "told",
    [
        *(-1, -(2**63), "-1", 12.5, "12.5", -0.5, 1e300, -(2.0**54), 2.0**54),
        *(
            float("nan"),
            float("inf"),
            "NaN",
            "",
            " 12",
            "12 ",
            "1_2",
            "1e3",
            "0x10",
            "twelve",
            "\uff11\uff12",
        ),
        *("9" * 19, True, False, [12], "12\n", "x" * 1000),
    ],
)
def test_what_is_no_whole_number_is_a_rejection_that_names_it(told, encoding):
    """Nothing is rounded, guessed or dropped: it will be a dead letter with its reason."""
    usage = verdict({**CALL, "gen_ai.usage.input_tokens": told}, encoding)

    assert isinstance(usage, Usage)
    assert usage.fault is not None
    assert usage.fault.reason is Reason.BAD_QUANTITY
    assert usage.fault.detail.startswith("input_tokens is ")
    assert usage.fault.detail.isprintable()
    assert len(usage.fault.detail) < 300
    kept = json.loads(usage.document)
    assert kept["id"] == ID
    assert type(kept["data"]["input_tokens"]) is list, "or a replay would take it for a count"


def test_an_attribute_without_a_value_is_not_there():
    """Some libraries write a name and then nothing."""
    counts = {"gen_ai.usage.input_tokens": None, "gen_ai.usage.prompt_tokens": 3}

    assert document(verdict({**WHO, **counts}))["data"]["input_tokens"] == 3


# -- What counts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"http.request.method": "POST"},
        WHO,
        {**WHO, "gen_ai.usage.cost": 1},
        {**WHO, "gen_ai.aggregated_usage.input_tokens": 12},
        {**WHO, "gen_ai.usage.input_tokens": None},
    ],
)
def test_a_span_without_a_count_of_tokens_is_ignored(attributes, encoding):
    """A trace is mostly of other things."""
    assert verdict(attributes, encoding) == Ignored()


@pytest.mark.parametrize("operation", sorted(COUNTED))
def test_an_operation_that_calls_a_model_counts(operation):
    """Each under its name."""
    usage = document(verdict({**CALL, "gen_ai.operation.name": operation}))

    assert usage["data"]["operation"] == operation


@pytest.mark.parametrize("operation", sorted(AROUND))
def test_what_stands_around_calls_of_a_model_is_ignored_whatever_it_sums_up(operation):
    """Its tokens are those of the calls inside, which are charged by their own spans."""
    assert verdict({**CALL, "gen_ai.operation.name": operation}) == Ignored()


def test_an_operation_that_nobody_knows_is_ignored_by_name():
    """It may be charged or stand around others; so a person is told and no money moves."""
    assert verdict({**CALL, "gen_ai.operation.name": "Rerank"}) == Ignored("rerank")


def test_an_operation_counts_where_it_is_asked_for():
    """Whoever knows what it is may say so."""
    (item,) = read(otlp.traces(otlp.span({**CALL, "gen_ai.operation.name": "rerank"})))

    assert document(usage_of(item, {"rerank"}))["data"]["operation"] == "rerank"


@pytest.mark.parametrize(
    ("name", "said", "today"),
    [
        ("gen_ai.operation.name", "completion", "text_completion"),
        ("gen_ai.operation.name", "Embedding", "embeddings"),
        ("llm.request.type", "chat", "chat"),
        ("llm.request.type", "completion", "text_completion"),
        ("llm.request.type", "embedding", "embeddings"),
        ("openinference.span.kind", "LLM", "chat"),
        ("openinference.span.kind", "EMBEDDING", "embeddings"),
    ],
)
def test_an_older_name_of_an_operation_is_todays(name, said, today):
    """So that one price serves all libraries."""
    attributes = {key: text for key, text in CALL.items() if key != "gen_ai.operation.name"}

    assert document(verdict({**attributes, name: said}))["data"]["operation"] == today


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("openinference.span.kind", "AGENT"),
        ("openinference.span.kind", "CHAIN"),
        ("traceloop.span.kind", "workflow"),
        ("traceloop.span.kind", "task"),
    ],
)
def test_what_other_libraries_put_around_a_call_is_ignored_too(name, said):
    """They sum up as well."""
    attributes = {key: text for key, text in CALL.items() if key != "gen_ai.operation.name"}

    assert verdict({**attributes, name: said}) == Ignored()


def test_a_span_with_tokens_and_no_operation_counts():
    """Before 1.27 only calls of models had tokens, and no operation had a name."""
    attributes = {key: text for key, text in CALL.items() if key != "gen_ai.operation.name"}
    data = document(verdict(attributes))["data"]

    assert data["input_tokens"] == 1000
    assert "operation" not in data


# -- Names -----------------------------------------------------------------------------------------


def test_what_answered_is_the_model_and_what_was_asked_for_stands_in():
    """A fallback or a router is charged as what worked."""
    asked = {name: text for name, text in CALL.items() if name != "gen_ai.response.model"}

    assert document(verdict(CALL))["data"]["model"] == "large-2026-11"
    assert document(verdict(asked))["data"]["model"] == "large"


@pytest.mark.parametrize("odd", ["", None, 12, ["large"]])
def test_a_model_that_is_no_text_gives_way_to_the_next_name(odd):
    """What is odd there is no model."""
    assert document(verdict({**CALL, "gen_ai.response.model": odd}))["data"]["model"] == "large"


def test_an_older_provider_is_read():
    """`gen_ai.system` was its name."""
    older = {name: text for name, text in CALL.items() if name != "gen_ai.provider.name"}

    assert document(verdict({**older, "gen_ai.system": "az"}))["data"]["provider"] == "az"


@pytest.mark.parametrize(
    ("of_span", "of_resource", "subject"),
    [
        ({"meterd.agreement": "a"}, {"meterd.agreement": "r"}, "a"),
        ({"meterd.escrow_id": "e"}, {"meterd.agreement": "r"}, "e"),
        ({"meterd.agreement": "a", "meterd.escrow_id": "e"}, {}, "a"),
        ({}, {"meterd.agreement": "r"}, "r"),
        ({}, {"meterd.escrow_id": "re"}, "re"),
        ({"meterd.agreement": ""}, {"meterd.agreement": "r"}, "r"),
        ({"meterd.agreement": 42}, {}, "42"),
    ],
)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_whose_usage_it_is_says_the_span_and_else_its_resource(
    of_span, of_resource, subject, encoding
):
    """The nearer word counts."""
    attributes = {name: text for name, text in CALL.items() if name != "meterd.agreement"}
    usage = verdict({**attributes, **of_span}, encoding, resource=of_resource)

    assert document(usage)["subject"] == subject


def test_usage_of_nobody_is_passed_on_for_the_ledger_to_reject():
    """It is never dropped here."""
    attributes = {name: text for name, text in CALL.items() if name != "meterd.agreement"}

    assert "subject" not in document(verdict(attributes))


def test_an_agreement_that_is_no_text_is_a_rejection():
    """It says where the mistake is."""
    usage = verdict({**CALL, "meterd.agreement": ["a", "b"]})

    assert isinstance(usage, Usage)
    assert usage.fault is not None
    assert (usage.fault.reason, usage.fault.detail) == (
        Reason.MALFORMED,
        "meterd.agreement is no text; write the agreement's id",
    )


@pytest.mark.parametrize(
    ("resource", "source"),
    [
        ({"service.name": "checkout"}, "checkout"),
        ({"service.namespace": "shop", "service.name": "checkout"}, "shop/checkout"),
        ({"service.name": ""}, "otlp"),
        ({}, "otlp"),
    ],
)
def test_the_source_is_the_service(resource, source):
    """By the name that it has in every other tool."""
    assert document(verdict(CALL, resource=resource))["source"] == source


# -- Identity --------------------------------------------------------------------------------------


def test_the_same_call_is_the_same_bytes_by_either_signal_and_encoding():
    """So whichever comes second is a duplicate: id, source and data are the same."""
    documents = {
        usage.document
        for encoding in ENCODINGS
        for usage in (verdict(CALL, encoding), verdict_of_log(CALL, encoding))
    }

    assert len(documents) == 1


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "ids",
    [
        {"trace": ""},
        {"span_id": ""},
        {"trace": "00" * 16},
        {"span_id": "00" * 8},
        {"trace": "ab" * 15},
        {"span_id": "ab" * 9},
        {"trace": "", "span_id": ""},
    ],
)
def test_usage_without_ids_is_a_rejection(ids, encoding):
    """Nobody could tell it from its own repetition."""
    for usage in (verdict(CALL, encoding, **ids), verdict_of_log(CALL, encoding, **ids)):
        assert isinstance(usage, Usage)
        assert usage.fault is not None
        assert usage.fault.reason is Reason.NO_ID
        assert "id" not in json.loads(usage.document)


def test_a_span_that_has_not_ended_is_a_rejection():
    """What it says may still change."""
    usage = verdict(CALL, at_ns=0)

    assert isinstance(usage, Usage)
    assert usage.fault is not None
    assert (usage.fault.reason, usage.fault.detail) == (
        Reason.MALFORMED,
        "the span has not ended; send it when it has",
    )


# -- Log records -----------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_log_record_of_the_event_is_usage_and_others_are_not(encoding):
    """An evaluation tells of the same call again; what has no name is judged by what it says."""
    by_attribute = {**CALL, "event.name": EVENT}

    assert document(verdict_of_log(CALL, encoding))["id"] == ID
    assert document(verdict_of_log(by_attribute, encoding, name=""))["id"] == ID
    assert document(verdict_of_log(CALL, encoding, name=""))["id"] == ID
    assert verdict_of_log(CALL, encoding, name="gen_ai.evaluation.result") == Ignored()
    assert verdict_of_log({**CALL, "event.name": "x"}, encoding, name="") == Ignored()
    assert verdict_of_log({"level": "info"}, encoding, name="") == Ignored()


def test_a_log_record_without_a_time_happened_when_it_was_seen():
    """And on arrival where it was not."""
    record = otlp.record(CALL, at_ns=0)
    record.observed_time_unix_nano = 1_000_000_000
    (seen,) = read(otlp.logs(record), Signal.LOGS)
    (unseen,) = read(otlp.logs(otlp.record(CALL, at_ns=0)), Signal.LOGS)

    assert document(usage_of(seen))["time"] == "1970-01-01T00:00:01.000000Z"
    assert "time" not in document(usage_of(unseen))


def test_no_name_is_looked_for_in_two_places():
    """A name under two counts would be counted twice."""
    names = [
        name for table in (genai.TOKENS, genai.NAMES) for names in table.values() for name in names
    ]

    assert len(names) == len(set(names))
    assert not COUNTED & AROUND
