"""Which spans and log records are usage, and that usage as a CloudEvent of the type `meterd.genai`.

The rules kept here:

1. What says how many tokens a call of a model took is usage; an explicit zero says it too. All else
   is ignored.
2. A call is charged where the model was called. Frameworks repeat the sums of their calls on the
   span of the agent or the workflow around them, under the same names: so only operations that call
   a model count, and what stands around them is ignored, however many tokens it tells of.
3. A span and the log record of the same operation are one event: the same id, of trace and span,
   the same source and the same data. Whichever comes second is a duplicate.
4. A count is a whole number or a rejection; nothing is rounded. Whose usage it is says the span, or
   else its resource, in `meterd.agreement` or `meterd.escrow_id`; the ledger rejects it where
   neither does.

The attributes have had several names. The tables below have the current one first, and the first
that is there counts; a name that is not in them is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import msgspec

from meterd.core.events import Reason, printable
from meterd.otlp.reading import Item, Scalar, Signal
from meterd.sources import Fault

TYPE = "meterd.genai"
SOURCE = "otlp"  # Where a resource has no name.
# The names of OpenTelemetry since 1.27, those before it, those of other libraries that say the same
# (Traceloop, Sentry, Pydantic), and OpenInference's.
TOKENS: Mapping[str, tuple[str, ...]] = {
    "input_tokens": (
        "gen_ai.usage.input_tokens",
        "gen_ai.usage.prompt_tokens",
        "llm.usage.prompt_tokens",
        "llm.token_count.prompt",
    ),
    "cached_tokens": (
        "gen_ai.usage.cache_read.input_tokens",
        "gen_ai.usage.cache_read_input_tokens",
        "gen_ai.usage.input_tokens.cached",
        "gen_ai.usage.details.cache_read_tokens",
        "llm.usage.cache_read_input_tokens",
        "llm.token_count.prompt_details.cache_read",
    ),
    "cache_creation_tokens": (
        "gen_ai.usage.cache_creation.input_tokens",
        "gen_ai.usage.cache_write.input_tokens",
        "gen_ai.usage.cache_creation_input_tokens",
        "gen_ai.usage.input_tokens.cache_write",
        "gen_ai.usage.details.cache_write_tokens",
        "llm.usage.cache_creation_input_tokens",
        "llm.token_count.prompt_details.cache_write",
    ),
    "output_tokens": (
        "gen_ai.usage.output_tokens",
        "gen_ai.usage.completion_tokens",
        "llm.usage.completion_tokens",
        "llm.token_count.completion",
    ),
    "reasoning_tokens": (
        "gen_ai.usage.reasoning.output_tokens",
        "gen_ai.usage.reasoning_tokens",
        "gen_ai.usage.output_tokens.reasoning",
        "gen_ai.usage.details.reasoning_tokens",
        "llm.usage.reasoning_tokens",
        "llm.token_count.completion_details.reasoning",
    ),
}
NAMES: Mapping[str, tuple[str, ...]] = {
    # What answered, before what was asked for: a fallback or a router is charged as what worked.
    "model": (
        "gen_ai.response.model",
        "gen_ai.request.model",
        "llm.response.model",
        "llm.request.model",
        "llm.response.model_name",
        "llm.model_name",
        "llm.request.model_name",
        "embedding.model_name",
    ),
    "provider": ("gen_ai.provider.name", "gen_ai.system", "llm.provider", "llm.system"),
}
AGREEMENT = ("meterd.agreement", "meterd.escrow_id")
# Where the operation stands, and what its older spellings are called today.
OPERATION: Mapping[str, Mapping[str, str]] = {
    "gen_ai.operation.name": {"completion": "text_completion", "embedding": "embeddings"},
    "llm.request.type": {"completion": "text_completion", "embedding": "embeddings"},
    "openinference.span.kind": {"llm": "chat", "embedding": "embeddings"},
    "traceloop.span.kind": {},
}
COUNTED = frozenset({"chat", "text_completion", "generate_content", "embeddings"})
# What is known to stand around calls of a model, in the words of all who name it.
AROUND = frozenset(
    {
        *("create_agent", "invoke_agent", "invoke_workflow", "execute_tool", "plan", "retrieval"),
        *("create_memory", "create_memory_store", "delete_memory", "delete_memory_store"),
        *("search_memory", "update_memory", "upsert_memory"),
        *("agent", "chain", "decision", "evaluator", "guardrail", "prompt", "retriever", "tool"),
        *("task", "workflow"),
    }
)
EVENT = "gen_ai.client.inference.operation.details"
RESOURCE_NAMES = ("service.namespace", "service.name")
WANTED = frozenset(
    {
        *(name for names in (*TOKENS.values(), *NAMES.values()) for name in names),
        *(*AGREEMENT, *OPERATION, *RESOURCE_NAMES, "event.name"),
    }
)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_T = TypeVar("_T")
_WHOLE = re.compile(r"[0-9]{1,18}\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class Usage:
    """One usage event: its document, and why it is bad whatever the ledger says of it, if it is."""

    document: bytes
    fault: Fault | None = None


@dataclass(frozen=True, slots=True)
class Ignored:
    """What is no usage. `unknown` is an operation with tokens of which nobody knows what it is."""

    unknown: str = ""


def usage_of(item: Item, counted: Collection[str] = COUNTED) -> Usage | Ignored:
    """Say what a span or log record comes to; `counted` are the operations that are charged."""
    told = {
        name: item.attributes[spelling]
        for name, spellings in TOKENS.items()
        if (spelling := _first(item.attributes, spellings)) is not None
    }
    if not told or (item.signal is Signal.LOGS and item.event_name not in {EVENT, ""}):
        return Ignored()
    operation = _operation(item.attributes)
    if operation and operation not in counted:
        return Ignored("" if operation in AROUND else operation)
    flaws = [Fault(Reason.BAD_QUANTITY, flaw) for name in told if (flaw := _flaw(name, told[name]))]
    agreement, unreadable = _agreement(item)
    if unreadable:
        flaws.append(Fault(Reason.MALFORMED, f"{unreadable} is no text; write the agreement's id"))
    data = {name: _text(item.attributes, spellings) for name, spellings in NAMES.items()}
    document = {
        "specversion": "1.0",
        "type": TYPE,
        "source": _source(item.resource),
        "id": _id(item),
        "subject": agreement,
        "time": _time(item.at_ns),
        "data": _filled({**data, "operation": operation}) | {n: _kept(told[n]) for n in told},
    }
    fault = _no_event(item) or next(iter(flaws), None)
    return Usage(msgspec.json.encode(_filled(document)), fault)


def _no_event(item: Item) -> Fault | None:
    """Say why nothing can be made of it that counts once; None where something can."""
    if not item.trace_id or not item.span_id:
        detail = "it has no trace id and span id, so nobody could tell it from its own repetition"
        return Fault(Reason.NO_ID, detail)
    if item.signal is Signal.TRACES and not item.at_ns:
        return Fault(Reason.MALFORMED, "the span has not ended; send it when it has")
    return None


def _id(item: Item) -> str:
    return f"{item.trace_id}-{item.span_id}" if item.trace_id and item.span_id else ""


def _first(attributes: Mapping[str, Scalar], spellings: Collection[str]) -> str | None:
    return next((spelling for spelling in spellings if spelling in attributes), None)


def _text(attributes: Mapping[str, Scalar], spellings: Collection[str]) -> str:
    """The first of them that is a text and not empty; "" where there is none."""
    values = (attributes.get(spelling) for spelling in spellings)
    return next((value for value in values if isinstance(value, str) and value), "")


def _operation(attributes: Mapping[str, Scalar]) -> str:
    """What was done, by its name of today; "" where nothing says it, as it was before 1.27."""
    for name, today in OPERATION.items():
        value = attributes.get(name)
        if isinstance(value, str) and value:
            return today.get(value.lower(), value.lower())
    return ""


def _agreement(item: Item) -> tuple[str, str]:
    """Whose usage it is, by the span before the resource; and the attribute that is no id."""
    for attributes in (item.attributes, item.resource):
        for name in AGREEMENT:
            value = attributes.get(name, "")
            if value is None:
                return "", name
            if value != "":
                return str(value), ""
    return "", ""


def _source(resource: Mapping[str, Scalar]) -> str:
    """Who says so: `namespace/name` of the service."""
    parts = [_text(resource, (name,)) for name in RESOURCE_NAMES]
    return "/".join(part for part in parts if part) or SOURCE


def _time(at_ns: int) -> str:
    """RFC 3339, to the microsecond; "" where it is not known."""
    if not at_ns:
        return ""
    moment = _EPOCH + timedelta(microseconds=at_ns // 1000)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _count(value: Scalar) -> Scalar:
    """A count as a number; what is none as it came."""
    if isinstance(value, str):
        return int(value) if _WHOLE.match(value) else printable(value)
    return value


def _kept(value: Scalar) -> int | list[Scalar]:
    """A count; what is none in a list, so that nobody takes it for one when it is tried again."""
    count = _count(value)
    return count if isinstance(count, int) and count >= 0 else [count]


def _flaw(name: str, value: Scalar) -> str:
    """Say why something is no count; "" where it is one."""
    count = _count(value)
    if isinstance(count, int):
        return f"{name} is {count}; a count is not below 0" if count < 0 else ""
    shown = "neither a number nor a text" if count is None else f'"{count}"'
    return f"{name} is {shown}; a count is a whole number"


def _filled(members: Mapping[str, _T]) -> dict[str, _T]:
    """Leave out what is not known."""
    return {name: value for name, value in members.items() if value != ""}
