"""What every source of deliveries keeps to: bytes and acks, no meaning, and no retry inside.

The loop that calls a source (`meterd.intake`) owns reconnecting, back-off and the order read ->
commit -> ack. A source that cannot go on raises `SourceUnavailable` and forgets its connection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from meterd.core.events import Reason


@dataclass(frozen=True, slots=True)
class Fault:
    """A delivery that the transport itself knows to be bad: a dead letter with this reason."""

    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Proof:
    """What stands beside a signed payload, as Standard Webhooks name it; "" where it is missing."""

    id: str
    timestamp: str
    signature: str

    @classmethod
    def of(cls, named: Iterable[tuple[str, str]]) -> Proof | None:
        """Find it among names and values; None where there is nothing of it."""
        found = {name: value for name, value in named if name.startswith(PROOF_PREFIX)}
        texts = [found.get(f"{PROOF_PREFIX}{name}", "") for name in cls.__match_args__]
        return cls(*texts) if any(texts) else None


PROOF_PREFIX = "webhook-"


@dataclass(slots=True)
class Deliveries:
    """Several arrivals in order, acked together after their commit.

    payloads  one JSON document each, as it came. ids       the transport's own id of each arrival;
    used where the event itself gives none. None: there are none. fields    what the transport's
    address says of each (`escrow_id`, `meter`); fills what the payload leaves out and must agree
    with what it says. None: nothing. faults    by index: arrivals that are bad whatever they say.
    proofs    by index: how a payload is signed. producer  who sent all of them, where the transport
    knows it by itself: the name of a producer.
    position  where to go on after a restart, stored in the same commit. None: the broker keeps it.
    receipt   what the source itself needs to ack these.
    """

    payloads: Sequence[bytes]
    ids: Sequence[str] | None = None
    fields: Sequence[Mapping[str, str]] | None = None
    faults: Mapping[int, Fault] = field(default_factory=dict)
    proofs: Mapping[int, Proof] = field(default_factory=dict)
    producer: str = ""
    position: str | None = None
    receipt: object = None


class Source(Protocol):
    """One place where deliveries come from.

    Called by one loop, never concurrently, except for `ack` and `lag`.
    """

    name: str
    kind: str
    address: str  # For people: never holds a password.

    async def connect(self, position: str | None) -> Sequence[str]:
        """Connect and go on behind `position` (None: the first time); what a person should know.

        Raises `SourceUnavailable`; the loop calls again after a back-off.
        """

    async def read(self) -> Deliveries:
        """Wait for deliveries: at least one, at most a batch, and all that are there already.

        Raises `SourceUnavailable` when the connection is gone. May be cancelled without losing a
        delivery.
        """

    async def ack(self, deliveries: Deliveries) -> None:
        """Tell the broker "done"; called once for each `read`, in order, after the commit.

        Raises `SourceUnavailable`.
        """

    async def lag(self) -> int | None:
        """How many deliveries wait at the broker; None where it does not tell.

        Raises `SourceUnavailable`.
        """

    async def close(self) -> None:
        """Disconnect. Never raises."""
