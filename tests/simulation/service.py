"""The escrow service of the simulation: the truth about the money, and every way to hide it.

Answers are bytes, read by meterd's own `escrow.outcomes`; only the wire is left out. What a service
may do is bounded by the assumptions of the scenario: in most a request lands within the quarantine
or never, and a reading is not older than the quarantine.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from dataclasses import dataclass, field
from typing import Any

from meterd.core.settlement import Answer, AnswerKind, Reading, Release
from meterd.escrow import outcomes
from meterd.escrow.outcomes import Mask, Received, Unread
from tests.simulation.loop import WORLD

TIMEOUT_S = 10.0
MASK = Mask("pf_live_simulated_key")
HTML = b"<html><body>502 Bad Gateway</body></html>"

# What may become of a call, and how often where the seed does not choose others.
FATES = {
    "ok": 40,
    "lost": 5,
    "reset": 4,
    "answer_lost": 6,
    "late": 8,
    "error_after": 6,
    "error_before": 4,
    "bare": 4,
    "limited": 4,
    "key_refused": 2,
    "conflict": 2,
    "not_sent": 4,
    "slow": 4,
    "declined": 2,
    "missing": 1,
    "forbidden": 1,
    "empty": 1,
}
ENDED = ("refunded", "expired", "released")
LANDS = ("ok", "answer_lost", "late", "error_after", "bare", "slow")


@dataclass
class Book:
    """One escrow, as it is. `shots` are its earlier states, for readings from a replica."""

    id: str
    total: int
    baseline: int
    deadline: int | None = None
    released: int = 0
    refunded: int = 0
    status: str = "active"
    foreign: int = 0
    given_away: int = 0  # What the service itself paid that nobody asked for.
    lost: int = 0  # Releases that it forgot.
    landed: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)  # How often each was asked for.
    under_way: set[str] = field(default_factory=set)  # May land yet.
    shots: list[tuple[float, int, int, str]] = field(default_factory=list)
    lie: str = ""
    kept: int | None = None  # What could be paid in all when meterd asked for the refund.

    @property
    def ours(self) -> int:
        """What meterd had released."""
        return self.released - self.baseline - self.foreign

    @property
    def ended(self) -> bool:
        """Whether nothing can be released from it any more."""
        return self.status in ENDED

    def note(self, now: float) -> None:
        """Remember the present state."""
        self.shots.append((now, self.released, self.refunded, self.status))


class Service:
    """All escrows, and the chances of each failure."""

    def __init__(self, sim: Any, rng: random.Random) -> None:
        self.sim = sim
        self.rng = rng
        self.books: dict[str, Book] = {}
        self.fates = dict(FATES)
        for _ in range(rng.randrange(3)):  # Some seeds have a favourite failure.
            self.fates[rng.choice(list(FATES))] += 40
        if sim.scenario == "cheat":
            self.fates["lost"] += 20
            self.fates["answer_lost"] += 30
        if sim.scenario == "ghost":
            self.fates["lost"] += 60
        if sim.scenario in ("late", "strict"):
            self.fates["late"] += 80
        self.stale = rng.choice((0.0, 0.1, 0.1, 0.6))  # Share of readings from a replica.
        self.bad_reads = rng.choice((0.0, 0.05, 0.2))
        self.history = rng.random() < 0.5
        self.numbers = rng.random() < 0.3
        self.out_until = 0.0  # Nothing is answered before.
        self.key_until = 0.0  # 401 before.

    # -- The truth ---------------------------------------------------------------------------------

    def land(self, book: Book, key: str, amount: int) -> str:
        """Carry a release out; "" or why not."""
        book.under_way.discard(key)
        sim = self.sim
        if self.sim.honoured and key in book.landed:
            return ""
        if book.status not in ("active", "partially_released"):
            return "not active"
        if amount > book.total - book.released - book.refunded:
            return "too little"
        if book.lie in ("more", "less"):
            wrong = amount * 2 if book.lie == "more" else amount // 2
            wrong = min(wrong, book.total - book.released - book.refunded)
            book.lie, book.given_away = "", book.given_away + max(0, wrong - amount)
            sim.count(("lie", "amount"))
            amount = wrong
        book.landed[key] = book.landed.get(key, 0) + amount
        book.released += amount
        book.note(sim.loop.now)
        sim.trace(f"service pays {book.id} {amount} for {key}")
        sim.books_check(book)
        return ""

    def foreign(self, book: Book, amount: int) -> None:
        """Somebody else releases."""
        amount = min(amount, book.total - book.released - book.refunded)
        if amount > 0 and book.status == "active":
            book.released += amount
            book.foreign += amount
            book.note(self.sim.loop.now)
            self.sim.trace(f"foreign release {book.id} {amount}")

    def end(self, book: Book, status: str) -> None:
        """Refund the rest, or only stop for a while where the status is no end."""
        if book.ended:
            return
        book.status = status
        rest = book.total - book.released - book.refunded
        if status in ("refunded", "expired"):
            book.refunded += rest
        elif status == "released":  # By the service, to the payee, without being asked.
            book.released += rest
            book.foreign += rest
        book.note(self.sim.loop.now)
        self.sim.trace(f"service says {book.id} {status}")

    def refund(self, book: Book, amount: int) -> None:
        """Give a part back to the payer."""
        book.refunded += min(amount, book.total - book.released - book.refunded)
        book.note(self.sim.loop.now)
        self.sim.count("partial refund")
        self.sim.trace(f"service refunds {book.id} {amount}")

    def lose_write(self, book: Book) -> None:
        """Forget the last release, for good."""
        if not book.landed or self.sim.sent_open(book.id):
            return
        key = list(book.landed)[-1]
        amount = book.landed.pop(key)
        book.released -= amount
        book.lost += amount
        book.note(self.sim.loop.now)
        self.sim.trace(f"service forgets {key} {amount}")

    # -- What it says ------------------------------------------------------------------------------

    def document(self, book: Book) -> dict[str, Any]:
        """The escrow as a reading shows it, perhaps from a replica."""
        sim, rng = self.sim, self.rng
        released, refunded, status = book.released, book.refunded, book.status
        if not sim.calm and rng.random() < self.stale:
            back = rng.choice((3.0, sim.stale_s)) * rng.random()
            when = sim.loop.now - min(back, sim.stale_s * 0.97)
            _, released, refunded, status = next(
                (shot for shot in reversed(book.shots) if shot[0] <= when), book.shots[0]
            )
        said: dict[str, Any] = {
            "escrow_id": book.id,
            "status": status,
            "amount": money(book.total),
            "released": money(released),
            "remaining": money(book.total - released - refunded),
            "refunded": money(refunded),
            "currency": "USDC",
            "to_agent_id": "me",
        }
        if rng.random() < 0.3:  # What nobody knows of yet changes nothing.
            said["x_review"] = {"score": 4.5, "released": "99", "by": [None, book.id]}
        if book.deadline is not None:
            said["auto_release_at"] = str(book.deadline)
        if self.history:
            said["releases"] = [
                {"memo": f"meterd {key}", "amount": money(amount), "status": "completed"}
                for key, amount in book.landed.items()
                if released == book.released
            ]
        if book.lie and not sim.calm:
            self._lie(book, said)
        return said

    def _lie(self, book: Book, said: dict[str, Any]) -> None:
        lies: dict[str, tuple[str, Any]] = {
            "currency": ("currency", "EURC"),
            "provider": ("to_agent_id", "somebody"),
            "other": ("escrow_id", "esc_stranger"),
            "sum": ("remaining", money(book.total - book.released - book.refunded + 7)),
        }
        if book.lie in lies:
            name, value = lies[book.lie]
            said[name] = value
        elif book.lie == "total":
            said["amount"] = money(book.total + 5_000_000)
            said["remaining"] = money(book.total + 5_000_000 - book.released - book.refunded)
        elif book.lie == "ghost":
            ghosts = [key for key in self.sim.voids(book.id) if key not in book.landed]
            if not ghosts:
                return
            said.setdefault("releases", []).append({"memo": f"meterd {ghosts[0]}"})
        else:
            return
        self.sim.count(("lie", book.lie))

    def paid_body(self, book: Book, amount: int) -> bytes:
        """What a 2xx to a release says, in one of the forms that were seen."""
        form = self.rng.randrange(4 if self.sim.calm else 5)
        said: dict[str, Any]
        if form == 0:
            said = self.document(book)
            said |= {
                "released": money(book.released),
                "remaining": money(book.total - book.released - book.refunded),
                "refunded": money(book.refunded),
            }
            said.pop("releases", None)
        elif form == 1:
            said = {"success": True, "gross_amount": money(amount), "fee": money(amount // 100)}
        elif form == 2:
            said = {"escrow_id": book.id, "released_total": money(book.released)}
        elif form == 3:
            said = {"status": "completed", "amount": money(amount)}
        else:
            said = {"ok": True, "net_amount": money(amount - amount // 100)}  # Proves nothing.
        return self.encode(said)

    def encode(self, said: dict[str, Any]) -> bytes:
        """JSON, with amounts as text or as the numbers of a careless float."""
        text = json.dumps(said)
        if self.numbers:
            text = re.sub(r'"(\d+\.\d{6})"', lambda found: found[1] + "00000000001", text)
        return text.encode()


def money(micros: int) -> str:
    """Six decimals."""
    return f"{micros // 10**6}.{micros % 10**6:06d}"


class Wire:
    """The way from one life of the daemon to the service, in place of `EscrowClient`."""

    def __init__(self, service: Service, clock: Any) -> None:
        self._service = service
        self._clock = clock

    async def read(self, escrow: str, _role: str) -> Reading | Unread:
        """GET, with whatever goes wrong on the way."""
        service, sim, rng = self._service, self._service.sim, self._service.rng
        mono = self._clock.mono()
        await asyncio.sleep(rng.random() * 0.05)
        now = sim.loop.now
        if now < service.out_until:
            return Unread("unavailable", "connection refused")
        if now < service.key_until:
            return self._said(401, b'{"error":"invalid key"}', mono)
        if not sim.calm and rng.random() < service.bad_reads:
            if rng.random() < 0.3:
                await asyncio.sleep(TIMEOUT_S)
                return Unread("unavailable", "no whole answer")
            status = rng.choice((500, 502, 429, 404, 403, 200, 200))
            body = rng.choice((HTML, b"", b"{}", b'{"escrow_id":"x"', b'{"error":"unavailable"}'))
            return self._said(status, body, mono)
        body = service.encode(service.document(service.books[escrow]))
        await asyncio.sleep(rng.random() * 0.05)
        return self._said(200, body, mono)

    def _said(self, status: int, body: bytes, mono: float) -> Reading | Unread:
        return outcomes.answer_to_read(Received(status, {}, body), MASK, mono, self._clock.wall())

    async def refund_rest(self, escrow: str) -> Answer:
        """POST /refund: of what is closed nothing is released any more, so the rest may go back."""
        service, sim, rng = self._service, self._service.sim, self._service.rng
        book = service.books[escrow]
        await asyncio.sleep(rng.random() * 0.05)
        now = sim.loop.now
        if now < service.out_until or now < service.key_until:
            return Answer(AnswerKind.NOT_SENT, "nothing was sent: connection refused")
        if not sim.calm and rng.random() < 0.2:
            return Answer(AnswerKind.DOUBT, "no whole answer")
        if not book.ended:
            book.kept = book.total - book.refunded
            service.end(book, "refunded")
        return Answer(AnswerKind.CONFIRMED, "refunded")

    async def release_partial(self, release: Release, _role: str) -> Answer:
        """POST, once; the world lets it land whether or not the daemon lives to hear of it."""
        service, sim, rng = self._service, self._service.sim, self._service.rng
        book = service.books[release.escrow]
        sim.check_send(release)
        book.calls[release.id] = book.calls.get(release.id, 0) + 1
        now = sim.loop.now
        fate = "ok"
        if not sim.calm:
            fate = rng.choices(list(service.fates), list(service.fates.values()))[0]
        if now < service.out_until:
            fate = "not_sent"
        elif now < service.key_until:
            fate = "key_refused"
        sim.trace(f"call {release.id} {release.escrow} {release.amount} {fate}")
        sim.count(("fate", fate))
        if fate == "not_sent":
            await asyncio.sleep(rng.random())
            return Answer(AnswerKind.NOT_SENT, "nothing was sent: connection refused")
        result: asyncio.Future[str] | None = None
        if fate in LANDS:
            result = self._carry(book, release, fate)
        return await self._answer(book, release, fate, result)

    def _carry(self, book: Book, release: Release, fate: str) -> asyncio.Future[str]:
        """Let the request land, now or later; done with why it was refused."""
        service, sim, rng = self._service, self._service.sim, self._service.rng
        result: asyncio.Future[str] = sim.loop.create_future()
        delay = rng.random() * 0.1
        if fate == "late":
            delay = rng.choice((0.2, 0.6, 0.97)) * sim.late_s
            if sim.scenario in ("late", "strict") and rng.random() < 0.7:
                delay = rng.uniform(3.0, 9.0) * sim.late_s
        book.under_way.add(release.id)

        def land() -> None:
            why = service.land(book, release.id, release.amount)
            if not result.done():
                result.set_result(why)

        sim.loop.call_later(delay, land, context=WORLD.copy())
        return result

    async def _answer(  # noqa: PLR0911  # A table of fates.
        self, book: Book, release: Release, fate: str, result: asyncio.Future[str] | None
    ) -> Answer:
        rng, amount = self._service.rng, release.amount
        if result is not None and fate in ("ok", "bare", "slow", "error_after"):
            why = await asyncio.shield(result)
            await asyncio.sleep(rng.random() * (0.1 if fate != "slow" else TIMEOUT_S * 0.9))
            if why:
                status = 402 if why == "too little" else 409
                return self._read(release, status, b'{"error":"%s"}' % why.encode())
            if fate == "error_after":
                return self._read(release, 500, rng.choice((b"", HTML, b'{"error":"internal"}')))
            if fate == "bare":
                bodies = (b"", b"{}", b'{"ok":true}', HTML, b'{"amount": "')
                return self._read(release, rng.choice((200, 202, 204)), rng.choice(bodies))
            return self._read(
                release, rng.choice((200, 201)), self._service.paid_body(book, amount)
            )
        if fate in ("lost", "answer_lost", "late") and rng.random() < 0.6:
            await asyncio.sleep(TIMEOUT_S)
            return Answer(AnswerKind.DOUBT, "no answer: no whole answer within 10 s")
        await asyncio.sleep(rng.random() * 0.5)
        status, body = {
            "limited": (429, b'{"error":"slow down"}'),
            "key_refused": (401, b'{"error":"invalid key"}'),
            "forbidden": (403, b'{"error":"forbidden"}'),
            "conflict": (409, b'{"error":"conflict"}'),
            "declined": (422, b'{"error":"bad amount"}'),
            "missing": (404, b'{"error":"no such escrow"}'),
            "empty": (402, b'{"error":"insufficient funds"}'),
            "error_before": (rng.choice((500, 502, 503, 408)), HTML),
            "late": (504, HTML),
        }.get(fate, (0, b""))
        if not status:
            return Answer(AnswerKind.DOUBT, "no answer: connection reset")
        headers = {"Retry-After": "3"} if fate == "limited" and rng.random() < 0.5 else {}
        return self._read(release, status, body, headers)

    def _read(
        self, release: Release, status: int, body: bytes, headers: dict[str, str] | None = None
    ) -> Answer:
        received = Received(status, headers or {}, body)
        return outcomes.answer_to_release(release, received, MASK, self._clock.wall())
