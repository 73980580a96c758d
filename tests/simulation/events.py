"""Events for the simulation, and what each is worth; nothing here is shared with meterd."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from fractions import Fraction

HOUR_MS = 3_600_000


@dataclass(frozen=True, eq=False, repr=False)
class Event:
    """One event as a producer sends it. Another spelling of the same event is another object."""

    payload: bytes
    fields: tuple[tuple[str, str], ...] = ()  # What the topic says of it.
    kind: str = "usage"  # Or "close", "garbage".
    source: str = ""  # "": the name of the source that it comes by.
    id: str = ""
    content: tuple[object, ...] = ()  # Equal for events that say the same.
    agreement: str = ""
    worth: Fraction = Fraction(0)  # USDC.
    at: int | None = None  # Wall ms.
    retained: bool = False
    number: int = 0  # Its producer's own number; 0: it numbers nothing.

    def identity(self, transport: str) -> tuple[str, str]:
        """What tells it from others."""
        return self.source or transport, self.id

    @property
    def key(self) -> tuple[bytes, tuple[tuple[str, str], ...]]:
        """How a delivery of it is known again."""
        return self.payload, self.fields

    def __repr__(self) -> str:
        return f"{self.kind} {self.id} {self.agreement}"


# Prices by agreement's plan, for one unit; "tokens" of the large model have a price of their own.
PRICES: dict[str, dict[tuple[str, str], Fraction]] = {
    "stream": {("calls", ""): Fraction("0.0017"), ("tokens", ""): Fraction("0.002") / 7},
    "model": {
        ("tokens", "large"): Fraction("0.01") / 3,
        ("tokens", ""): Fraction("0.0000013"),
        ("calls", ""): Fraction("0.001") / 11,
    },
}
PLANS = """
[meters.tokens]
[meters.calls]
aggregation = "count"
[plans.stream]
pattern = "streaming"
rates = [{ meter = "calls", price = "0.0017" }, { meter = "tokens", price = "0.002", per = 7 }]
settle = { SETTLE0 }
[plans.model]
pattern = "pay_per_token"
rates = [
  { meter = "tokens", price = "0.01", per = 3, where = { model = "large" } },
  { meter = "tokens", price = "0.0000013" },
  { meter = "calls", price = "0.001", per = 11 },
]
settle = { SETTLE1 }
"""
SETTLES = (
    'amount = "0.05"',
    'interval = "15s", min_release = "0.000001"',
    "units = 40",
    'escrow_percent = 5, amount = "0.5"',
    'amount = "0.2", interval = "40s"',
)
GARBAGE = (
    b"",
    b"null",
    b"[]",
    b"{",
    b'{"id":"x"}',
    b'{"id":"g1","agreement":"a1","meter":"tokens","quantity":-5}',
    b'{"id":"g2","agreement":"a1","meter":"tokens","quantity":1e400}',
    b'{"id":"g3","agreement":"a1","meter":"tokens","quantity":"1e9"}',
    b'{"id":"g4","agreement":"nobody","meter":"tokens","quantity":1}',
    b'{"id":"g5","agreement":"a1","meter":"unknown","quantity":1}',
    b'{"id":"g6","agreement":"a1","meter":"tokens","quantity":1,"type":"strange"}',
    b'{"id":"g7","agreement":"a1","meter":"tokens","quantity":NaN}',
    b'{"id":"g8","agreement":"a1","meter":"tokens","quantity":0}},{"id":"g9"',
    b"\xff\xfe",
)


class Factory:
    """Makes a seed's events."""

    def __init__(self, rng: random.Random, plans: dict[str, str], now_ms: int) -> None:
        self.rng = self._rng = rng
        self._plans = plans  # Of each agreement.
        self._now_ms = now_ms
        self._number = 0

    def usage(self) -> Event:
        """One event of usage."""
        rng = self._rng
        self._number += 1
        agreement = rng.choice(list(self._plans))
        meter = rng.choice(("tokens", "tokens", "calls"))
        model = rng.choice(("", "", "large", "small")) if meter == "tokens" else ""
        quantity = rng.choice((Fraction(rng.randint(1, 60)), Fraction(rng.randint(1, 9999), 1000)))
        at = None
        if rng.random() < 0.15:
            at = self._now_ms - rng.randrange(8 * HOUR_MS)
        source = rng.choice(("", "svc"))
        return self._spell(agreement, meter, model, quantity, at, f"e{self._number}", source)

    def again(self, event: Event) -> Event:
        """The same event, perhaps spelled in another way."""
        if self._rng.random() < 0.5 or event.kind != "usage":
            return event
        agreement, meter, model, quantity, at = event.content
        source, number = event.source, event.number
        return self._spell(agreement, meter, model, quantity, at, event.id, source, number)

    def other(self, event: Event) -> Event:
        """The same identity with other content."""
        agreement, meter, model, _, at = event.content
        quantity = Fraction(self._rng.randint(61, 90))
        if meter == "calls":
            meter, model = "tokens", ""
        return self._spell(agreement, meter, model, quantity, at, event.id, event.source)

    def garbage(self) -> Event:
        """What accrues nothing, ever."""
        self._number += 1
        retained = self._rng.random() < 0.2
        payload = self._rng.choice(GARBAGE)
        if retained:
            payload = b'{"id":"r%d","agreement":"a1","meter":"calls"}' % self._number
        return Event(payload, kind="garbage", id=f"g{self._number}", retained=retained)

    def misaddressed(self) -> Event:
        """A topic that says something else than the payload."""
        self._number += 1
        payload = {"id": f"m{self._number}", "agreement": "a1", "meter": "calls"}
        fields = (("escrow_id", "esc_other"),)
        return Event(json.dumps(payload).encode(), fields, kind="garbage", id=f"m{self._number}")

    def numbered(self, source: str, number: int, at: int) -> Event:
        """One event of a producer that numbers what it sends."""
        event = self.usage()
        agreement, meter, model, quantity, _ = event.content
        return self._spell(agreement, meter, model, quantity, at, event.id, source, number)

    def close(self, agreement: str) -> Event:
        """Ask for the last settlement."""
        self._number += 1
        payload = {"id": f"c{self._number}", "type": "meterd.close", "agreement": agreement}
        return Event(
            json.dumps({**payload, "source": "svc"}).encode(),
            kind="close",
            source="svc",
            id=f"c{self._number}",
            content=(agreement, "close"),
            agreement=agreement,
        )

    def _spell(self, agreement, meter, model, quantity, at, event_id, source, number=0) -> Event:
        rng = self._rng
        said: dict[str, object] = {"id": event_id}
        if source:
            said["source"] = source
        fields: tuple[tuple[str, str], ...] = ()
        where = rng.random()
        if where < 0.6:
            said["agreement"] = agreement
        elif where < 0.8:
            said["escrow_id"] = f"esc_{agreement}"
        else:
            fields = (("escrow_id", f"esc_{agreement}"),)
        said["meter"] = meter
        text = f"{float(quantity):.3f}"
        if quantity.denominator == 1 and rng.random() < 0.6:
            said["quantity"] = int(quantity)
        elif rng.random() < 0.5:
            said["quantity"] = text
        else:
            said["quantity"] = float(text)
        if model:
            said["dimensions"] = {"model": model}
        if at is not None:
            seconds, ms = divmod(at, 1000)
            said["time"] = _iso(seconds, ms)
        if number:
            said["sequence"] = rng.choice((number, str(number), f"{number:06d}"))
        items = list(said.items())
        rng.shuffle(items)
        counted = Fraction(1) if meter == "calls" else quantity
        prices = PRICES[self._plans[agreement]]
        price = prices.get((meter, model), prices[meter, ""])
        return Event(
            json.dumps(dict(items)).encode(),
            fields,
            source=source,
            id=event_id,
            content=(agreement, meter, model, counted if meter != "calls" else Fraction(1), at),
            agreement=agreement,
            worth=counted * price,
            at=at,
            number=number,
        )


def _iso(seconds: int, ms: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S") + f".{ms:03d}Z"
