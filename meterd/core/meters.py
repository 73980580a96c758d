"""What is measured: a meter's name, unit and aggregation over the agreement's life."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import msgspec

from meterd.core.events import quantity_nanos
from meterd.core.money import NANOS


class Aggregation(enum.StrEnum):
    """How a meter makes one number of many events."""

    SUM = "sum"
    COUNT = "count"


@dataclass(frozen=True, slots=True)
class Meter:
    """One meter of the configuration."""

    name: str
    aggregation: Aggregation = Aggregation.SUM
    unit: str = ""

    def measure(self, quantity: int | str | msgspec.Raw) -> int:
        """How much one event adds, in nanos of the unit. Raises `money.BadNumber`.

        A counting meter takes each event as one, whatever quantity stands in it.
        """
        if self.aggregation is Aggregation.COUNT:
            return NANOS
        return quantity_nanos(quantity)
