"""What the tests of the core share: a small ledger, and the way of a batch through it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from meterd.core.accounts import Agreement, Touched
from meterd.core.changes import CardRow, State
from meterd.core.events import EventDecoder
from meterd.core.ledger import Ledger, contents
from meterd.core.meters import Aggregation, Meter
from meterd.core.plans import Pattern, Plan
from meterd.core.pricing import Rate, RateCard

NOW = 1_795_000_000_000  # Wall ms, in November 2026.
WINDOW = 72 * 3_600_000
SENTINEL = 739_184_650_217

METERS = {
    "tokens": Meter("tokens", unit="token"),
    "calls": Meter("calls", Aggregation.COUNT),
    "unpriced": Meter("unpriced"),
}
DEAR = Rate("tokens", 3 * 10**9, 7, (("kind", "output"),))
CARD = RateCard((DEAR, Rate("tokens", 10**9, 3), Rate("calls", 10**9)))
PLANS = {
    "stream": Plan("stream", Pattern.STREAMING, CARD),
    "strict": Plan("strict", Pattern.PAY_PER_TOKEN, RateCard((DEAR,))),
}


def ledger():
    """Two agreements under different plans."""
    books = Ledger(PLANS, METERS)
    books.bind(Agreement("a", "stream", "payer", (("main", "esc_a"),)), NOW)
    books.bind(Agreement("b", "strict", "payer", (("main", "esc_b"),)), NOW)
    return books


def usage(event_id, quantity=1, **fields):
    """One event in bare JSON."""
    event = {"id": event_id, "agreement": "a", "meter": "tokens", "quantity": quantity}
    return json.dumps({**event, **fields}).encode()


@dataclass
class Till:
    """A ledger with a memory of identities in place of the store's, driven as by the daemon."""

    books: Ledger = field(default_factory=ledger)
    known: dict = field(default_factory=dict)
    accepted: int = 0
    duplicates: int = 0
    rejections: list = field(default_factory=list)
    rows: dict = field(default_factory=dict)
    samples: dict = field(default_factory=dict)
    taken: dict = field(default_factory=dict)  # What each event added, by (source, id).

    def take(self, payloads, *, ids=None, source="s", now=NOW):
        """Take a batch: the entry that was applied."""
        decoded = EventDecoder(SENTINEL).decode(payloads)
        resolved = self.books.resolve(decoded, ids, source, now - WINDOW, now)
        digests = [repr((event.source, event.id)).encode() for event in resolved.events]
        prints = [hash(content) & 0xFFFFFFFF for content in contents(resolved.events)]
        known = [self.known.get(digest, -1) for digest in digests]
        entry = self.books.decide(resolved, digests, prints, known, now)
        for place in range(len(digests)):
            if entry.fresh is None or entry.fresh[place]:
                self.known[digests[place]] = prints[place]
                self._note(resolved, place)
        self.keep(self.books.apply(entry, now))
        assert len(payloads) == entry.accepted + entry.duplicates + len(entry.rejections)
        self.accepted += entry.accepted
        self.duplicates += entry.duplicates
        self.rejections += entry.rejections
        return entry

    def _note(self, resolved, place):
        counter, event = resolved.counters[place], resolved.events[place]
        if counter is not None:
            added = resolved.amounts.get(place, 0), resolved.keys.get(place, "")
            quantity = resolved.quantities[place]
            self.taken[event.source, event.id] = counter.number, quantity, *added

    def keep(self, touched):
        """Keep the rows of a change, as a store would."""
        change = touched.change()
        self.rows.update({row.number: row for row in change.counters})
        self.samples.update({(row.counter, row.key): row for row in change.samples})
        return change

    def take_back(self, event_id, source="s"):
        """Take back what an event added."""
        number, quantity, amount, key = self.taken.pop((source, event_id))
        touched = Touched()
        self.books.take_back(self.books.counter(number), quantity, amount, key, touched)
        return self.keep(touched)

    def restored(self, plans=None, meters=None):
        """The ledger that a restart would make of what was stored."""
        cards = [CardRow(card.id, card.text) for card in self.books.cards.values()]
        plans, meters = plans or self.books.plans, meters or self.books.meters
        return Ledger.restore(plans, meters, self.state(cards))

    def verdicts(self, payloads, **kwargs):
        """What became of each delivery of a batch: a reason, or "" for accepted or duplicate."""
        found = [""] * len(payloads)
        for rejection in self.take(payloads, **kwargs).rejections:
            assert found[rejection.index] == "", "one verdict for each delivery"
            assert rejection.detail.isprintable()
            assert len(rejection.detail) < 400
            assert rejection.id.isprintable()
            assert len(rejection.id) <= 256
            found[rejection.index] = str(rejection.reason)
        return found

    def state(self, cards):
        """What a store would hold of it."""
        return State(
            cards=list(cards),
            agreements=[account.row for account in self.books.accounts.values()],
            counters=list(self.rows.values()),
            samples=list(self.samples.values()),
            escrows=list(self.books.escrows.values()),
        )
