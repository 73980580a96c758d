"""The loop that pays: due -> reading -> intention -> call -> outcome, an escrow at a time.

A visit always begins with a fresh reading of the escrow, so that settling, adopting and resolving a
doubt are one path. What may be done after it is the state table's to say (`core.settlement.step`);
this file only carries out its effects, in order, and chooses when to come again. Many escrows are
visited side by side, up to `concurrency`.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from meterd.bookkeeper import Bookkeeper
from meterd.core import advice
from meterd.core.settlement import (
    LIVE,
    UNKNOWN_OUTCOME,
    Answer,
    Answered,
    AnswerKind,
    Confirm,
    Due,
    Effect,
    Escrow,
    EscrowStatus,
    Go,
    Observed,
    Reading,
    Release,
    Repeat,
    Send,
    Unreadable,
)
from meterd.logs import get_logger

log = get_logger(__name__)

# A rotated key is put right by a person; the log need not say more often that it is wrong.
KEY_REFUSED_WAIT_S = 10.0
# Something is due and a guard stands against it: near a deadline, say. A look costs a reading.
BLOCKED_WAIT_S = 1.0
# A wall clock that is set forward makes things due while the loop sleeps by another clock.
CLOCK_LOOK_S = 60.0
# A refund that was not granted is asked for again, after a reading, so often.
REFUND_WAIT_S = 5.0


class Unread(Protocol):
    """A reading that gave nothing, and why. An expected outcome, therefore a value."""

    @property
    def kind(self) -> str:
        """One of key_refused, forbidden, missing, limited, unavailable, nonsense."""

    @property
    def detail(self) -> str:
        """What happened, for a person."""

    @property
    def retry_after(self) -> float | None:
        """Seconds that the service asked us to wait."""


class EscrowService(Protocol):
    """The escrow service as the settler needs it. No call raises but when it is cancelled.

    The role says where an id leads: a wallet is drawn on like an escrow.
    """

    async def read(self, escrow: str, role: str) -> Reading | Unread:
        """Read an escrow."""

    async def release_partial(self, release: Release, role: str) -> Answer:
        """Make the call: at most one request leaves, in all of this release's life."""

    async def refund_rest(self, escrow: str) -> Answer:
        """Ask for the refund of what is left; asked again, nothing more is refunded."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How often to come. Durations in seconds."""

    concurrency: int = 16
    reconcile_interval: float = 300.0
    doubts_max: int = 3
    doubts_window: float = 600.0


class Settler:
    """Visits escrows: those due, those in doubt or being adopted, and each now and then."""

    def __init__(self, bookkeeper: Bookkeeper, service: EscrowService, pace: Pace = Pace()) -> None:
        self._bookkeeper = bookkeeper
        self._service = service
        self._pace = pace
        self._clock = bookkeeper.clock
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._waiting: set[str] = set()  # In the queue.
        self._busy: set[str] = set()  # Being visited.
        self._again: set[str] = set()  # Asked for while being visited.
        self._timers: list[tuple[float, str]] = []  # (mono, escrow)
        self._timer_at: dict[str, float] = {}
        self._doubts: deque[float] = deque(maxlen=pace.doubts_max)
        self._key_refused_until = 0.0
        self._key_reads = False  # The key that was refused for a release is taken for readings.
        self._stopping = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    # -- The loops ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Settle until cancelled. Raises only what must end the process."""
        for escrow in self._bookkeeper.ledger.escrows.values():
            if escrow.status is not EscrowStatus.CLOSED or escrow.refund:
                self._enqueue(escrow.id)
        async with asyncio.TaskGroup() as group:
            for number in range(self._pace.concurrency):
                group.create_task(self._worker(), name=f"settler {number}")
            while True:
                await self._wait()
                await self._bookkeeper.end_periods()
                for escrow_id in self._take():
                    self._enqueue(escrow_id)

    async def drain(self) -> None:
        """Settle what is due now, in as many paced releases as it takes, then intend nothing more.

        Bounded by the caller's time-out. What cannot go on by itself is left to the next start.
        """
        bookkeeper, clock = self._bookkeeper, self._clock
        going = [escrow for escrow in bookkeeper.ledger.escrows if bookkeeper.due(escrow)]
        while True:
            settled = {escrow: bookkeeper.ledger.escrows[escrow].settled for escrow in going}
            for escrow in going:
                self._enqueue(escrow)
            while self._waiting or self._busy:
                self._idle.clear()
                await self._idle.wait()
            going = [escrow for escrow in going if self._goes_on(escrow, settled[escrow])]
            if not going or self.blocked():
                break
            pace = min(bookkeeper.ledger.escrows[escrow].next_mono for escrow in going)
            await asyncio.sleep(max(0.0, pace - clock.mono()))
        self._stopping.set()

    def _goes_on(self, escrow: str, settled: int) -> bool:
        """Whether another visit may pay: one has just paid, or waits for its pace."""
        state = self._bookkeeper.ledger.escrows[escrow]
        if state.status is not EscrowStatus.ACTIVE or state.release is not None:
            return False
        moved = state.settled > settled or state.next_mono > self._clock.mono()
        return moved and bool(self._bookkeeper.due(escrow))

    def halt(self) -> None:
        """Intend nothing more from now on; what is under way goes on."""
        self._stopping.set()

    async def _wait(self) -> None:
        """Sleep until something is due, a timer runs out or a threshold's moment comes."""
        delays = [CLOCK_LOOK_S]
        if self._timers:
            delays.append(self._timers[0][0] - self._clock.mono())
        look = self._bookkeeper.next_look
        if look is not None:
            delays.append((look - self._clock.wall()) / 1000)
        if min(delays) <= 0:
            return
        try:
            async with asyncio.timeout(min(delays)):
                await self._bookkeeper.due_changed.wait()
        except TimeoutError:
            return

    def _take(self) -> list[str]:
        now = self._clock.mono()
        taken = self._bookkeeper.take_due()
        while self._timers and self._timers[0][0] <= now:
            at, escrow = heapq.heappop(self._timers)
            if self._timer_at.get(escrow) == at:
                del self._timer_at[escrow]
                taken.append(escrow)
        return taken

    def _enqueue(self, escrow: str) -> None:
        if escrow in self._busy:
            self._again.add(escrow)
        elif escrow not in self._waiting:
            self._waiting.add(escrow)
            self._queue.put_nowait(escrow)

    async def _worker(self) -> None:
        while True:
            escrow = await self._queue.get()
            self._waiting.discard(escrow)
            self._busy.add(escrow)
            try:
                paid = await self.visit(escrow)
            finally:
                self._busy.discard(escrow)
                if not self._waiting and not self._busy:
                    self._idle.set()
            self._plan(escrow, paid=paid)

    # -- A visit ------------------------------------------------------------------------------

    async def visit(self, escrow: str) -> bool:
        """Read one escrow and do what its state table asks for; whether a call was made."""
        escrows = self._bookkeeper.ledger.escrows
        # 1. Read.
        if not self._worth_reading(escrows[escrow]) or not await self._read(escrow):
            return False
        # 2. What is open, if anything is, comes first; else intend, and pay.
        if escrows[escrow].refund:
            paid = False
        elif escrows[escrow].release is not None:
            paid = await self._go_on(escrow)
        else:
            paid = await self._pay(escrow)
        # 3. An escrow that is settled for good, as this visit has read it, gives back its rest.
        if escrows[escrow].refund:
            await self._refund(escrow)
        return paid

    async def _go_on(self, escrow: str) -> bool:
        """Go on with an open release: the reading has resolved it, or only a repetition can."""
        bookkeeper, clock = self._bookkeeper, self._clock
        release = bookkeeper.ledger.escrows[escrow].release
        assert release is not None
        if not bookkeeper.rules.honoured or release.status not in UNKNOWN_OUTCOME:
            return False
        event = Repeat(clock.mono(), clock.wall())
        return await self._carry_out(escrow, await bookkeeper.step(escrow, event))

    async def _pay(self, escrow: str) -> bool:
        """Intend a release of what is due, and make its call."""
        bookkeeper, clock = self._bookkeeper, self._clock
        why = bookkeeper.due(escrow)
        if not why or self.blocked():
            return False
        event = Due(
            owed=bookkeeper.owed_on(escrow),
            why=why,
            release_id=f"rel_{secrets.token_hex(12)}",
            units=self._units(escrow),
            mono=clock.mono(),
            wall=clock.wall(),
        )
        return await self._carry_out(escrow, await bookkeeper.step(escrow, event))

    def _units(self, escrow: str) -> int:
        """The units that the next release settles: a piece of `release_max` settles none yet.

        So the threshold in units goes on asking for the other pieces, to the last one.
        """
        bookkeeper = self._bookkeeper
        state = bookkeeper.ledger.escrows[escrow]
        piece = state.payable(bookkeeper.owed_on(escrow)) > bookkeeper.rules.release_max
        return state.units_settled if piece else bookkeeper.account_of(escrow).units

    async def _refund(self, escrow: str) -> None:
        """Ask the service to refund what is left of a closed escrow.

        By level and not by delta: what is left is read first, and asking twice refunds once.
        """
        state = self._bookkeeper.ledger.escrows[escrow]
        if state.remaining > 0 and state.service_status in LIVE:
            answer = await self._service.refund_rest(escrow)
            if answer.kind is not AnswerKind.CONFIRMED:
                log.warning(
                    f"The rest of an escrow was not refunded yet: {answer.detail}",
                    action="refund_waits",
                    escrow=escrow,
                )
                return
        await self._bookkeeper.refunded(escrow)

    def _worth_reading(self, state: Escrow) -> bool:
        """Whether a reading now could lead to anything."""
        closed = state.status is EscrowStatus.CLOSED and not state.refund
        if closed or self._clock.mono() < self._paced_until(state):
            return False
        idle = state.status is EscrowStatus.ACTIVE and state.release is None
        return not (idle and self._bookkeeper.due(state.id) and self.blocked())

    async def _read(self, escrow: str) -> bool:
        """Bring in a fresh reading; whether there was one."""
        bookkeeper, clock = self._bookkeeper, self._clock
        role = bookkeeper.ledger.escrows[escrow].role
        reading = await self._service.read(escrow, role)
        if not isinstance(reading, Reading):
            if reading.kind == "key_refused":
                self._refuse_key(reading.detail, reads=False)
            await bookkeeper.step(escrow, Unreadable(reading.detail, clock.mono()))
            return False
        self._take_key()
        owed = bookkeeper.owed_on(escrow)
        await bookkeeper.step(escrow, Observed(reading, clock.mono(), clock.wall(), owed))
        return True

    async def _carry_out(self, escrow: str, effects: Sequence[Effect]) -> bool:
        """Carry out what the table asked for; whether a call was made."""
        bookkeeper, clock = self._bookkeeper, self._clock
        if Confirm() in effects:
            effects = await bookkeeper.step(escrow, Go(clock.mono(), clock.wall()))
        send = next((effect for effect in effects if isinstance(effect, Send)), None)
        if send is None:
            return False
        role = bookkeeper.ledger.escrows[escrow].role
        answer = await self._service.release_partial(send.release, role)
        if answer.kind is AnswerKind.KEY_REFUSED:
            self._refuse_key(answer.detail, reads=True)
        await bookkeeper.step(escrow, Answered(answer, clock.mono(), clock.wall()))
        release = bookkeeper.ledger.escrows[escrow].release
        if release is not None and release.status in UNKNOWN_OUTCOME:
            self._doubt()
        return True

    def blocked(self) -> str:
        """Say why nothing is intended on any escrow now; "" when nothing stands against it."""
        now = self._clock.mono()
        if self._stopping.is_set():
            return advice.STOPPING
        if not self._bookkeeper.store.writable:
            return advice.DISK_FULL
        if now < self._key_refused_until:
            return advice.KEY_REFUSED
        full = len(self._doubts) == self._doubts.maxlen
        if full and now - self._doubts[0] < self._pace.doubts_window:
            return f"{len(self._doubts)} releases came into doubt one after the other"
        return ""

    def _doubt(self) -> None:
        """Count a doubt; so many in a row are the service's trouble, not one release's."""
        before = self.blocked()
        self._doubts.append(self._clock.mono())
        why = self.blocked()
        if why and not before:
            log.error(
                f"Nothing is intended for a while: {why}. Usage is counted; see meterd status.",
                action="releases_blocked",
                seconds=self._pace.doubts_window,
                next="meterd status",
            )

    def _take_key(self) -> None:
        """A reading went well: where readings were refused before, the key works again."""
        if self._key_refused_until and not self._key_reads:
            self._key_refused_until = 0.0
            log.info("The escrow service takes the key again.", action="key_taken")

    def _refuse_key(self, detail: str, *, reads: bool) -> None:
        """Intend nothing anywhere for a while. `reads`: it was a release that was refused.

        A key that reads and may not release is not put right by the next reading.
        """
        now = self._clock.mono()
        self._key_reads = reads
        self._bookkeeper.alarm("key_refused")  # Each time: it is over when none comes any more.
        if now >= self._key_refused_until:
            log.error(
                "The escrow service refuses the key; nothing is released until it is put right. "
                "Check escrow.api_key, then: meterd check --live",
                action="key_refused",
                detail=detail,
                next="meterd check --live",
            )
        self._key_refused_until = now + KEY_REFUSED_WAIT_S

    # -- When to come again -------------------------------------------------------------------

    def _plan(self, escrow: str, *, paid: bool) -> None:
        """Set the timer for this escrow's next visit."""
        if escrow in self._again:
            self._again.discard(escrow)
            state = self._bookkeeper.ledger.escrows[escrow]
            if self._clock.mono() >= self._paced_until(state):
                self._enqueue(escrow)
                return
        delay = self._delay(self._bookkeeper.ledger.escrows[escrow], paid=paid)
        if delay is None:
            return
        at = self._clock.mono() + delay
        if at < self._timer_at.get(
            escrow, math.inf
        ):  # An earlier timer plans anew when it runs out.
            self._timer_at[escrow] = at
            heapq.heappush(self._timers, (at, escrow))
            if self._timers[0][1] == escrow:
                self._bookkeeper.due_changed.set()  # The loop sleeps until another moment.

    def _delay(self, state: Escrow, *, paid: bool) -> float | None:
        """Seconds until the next visit; None: never. `paid`: the last one made a call."""
        now = self._clock.mono()
        rules, pace = self._bookkeeper.rules, self._pace
        paced = max(0.0, state.next_mono - now)
        if state.status is EscrowStatus.CLOSED:
            return max(paced, REFUND_WAIT_S) if state.refund else None
        if state.status is EscrowStatus.FROZEN and state.release is None:
            return pace.reconcile_interval
        unsure = state.release is not None or state.suspicion or state.low_since is not None
        if unsure or state.status in (EscrowStatus.ADOPTING, EscrowStatus.PAUSED):
            return max(paced, rules.observe_gap)
        if self._bookkeeper.due(state.id):
            return paced or (0.0 if paid else BLOCKED_WAIT_S)
        self._bookkeeper.look_again(state.id)
        return pace.reconcile_interval

    def _paced_until(self, state: Escrow) -> float:
        """A doubt is read as soon as possible; what is only due waits for its pace."""
        return 0.0 if state.release is not None else state.next_mono
