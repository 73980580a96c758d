"""Which numbers of a numbering producer were counted: what is missing, and what came before.

The rule kept here: a number is called seen only when its event was counted, and never counted only
when it surely was not. Whatever lies between the two is unknown, and an event that is too old for
the memory of identities then waits for a person, as one without a number does.

Theory of operation. A producer is what an event calls its `source`. Its numbers (CloudEvents:
`sequence`) are remembered as disjoint intervals, so one that sends without loss costs two integers
for ever, and what lies between two intervals is missing. Inside the dedupe window identities decide
what is new, and the numbers only follow. Beyond it the numbers decide, where the run is known:

- A *run* is one numbering from its first known number, the *floor*, upwards. What is below the
  floor was counted or not: nobody knows.
- A producer that begins anew sends a number that was seen under an identity that was not. Only new
  events can say so: what comes again, by whatever way, is known by its identity and changes
  nothing. The old run's gaps are given up.
- The time tells which run an event belongs to. A number seen is this event's only when the event is
  no older than the run and no younger than the newest that was counted: one that is younger is of a
  numbering that nobody has seen yet.
- A run is *exact* when its beginning is known: the first one of a producer, and one that began with
  0 or 1 after everything else that was counted. One that begins otherwise (two producers under one
  name, a counter that was put back, a beginning that was overtaken) shows gaps and decides nothing.
- There are limits. Beyond `GAPS_MAX` the lowest gap is given up: the floor moves above it. Beyond
  `PRODUCERS_MAX` the producer that was silent for longest is forgotten. From then on no new run is
  believed for what was made before that moment.
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice

from meterd.core.changes import ProducerRow
from meterd.core.events import UsageEvent

GAPS_MAX = 1_000  # A row of at most 40 KiB, and far more than a broker loses one by one.
PRODUCERS_MAX = 10_000
DIGITS_MAX = 18  # What fits 64 bits.
NUMBERS = 10**DIGITS_MAX
BEGINNINGS = (0, 1)  # CloudEvents' numbering begins with 1, that of many programs with 0.
# Threads of a producer take number and time one after the other: the first may be overtaken by so
# much. It is about what is counted for a run, and only for new events: one that comes again may be
# of the run before. It is never about what the numbers decide.
OVERTAKEN_MS = 1_000
# A clock may be so far ahead: what was counted by now has no later time.
AHEAD_MS = 5 * 60 * 1000


class Known(enum.Enum):
    """What the numbers say of an event that is older than the memory of identities."""

    SEEN = "seen"
    MISSING = "missing"  # It was never counted.
    UNKNOWN = "unknown"


# An event that was counted: its number, its time in wall ms, and whether it is counted only now.
Counted = tuple[int, int, bool]


@dataclass(slots=True)
class Noted:
    """What noting a batch leaves: rows to be stored, None where a producer is forgotten.

    `began`: producers whose numbers begin anew; `blurred`: those of them whose new run decides
    nothing, though the one before did.
    """

    rows: dict[str, ProducerRow | None] = field(default_factory=dict)
    began: list[str] = field(default_factory=list)
    blurred: list[str] = field(default_factory=list)
    numbers_from: int | None = None

    @property
    def kept(self) -> tuple[ProducerRow, ...]:
        """The rows to be stored."""
        return tuple(row for row in self.rows.values() if row is not None)

    @property
    def gone(self) -> tuple[str, ...]:
        """The producers that are forgotten."""
        return tuple(source for source, row in self.rows.items() if row is None)


@dataclass(eq=False, slots=True)
class Producer:
    """One producer's run: `firsts[i]` to `lasts[i]` were counted, what lies between was not.

    Times in wall ms. `since`: from when on events belong to this run; `latest`: the newest event
    that was counted; `missing_since`: when the first of what is missing now was missed, 0: nothing
    is.
    """

    source: str
    firsts: list[int]
    lasts: list[int]
    since: int
    latest: int
    run: int = 1
    exact: bool = True
    missing: int = 0
    missing_since: int = 0
    given_up: int = 0

    @property
    def last(self) -> int:
        """The highest number of the run."""
        return self.lasts[-1]

    @property
    def row(self) -> ProducerRow:
        """The producer as it is to be stored."""
        return ProducerRow(
            self.source,
            self.run,
            tuple(zip(self.firsts, self.lasts, strict=True)),
            self.since,
            self.latest,
            self.exact,
            self.missing_since,
            self.given_up,
        )

    def gaps(self) -> Iterator[tuple[int, int]]:
        """The first and the last number of each missing range, lowest first."""
        for last, first in zip(self.lasts, self.firsts[1:], strict=False):
            yield last + 1, first - 1

    def has(self, number: int) -> bool:
        """Whether the number was counted in this run."""
        place = bisect_right(self.firsts, number)
        return place > 0 and number <= self.lasts[place - 1]

    def judge(self, number: int, at: int) -> Known:
        """What the run says of an event of that time, without its identity."""
        if not self.exact or at < self.since or number < self.firsts[0]:
            return Known.UNKNOWN
        if not self.has(number):
            return Known.MISSING
        return Known.SEEN if at <= self.latest else Known.UNKNOWN

    def owns(self, number: int, at: int, *, fresh: bool) -> bool:
        """Whether an event is counted for this run; if not, it is a straggler of one before.

        Before the first run there was none that is known, and who comes first may be overtaken.
        """
        if at >= self.since - (OVERTAKEN_MS if fresh else 0):
            return True
        return self.run == 1 and not self.has(number)

    def is_begun_anew(self, number: int, at: int) -> bool:
        """Whether a new event with this number and time shows that another numbering has begun."""
        before = number < self.firsts[0] and self._is_beginning(number, at)
        return before or self.has(number)

    def _is_beginning(self, number: int, at: int) -> bool:
        return number in BEGINNINGS and at > self.latest

    def begin(self, number: int, at: int) -> None:
        """Begin a new run with this event; the old one's gaps are given up."""
        self.exact = self._is_beginning(number, at)
        self.given_up += self.missing
        self.missing = 0
        self.firsts, self.lasts = [number], [number]
        self.since = self.latest = max(self.latest, at)
        self.run += 1

    def count(self, number: int, at: int, *, fresh: bool) -> None:
        """Count an event, in whatever order they come."""
        if not self.owns(number, at, fresh=fresh):
            return
        if fresh and self.is_begun_anew(number, at):
            self.begin(number, at)
            return
        self._add(number)
        self.latest = max(self.latest, at)

    def _add(self, number: int) -> None:
        """Count a number; one that was counted, or is below the floor, changes nothing."""
        place = bisect_right(self.firsts, number)
        if place == 0 or number <= self.lasts[place - 1]:
            return
        joins_below = number == self.lasts[place - 1] + 1
        joins_above = place < len(self.firsts) and number == self.firsts[place] - 1
        if place == len(self.firsts):
            self.missing += number - self.lasts[-1] - 1
        else:
            self.missing -= 1
        if joins_below and joins_above:
            self.lasts[place - 1] = self.lasts[place]
            del self.firsts[place], self.lasts[place]
        elif joins_below:
            self.lasts[place - 1] = number
        elif joins_above:
            self.firsts[place] = number
        else:
            self.firsts.insert(place, number)
            self.lasts.insert(place, number)

    def append(self, numbers: Sequence[int]) -> None:
        """Count sorted numbers, each one once, that lie above all that were counted."""
        for number in numbers:
            if number == self.lasts[-1] + 1:
                self.lasts[-1] = number
            else:
                self.missing += number - self.lasts[-1] - 1
                self.firsts.append(number)
                self.lasts.append(number)

    def give_up(self, gaps_left: int) -> None:
        """Leave so many gaps, the highest; what lies below them is given up."""
        surplus = len(self.firsts) - 1 - gaps_left
        if surplus > 0:
            lost = sum(last - first + 1 for first, last in islice(self.gaps(), surplus))
            del self.firsts[:surplus], self.lasts[:surplus]
            self.missing -= lost
            self.given_up += lost


class Sequences:
    """The numbering producers of one daemon. It has one owner, the bookkeeper."""

    def __init__(
        self,
        rows: Iterable[ProducerRow] = (),
        numbers_from: int = 0,
        *,
        gaps_max: int = GAPS_MAX,
        producers_max: int = PRODUCERS_MAX,
    ) -> None:
        """Begin with what was stored.

        `numbers_from`: until then (wall ms) events may have been counted whose numbers are not
        remembered, so that no run is believed for an earlier time.
        """
        self._gaps_max = gaps_max
        self._producers_max = producers_max
        self._numbers_from = numbers_from
        # The one that was silent for longest comes first.
        self._producers = {row.source: _restored(row) for row in sorted(rows, key=_latest)}
        producers = self._producers.values()
        self.missing = sum(producer.missing for producer in producers)
        self.incomplete = sum(producer.missing > 0 for producer in producers)
        self.given_up = sum(producer.given_up for producer in producers)

    def __len__(self) -> int:
        return len(self._producers)

    def producer(self, source: str) -> Producer | None:
        """Find a producer that has numbered its events."""
        return self._producers.get(source)

    def producers(self) -> list[Producer]:
        """List all of them, by name."""
        return sorted(self._producers.values(), key=lambda producer: producer.source)

    def judge(self, source: str, number: int, at: int) -> Known:
        """What the numbers say of an event of that time, wall ms, whose identity is forgotten."""
        producer = self._producers.get(source)
        return Known.UNKNOWN if producer is None else producer.judge(number, at)

    def note(self, counted: Mapping[str, Sequence[Counted]], wall: int) -> Noted:
        """Note the events of a batch that were counted, by source, at wall ms."""
        noted = Noted()
        for source, events in counted.items():
            before = self._producers.pop(source, None)
            if before is None:
                producer = self._meet(source, events, wall)
            else:
                producer = self._go_on(before, events, wall, noted)
            if producer is not None:
                self._producers[source] = producer
                noted.rows[source] = producer.row
        while len(self._producers) > self._producers_max:
            self._forget(noted, wall)
        return noted

    def give_up(self, source: str) -> ProducerRow | None:
        """Give up what is missing of a producer; None: nothing is."""
        producer = self._producers.get(source)
        if producer is None or not producer.missing:
            return None
        missing, given_up = producer.missing, producer.given_up
        producer.give_up(0)
        self._add_up(producer, missing, given_up, 0)
        return producer.row

    def discard(self, source: str, number: int, at: int, wall: int) -> ProducerRow | None:
        """Wait no more for one event, which a person has thrown away; None: nobody does."""
        producer = self._producers.get(source)
        if producer is None or number > producer.last:
            return None
        if not producer.owns(number, at, fresh=False):
            return None
        missing = producer.missing
        producer.count(number, at, fresh=False)
        self._add_up(producer, missing, producer.given_up, wall)
        return producer.row

    def is_exact(self, source: str) -> bool:
        """Whether the numbers of a producer decide about its late events."""
        producer = self._producers.get(source)
        return producer is not None and producer.exact

    def _meet(self, source: str, events: Sequence[Counted], wall: int) -> Producer | None:
        """Begin to know a producer, by a new event: what comes again was counted before."""
        fresh = [event for event in events if event[2]]
        if not fresh:
            return None
        first = min(fresh, key=_time_then_number)
        number, at, _ = first
        since = max(at, self._numbers_from)
        producer = Producer(source, [number], [number], since, at)
        rest = list(events)
        rest.remove(first)
        _count(producer, rest)
        producer.give_up(self._gaps_max)
        self._add_up(producer, 0, 0, wall)
        return producer

    def _go_on(
        self, producer: Producer, events: Sequence[Counted], wall: int, noted: Noted
    ) -> Producer:
        run, exact = producer.run, producer.exact
        missing, given_up = producer.missing, producer.given_up
        _count(producer, events)
        producer.give_up(self._gaps_max)
        self._add_up(producer, missing, given_up, wall)
        if producer.run != run:
            noted.began.append(producer.source)
            if exact and not producer.exact:
                noted.blurred.append(producer.source)
        return producer

    def _add_up(self, producer: Producer, missing: int, given_up: int, wall: int) -> None:
        """Keep the sums in step with one that had so much missing and given up before."""
        self.missing += producer.missing - missing
        self.incomplete += (producer.missing > 0) - (missing > 0)
        self.given_up += producer.given_up - given_up
        if not producer.missing:
            producer.missing_since = 0
        elif not producer.missing_since:
            producer.missing_since = wall

    def _forget(self, noted: Noted, wall: int) -> None:
        """Forget the producer that was silent for longest."""
        source = next(iter(self._producers))
        producer = self._producers.pop(source)
        self.missing -= producer.missing
        self.incomplete -= producer.missing > 0
        self.given_up += producer.missing
        noted.rows[source] = None
        self._numbers_from = max(self._numbers_from, wall + AHEAD_MS)
        noted.numbers_from = self._numbers_from


def number_of(sequence: int | str) -> int | None:
    """Read a number, or its decimal digits with or without leading zeros; None: it is no number."""
    if isinstance(sequence, str):
        if not (len(sequence) <= DIGITS_MAX and sequence.isascii() and sequence.isdigit()):
            return None
        return int(sequence)
    return sequence if 0 <= sequence < NUMBERS else None


def take_numbers(events: Sequence[UsageEvent]) -> dict[int, int]:
    """Take the numbers out of events, by their place; most batches have none.

    A number says where an event stands and not what was used: it is no part of the content.
    """
    said = [event.sequence for event in events]
    if said.count("") == len(said):
        return {}
    numbers = {}
    for place, sequence in enumerate(said):
        events[place].sequence = ""
        number = number_of(sequence)
        if number is not None:
            numbers[place] = number
    return numbers


def time_of(event: UsageEvent) -> int | None:
    """When an event says that it happened, wall ms."""
    return None if event.time is None else (event.time - _EPOCH) // _MILLISECOND


def _count(producer: Producer, events: Sequence[Counted]) -> None:
    """Count a batch: nearly always it goes on where the last one ended."""
    if not events:
        return
    numbers = sorted({number for number, _, _ in events})
    times = [at for _, at, _ in events]
    each_once = len(numbers) == len(events)
    of_this_run = producer.run == 1 or min(times) >= producer.since
    if each_once and of_this_run and numbers[0] > producer.last:
        producer.append(numbers)
        producer.latest = max(producer.latest, *times)
        return
    for number, at, fresh in sorted(events, key=_time):
        producer.count(number, at, fresh=fresh)


def _time(event: Counted) -> int:
    return event[1]


def _time_then_number(event: Counted) -> tuple[int, int]:
    return event[1], event[0]


def _latest(row: ProducerRow) -> int:
    return row.latest


def _restored(row: ProducerRow) -> Producer:
    firsts = [first for first, _ in row.intervals]
    lasts = [last for _, last in row.intervals]
    missing = sum(first - last - 1 for last, first in zip(lasts, firsts[1:], strict=False))
    return Producer(
        row.source,
        firsts,
        lasts,
        row.since,
        row.latest,
        row.run,
        row.exact,
        missing,
        row.missing_since,
        row.given_up,
    )


_EPOCH = datetime.fromtimestamp(0, UTC)
_MILLISECOND = timedelta(milliseconds=1)
