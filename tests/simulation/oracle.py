"""What the books must say, reckoned naively from deliveries: sets and exact fractions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from meterd.sources import Deliveries
from tests.simulation.events import HOUR_MS, Event

AHEAD_MS = 5 * 60 * 1000
Identity = tuple[str, str]
Delivery = tuple[str, bytes, tuple[tuple[str, str], ...]]


@dataclass
class Verdicts:
    """What one batch must come to."""

    fresh: dict[Identity, Event] = field(default_factory=dict)
    duplicates: int = 0
    rejected: set[int] = field(default_factory=set)
    deliveries: list[Delivery] = field(default_factory=list)


class Oracle:
    """Remembers what was accepted: for now, and for good once its commit is on the disk."""

    def __init__(self) -> None:
        self.events: dict[tuple[bytes, tuple[tuple[str, str], ...]], Event] = {}
        self.durable: dict[Identity, Event] = {}
        self.decided: set[Delivery] = set()  # Deliveries whose verdict is on the disk.
        self.rejected = 0  # Dead letters on the disk.
        self.received = 0
        self.verdicts: Counter[str] = Counter()
        self._now: dict[Identity, Event] = {}
        self._worth: dict[str, Fraction] = {}
        self._worth_now: dict[str, Fraction] = {}

    def know(self, event: Event) -> Event:
        """Note an event that will be delivered."""
        return self.events.setdefault(event.key, event)

    def restart(self) -> None:
        """Forget what was not durable."""
        self._now = dict(self.durable)
        self._worth_now = dict(self._worth)

    def judge(
        self,
        transport: str,
        deliveries: Deliveries,
        oldest: int,
        now: int,
        closed: Callable[[str], bool],
    ) -> Verdicts:
        """Say what must become of each delivery, in order."""
        found = Verdicts()
        for place, payload in enumerate(deliveries.payloads):
            fields = deliveries.fields[place] if deliveries.fields is not None else {}
            key = (bytes(payload), tuple(fields.items()))
            event = self.events[key]
            found.deliveries.append((transport, *key))
            identity = event.identity(transport)
            known = self._now.get(identity) or found.fresh.get(identity)
            at = now if event.at is None else event.at
            late = event.at is not None and not oldest <= at <= now + AHEAD_MS
            # Delivered again to an agreement that is closed by now, an event is still a duplicate.
            if event.kind == "garbage" or late or (known is None and closed(event.agreement)):
                found.rejected.add(place)
            elif known is None:
                found.fresh[identity] = event
            elif known.content == event.content:
                found.duplicates += 1
            else:
                found.rejected.add(place)
        return found

    def accept(self, verdicts: Verdicts) -> None:
        """The daemon has taken a batch into its memory."""
        self._now.update(verdicts.fresh)
        for event in verdicts.fresh.values():
            known = self.worth_now(event.agreement)
            self._worth_now[event.agreement] = known + event.worth
        self.received += len(verdicts.deliveries)
        self.verdicts["accepted"] += len(verdicts.fresh)
        self.verdicts["duplicates"] += verdicts.duplicates
        self.verdicts["rejected"] += len(verdicts.rejected)

    def keep(self, verdicts: Verdicts) -> None:
        """The batch is on the disk."""
        for identity, event in verdicts.fresh.items():
            if identity not in self.durable:
                self._worth[event.agreement] = self.worth(event.agreement) + event.worth
            self.durable[identity] = event
        self.decided.update(verdicts.deliveries)
        self.rejected += len(verdicts.rejected)

    def worth(self, agreement: str) -> Fraction:
        """The price of all durable usage of an agreement, in USDC."""
        return self._worth.get(agreement, Fraction(0))

    def worth_now(self, agreement: str) -> Fraction:
        """The same of what the daemon has taken into its memory."""
        return self._worth_now.get(agreement, Fraction(0))

    def recompute(self, agreement: str) -> Fraction:
        """The same, from scratch."""
        mine = [event.worth for event in self.durable.values() if event.agreement == agreement]
        return sum(mine, Fraction(0))

    def untold(self, transport: str, events: Sequence[Event]) -> list[Event]:
        """Which of these have no verdict on the disk."""
        return [event for event in events if (transport, *event.key) not in self.decided]


def hour_floor(ms: int) -> int:
    """The beginning of an hour."""
    return ms // HOUR_MS * HOUR_MS
