"""What one run of the benchmark was asked for, and its way of repeating."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console

from bench.figures import Figure
from bench.stage import Stage

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """Sizes. `smoke` does everything once and small, and judges nothing."""

    stage: Stage
    console: Console
    repeat: int
    events: int
    known: int
    agreements: int
    releases: int
    idle_s: float
    smoke: bool

    def alternately(
        self, contestants: Mapping[str, Callable[[], float]], unit: str, repeat: int | None = None
    ) -> dict[str, Figure]:
        """Measure each in turn, round after round; every second round the other way about."""
        values: dict[str, list[float]] = {name: [] for name in contestants}
        for number in range(self.repeat if repeat is None else repeat):
            order = list(contestants.items())
            for name, measure in order[:: -1 if number % 2 else 1]:
                values[name].append(measure())
                self.console.print(
                    f"    {number + 1}. {name}: {values[name][-1]:,.4g} {unit}", highlight=False
                )
        return {name: Figure(tuple(found), unit) for name, found in values.items()}

    def say(self, text: str) -> None:
        self.console.print(f"  {text}", highlight=False)


def chunks(found: Sequence[T], size: int) -> list[Sequence[T]]:
    return [found[first : first + size] for first in range(0, len(found), size)]
