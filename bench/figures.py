"""What was measured, as figures: medians with their spread, ratios, floors and aims.

Ratios are taken round by round, of measurements made one after the other, so that a machine that
is busy for a minute spoils one round and not the comparison.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import platform
import sqlite3
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

LIBRARIES = ("aiohttp", "hiredis", "mqtt5", "msgspec", "numpy", "redis", "xxhash")


@dataclass(frozen=True, slots=True)
class Figure:
    """Some measurements of the same thing."""

    values: tuple[float, ...]
    unit: str

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """The difference between the largest and the smallest, in shares of the median."""
        return (max(self.values) - min(self.values)) / self.median if self.median else 0.0

    def document(self) -> dict[str, Any]:
        return {
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "spread": round(self.spread, 3),
            "runs": len(self.values),
            "unit": self.unit,
        }

    def __str__(self) -> str:
        low, high = shown(min(self.values)), shown(max(self.values))
        return f"{shown(self.median)} {self.unit} ({low} to {high})"


def ratios(above: Figure, below: Figure) -> Figure:
    """Divide round by round."""
    pairs = zip(above.values, below.values, strict=True)
    return Figure(tuple(first / second for first, second in pairs), "x")


@dataclass(frozen=True, slots=True)
class Goal:
    """What a row must reach (floor) and should reach (aim)."""

    floor: float
    aim: float
    more_is_better: bool = True

    def verdict(self, value: float) -> str:
        if not self.more_is_better:
            reached = (value < self.aim, value < self.floor)
        else:
            reached = (value >= self.aim, value >= self.floor)
        return "aim" if reached[0] else "floor" if reached[1] else "missed"

    def __str__(self) -> str:
        sign = "" if self.more_is_better else "< "
        return f"{sign}{self.floor:g} / {sign}{self.aim:g}"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: the figure that is judged, and those that it was made of."""

    name: str
    title: str
    figure: Figure
    goal: Goal | None
    parts: dict[str, Figure] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        return self.goal.verdict(self.figure.median) if self.goal else ""

    def document(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "title": self.title,
            **self.figure.document(),
            "goal": asdict(self.goal) if self.goal else None,
            "verdict": self.verdict,
            "parts": {name: part.document() for name, part in self.parts.items()},
            "notes": list(self.notes),
        }


def shown(value: float) -> str:
    """Write a figure with as many digits as it is worth."""
    if value >= 10_000:
        return f"{value / 1000:,.0f} k"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def machine(servers: Sequence[Sequence[str]] = ()) -> dict[str, Any]:
    """Describe what it ran on, without names or places."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    cores = sum(
        line.startswith("processor") for line in Path("/proc/cpuinfo").read_text().splitlines()
    )
    memory_kb = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d"),
        "cores": cores,
        "processor": model,
        "memory_gb": round(memory_kb / 1e6),
        "system": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "servers": [_first_line(command) for command in servers],
    }


def _first_line(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return f"{command[0]}: not installed"
    # The build's own hash and host are of no interest to anybody.
    return " ".join((done.stdout or done.stderr).splitlines()[0].split()[:3])


def print_table(rows: Sequence[Row], console: Console, *, judged: bool) -> None:
    table = Table(title="meterd bench", title_justify="left")
    for heading in ("row", "what", "median (min to max)", "floor / aim", "reached"):
        table.add_column(heading, overflow="fold")
    colours = {"aim": "green", "floor": "yellow", "missed": "red"}
    for row in rows:
        colour = colours.get(row.verdict, "white")
        table.add_row(
            row.name,
            row.title,
            str(row.figure),
            str(row.goal or ""),
            f"[{colour}]{row.verdict}[/{colour}]" if judged else "",
        )
        for name, part in row.parts.items():
            table.add_row("", f"  {name}", str(part), "", "")
        for note in row.notes:
            table.add_row("", f"  [dim]{note}[/dim]", "", "", "")
    console.print(table)
