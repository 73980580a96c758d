"""What happens, told to whoever listens: the memory behind `GET /v1/stream`.

The rule kept here: listeners cost the books nothing that counts. Nobody listens: the bookkeeper
asks nobody. Somebody listens: a batch leaves the accounts that it touched in a set, and five times
a second each of them is told once, with its sums as they are then. What was told is kept in one
ring of bounded size; a listener is a place in that ring and has no buffer of its own, so a slow one
falls out of the ring and is sent away instead of being waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import msgspec

from meterd.api.overview import balance
from meterd.api.parts import Parts
from meterd.api.problems import Problem
from meterd.api.views import Document, agreement_of
from meterd.api.wire import iso_time
from meterd.core.accounts import Account
from meterd.core.money import format_amount, format_exact
from meterd.core.settlement import Escrow, Release
from meterd.logs import get_logger

log = get_logger(__name__)

TICK_S = 0.2
LISTENERS_MAX = 20
RING_MAX = 10_000  # Events that can be had again by their id: some 3 MB.
ACCRUALS_MAX = 100  # In one tick; the others keep their place for the next one.
CHUNK_BYTES = 64 * 1024  # Of one write.
LINGER_S = 60.0  # Whoever was the last to listen finds what happened meanwhile for so long.
NUMBER_DIGITS_MAX = 15


@dataclass(frozen=True, slots=True)
class Told:
    """One event of the stream. `agreement`: whom it is about; None: all."""

    number: int
    agreement: str | None
    text: bytes


class Fallen(Exception):
    """A listener was so slow that what comes next for him is gone."""


class Hub:
    """Takes what the bookkeeper tells, while somebody listens. Lives on the event loop."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._bookkeeper = parts.bookkeeper
        self._ledger = parts.bookkeeper.ledger
        # Numbers of one process mean nothing to the next one.
        self._era = secrets.token_hex(4)
        self._ring: deque[Told] = deque(maxlen=RING_MAX)
        self._last = 0  # The number of the latest event.
        self._oldest = 0  # Whoever has heard of this number can go on from it.
        self._dirty: dict[Account, None] = {}
        self._sources: dict[str, tuple[bool, str]] = {}
        self._dead_letters = 0
        self._ears: set[asyncio.Event] = set()
        self._pump: asyncio.Task[None] | None = None
        self.closed = False

    # -- What the bookkeeper tells -----------------------------------------------------------------

    def accrued(self, accounts: Iterable[Account]) -> None:
        """Usage of these was counted, or taken back."""
        self._dirty.update(dict.fromkeys(accounts))

    def released(self, release: Release) -> None:
        """A release is in a new state, and durable."""
        at, status, detail = release.history[-1]
        agreement = agreement_of(self._ledger.escrows, release)
        self._tell(
            "release",
            agreement,
            {
                "id": release.id,
                "agreement": agreement,
                "escrow": release.escrow,
                "amount": format_amount(release.amount),
                "status": status,
                "detail": detail,
                "why": release.why,
                "at": iso_time(at),
            },
        )
        if agreement is not None:
            self._dirty[self._ledger.accounts[agreement]] = None

    def moved(self, escrow: Escrow) -> None:
        """An escrow is in another state, or new."""
        self._tell(
            "state",
            escrow.agreement,
            {
                "agreement": escrow.agreement,
                "escrow": escrow.id,
                "state": escrow.word,
                "reason": escrow.reason,
                "at": self._now(),
            },
        )
        self._dirty[self._ledger.accounts[escrow.agreement]] = None

    # -- Who listens -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def listening(self) -> Iterator[asyncio.Event]:
        """Listen; the event is set whenever there may be something new. Raises `Problem`."""
        if self.closed:
            raise Problem(503, "stopping", "meterd stops; ask again when it is up")
        if len(self._ears) >= LISTENERS_MAX:
            detail = f"{LISTENERS_MAX} listen already; ask again later"
            raise Problem(503, "too-many-listeners", detail, headers={"Retry-After": "10"})
        self._begin()
        ear = asyncio.Event()
        self._ears.add(ear)
        try:
            yield ear
        finally:
            self._ears.discard(ear)

    def close(self) -> None:
        """Send everybody away: the daemon stops."""
        self.closed = True
        if self._pump is not None:
            self._pump.cancel()
        self._end()

    @property
    def last(self) -> int:
        """The number of the latest event."""
        return self._last

    def place_of(self, event_id: str) -> int | None:
        """Where to go on behind an event; None: what came behind it is gone."""
        era, _, text = event_id.partition("-")
        if era != self._era or not (text.isascii() and text.isdecimal()):
            return None
        number = int(text) if len(text) <= NUMBER_DIGITS_MAX else -1
        return number if self._oldest <= number <= self._last else None

    def since(self, number: int, agreement: str | None) -> tuple[bytes, int]:
        """Write what comes behind a number, some of it, and say up to where. Raises `Fallen`."""
        if number < self._oldest:
            raise Fallen
        behind = list(islice(reversed(self._ring), self._last - number))
        parts, weight = [], 0
        for told in reversed(behind):
            number = told.number
            if agreement is None or told.agreement is None or told.agreement == agreement:
                parts.append(told.text)
                weight += len(told.text)
                if weight >= CHUNK_BYTES:
                    break
        return b"".join(parts), number

    def greeting(self, kind: str) -> bytes:
        """Say where things stand that only changes are told of; it has the latest event's id."""
        states = self._parts.intake.states.values()
        document = {
            "at": self._now(),
            "version": self._parts.version,
            "agreements": len(self._ledger.accounts),
            "dead_letters": self._bookkeeper.dead_letters,
            "sources": [
                {"name": state.name, "connected": state.connected, "error": state.error}
                for state in states
            ],
        }
        return self._text(kind, document)

    # -- The pump ----------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Have the bookkeeper tell, unless it does already."""
        if self._pump is not None:
            return
        self._last += 1  # What happened while nobody listened is told to nobody.
        self._oldest = self._last
        self._look_at_edges()
        self._bookkeeper.watcher = self
        self._pump = asyncio.create_task(self._run(), name="stream")

    def _end(self) -> None:
        """Have the bookkeeper tell nobody, and send away whoever listens."""
        self._bookkeeper.watcher = None
        self._pump = None
        self._last += 1
        self._oldest = self._last
        self._ring.clear()
        self._dirty.clear()
        self._wake()

    async def _run(self) -> None:
        """Tell in bundles, until nobody has listened for a while."""
        alone = 0.0
        try:
            while alone < LINGER_S:
                await asyncio.sleep(TICK_S)
                self._tick()
                alone = 0.0 if self._ears else alone + TICK_S
            self._end()
        except Exception as error:  # A mistake in showing must not stop the books.
            log.error(
                "The live stream failed by a mistake of meterd's own; listeners may come again.",
                action="stream_failed",
                exc_info=error,
            )
            self._end()

    def _tick(self) -> None:
        for account in list(islice(self._dirty, ACCRUALS_MAX)):
            del self._dirty[account]
            self._tell("accrual", account.agreement.id, self._sums(account))
        letters, sources = self._dead_letters, self._sources
        self._look_at_edges()
        if self._dead_letters != letters:
            self._tell("dead_letters", None, {"count": self._dead_letters, "at": self._now()})
        for name, (connected, error) in self._sources.items():
            if sources.get(name) != (connected, error):
                document = {"name": name, "connected": connected, "error": error}
                self._tell("source", None, {**document, "at": self._now()})

    def _look_at_edges(self) -> None:
        states = self._parts.intake.states.values()
        self._sources = {state.name: (state.connected, state.error) for state in states}
        self._dead_letters = self._bookkeeper.dead_letters

    def _sums(self, account: Account) -> Document:
        money = balance(self._ledger, account)
        holds = self._bookkeeper.holds.amount(account.agreement.id)
        return {
            "agreement": account.agreement.id,
            "events": account.events,
            "accrued": format_exact(account.accrued),
            "released": format_amount(money.released),
            "unsettled": format_amount(money.unsettled),
            "in_doubt": format_amount(money.in_doubt),
            "headroom": None if money.headroom is None else format_amount(money.headroom - holds),
            "at": self._now(),
        }

    def _tell(self, kind: str, agreement: str | None, document: Document) -> None:
        self._last += 1
        self._ring.append(Told(self._last, agreement, self._text(kind, document)))
        self._oldest = max(self._oldest, self._ring[0].number - 1)
        self._wake()

    def _text(self, kind: str, document: Document) -> bytes:
        head = f"id: {self._era}-{self._last}\nevent: {kind}\ndata: ".encode()
        return head + msgspec.json.encode(document) + b"\n\n"

    def _wake(self) -> None:
        for ear in self._ears:
            ear.set()

    def _now(self) -> str | None:
        return iso_time(self._bookkeeper.clock.wall())
