"""Typed events: what a CloudEvent's attributes and data say, as usage of meterd's own meters.

An event that names a `type` and no meter may feed several meters at once: all those whose
`event_type` it is. Each meter says by a JSONPath where in `data` its quantity and its dimensions
stand, as OpenMeter's meters do. The rule kept here: what an event says is found out by its data and
the configuration alone, exactly, and never through a float; which of it is charged is the ledger's
decision, by the agreement's plan.

`meterd.usage` carries a bare event as `data`. `meterd.genai` is a call of a model, with the counts
of tokens that OpenTelemetry's conventions name; there the input includes what came from or went
into a cache and the output includes the reasoning, so the parts are taken out of the whole.
"""

from __future__ import annotations

import binascii
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from meterd.core import money
from meterd.core.events import (
    NO_DATA,
    Reason,
    UsageEvent,
    data_nanos,
    printable,
)
from meterd.core.flaws import json_flaw
from meterd.core.meters import Aggregation, Meter
from meterd.core.paths import Path

SPECVERSION = "1.0"
USAGE_TYPE = "meterd.usage"
GENAI_TYPE = "meterd.genai"
TOKENS_METER, CALLS_METER = "tokens", "calls"  # What a call of a model feeds by itself.
DATA_DEPTH_MAX = 16
PATHS_FOUND_MAX = 1  # A path that finds two values leaves open which of them is charged.

Why = tuple[Reason, str]


@dataclass(frozen=True, slots=True)
class Part:
    """What an event says to one meter. `quantity` as it stands there; "" where events are counted.

    `otherwise`: dimensions to charge it by where the plan has no rate for its own.
    """

    meter: str
    quantity: int | str | msgspec.Raw = 1
    value: str = ""
    dimensions: Mapping[str, str] = field(default_factory=dict)
    otherwise: Mapping[str, str] | None = None


class _Usage(msgspec.Struct):
    """The data of `meterd.usage`."""

    meter: str = ""
    quantity: msgspec.Raw = msgspec.Raw(b"")
    dimensions: dict[str, str] = {}
    value: str = ""
    price: int | str = ""
    hold: str = ""


class _Special(msgspec.Struct):
    """The data of milestones, outcomes, voids and closes."""

    name: str = ""
    score: msgspec.Raw = msgspec.Raw(b"")
    signature: str = ""
    voids: str = ""


class _GenAi(msgspec.Struct):
    """The data of `meterd.genai`. A count that is left out is unknown; 0 is 0."""

    model: str = ""
    provider: str = ""
    operation: str = ""
    input_tokens: int | str | None = None
    cached_tokens: int | str | None = None
    cache_creation_tokens: int | str | None = None
    output_tokens: int | str | None = None
    reasoning_tokens: int | str | None = None


_MALFORMED = (msgspec.MsgspecError, ValueError, RecursionError)
_usage = msgspec.json.Decoder(_Usage)
_special = msgspec.json.Decoder(_Special)
_genai = msgspec.json.Decoder(_GenAi)
# Numbers with a point or an exponent stay the texts that they are.
_any = msgspec.json.Decoder(float_hook=str)
_canonical = msgspec.json.Encoder(order="sorted")


def unwrap(event: UsageEvent) -> Why | None:
    """Bring a CloudEvent's attributes to where a bare event has them; why not, if so.

    What is left is the same for each way in which the event may have been sent.
    """
    if event.specversion != SPECVERSION:
        return Reason.MALFORMED, f'specversion: only "{SPECVERSION}" is known'
    if not event.type:
        return Reason.MALFORMED, "type: a CloudEvent must say what it is"
    if event.subject:
        if not event.agreement:
            event.agreement = event.subject
        elif event.agreement != event.subject:
            return Reason.MISMATCH, "subject and agreement name different agreements"
    if event.datacontenttype and not _is_json(event.datacontenttype):
        kind = printable(event.datacontenttype, 80)
        return Reason.MALFORMED, f"datacontenttype: {kind} cannot be read; send application/json"
    if event.data_base64:
        try:
            event.data = msgspec.Raw(binascii.a2b_base64(event.data_base64, strict_mode=True))
        except (binascii.Error, ValueError):
            return Reason.MALFORMED, "data_base64: no base64"
    event.specversion = event.subject = event.datacontenttype = event.data_base64 = ""
    return None


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind in {"application/json", "text/json"} or kind.endswith("+json")


def open_usage(event: UsageEvent) -> Why | None:
    """Make a bare event of a `meterd.usage`; why not, if so."""
    try:
        said = _usage.decode(event.data)
    except _MALFORMED as error:
        return Reason.MALFORMED, f"data: {_said(event, error)}"
    for name in ("meter", "value", "price", "hold"):
        if said_here := getattr(said, name):
            setattr(event, name, said_here)
    if said.dimensions:
        event.dimensions = said.dimensions
    if bytes(said.quantity):
        event.quantity = said.quantity  # type: ignore[assignment]  # Read by rule, as raw JSON is.
    event.type, event.data = "", NO_DATA
    return None


def open_special(event: UsageEvent) -> Why | None:
    """Take out of `data` what a milestone, an outcome, a void or a close says there."""
    if not bytes(event.data):
        return None
    try:
        said = _special.decode(event.data)
    except _MALFORMED as error:
        return Reason.MALFORMED, f"data: {_said(event, error)}"
    event.name = said.name or event.name
    event.signature = said.signature or event.signature
    event.voids = said.voids or event.voids
    if bytes(said.score):
        event.score = said.score  # type: ignore[assignment]  # Read by rule, as raw JSON is.
    event.data = NO_DATA
    return None


class Feeds:
    """Which meters an event's type feeds, by the configuration."""

    def __init__(self, meters: Iterable[Meter]) -> None:
        self._by_type: dict[str, list[_Feed]] = {GENAI_TYPE: []}
        for meter in meters:
            if meter.event_type:
                self._by_type.setdefault(meter.event_type, []).append(_Feed(meter))

    def __contains__(self, event_type: object) -> bool:
        return event_type in self._by_type

    def meters(self, event_type: str) -> list[str]:
        """Name the meters that a type feeds."""
        names = [feed.meter.name for feed in self._by_type[event_type]]
        if event_type == GENAI_TYPE:
            names += [name for name in (TOKENS_METER, CALLS_METER) if name not in names]
        return names

    def parts(self, event: UsageEvent) -> Sequence[Part] | Why:
        """What an event says to each meter that its type feeds, or why it says nothing.

        A meter whose value is not there, or null, is not fed. The event's data are brought to one
        spelling.
        """
        try:
            data = _any.decode(event.data or b"null")
        except _MALFORMED as error:
            return Reason.MALFORMED, f"data: {_said(event, error)}"
        if _is_deep(data):
            return Reason.MALFORMED, f"data: nested more than {DATA_DEPTH_MAX} deep"
        found = [feed.part(data) for feed in self._by_type[event.type]]
        for part in found:
            if isinstance(part, tuple):
                return part
        parts = [part for part in found if isinstance(part, Part)]
        if event.type == GENAI_TYPE:
            own = _genai_parts(event, {feed.meter.name for feed in self._by_type[event.type]})
            if isinstance(own, tuple):
                return own
            parts += own
        if not parts:
            paths = ", ".join(feed.where for feed in self._by_type[event.type])
            return Reason.BAD_QUANTITY, f"data: there is no {paths}"
        event.data = msgspec.Raw(_canonical.encode(data))
        return parts


class _Feed:
    """One meter and where it finds in the data what it measures."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.where = meter.value
        self._value = Path(meter.value) if meter.value else None
        self._dimensions = [(name, Path(path)) for name, path in meter.dimensions]

    def part(self, data: Any) -> Part | Why | None:
        """What the data say to this meter; None: nothing."""
        quantity: int | str = 1  # Without a value events are counted; the configuration sees to it.
        value = ""
        if self._value is not None:
            found = self._value.find(data)
            if len(found) > PATHS_FOUND_MAX:
                detail = f"{self.where} finds {len(found)} values; one can be measured"
                return Reason.BAD_QUANTITY, detail
            if not found or found[0] is None:
                return None
            said = found[0]
            if type(said) not in (int, str):
                return Reason.BAD_QUANTITY, f"{self.where} is no number"
            if self.meter.aggregation is Aggregation.UNIQUE:
                value = str(said)
            else:
                quantity = said
        dimensions: dict[str, str] = {}
        for name, path in self._dimensions:
            found = path.find(data)
            if not found or found[0] is None:
                continue
            text = _text(found[0])
            if text is None or len(found) > PATHS_FOUND_MAX:
                detail = f"the dimension {name} is not one text, number, true or false"
                return Reason.MALFORMED, detail
            dimensions[name] = text
        return Part(self.meter.name, quantity, value, dimensions)


def _text(said: Any) -> str | None:
    """A dimension's value as a text; None where it is none."""
    if type(said) is bool:
        return "true" if said else "false"
    return str(said) if type(said) in (int, str) else None


def _is_deep(data: Any) -> bool:
    """Whether data are nested deeper than is allowed: one look at each level."""
    level = [data]
    for _ in range(DATA_DEPTH_MAX):
        level = [
            inner
            for outer in level
            if type(outer) in (dict, list)
            for inner in (outer.values() if type(outer) is dict else outer)
        ]
        if not level:
            return False
    return any(type(inner) in (dict, list) for inner in level)


def _said(event: UsageEvent, error: Exception) -> str:
    if not bytes(event.data):
        return f"there is none, and {event.type} needs it"
    return printable(json_flaw(error, bytes(event.data), ""))


# Calls of models ----------------------------------------------------------------------------------


def _genai_parts(event: UsageEvent, configured: set[str]) -> list[Part] | Why:
    """The tokens of a call by kind, none of them in two kinds, and the call itself."""
    try:
        said = _genai.decode(event.data)
        counts = _Counts.of(said)
    except money.BadNumber as error:
        return Reason.BAD_QUANTITY, f"data: {error}"
    except _MALFORMED as error:
        return Reason.MALFORMED, f"data: {_said(event, error)}"
    named = {"model": said.model, "provider": said.provider, "operation": said.operation}
    dimensions = {name: text for name, text in named.items() if text}
    parts = [] if CALLS_METER in configured else [Part(CALLS_METER, dimensions=dimensions)]
    if TOKENS_METER in configured:
        return parts
    for kind, whole, nanos in counts.kinds():
        own = {**dimensions, "kind": kind}
        otherwise = None if kind == whole else {**dimensions, "kind": whole}
        quantity = money.format_quantity(nanos)
        parts.append(Part(TOKENS_METER, quantity, dimensions=own, otherwise=otherwise))
    return parts


@dataclass(frozen=True, slots=True)
class _Counts:
    """The counts of tokens of a call in nanos; the first of each group includes its others."""

    read: tuple[int, int, int]  # Input, of it from the cache, of it into the cache.
    written: tuple[int, int]  # Output, of it reasoning.

    @classmethod
    def of(cls, said: _GenAi) -> _Counts:
        """Read the counts. Raises `money.BadNumber`."""
        read = _group(said, "input_tokens", "cached_tokens", "cache_creation_tokens")
        written = _group(said, "output_tokens", "reasoning_tokens")
        if read is None and written is None:
            raise money.BadNumber("there is neither input_tokens nor output_tokens")
        return cls(read or (0, 0, 0), written or (0, 0))  # type: ignore[arg-type]

    def kinds(self) -> list[tuple[str, str, int]]:
        """Each kind, the kind that includes it, and how many tokens are of this kind alone."""
        whole, cached, created = self.read
        output, reasoning = self.written
        return [
            ("input", "input", whole - cached - created),
            ("cached", "input", cached),
            ("cache_creation", "input", created),
            ("output", "output", output - reasoning),
            ("reasoning", "output", reasoning),
        ]


def _group(said: _GenAi, whole: str, *parts: str) -> tuple[int, ...] | None:
    """Read a count and those that it includes; None: none of them is given."""
    given = {name: getattr(said, name) for name in (whole, *parts)}
    if all(count is None for count in given.values()):
        return None
    numbers = [0 if count is None else _count(name, count) for name, count in given.items()]
    included = sum(numbers[1:])
    if given[whole] is None:
        numbers[0] = included
    if included > numbers[0]:
        raise money.BadNumber(f"{' and '.join(parts)} are part of {whole}, and more than it")
    return tuple(numbers)


def _count(name: str, count: int | str) -> int:
    try:
        return data_nanos(count)
    except money.BadNumber as error:
        raise money.BadNumber(f"{name}: {error}") from None
