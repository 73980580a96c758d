"""The events of a measurement, and what they must add up to, worked out in another way than meterd.

Sums are kept as whole tokens by escrow and kind while the events are made, and priced at the end
with `Decimal`. Every so often an event is sent twice: brokers do that, and it must cost nothing.
"""

from __future__ import annotations

import datetime as dt
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

PRICES = {"input": Decimal("0.0005") / 1000, "output": Decimal("0.002") / 1000}
KINDS = tuple(PRICES)
REPEAT_EVERY = 10_000

PLAN = """
[meters.tokens]

[plans.tokens]
pattern = "pay_per_token"
rates = [
    {{ meter = "tokens", price = "0.0005", per = 1000, where = {{ kind = "input" }} }},
    {{ meter = "tokens", price = "0.002", per = 1000, where = {{ kind = "output" }} }},
]
settle = {{ amount = "{amount}", interval = "1h" }}
"""


def escrow_ids(count: int, series: str = "a") -> list[str]:
    return [f"esc_bench_{series}_{number:06}" for number in range(count)]


@dataclass
class Workload:
    """Makes events for some escrows and remembers what they are worth."""

    escrows: Sequence[str]
    chance: random.Random = field(default_factory=lambda: random.Random(1))
    tokens: Counter[tuple[str, str]] = field(default_factory=Counter)
    distinct: Counter[str] = field(default_factory=Counter)
    sent: int = 0

    def events(self, count: int) -> Iterator[tuple[str, bytes]]:
        """Hand out (escrow, JSON of about 200 bytes), some of them twice."""
        escrows, chance = self.escrows, self.chance
        time = dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        last = ("", b"")
        for number in range(count):
            self.sent += 1
            if number % REPEAT_EVERY == REPEAT_EVERY - 1:
                yield last
                continue
            escrow = escrows[chance.randrange(len(escrows))]
            kind = KINDS[chance.random() < 0.5]
            quantity = chance.randrange(1, 2001)
            last = (escrow, self._event(escrow, kind, quantity, time))
            yield last

    def one_each(self, quantity: int) -> Iterator[tuple[str, bytes]]:
        """Hand out one event for each escrow, all of the same quantity."""
        time = dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        for escrow in self.escrows:
            self.sent += 1
            yield escrow, self._event(escrow, "output", quantity, time)

    def _event(self, escrow: str, kind: str, quantity: int, time: str) -> bytes:
        self.tokens[escrow, kind] += quantity
        self.distinct[escrow] += 1
        event_id = f"{self.chance.getrandbits(128):032x}"
        return (
            f'{{"id":"req-{event_id}","source":"svc-a","escrow_id":"{escrow}",'
            f'"meter":"tokens","quantity":{quantity},"time":"{time}",'
            f'"dimensions":{{"model":"m-large","kind":"{kind}"}}}}'
        ).encode()

    def owed(self) -> dict[str, Decimal]:
        """Price what was sent: exact USDC by escrow, for every escrow."""
        sums = dict.fromkeys(self.escrows, Decimal(0))
        for (escrow, kind), quantity in self.tokens.items():
            sums[escrow] += PRICES[kind] * quantity
        return sums
