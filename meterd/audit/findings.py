"""What an audit found: broken invariants with their row and figures, and what is worth a note."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

BREAKS_MAX = 200  # More of them tell a reader nothing more; all of them are counted.


@dataclass(frozen=True, slots=True)
class Break:
    """One row that breaks one invariant; `detail` has the figures of both sides."""

    invariant: str
    row: str
    detail: str

    def __str__(self) -> str:
        return f"{self.invariant}: {self.row}: {self.detail}"


@dataclass(slots=True)
class Findings:
    """All breaks (the first `BREAKS_MAX` are kept) and notes of one audit."""

    breaks: list[Break] = field(default_factory=list)
    broken: int = 0
    notes: list[str] = field(default_factory=list)
    checked: Counter[str] = field(default_factory=Counter)  # What was compared, by its name.
    unasked: int = 0  # Escrows of which the service told nothing.

    def broke(self, invariant: str, row: str, detail: str) -> None:
        """Note a break."""
        self.broken += 1
        if len(self.breaks) < BREAKS_MAX:
            self.breaks.append(Break(invariant, row, detail))

    def expect(self, true: bool, invariant: str, row: str, detail: str) -> None:
        """Note a break unless something is true."""
        if not true:
            self.broke(invariant, row, detail)

    def note(self, sentence: str) -> None:
        """Note what breaks nothing and a person should know."""
        if len(self.notes) < BREAKS_MAX:
            self.notes.append(sentence)
