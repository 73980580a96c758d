"""The journal: its chain, and whether what only an act can bring about has its act in it.

The journal says who froze, resumed, resolved and credited, and when. The rows of money say what
came of it. Here the two are held together: nothing was sent while an escrow was frozen, nothing
left that state without a person's word, and nothing was closed with usage unpaid in silence.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from meterd.audit.books import Books, Escrow, Release
from meterd.audit.checks import owed_of
from meterd.audit.findings import Findings
from meterd.core.money import format_amount

Settings = dict[str, Any]

FROZEN, RESUMED = "escrow_frozen", "escrow_resumed"
ACCEPTED = (RESUMED, "foreign_release_credited")  # Acts by which a difference is credited.
# A person's word as an act, and how it stands in the history of the release it was about.
WORDS = {
    "release_landed": "a person says it landed",
    "release_absent": "a person says it is absent",
}
# By these the service ends an escrow itself.
ENDED = frozenset({"released", "refunded", "expired", "cancelled"})
FOREVER = 2**63


@dataclass(slots=True)
class Acts:
    """What the journal says, by what it was done to. Times in wall ms, in the journal's order."""

    bound: set[str] = field(default_factory=set)
    accepted: set[str] = field(default_factory=set)
    uncollectible: set[str] = field(default_factory=set)
    freezes: dict[str, list[tuple[int, str]]] = field(default_factory=dict)  # (at, action)
    words: dict[tuple[str, str], int] = field(default_factory=dict)  # By (action, escrow).
    last_at: int = 0
    clock_set_back: bool = False

    def add(self, at: int, action: str, subject: str) -> None:
        """Take one entry in."""
        self.clock_set_back |= at < self.last_at
        self.last_at = at
        if action == "agreement_bound":
            self.bound.add(subject)
        if action in ACCEPTED:
            self.accepted.add(subject)
        if action == "uncollectible":
            self.uncollectible.add(subject)
        if action in (FROZEN, RESUMED):
            self.freezes.setdefault(subject, []).append((at, action))
        if action in WORDS:
            self.words[action, subject] = self.words.get((action, subject), 0) + 1


def check_journal(
    connection: sqlite3.Connection, settings: Settings, books: Books, findings: Findings
) -> None:
    """Each entry is chained to the one before, and the last one is the one noted beside them."""
    last, head = 0, bytes(32)
    acts = Acts()
    query = "SELECT number, hash, at, actor, action, subject, detail FROM journal ORDER BY number"
    for number, stored, *fields in connection.execute(query):
        last += 1
        line = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
        head = hashlib.sha256(head + line.encode("utf-8", "replace")).digest()
        if number != last or stored != head:
            findings.broke(
                "journal",
                f"journal {number}",
                f"entry {last} was expected, with a hash of {head.hex()[:16]}…; from here on"
                " nothing is proved",
            )
            return
        acts.add(fields[0], fields[2], fields[3])
    noted = settings.get("journal_number", 0), settings.get("journal_hash", bytes(32))
    findings.expect(
        noted == (last, head),
        "journal",
        f"journal {last}",
        f"the journal ends here, it should end at entry {noted[0]}",
    )
    findings.checked["journal entries"] = last
    if noted == (last, head):  # Of a journal that is cut off nothing can be asked.
        _check_acts(acts, books, findings)


def _check_acts(acts: Acts, books: Books, findings: Findings) -> None:
    """What only an act can bring about has its act in the journal, and the other way round."""
    for name in sorted(acts.bound ^ set(books.agreements)):
        known = name in acts.bound
        said = "was bound, says the journal; it is gone" if known else "was never bound"
        findings.broke("journal", f"agreement {name}", f"it {said}")
    set_back = acts.clock_set_back or any(map(_goes_back, books.releases.values()))
    if set_back:
        findings.note(
            "the machine's clock was set back at some time: what was sent while an escrow was"
            " frozen cannot be told by the time"
        )
    for escrow in books.escrows.values():
        findings.expect(
            escrow.credited == 0 or escrow.id in acts.accepted or _was_paid_out(escrow),
            "journal",
            f"escrow {escrow.id}",
            f"{escrow.credited} micros are credited, and nobody is on record for it",
        )
        _check_frozen(acts, escrow, findings)
        _check_words(acts, books, escrow, findings)
        if not set_back:
            _check_silence(acts, books, escrow, findings)
        if escrow.id not in acts.accepted:
            _check_intentions(books, escrow, findings)
        if escrow.status == "closed":
            _check_closed(acts, books, escrow, findings)


def _goes_back(release: Release) -> bool:
    times = [move.at for move in release.history]
    return times != sorted(times)


def _was_paid_out(escrow: Escrow) -> bool:
    """Whether the service itself ended an escrow: what it paid out then is payment too."""
    return escrow.status == "closed" and escrow.service_status in ENDED and escrow.credited > 0


# -- Frozen --------------------------------------------------------------------------------------


def _check_frozen(acts: Acts, escrow: Escrow, findings: Findings) -> None:
    """An escrow is frozen when the last word on it says so, and a person alone ends that."""
    freezes = acts.freezes.get(escrow.id, [])
    last = freezes[-1][1] if freezes else "that it was never frozen"
    findings.expect(
        (last == FROZEN) == (escrow.status == "frozen"),
        "frozen",
        f"escrow {escrow.id}",
        f"it is {escrow.status}, the journal's last word on it is {last}",
    )


def _check_silence(acts: Acts, books: Books, escrow: Escrow, findings: Findings) -> None:
    """Frozen, nothing is intended and nothing is sent."""
    spans = list(_spans(acts.freezes.get(escrow.id, [])))
    for release in books.releases_of(escrow.id) if spans else ():
        for move in release.history:
            if move.status in {"intended", "sent"} and any(
                begin < move.at < end for begin, end in spans
            ):
                findings.broke(
                    "frozen",
                    f"release {release.id}",
                    f"it was {move.status} at {move.at}, while escrow {escrow.id} was frozen",
                )


def _spans(freezes: list[tuple[int, str]]) -> Iterator[tuple[int, int]]:
    """From when until when an escrow was frozen."""
    began: int | None = None
    for at, action in freezes:
        if action == FROZEN:
            began = at if began is None else began
        elif began is not None:
            yield began, at
            began = None
    if began is not None:
        yield began, FOREVER


# -- Words, levels and ends ----------------------------------------------------------------------


def _check_words(acts: Acts, books: Books, escrow: Escrow, findings: Findings) -> None:
    """What a person said of a release is said by somebody: in its history and in the journal."""
    lines = [move.detail for row in books.releases_of(escrow.id) for move in row.history]
    for action, words in WORDS.items():
        told = sum(line.startswith(words) for line in lines)
        acted = acts.words.get((action, escrow.id), 0)
        findings.expect(
            told == acted,
            "journal",
            f"escrow {escrow.id}",
            f"{told} of its releases say {words!r}, the journal has {acted} entries {action}",
        )


def _check_intentions(books: Books, escrow: Escrow, findings: Findings) -> None:
    """A release is intended on the level of those before it: what the service showed is theirs.

    Only where nobody has accepted a difference, by which the level moves.
    """
    level = escrow.baseline
    for release in books.releases_of(escrow.id):
        findings.expect(
            release.before == level,
            "level",
            f"release {release.id}",
            f"it was intended behind {format_amount(release.before)}, the releases before it come"
            f" to {format_amount(level)}",
        )
        if release.status == "confirmed":
            level += release.amount


def _check_closed(acts: Acts, books: Books, escrow: Escrow, findings: Findings) -> None:
    """What is closed is paid to the last quantum, or the journal says what was lost.

    Where an agreement has several escrows of a role, the last of them to be closed answers for all.
    """
    mates = [
        other
        for other in books.escrows.values()
        if (other.agreement, other.role) == (escrow.agreement, escrow.role)
    ]
    if any(other.status != "closed" or other.id in acts.uncollectible for other in mates):
        return
    paid = sum(max(other.observed, other.expected) - other.baseline for other in mates)
    unpaid = owed_of(books, escrow.agreement, escrow.role) - paid
    findings.expect(
        unpaid <= 0,
        "settled at close",
        f"escrow {escrow.id}",
        f"it is closed with {format_amount(max(0, unpaid))} accrued and not released, and the"
        " journal does not say so",
    )
