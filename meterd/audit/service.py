"""The store held against the escrow service's own figures and its own history.

What the service says is a reading, and a reading may be some minutes old: where that may be all,
the finding says so. A backup is older than the service: what was released since it was taken looks
the same as what somebody else released, so there it is a note and not a break.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from meterd.audit.books import Books, Escrow, Release
from meterd.audit.checks import LANDED, OPEN, held_of, owed_of
from meterd.audit.findings import Findings
from meterd.audit.journal import ENDED
from meterd.core.money import format_amount

WALLET = "wallet"  # Its payer fills it up; an escrow's total never changes.
NEWER = "released after this copy was taken, or by somebody else; to tell, stop the daemon and look"


@dataclass(frozen=True, slots=True)
class Shown:
    """What the service shows of an escrow, in micros; `release_ids` are meterd's own."""

    status: str
    total: int
    released: int
    remaining: int
    refunded: int
    release_ids: frozenset[str]
    provider: str | None = None


def compare(
    books: Books, answers: Mapping[str, Shown | str], findings: Findings, *, is_copy: bool
) -> None:
    """Hold every escrow against its answer. A text says why there is none."""
    for name in sorted(books.escrows):
        escrow, answer = books.escrows[name], answers.get(name, "it was not asked for")
        if isinstance(answer, Shown):
            findings.checked["escrows asked"] += 1
            if not escrow.adopted:
                findings.note(f"escrow {name}: not adopted yet; nothing can be compared")
                continue
            _check_figures(books, escrow, answer, findings, is_copy=is_copy)
            _check_history(books, escrow, answer, findings, is_copy=is_copy)
        else:
            findings.unasked += 1
            findings.note(f"escrow {name}: the service told nothing of it: {answer}")


def _check_figures(
    books: Books, escrow: Escrow, shown: Shown, findings: Findings, *, is_copy: bool
) -> None:
    row = f"escrow {escrow.id}"
    findings.expect(
        shown.released + shown.remaining + shown.refunded == shown.total,
        "service",
        row,
        f"released {format_amount(shown.released)} + remaining {format_amount(shown.remaining)} +"
        f" refunded {format_amount(shown.refunded)} is not its total {format_amount(shown.total)}",
    )
    findings.expect(
        shown.total == escrow.total or escrow.role == WALLET,
        "service",
        row,
        f"its total is {format_amount(shown.total)}, {format_amount(escrow.total)} when adopted",
    )
    findings.expect(
        shown.provider == escrow.provider,
        "service",
        row,
        f"its provider is {shown.provider}, {escrow.provider} when adopted",
    )
    known, held = escrow.expected, held_of(books, escrow.id)
    if shown.released < known:
        findings.broke(
            "service",
            row,
            f"it shows {format_amount(shown.released)} as released,"
            f" {format_amount(known - shown.released)} less than the {format_amount(known)} that"
            " the store knows of: it lost a write, or this reading is old (ask again later)",
        )
        return
    extra = shown.released - known
    if extra in (0, held):
        return
    figures = (
        f"it shows {format_amount(shown.released)} as released, {format_amount(extra)} more than"
        f" the {format_amount(known)} that the store knows of"
    )
    if held:
        figures += f" (with {format_amount(held)} in doubt)"
    if is_copy:
        findings.note(f"{row}: {figures}: {NEWER}")
    elif shown.status in ENDED:
        findings.note(f"{row}: {figures}; the service has ended it ({shown.status!r})")
    else:
        beyond = _beyond(books, escrow, shown)
        findings.broke("service", row, f"{figures}: somebody else released{beyond}")


def _beyond(books: Books, escrow: Escrow, shown: Shown) -> str:
    """How much of what was released was never used."""
    used = escrow.baseline + owed_of(books, escrow.agreement)
    over = shown.released - used
    return f", {format_amount(over)} of it beyond all usage" if over > 0 else ""


def _check_history(
    books: Books, escrow: Escrow, shown: Shown, findings: Findings, *, is_copy: bool
) -> None:
    """Every release that landed stands in the service's history, and no other one of ours."""
    releases = {release.id: release for release in books.releases_of(escrow.id)}
    # Behind a restored backup a person has credited what was released in between.
    settled = escrow.credited > 0 and shown.released - escrow.expected in {
        0,
        held_of(books, escrow.id),
    }
    for name in sorted(shown.release_ids):
        if settled and name not in releases:
            findings.note(f"release {name}: not of this store; it is in what was credited")
        else:
            _check_shown(name, releases.get(name), escrow, findings, is_copy=is_copy)
    landed = [release for release in releases.values() if release.status in LANDED]
    if not shown.release_ids:
        if landed:
            findings.note(f"escrow {escrow.id}: the service shows no history of our releases")
        return
    # A service may show only its newest lines: what is older than the oldest one cannot be missed.
    oldest = min(
        (releases[name].number for name in shown.release_ids if name in releases), default=0
    )
    looked_for = [release for release in landed if release.number >= oldest]
    for release in looked_for:
        findings.expect(
            release.id in shown.release_ids,
            "service",
            f"release {release.id}",
            f"{format_amount(release.amount)} is {release.status}, and the service's history of"
            f" escrow {escrow.id} does not have it",
        )
    findings.checked["releases found in the service's history"] += sum(
        release.id in shown.release_ids for release in looked_for
    )
    findings.checked["releases older than the history shown"] += len(landed) - len(looked_for)


def _check_shown(
    name: str, release: Release | None, escrow: Escrow, findings: Findings, *, is_copy: bool
) -> None:
    """One line of the service's history that bears an id of ours."""
    row = f"release {name}"
    if release is None:
        said = f"the service's history of escrow {escrow.id} has it, the store does not"
        if is_copy:
            findings.note(f"{row}: {said}: {NEWER}")
        else:
            findings.broke("service", row, f"{said}: another daemon, or a restored backup")
    elif release.status in OPEN:
        findings.note(f"{row}: {release.status}, and the service's history shows that it landed")
    elif release.status not in LANDED:
        amount = format_amount(release.amount)
        findings.broke(
            "service",
            row,
            f"{amount} is {release.status}, and the service's history of escrow {escrow.id} has it",
        )
