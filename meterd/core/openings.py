"""How an escrow is opened exactly once through a call that cannot be repeated.

Theory of operation. To create an escrow is to lock somebody's money: sent twice, it locks twice,
and the network loses answers. So, as with a release,

1. an opening is *intended*, durably, before it is sent, and is sent at most once in its life;
2. its memo carries a key that no other escrow has. After a lost answer or a crash the escrow is
   found again by that memo in the service's list, and bound;
3. what is not found counts as locked until the quarantine has passed twice and two whole lists,
   apart, do not show it. Then it is absent, and a person (or the program that asked) opens again.
   meterd never sends a second one by itself.

One that is absent is looked for in later lists all the same: found there, it is bound, and said.

All of it is pure: `now` is handed in. `mono` is seconds of a clock that starts with the process,
`wall` is milliseconds since the epoch, amounts are micros.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from meterd.core.settlement import AnswerKind

MEMO_CHARS_MAX = 200  # As much of a memo as is read back.
OWN_MEMO = "meterd"  # What a memo begins with where the plan gives none.
_AGREEMENT = re.compile(r"(?:^| )agreement=([A-Za-z0-9_.:-]{1,128})(?= |$)", re.ASCII)


class OpeningStatus(enum.StrEnum):
    """Where an opening stands. Found `intended` after a restart it is in doubt."""

    INTENDED = "intended"
    IN_DOUBT = "in_doubt"
    LOCKED = "locked"
    FAILED = "failed"  # Certainly nothing was locked.
    ABSENT = "absent"  # Given up: no list showed it.


UNFINISHED = frozenset({OpeningStatus.INTENDED, OpeningStatus.IN_DOUBT})
# Answers that say for certain that nothing was locked. A conflict says nothing of the first try.
_REFUSED = frozenset(
    {
        AnswerKind.DECLINED,
        AnswerKind.MISSING,
        AnswerKind.EMPTY,
        AnswerKind.KEY_REFUSED,
        AnswerKind.FORBIDDEN,
        AnswerKind.LIMITED,
        AnswerKind.NOT_SENT,
    }
)


@dataclass(frozen=True, slots=True)
class Opening:
    """One escrow that is to be locked. `id` is its key, and the last word of its memo."""

    id: str
    agreement: str
    plan: str
    payer: str
    role: str
    amount: int
    provider: str
    hours: int | None
    memo: str
    why: str  # asked, renewal or rollover; again: a person has opened another in its place.
    status: OpeningStatus
    created_at: int
    changed_at: int
    escrow: str = ""
    detail: str = ""
    # Not stored: they are measured with the monotonic clock of this process.
    since_mono: float = 0.0  # When the doubt began.
    sightings: int = 0  # Whole lists behind the quarantine that did not show it.
    sighted_mono: float = 0.0


@dataclass(frozen=True, slots=True)
class Wish:
    """What a person or a program asks for: open an agreement or, with `next`, its next escrow.

    Ids and texts may be "", an amount None: then the plan and the configuration say it.
    """

    plan: str
    agreement: str = ""
    payer: str = ""
    provider: str = ""
    deposit: int | None = None
    next: bool = False


@dataclass(frozen=True, slots=True)
class Locked:
    """A creation was answered as it was asked: its escrow, and who pays, where that is told."""

    escrow: str
    creator: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """One escrow of the service's list. `live`: it can still be released from."""

    escrow: str
    memo: str
    creator: str
    provider: str
    total: int
    live: bool
    created_at: int = 0  # Wall ms; 0: the service does not say.


@dataclass(frozen=True, slots=True)
class Census:
    """An agent's escrows. `whole`: one that is not in it was not there."""

    escrows: tuple[Found, ...]
    whole: bool


def memo_of(plan_memo: str, agreement: str, key: str) -> str:
    """Write an escrow's memo: what the plan says, whose it is, and the key that finds it again."""
    return f"{plan_memo or OWN_MEMO} agreement={agreement} {key}"


def memo_flaw(memo: str) -> str:
    """Say why a memo could not be read back as it was written; "" when it can."""
    if len(memo) > MEMO_CHARS_MAX:
        return f"has {len(memo)} characters with agreement and key, {MEMO_CHARS_MAX} are read back"
    if not memo.isprintable() or " ".join(memo.split()) != memo:
        return "may hold single blanks and printable characters alone"
    return ""


def named_in(memo: str) -> str:
    """Which agreement a memo names; "" for none."""
    found = _AGREEMENT.search(memo)
    return "" if found is None else found[1]


def landed(opening: Opening, locked: Locked, detail: str, wall: int) -> Opening:
    """Book that its escrow is there."""
    return replace(
        opening,
        status=OpeningStatus.LOCKED,
        escrow=locked.escrow,
        payer=opening.payer or locked.creator,
        detail=detail,
        changed_at=wall,
    )


def answered(opening: Opening, kind: AnswerKind, detail: str, mono: float, wall: int) -> Opening:
    """Book an answer that names no escrow: refused for certain, else in doubt."""
    assert opening.status is OpeningStatus.INTENDED, "it is sent once, and answered once"
    if kind in _REFUSED:
        return replace(opening, status=OpeningStatus.FAILED, detail=detail, changed_at=wall)
    return _doubt(opening, detail, mono, wall)


def restarted(opening: Opening, mono: float, wall: int) -> Opening:
    """What the dead process intended may have left; a doubt begins anew with the clock."""
    if opening.status is OpeningStatus.INTENDED:
        return _doubt(opening, "found after a restart", mono, wall)
    return replace(opening, since_mono=mono, sightings=0)


def _doubt(opening: Opening, detail: str, mono: float, wall: int) -> Opening:
    return replace(
        opening,
        status=OpeningStatus.IN_DOUBT,
        detail=detail,
        changed_at=wall,
        since_mono=mono,
    )


def find(opening: Opening, listed: Sequence[Found]) -> list[Found]:
    """Find what was locked for it, oldest first: more than one where the network doubled a call."""
    wanted = opening.memo, opening.amount, opening.provider
    found = [one for one in listed if (one.memo, one.total, one.provider) == wanted]
    return sorted(found, key=lambda one: (one.created_at, one.escrow))


def unseen(
    opening: Opening, listed_mono: float, wall: int, *, quarantine: float, gap: float
) -> Opening:
    """A whole list, asked for at `listed_mono`, does not show it: wait, or give it up."""
    if opening.status is not OpeningStatus.IN_DOUBT:
        return opening
    if listed_mono - opening.since_mono < 2 * quarantine:
        return opening
    if not opening.sightings:
        return replace(opening, sightings=1, sighted_mono=listed_mono)
    if listed_mono - opening.sighted_mono < gap:
        return opening
    detail = "no list shows it, twice the quarantine after it was asked for"
    return replace(opening, status=OpeningStatus.ABSENT, detail=detail, changed_at=wall)
