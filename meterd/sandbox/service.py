"""The one owner of the escrow service's state: it decides, books, saves, and shows.

The rule kept here: a request is decided and booked in one step of the event loop, then saved, and
answered only after the commit. What became due meanwhile (deadlines, requests that land late) is
done first, in the order of its time, so that a request never sees a moment in which the past has
not happened yet.
"""

from __future__ import annotations

import asyncio
import heapq
import secrets
import time
from collections import deque
from collections.abc import Mapping
from itertools import count
from typing import Any

from meterd.errors import StoreCorrupt
from meterd.sandbox import ledger
from meterd.sandbox.faults import Faults, Rule
from meterd.sandbox.ledger import (
    RELEASES,
    Act,
    Ask,
    Books,
    Change,
    Deadline,
    Decision,
    Escrow,
    Kind,
    Operation,
    Wallet,
)
from meterd.sandbox.store import HISTORY_MAX, Saved, Store
from meterd.sandbox.views import Views
from meterd.sandbox.wire import debit_answer, release_answer

KEYS_KEPT = 100_000  # Used keys kept in memory; older ones are looked up in the file.
CLOCK_OFFSET_MS_MAX = 50 * 366 * 86_400_000
SERVICE = "service"  # The agent that stands in the log where the service itself acted.


class Service:
    """The escrow service without HTTP. All methods are called on one event loop."""

    def __init__(
        self,
        store: Store,
        books: Books,
        histories: Mapping[str | tuple[str, str], list[Operation]],
    ) -> None:
        self.store = store
        self.books = books
        self.faults = Faults()
        self._offset_ms = store.clock()
        # Written once for the wire and then shown often: by escrow, or (payer, payee), and then
        # (seq, the release or debit).
        self._histories: dict[str | tuple[str, str], deque[tuple[int, dict[str, Any]]]] = {
            place: deque(((op.seq, _line(op)) for op in newest), HISTORY_MAX)
            for place, newest in histories.items()
        }
        self._escrow_views: Views[Escrow] = Views()
        self._wallet_views: Views[Wallet] = Views()
        self._agenda: list[tuple[int, int, Act, str]] = []  # (due, tie-break, what, outcome).
        self._ties = count()
        # Keys booked since the start, oldest first: what lands late is decided without a look-up.
        self._keys: dict[tuple[str, str | None, str | None], None] = {}
        for escrow in books.escrows.values():
            self._note_deadline(escrow)

    @classmethod
    def load(cls, store: Store, fee_bps: int, wallet_minimum: int = 0) -> Service:
        """Take over what the file holds.

        Raises `StoreCorrupt` when its sums contradict each other.
        """
        books, histories = store.load(fee_bps)
        held = sum(books.wallets.values())
        held += sum(escrow.remaining + escrow.fee for escrow in books.escrows.values())
        if held != books.supply:
            raise StoreCorrupt("the sandbox's file does not add up; name another file")
        books.wallet_minimum = wallet_minimum
        return cls(store, books, histories)

    def now_ms(self) -> int:
        """The service's own time, in milliseconds since 1970."""
        return time.time_ns() // 1_000_000 + self._offset_ms

    async def move_clock(self, by_ms: int) -> bool:
        """Move the clock, either way; False when that would leave sensible times."""
        offset_ms = self._offset_ms + by_ms
        if abs(offset_ms) > CLOCK_OFFSET_MS_MAX:
            return False
        self._offset_ms = offset_ms
        await self.store.put_clock(offset_ms)
        self.catch_up()
        await self.store.all_saved()
        return True

    def catch_up(self) -> int:
        """Do what became due; answers the time. Called before each request."""
        now_ms = self.now_ms()
        while self._agenda and self._agenda[0][0] <= now_ms:
            _, _, act, outcome = heapq.heappop(self._agenda)
            decision = act(outcome, now_ms)
            if isinstance(decision, Change):
                self._book(decision, now_ms)
        return now_ms

    async def perform(self, act: Act, outcome: str) -> Decision:
        """Decide a request, book and save it.

        Comes back when it is durable. Raises `StoreFailed`.
        """
        now_ms = self.catch_up()
        decision = act(outcome, now_ms)
        if isinstance(decision, Change):
            await asyncio.shield(self._book(decision, now_ms))
        return decision

    def land_late(self, act: Act, delay_ms: int, outcome: str) -> None:
        """Let a request take effect later. It is on its way, not here: a restart loses it."""
        heapq.heappush(self._agenda, (self.now_ms() + delay_ms, next(self._ties), act, outcome))

    def has_booked(self, agent: str, place: str | None, key: str | None) -> bool:
        """Whether this key moved money lately; `place` as of an operation."""
        return (agent, place, key) in self._keys

    def hide(self, before: Escrow | Wallet, for_ms: int) -> None:
        """Show this state to readers for a while, whatever happens to it."""
        until_ms = self.now_ms() + for_ms
        if isinstance(before, Escrow):
            self._escrow_views.hide(before.escrow_id, before, until_ms)
        else:
            self._wallet_views.hide(before.agent, before, until_ms)

    def hide_nothing(self) -> None:
        """Show everything as it stands again."""
        self._escrow_views.hide_nothing()
        self._wallet_views.hide_nothing()

    async def shown(self, escrow: Escrow, view: Rule | None, now_ms: int) -> Escrow:
        """The state of an escrow that a reading gets; the present one only once it is durable."""
        await self.store.saved(escrow.escrow_id)
        present = self.books.escrows[escrow.escrow_id]
        return self._escrow_views.shown(escrow.escrow_id, present, view, now_ms)

    async def shown_wallet(self, agent: str, view: Rule | None, now_ms: int) -> Wallet:
        """The state of a wallet that a reading gets; the present one only once it is durable."""
        await self.store.all_saved()
        present = ledger.wallet(self.books, agent)
        return self._wallet_views.shown(agent, present, view, now_ms)

    def history(self, escrow: Escrow) -> list[dict[str, Any]]:
        """The newest releases that this state of an escrow knows of, oldest first, as shown."""
        return self._newest(escrow.escrow_id, escrow.seq)

    def debits(self, wallet: Wallet, payee: str) -> list[dict[str, Any]]:
        """The newest debits of a payee that this state of a wallet knows of, as `history`."""
        return self._newest((wallet.agent, payee), wallet.seq)

    def _newest(self, place: str | tuple[str, str], seq_max: int) -> list[dict[str, Any]]:
        return [line for seq, line in self._histories.get(place, ()) if seq <= seq_max]

    def act_by_other(self, rule: Rule, amount: int | None) -> Act:
        """What a fault of phase NOW does to its escrow, as if somebody else had."""
        ask = Ask(SERVICE, rule.told.get("memo"), None, "by_other")
        escrow_id = rule.escrow_id
        escrow = self.books.escrows.get(escrow_id)
        payer = Ask(escrow.creator, None, None, "by_other") if escrow is not None else ask
        acts: Mapping[str, Act] = {
            "foreign_release": lambda _, now: ledger.release_by_other(
                self.books, escrow_id, amount, ask, now
            ),
            "refund": lambda _, now: (
                ledger.refund_all(self.books, escrow_id, payer, now)
                if amount is None
                else ledger.refund_part(self.books, escrow_id, amount, payer, now)
            ),
            "dispute": lambda _, __: ledger.dispute(self.books, escrow_id, payer),
            "expire": lambda _, now: ledger.reach_deadline(
                self.books, escrow_id, Deadline.REFUND, ask, now
            ),
            "auto_release": lambda _, now: ledger.reach_deadline(
                self.books, escrow_id, Deadline.RELEASE, ask, now
            ),
        }
        return acts[rule.kind]

    async def open_wallets(self, agents: frozenset[str], balance: int) -> None:
        """Give each agent that the file does not know its first play money, in micros."""
        for agent in sorted(agents - set(self.books.wallets)):
            if balance > 0:
                await self.perform(self._opening(agent, balance), "opening")

    def _opening(self, agent: str, balance: int) -> Act:
        return lambda outcome, now: ledger.grant(
            self.books, balance, Kind.OPENING, Ask(agent, outcome=outcome), now
        )

    def _book(self, change: Change, now_ms: int) -> Saved:
        escrow, operation = change.escrow, change.operation
        self._keep_past(change, now_ms)
        known = escrow is not None and escrow.escrow_id in self.books.escrows
        ledger.apply(self.books, change)
        if escrow is not None and (not known or operation is None):
            self._note_deadline(escrow)  # A new escrow, or one that a resolved dispute lets go on.
        if operation is not None and operation.key is not None:
            self._keep_key(operation)
        if operation is not None:
            self._keep_line(operation)
        return self.store.save(change)

    def _keep_line(self, operation: Operation) -> None:
        """Let a release or a debit be found in its history."""
        place: str | tuple[str, str]
        if operation.payee is not None:
            place = (operation.agent, operation.payee)
        elif operation.escrow_id is not None and operation.kind in RELEASES:
            place = operation.escrow_id
        else:
            return
        history = self._histories.setdefault(place, deque(maxlen=HISTORY_MAX))
        history.append((operation.seq, _line(operation)))

    def _keep_key(self, operation: Operation) -> None:
        self._keys[operation.agent, operation.place, operation.key] = None
        if len(self._keys) > KEYS_KEPT:
            del self._keys[next(iter(self._keys))]

    def _keep_past(self, change: Change, now_ms: int) -> None:
        """Keep what the change ends: the escrow's state, and those of wallets that are debited."""
        wanted = self.faults.wants_history
        escrow, operation = change.escrow, change.operation
        before = None if escrow is None else self.books.escrows.get(escrow.escrow_id)
        if before is not None:
            self._escrow_views.keep(before.escrow_id, before, now_ms, wanted=wanted)
        debited = operation.agent if operation is not None and operation.payee else None
        for agent in change.wallets:
            if agent in self.books.wallets and (agent == debited or agent in self.books.debited):
                wallet = ledger.wallet(self.books, agent)
                self._wallet_views.keep(agent, wallet, now_ms, wanted=wanted)

    def _note_deadline(self, escrow: Escrow) -> None:
        if escrow.deadline_ms is None or escrow.status in ledger.FINAL:
            return
        ask = Ask(SERVICE, None, None, "by_deadline")
        escrow_id, direction = escrow.escrow_id, escrow.on_deadline
        heapq.heappush(
            self._agenda,
            (
                escrow.deadline_ms,
                next(self._ties),
                lambda _, now: ledger.reach_deadline(self.books, escrow_id, direction, ask, now),
                "by_deadline",
            ),
        )


def _line(operation: Operation) -> dict[str, Any]:
    """One line of a history."""
    return release_answer(operation) if operation.payee is None else debit_answer(operation)


def new_escrow_id() -> str:
    """A new id: `esc_` and 24 characters of A-Z a-z 0-9 _ -."""
    return f"esc_{secrets.token_urlsafe(18)}"
