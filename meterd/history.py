"""Past usage for a simulation: from NDJSON files, or from what a store still knows of it.

The rule: nothing is made up in silence. What is left out or was not known is counted, and told in a
sentence. Looking changes nothing: a store is opened as the auditor opens it.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from pathlib import Path

from meterd.audit.files import opened
from meterd.core.changes import CounterRow, Taken
from meterd.core.events import EventDecoder, Rejection, UsageEvent
from meterd.core.ledger import MILESTONE_TYPE, OUTCOME_TYPE, VOID_TYPE
from meterd.core.meters import Aggregation, Meter
from meterd.core.money import NANOS, format_price, format_quantity
from meterd.core.simulate import Past
from meterd.store import schema, taken

_EPOCH = datetime.fromtimestamp(0, UTC)
_MILLISECOND = timedelta(milliseconds=1)
HOUR_MS = 3_600_000
LINES_AT_ONCE = 1000


@dataclass(slots=True)
class History:
    """Usage in the order of its time, each identity once; sentences on what it does not say.

    `plans`: the plan of each agreement, where the origin knows it.
    """

    past: list[Past] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    plans: dict[str, str] = field(default_factory=dict)

    def in_order(self) -> History:
        """Sort the usage by its time."""
        self.past.sort(key=attrgetter("at"))  # Of one moment, in the order of their coming.
        return self

    def note(self, count: int, what: str) -> None:
        """Tell how often something was so, if at all."""
        if count:
            self.notes.append(f"{count:,} {what}")


# -- Files ---------------------------------------------------------------------------------------


def from_lines(lines: Iterable[bytes], name_of: Mapping[str, str]) -> History:
    """Read usage events, one a line, as `meterd replay` does.

    `name_of`: the agreement of each escrow that the configuration knows.
    """
    reading = _Reading(name_of)
    decoder = EventDecoder(secrets.randbits(62))
    for batch in _batches(lines):
        for event in decoder.decode(batch):
            reading.take(event)
    return reading.ended()


def _batches(lines: Iterable[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    for line in lines:
        if stripped := line.strip():
            batch.append(stripped)
        if len(batch) >= LINES_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


class _Reading:
    """Events of files, told apart by their identities."""

    def __init__(self, name_of: Mapping[str, str]) -> None:
        self._name_of = name_of
        self._history = History()
        self._known: set[tuple[str, str]] = set()
        self._voided: set[tuple[str, str, str]] = set()
        self._flawed = self._twice = self._timeless = 0
        self._flaw = ""

    def take(self, event: UsageEvent | Rejection) -> None:
        """Take one line in."""
        if isinstance(event, Rejection):
            self._flawed += 1
            self._flaw = self._flaw or event.detail
            return
        identity = event.source, event.id
        if event.id and identity in self._known:
            self._twice += 1
            return
        self._known.add(identity)
        name = event.agreement or event.escrow_id
        event.agreement, event.escrow_id = self._name_of.get(name, name), ""
        if event.type == VOID_TYPE:
            self._voided.add((event.agreement, event.source, event.voids))
        elif event.time is None:
            self._timeless += 1
        else:
            self._history.past.append(Past((event.time - _EPOCH) // _MILLISECOND, event))

    def ended(self) -> History:
        """Leave out what was taken back, and say what else is not there."""
        history, voided = self._history, self._voided
        if voided:
            kept = [
                item
                for item in history.past
                if (item.event.agreement, item.event.source, item.event.id) not in voided
            ]
            taken_back, history.past = len(history.past) - len(kept), kept
            history.note(taken_back, "events that were taken back are left out from the beginning")
        history.note(self._flawed, f"lines are no usage events, the first: {self._flaw}")
        history.note(self._twice, "events came twice and are counted once")
        history.note(self._timeless, "events have no time and are left out")
        return history.in_order()


# -- A store -------------------------------------------------------------------------------------


def from_store(place: Path, meters: Mapping[str, Meter]) -> History:
    """Read what a store knows of single events: the hour, the counter and what was added.

    `place`: a state directory without a daemon, or a backup. Raises as `audit.files.opened` does.
    """
    history = History()
    with opened(place) as store:
        execute = store.connection.execute
        rows = execute(f"SELECT {schema.AGREEMENT_COLUMNS} FROM agreement")  # noqa: S608
        history.plans = {row.id: row.plan for row in map(schema.agreement_of, rows)}
        rows = execute(f"SELECT {schema.COUNTER_COLUMNS} FROM counter")  # noqa: S608
        counters = {row.number: row for row in map(schema.counter_of, rows)}
        hours: dict[tuple[int, str], list[Taken]] = {}
        blocks = execute("SELECT bucket, wide, data FROM taken_block ORDER BY number")
        for bucket, wide, data in blocks:
            for one in taken.unpack(data, wide=bool(wide)):
                if one.counter in counters:
                    name = counters[one.counter].agreement
                    hours.setdefault((bucket, name), []).append(one)
    read = 0
    for (bucket, _), events in hours.items():
        for place_, one in enumerate(events):
            at = bucket * HOUR_MS + (2 * place_ + 1) * HOUR_MS // (2 * len(events))
            read += 1
            history.past.append(Past(at, _event(read, one, counters[one.counter], meters, at)))
    history.note(read, "events are known by their hour alone and are spread evenly over it")
    counted = sum(row.events for row in counters.values())
    history.note(
        max(0, counted - read),
        "events are older than the store's memory of single events and are left out",
    )
    history.note(
        max(0, read - counted),
        "events were taken back later; which ones is not known, so they count",
    )
    return history.in_order()


def _event(
    number: int, one: Taken, counter: CounterRow, meters: Mapping[str, Meter], at: int
) -> UsageEvent:
    """Write an event anew from what it added."""
    dimensions = dict(counter.dimensions)
    event = UsageEvent(
        id=f"{number}",
        agreement=counter.agreement,
        meter=counter.meter,
        quantity=format_quantity(one.quantity),
        dimensions=dimensions,
        time=_EPOCH + at * _MILLISECOND,
    )
    if counter.meter == MILESTONE_TYPE:
        event.type, event.name = MILESTONE_TYPE, dimensions.get("name", "")
    elif counter.meter == OUTCOME_TYPE:
        event.type, event.score = OUTCOME_TYPE, event.quantity
    elif one.amount:
        event.price = format_price(one.amount // one.quantity)
    meter = meters.get(counter.meter)
    if meter is not None and meter.aggregation is Aggregation.UNIQUE:
        event.value = one.sample
    if meter is not None and meter.aggregation is Aggregation.COUNT:
        event.quantity = one.quantity // NANOS
    return event
