"""What an answer to a batch of events means, and how long to wait before it is sent again.

The rule kept here: a batch is taken when meterd says so of each of its events, and of nothing else.
Every other answer (a page of a proxy, a 200 that counts differently, a refused token) leaves the
batch where it is.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from meterd.sdk.usage import Rejected
from meterd.sdk.wire import Reply

PATH = "/v1/events"
PAUSE_FIRST_S = 0.2
PAUSE_MAX_S = 30.0


class _Rejection(msgspec.Struct):
    index: int
    reason: str
    id: str = ""
    detail: str = ""


class _Recorded(msgspec.Struct):
    accepted: int
    duplicates: int
    rejected: list[_Rejection]


@dataclass(frozen=True, slots=True)
class Taken:
    """Meterd has the batch; these of its events it keeps as dead letters."""

    rejected: tuple[Rejected, ...]


@dataclass(frozen=True, slots=True)
class TooMuch:
    """Meterd refused the batch as a whole, for what it is: a part of it may be taken."""

    why: str


@dataclass(frozen=True, slots=True)
class Again:
    """The batch is to be sent again. `after_s`: how long meterd wants to be left alone."""

    why: str
    after_s: int | None = None


def body_of(batch: Sequence[bytes]) -> bytes:
    """Write a batch as the body of one request."""
    return b"[" + b",".join(batch) + b"]"


def read(reply: Reply, batch: Sequence[bytes]) -> Taken | TooMuch | Again:
    """Read what came back for a batch."""
    if reply.status in {400, 413}:
        return TooMuch(reply.said)
    if reply.status != 200:
        return Again(reply.said, reply.retry_after_s)
    try:
        recorded = msgspec.json.decode(reply.body, type=_Recorded)
    except (msgspec.MsgspecError, ValueError):
        return Again("200, but the answer is not meterd's; what answers at this address?")
    told = recorded.accepted + recorded.duplicates + len(recorded.rejected)
    inside = all(0 <= one.index < len(batch) for one in recorded.rejected)
    if told != len(batch) or not inside:
        return Again(f"200, but the answer is about {told} events and not about {len(batch)}")
    return Taken(tuple(rejected(batch[r.index], r.reason, r.detail) for r in recorded.rejected))


def rejected(payload: bytes, reason: str, detail: str) -> Rejected:
    """Say of an event, as it was sent, that it was not taken for usage."""
    event = msgspec.json.decode(payload)
    return Rejected(str(event.get("id", "")), reason, detail, event)


def pause_s(failures: int, after_s: int | None) -> float:
    """Seconds until the next try after so many failures in a row: full jitter, up to half a minute.

    What meterd asked for comes first, with a jitter on top, so that many senders do not come back
    at one moment. Written out here: a library for it would count on its own in other programs.
    """
    most = min(PAUSE_MAX_S, PAUSE_FIRST_S * 2 ** min(failures - 1, 10))
    return (after_s or 0) + random.uniform(0, most)  # noqa: S311 - No secret.
