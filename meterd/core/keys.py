"""Answers to calls with an `Idempotency-Key`, so that a call that is sent again is given the same.

Bounded in time, in number and in bytes for each owner, a token: the oldest are forgotten first. A
row without an answer says that the call's work had begun when the process ended.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from meterd.core.changes import KeyRow

KEPT_MS = 24 * 3_600_000
ROWS_MAX = 10_000  # Of one owner.
BYTES_MAX = 16 * 1024 * 1024  # Of the answers of one owner.


@dataclass(slots=True)
class _Owned:
    """The rows of one owner, oldest first."""

    rows: dict[str, KeyRow] = field(default_factory=dict)
    weight: int = 0

    def pop(self, key: str) -> KeyRow | None:
        """Forget a row."""
        row = self.rows.pop(key, None)
        if row is not None:
            self.weight -= len(row.body)
        return row

    def put(self, row: KeyRow) -> None:
        """Remember a row as the newest."""
        self.pop(row.key)
        self.rows[row.key] = row
        self.weight += len(row.body)


class Keys:
    """All keys that are remembered. Times in wall ms."""

    def __init__(self, rows: Iterable[KeyRow] = ()) -> None:
        self._owners: dict[str, _Owned] = {}
        for row in sorted(rows, key=lambda row: row.at):
            self._owners.setdefault(row.owner, _Owned()).put(row)

    def __len__(self) -> int:
        return sum(len(owned.rows) for owned in self._owners.values())

    def get(self, owner: str, key: str, now: int) -> KeyRow | None:
        """Find what is remembered of a key."""
        owned = self._owners.get(owner)
        row = None if owned is None else owned.rows.get(key)
        return None if row is None or _is_old(row, now) else row

    def put(self, row: KeyRow, now: int) -> list[tuple[str, str]]:
        """Remember; the owner and key of each row that is forgotten for it."""
        owned = self._owners.setdefault(row.owner, _Owned())
        owned.put(row)
        gone = []
        while owned.rows:
            oldest = next(iter(owned.rows.values()))
            crowded = len(owned.rows) > ROWS_MAX or owned.weight > BYTES_MAX
            if not (crowded or _is_old(oldest, now)):
                break
            owned.pop(oldest.key)
            gone.append((oldest.owner, oldest.key))
        return gone

    def forget(self, owner: str, key: str) -> None:
        """Forget a key: its call has done nothing."""
        owned = self._owners.get(owner)
        if owned is not None:
            owned.pop(key)


def _is_old(row: KeyRow, now: int) -> bool:
    return now - row.at >= KEPT_MS
