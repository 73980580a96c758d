"""What the books must say, reckoned naively from deliveries: sets and exact fractions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from meterd.sources import Deliveries
from tests.simulation.events import HOUR_MS, Event

AHEAD_MS = 5 * 60 * 1000
Identity = tuple[str, str]
Delivery = tuple[str, bytes, tuple[tuple[str, str], ...]]


@dataclass
class Numbers:
    """What one producer's numbers must say; they decide about late events while they are exact."""

    since: int
    latest: int
    floor: int
    seen: frozenset[int]
    exact: bool = True

    def again(self, event: Event) -> Numbers:
        """The same when an event of it came again that was counted before."""
        assert event.at is not None
        mine = event.at >= self.since and event.number >= self.floor
        return replace(self, seen=self.seen | {event.number}) if mine else self

    def after(self, event: Event) -> Numbers:
        """The same when a new event of it was counted."""
        assert event.at is not None
        latest = max(self.latest, event.at)
        mine = event.at >= self.since
        if event.number == 1 and event.at > self.latest:
            return Numbers(event.at, latest, 1, frozenset({1}))
        if mine and event.number in self.seen:  # Its first one was refused.
            return Numbers(latest, latest, event.number, frozenset({event.number}), exact=False)
        mine = mine and event.number >= self.floor
        seen = self.seen | {event.number} if mine else self.seen
        return replace(self, latest=latest, seen=seen)


@dataclass
class Verdicts:
    """What one batch must come to."""

    fresh: dict[Identity, Event] = field(default_factory=dict)
    duplicates: int = 0
    rejected: set[int] = field(default_factory=set)
    late: int = 0  # Of the fresh ones, those that their numbers alone have brought in.
    refused: int = 0  # Of the rejected ones, those with a number.
    again: list[Event] = field(default_factory=list)  # Of the duplicates, those with a number.
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
        self.numbers: dict[str, Numbers] = {}  # Of each producer, as they are on the disk.
        self.numbers_now: dict[str, Numbers] = {}
        self.refused = 0  # Numbered events that were rejected.
        self._hours: dict[Identity, int] = {}  # In which hour an identity is remembered.
        self._now: dict[Identity, Event] = {}
        self._worth: dict[str, Fraction] = {}
        self._worth_now: dict[str, Fraction] = {}

    def know(self, event: Event) -> Event:
        """Note an event that will be delivered."""
        return self.events.setdefault(event.key, event)

    def restart(self) -> None:
        """Forget what was not durable."""
        self._now = dict(self.durable)
        self.numbers_now = dict(self.numbers)
        self._worth_now = dict(self._worth)

    def judge(
        self,
        transport: str,
        deliveries: Deliveries,
        oldest: int,
        now: int,
        closed: Callable[[str], bool],
        hour_min: int,
    ) -> Verdicts:
        """Say what must become of each delivery, in order; identities before an hour are gone."""
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
            if event.number and event.at is not None and event.at < oldest:
                self._judge_late(found, place, event, identity, closed, hour_min, now)
                continue
            # Delivered again to an agreement that is closed by now, an event is still a duplicate.
            if event.kind == "garbage" or late or (known is None and closed(event.agreement)):
                found.rejected.add(place)
                found.refused += bool(event.number)
            elif known is None:
                found.fresh[identity] = event
                self._hours[identity] = at // HOUR_MS
            elif known.content == event.content:
                found.duplicates += 1
                found.again += [event] if event.number else []
            else:
                found.rejected.add(place)
        return found

    def _judge_late(
        self,
        found: Verdicts,
        place: int,
        event: Event,
        identity: Identity,
        closed: Callable[[str], bool],
        hour_min: int,
        now: int,
    ) -> None:
        """Say what must become of an event that is too old, by its number."""
        numbers = self.numbers_now.get(event.source)
        known = identity in self._now and self._hours[identity] >= hour_min
        assert event.at is not None
        mine = numbers is not None and numbers.exact
        mine = mine and event.number >= numbers.floor and event.at >= numbers.since  # type: ignore[union-attr]
        seen = numbers.seen if numbers is not None and mine else frozenset()
        if known or identity in found.fresh or event.number in seen:
            found.duplicates += 1
            found.again.append(event)
        elif not mine or closed(event.agreement):
            found.rejected.add(place)
            found.refused += 1
        else:
            found.fresh[identity] = event
            found.late += 1
            self._hours[identity] = now // HOUR_MS

    @staticmethod
    def _note(numbers: dict[str, Numbers], verdicts: Verdicts) -> None:
        """Count the numbers of a batch, in the order in which its events were made."""
        counted = [(event, True) for event in verdicts.fresh.values() if event.number]
        counted += [(event, False) for event in verdicts.again]
        for event, new in sorted(counted, key=lambda one: (one[0].at or 0, not one[1])):
            known = numbers.get(event.source)
            at, number = event.at or 0, event.number
            if new and known is None:
                numbers[event.source] = Numbers(at, at, number, frozenset({number}))
            elif known is not None:  # Nobody is met by what comes again.
                numbers[event.source] = known.after(event) if new else known.again(event)

    def accept(self, verdicts: Verdicts) -> None:
        """The daemon has taken a batch into its memory."""
        self._note(self.numbers_now, verdicts)
        self._now.update(verdicts.fresh)
        self.refused += verdicts.refused
        for event in verdicts.fresh.values():
            known = self.worth_now(event.agreement)
            self._worth_now[event.agreement] = known + event.worth
        self.received += len(verdicts.deliveries)
        self.verdicts["accepted"] += len(verdicts.fresh)
        self.verdicts["duplicates"] += verdicts.duplicates
        self.verdicts["rejected"] += len(verdicts.rejected)

    def keep(self, verdicts: Verdicts) -> None:
        """The batch is on the disk."""
        self._note(self.numbers, verdicts)
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
