"""The customers of the demo: all seven patterns, over six transports, and one that runs dry.

Each books what he used in decimals, from the prices that he was told, and knows nothing of meterd.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from meterd.demo.service import Customer, Event, Gate, Transport

CALL = Decimal("0.001")
PAGE = Decimal("0.05")
UNIT = Decimal("0.01")
UNITS_FREE = 100
FEE = Decimal("2.00")
TRANCHES: Mapping[str, Decimal] = {
    "draft": Decimal("0.50"),
    "build": Decimal("1.00"),
    "launch": Decimal("0.50"),
}
SHARE = Decimal("0.70")
SCORE = "0.83"
INPUT, OUTPUT = Decimal("0.0000005"), Decimal("0.000002")
WORDS: Mapping[str, Decimal] = {"large": Decimal("0.00002"), "small": Decimal("0.00001")}
ANSWER = Decimal("0.0005")
WALLET_CALLS = 10  # What its minimum is worth.


def cast() -> list[Customer]:
    """The customers of the demo."""
    return [
        Customer("Ada", "tokens", "mqtt", "5.00", 4),
        Customer("Bo", "calls", "redis", "5.00", 12),
        Customer("Cy", "tokens", "sdk", "5.00", 6),
        Customer("Di", "speech", "redis", "5.00", 3),
        Customer("Eve", "calls", "redis", "5.00", 8, forgetful=True),
        Cautious("Fay", "single", "http", "", 5, roles=("wallet",)),
        Cautious("Gus", "pages", "http", "1.00", 1, price=PAGE, meter="pages"),
        Member("Hal", "pass", "http", str(FEE), 4),
        Project("Ivy", "project", "http", "2.00", 1),
        Task("Jo", "answer", "http", "3.00", 1),
        Mixed("Kim", "mixed", "http", str(FEE), 5, roles=("base", "overage")),
        Traced("Lou", "tokens", "otlp", "5.00", 4),
        Typed("Max", "chat", "openmeter", "5.00", 5),
    ]


@dataclass(slots=True)
class Cautious(Customer):
    """Each of his calls is reserved before it is served; one that is refused is not."""

    price: Decimal = CALL
    meter: str = "calls"

    async def visit(self, way: Transport, gate: Gate, rng: random.Random) -> None:  # noqa: ARG002
        """Ask for some calls, each by itself."""
        for _ in range(rng.randint(1, self.burst)):
            hold = await gate.reserve(self.agreement, self.meter)
            if hold:
                await gate.capture(hold)
                self.used += self.price
                self.events += 1

    async def leave(self, way: Transport) -> None:
        """Make as many calls at once as a wallet's smallest debit is worth: no rest is less."""
        if self.roles == ("wallet",):
            await way.send([self._event(self.meter, 1) for _ in range(WALLET_CALLS)])
            self.used += WALLET_CALLS * self.price
            self.events += WALLET_CALLS


@dataclass(slots=True)
class Member(Customer):
    """He pays his fee whatever he uses; the week ends when the agreement is closed."""

    async def leave(self, way: Transport) -> None:  # noqa: ARG002
        """Owe the fee."""
        self.used += FEE

    def _call(self, rng: random.Random) -> list[Event]:  # noqa: ARG002
        return [self._event("requests", 1)]


@dataclass(slots=True)
class Project(Customer):
    """He pays when a milestone is reached, each once."""

    def _call(self, rng: random.Random) -> list[Event]:
        number = next(self.numbers)
        if rng.random() > 0.1 and number:
            return []
        reached = self.events
        if reached >= len(TRANCHES):
            return []
        name, amount = list(TRANCHES.items())[reached]
        self.used += amount
        return [self._told("meterd.milestone", name=name)]


@dataclass(slots=True)
class Task(Customer):
    """He pays by the score of one result."""

    def _call(self, rng: random.Random) -> list[Event]:
        if self.events or rng.random() > 0.1:
            return []
        self.used += SHARE * Decimal(self.deposit)
        return [self._told("meterd.outcome", score=SCORE)]


@dataclass(slots=True)
class Traced(Customer):
    """An agent whose calls of a model are traced: its exporter tells, and knows nothing of bills.

    What came from the cache is input, since his plan has no rate of its own for it.
    """

    def _call(self, rng: random.Random) -> list[Event]:
        read, written = rng.randint(200, 3000), rng.randint(20, 800)
        self.used += INPUT * read + OUTPUT * written
        counts = {
            "input_tokens": read,
            "cache_read.input_tokens": rng.randint(0, read),
            "output_tokens": written,
            "reasoning.output_tokens": rng.randint(0, written),
        }
        said: dict[str, dict[str, object]] = {
            "meterd.agreement": {"stringValue": self.agreement},
            "gen_ai.operation.name": {"stringValue": "chat"},
            "gen_ai.response.model": {"stringValue": "m-large"},
        }
        said |= {f"gen_ai.usage.{name}": {"intValue": n} for name, n in counts.items()}
        return [
            {
                "traceId": f"{rng.getrandbits(128):032x}",
                "spanId": f"{next(self.numbers) + 1:016x}",
                "endTimeUnixNano": str(time.time_ns()),
                "attributes": [{"key": name, "value": value} for name, value in said.items()],
            }
        ]


@dataclass(slots=True)
class Typed(Customer):
    """His proxy tells OpenMeter what happened: one event feeds two meters here."""

    def _call(self, rng: random.Random) -> list[Event]:
        model, words = rng.choice(list(WORDS)), rng.randint(5, 500)
        self.used += WORDS[model] * words + ANSWER
        event = self._told("completion", data={"model": model, "usage": {"words": words}})
        return [{**event, "specversion": "1.0", "subject": event.pop("escrow_id")}]


@dataclass(slots=True)
class Mixed(Customer):
    """His fee covers some units; each one beyond is charged, as far as its budget goes."""

    units: int = 0

    def _call(self, rng: random.Random) -> list[Event]:
        units = rng.randint(1, 5)
        beyond = max(0, self.units + units - UNITS_FREE)
        if beyond * UNIT > Decimal(self.deposit):
            return []  # The budget is used up.
        self.units += units
        self.used += (beyond - max(0, self.units - units - UNITS_FREE)) * UNIT
        return [self._event("units", units)]

    async def leave(self, way: Transport) -> None:  # noqa: ARG002
        """Owe the fee."""
        self.used += FEE
