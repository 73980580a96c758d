"""What is measured: a meter's name, unit and aggregation over one period of an agreement.

`sum` and `count` are additive: a batch adds one number, and an event that is taken back subtracts
one. `max`, `unique` and `latest` are not: what they show depends on which events there were, so
each keeps its *samples* for as long as the period is kept, and taking an event back takes its
sample back.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from meterd.core.events import data_nanos, quantity_nanos
from meterd.core.money import NANOS


class Aggregation(enum.StrEnum):
    """How a meter makes one number of many events."""

    SUM = "sum"
    COUNT = "count"
    MAX = "max"
    UNIQUE = "unique"
    LATEST = "latest"


ADDITIVE = frozenset({Aggregation.SUM, Aggregation.COUNT})


@dataclass(frozen=True, slots=True)
class Meter:
    """One meter of the configuration.

    Events of `event_type` feed it without naming it; `value` and the `dimensions` by name are the
    JSONPaths of what they say to it.
    """

    name: str
    aggregation: Aggregation = Aggregation.SUM
    unit: str = ""
    event_type: str = ""
    value: str = ""
    dimensions: tuple[tuple[str, str], ...] = ()

    @property
    def additive(self) -> bool:
        """Whether what it shows is the sum of what its events add."""
        return self.aggregation in ADDITIVE

    def measure(self, quantity: int | str | msgspec.Raw) -> int:
        """How much one event says, in nanos of the unit. Raises `money.BadNumber`.

        A counting meter takes each event as one, whatever quantity stands in it; so does `unique`,
        which looks at the event's `value`.
        """
        if self.aggregation in (Aggregation.COUNT, Aggregation.UNIQUE):
            return NANOS
        return quantity_nanos(quantity)

    def measure_fed(self, quantity: int | str | msgspec.Raw) -> int:
        """How much a typed event's data say, in nanos; here 0 is 0. Raises `money.BadNumber`."""
        if self.aggregation in (Aggregation.COUNT, Aggregation.UNIQUE):
            return NANOS
        return data_nanos(quantity)

    def sample_key(self, quantity: int, value: str, at: int, event_id: str, source: str) -> str:
        """Name the sample of an event. `at` in wall ms; equal keys are equal samples.

        `latest` is decided by the event's own time, and of two at one time by the greater id. Two
        sources may use the same id, so both are in the key, with a sign between them that is in
        neither.
        """
        if self.aggregation is Aggregation.MAX:
            return str(quantity)
        if self.aggregation is Aggregation.UNIQUE:
            return value
        return f"{at:016d} {event_id}\n{source}"


@dataclass(frozen=True, slots=True)
class Sample:
    """What one or more events of a counter said: `quantity` nanos, `count` times."""

    key: str
    quantity: int
    count: int


@dataclass(slots=True)
class Samples:
    """All samples of one counter, and what its meter makes of them."""

    aggregation: Aggregation
    known: dict[str, Sample] = field(default_factory=dict)

    @classmethod
    def of(cls, aggregation: Aggregation, samples: Iterable[Sample]) -> Samples:
        """Bring back what was stored."""
        return cls(aggregation, {sample.key: sample for sample in samples if sample.count})

    def add(self, key: str, quantity: int, count: int = 1) -> Sample:
        """Take an event in, or with a `count` of -1 back; the sample as it is to be stored."""
        before = self.known.get(key)
        sample = Sample(key, quantity, count + (before.count if before is not None else 0))
        assert sample.count >= 0, "a sample is taken back once for each time that it came"
        if sample.count:
            self.known[key] = sample
        else:
            del self.known[key]
        return sample

    @property
    def quantity(self) -> int:
        """What the meter shows, in nanos; 0 without samples."""
        if not self.known:
            return 0
        if self.aggregation is Aggregation.UNIQUE:
            return len(self.known) * NANOS
        if self.aggregation is Aggregation.MAX:
            return max(sample.quantity for sample in self.known.values())
        return self.known[max(self.known)].quantity
