"""What the API needs of the daemon's other rooms, as narrow views of them.

The API owns nothing that lives: it asks the bookkeeper, submits through the intake, and reads the
rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from meterd.api.overview import Overview
from meterd.api.runway import Runways
from meterd.api.settings import ApiSettings
from meterd.bookkeeper import Bookkeeper, Recorded
from meterd.core.changes import Hold
from meterd.core.openings import Opening, Wish
from meterd.sources import Deliveries


class SourceView(Protocol):
    """What can be said of a source. Times in wall ms."""

    @property
    def name(self) -> str:
        """Its name in the configuration."""

    @property
    def kind(self) -> str:
        """Its kind, such as `mqtt`."""

    @property
    def address(self) -> str:
        """Where it reads, without passwords."""

    @property
    def connected(self) -> bool:
        """Whether deliveries can come now."""

    @property
    def since(self) -> int:
        """When `connected` last changed; 0: never."""

    @property
    def error(self) -> str:
        """Why it is not connected."""

    @property
    def warning(self) -> str:
        """The last gap or reset that it saw."""

    @property
    def lag(self) -> int | None:
        """Deliveries that wait at the broker; None: it does not tell."""

    @property
    def unacked(self) -> int:
        """Deliveries read and not yet acked."""


class IntakeView(Protocol):
    """The door for events whose answer is their ack, and the sources' states by name."""

    @property
    def states(self) -> Mapping[str, SourceView]:
        """Every configured source."""

    async def submit(self, source: str, deliveries: Deliveries) -> Recorded:
        """Record deliveries; durable when this returns. Raises `Unavailable`."""

    async def capture(self, hold: Hold, quantity: str) -> Recorded:
        """Record what a hold's work used; durable when this returns. Raises `Unavailable`."""


class SettlerView(Protocol):
    """What stands against releases as a whole."""

    def blocked(self) -> str:
        """Say why nothing is released now; "" when nothing stands against it."""


class OpenerView(Protocol):
    """Who locks escrows."""

    @property
    def unfinished(self) -> Sequence[Opening]:
        """The openings whose escrow nothing draws on, oldest first."""

    async def open(self, wish: Wish, actor: str) -> str:
        """Lock what an agreement needs; its id. Raises `Refused`, `NotFound`, `Unavailable`."""


class Instruments(Protocol):
    """The metrics: told of each request, asked for all series and what happened so far."""

    accepted: int
    duplicates: int
    rejected: int
    last_event_at: int  # Wall ms; 0: none since the start.
    last_release_at: int

    def http(self, route: str, method: str, status: int, seconds: float) -> None:
        """A request was answered."""

    def otlp_ignored(self, signal: str, count: int) -> None:
        """So many spans (`traces`) or log records (`logs`) came that are no usage."""

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Every series as text, and its content type, for an Accept header."""


@dataclass(frozen=True, slots=True)
class Parts:
    """All that the rooms of the API work with."""

    settings: ApiSettings
    bookkeeper: Bookkeeper
    intake: IntakeView
    settler: SettlerView
    opener: OpenerView
    overview: Overview
    instruments: Instruments
    store_bytes: Callable[[], int]
    fatal: Callable[[BaseException], None]
    version: str
    started_at: int  # Wall ms.
    runways: Runways = field(default_factory=Runways)
