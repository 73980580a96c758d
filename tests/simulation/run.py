"""One seed: a workload, faults, then calm; then the books must close.

`simulate(seed)` runs the real daemon (app.Daemon with its intake, bookkeeper, settler and store) in
virtual time against simulated brokers, producers and a simulated escrow service. Invariants are
looked at with every step of an escrow's state, with every batch, every call and every payment. The
seed decides everything: the same seed is the same run.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import random
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import stamina
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import meterd.app
import meterd.bookkeeper
import meterd.core.ledger
import meterd.intake
import meterd.opener
import meterd.settler
import meterd.store.sqlite
from meterd import config
from meterd.app import Daemon, _open_books
from meterd.core.openings import Census
from meterd.core.settlement import (
    UNFINISHED,
    Alarm,
    Escrow,
    EscrowStatus,
    Record,
    Release,
    ReleaseStatus,
    Resolved,
    Resume,
)
from meterd.errors import Refused, StoreCorrupt, StoreFailed, Unavailable
from meterd.opener import Opener, Terms
from meterd.receipts import Notary
from meterd.sources import Deliveries
from tests.simulation.brokers import SessionBroker, SessionSource, StreamBroker, StreamSource
from tests.simulation.events import HOUR_MS, PLANS, SETTLES, Event, Factory
from tests.simulation.loop import WORLD, Deadlock, Life, SimLoop
from tests.simulation.oracle import Oracle, hour_floor
from tests.simulation.service import Book, Service, Wire
from tests.simulation.store import InlineStore

START_MS = 1_795_435_200_000  # 2026-11-23T12:00:00Z.
GAP_S = 4.0
WINDOW_MS = 6 * HOUR_MS
RELEASE_MAX = 150_000
STEPS_MAX = 400_000  # More than any run takes: who needs more turns in circles.
# How often each kind of world is made. Rare ones are made more often than they are rare: every
# edge of the state table must be walked a hundred times in the seeds of CI.
SCENARIOS = {
    "plain": 20,
    "foreign": 22,
    "credit": 24,
    "late": 42,
    "strict": 20,
    "liar": 30,  # Documents that contradict themselves or what was,
    "cheat": 34,  # a service that pays other amounts than asked, or forgets what it paid,
    "ghost": 18,  # and one whose history shows releases that its totals do not.
    "ends": 36,
    "honoured": 12,
    "tampered": 18,
}
LIES = ("currency", "provider", "other", "sum", "total")
TAMPERED_MAX = 10  # In one run.
NUMBERING = 0.25  # Of the seeds.


class Violation(AssertionError):
    """The daemon broke a promise."""


class Clock:
    """The clocks of one life: the monotonic one starts anywhere, the wall clock may be stepped."""

    def __init__(self, sim: Simulation) -> None:
        self._sim = sim
        self._zero = sim.rng.uniform(0, 1e5) - sim.loop.now

    def mono(self) -> float:
        """Seconds."""
        return self._zero + self._sim.loop.now

    def wall(self) -> int:
        """Milliseconds."""
        steps = self._sim.wall_base + self._sim.wall_step
        return START_MS + steps + int(self._sim.loop.now * 1000)


class NoLocks:
    """A service that lists nothing and locks nothing: every agreement here is configured."""

    async def lock(self, opening: Any) -> Any:
        raise AssertionError(f"{opening} was not asked for")

    async def list_escrows(self, _agent_id: str) -> Census:
        """Nobody's escrows."""
        return Census((), whole=True)


class SimDaemon(Daemon):
    """The daemon without its sockets and signals."""

    @contextlib.asynccontextmanager
    async def _http(self) -> Any:
        yield

    @contextmanager
    def _signals(self) -> Iterator[None]:
        yield


class Simulation:
    """The world of one seed."""

    def __init__(self, seed: int, directory: Path, *, keep_trace: bool = False) -> None:
        self.seed = seed
        self.directory = directory
        self.rng = rng = random.Random(f"meterd {seed}")
        self.loop = SimLoop(f"order {seed}")
        self.counts: Counter[Any] = Counter()
        self.hash = hashlib.blake2b(digest_size=16)
        self.lines: list[str] | None = [] if keep_trace else None
        self.calm = False
        self.wall_step = self.wall_base = 0
        self.disk_full = False
        self.store_fault = ""
        self.slow_disk = rng.random() < 0.35
        self.scenario = rng.choices(list(SCENARIOS), list(SCENARIOS.values()))[0]
        self.honoured = self.scenario == "honoured"
        self.on_deadline = rng.choice(("expired", "released"))  # Who gets the rest.
        self.quarantine_s = 15 if self.slow else rng.choice((15, 15, 40))
        self.late_s = self.stale_s = float(self.quarantine_s)
        self.oracle = Oracle()
        self.service = Service(self, rng)
        self.stream = StreamBroker(rng, self.trace, self.told)
        self.session = SessionBroker(rng, self.trace, self.told)
        self.life: Life | None = None
        self.store: InlineStore | None = None
        self.daemon: SimDaemon | None = None
        self.clock = Clock(self)
        self._ended = asyncio.Event()
        self.loop.on_crash = self.crash
        self._resting = False  # No life is begun any more by itself.
        self._unsent = 0
        self._make_world()

    def _make_world(self) -> None:
        rng = self.rng
        names = [f"a{number}" for number in range(1, rng.randint(2, 4) + 1)]
        self.plans = {name: rng.choice(("stream", "model")) for name in names}
        longer = self.slow or rng.random() < 0.15
        self.until = rng.uniform(200, 320) if longer else rng.uniform(80, 150)
        if self.scenario == "plain":
            self.until /= 2  # There is nothing that would have to come together.
        for name in names:
            total = rng.choice((1_000_000, 5_000_000, 300_000, 100_000))
            baseline = rng.choice((0, 0, 70_000))
            book = Book(f"esc_{name}", total, baseline, released=baseline)
            if self.scenario == "ends" and rng.random() < 0.6:
                book.deadline = START_MS + int(
                    (self.until * rng.uniform(0.6, 1) + rng.choice((0, rng.uniform(0, 200)))) * 1000
                )
            book.note(-1000.0)
            self.service.books[book.id] = book
        self.factory = Factory(rng, self.plans, START_MS)
        self._make_numbering()
        self.settings = _settings(self._configuration(names))

    def _make_numbering(self) -> None:
        """In some seeds a producer numbers its events; it has chances of its own."""
        mine = random.Random(f"numbers {self.seed}")
        self.numbering: Factory | None = None
        if mine.random() < NUMBERING and self.scenario != "ends":
            self.numbering = Factory(mine, self.plans, START_MS)
            self.wall_base = -2 * HOUR_MS  # What is made now will be too old by and by.

    def _configuration(self, names: Sequence[str]) -> str:
        rng = self.rng
        plans = PLANS.replace("SETTLE0", rng.choice(SETTLES)).replace(
            "SETTLE1", rng.choice(SETTLES)
        )
        agreements = "".join(
            f'[[agreements]]\nid = "{name}"\nplan = "{self.plans[name]}"\n'
            f'escrows = {{ main = "esc_{name}" }}\n'
            for name in names
        )
        return f"""
[daemon]
drain_timeout = "{rng.choice((1, 20))}s"
[dedupe]
window = "6h"
entries_max = 4000
[escrow]
api_key = "pf_live_simulated_key"
agent_id = "me"
in_doubt_quarantine = "{self.quarantine_s}s"
observe_gap = "4s"
min_interval = "1s"
doubts_window = "60s"
release_max = "{rng.choice(("0.15", "0.02"))}"
strict = {str(self.scenario == "strict").lower()}
idempotency = "{"honoured" if self.honoured else "ignored"}"
on_foreign_release = "{"credit" if self.scenario == "credit" else "freeze"}"
{plans}{agreements}"""

    # -- What is told, counted and refused ---------------------------------------------------------

    def trace(self, text: str) -> None:
        """Note what happened: the same seed gives the same notes."""
        line = f"{self.loop.now:.6f} {text}"
        self.hash.update(line.encode())
        if self.lines is not None:
            self.lines.append(line)

    def count(self, what: Any) -> None:
        """Note that something was reached."""
        self.counts[what] += 1

    def check(self, holds: bool, text: str) -> None:
        """End the run when a promise is broken."""
        if not holds:
            self.trace(f"VIOLATION {text}")
            self.loop.fail(Violation(f"METERD_SEED={self.seed} ({self.scenario}): {text}"))

    def commit_delay(self) -> float:
        """How long the next commit takes."""
        if self.slow_disk and not self.calm and self.rng.random() < 0.05:
            return self.rng.uniform(3, 9)
        return self.rng.random() * 0.01

    def told(self, transport: str, events: Sequence[Event]) -> None:
        """Somebody was told "done"."""
        untold = self.oracle.untold(transport, events)
        self.check(not untold, f"{transport} was told of {untold[:1]} before it was durable")
        self.check(not self.session.disorder, self.session.disorder)

    def voids(self, escrow: str) -> list[str]:
        """Ids of the releases that the daemon gave up."""
        assert self.daemon is not None
        state = self.daemon._bookkeeper.ledger.escrows[escrow]
        return [void.id for void in state.voids]

    def sent_open(self, escrow: str) -> bool:
        """Whether a release of this escrow is open."""
        daemon = self.daemon
        return daemon is None or daemon._bookkeeper.ledger.escrows[escrow].release is not None

    @property
    def slow(self) -> bool:
        """Whether what this scenario is about takes more than one quarantine to show."""
        return self.scenario in ("late", "liar", "cheat", "ghost")

    # -- Invariants --------------------------------------------------------------------------------

    @property
    def trusting(self) -> bool:
        """Whether the assumptions hold that the exact promises rest on."""
        return self.scenario in ("plain", "strict", "honoured", "ends", "tampered")

    def stepped(self, before: Escrow, event: object, after: Escrow, effects: Sequence[Any]) -> None:
        """Look at one step of an escrow's state."""
        self._count_step(before, after, effects)
        book = self.service.books[before.id]
        self.check(
            before.status is not EscrowStatus.FROZEN
            or after.status is EscrowStatus.FROZEN
            or isinstance(event, Resume),
            f"{book.id} left frozen by {type(event).__name__}",
        )
        if self.scenario == "late":
            self._check_late(before, after, effects)
        for record in effects:
            if isinstance(record, Record) and record.release.status is ReleaseStatus.VOID:
                given_up = isinstance(event, Resolved) or self.scenario != "strict"
                self.check(given_up, f"{book.id}: a void without a person, in strict")
        if self.trusting:
            self.check(
                after.baseline + after.settled <= book.released or after.total == 0,
                f"{book.id}: {after.settled} counted as paid, {book.released} was",
            )
            owed = int(self.oracle.worth_now(after.agreement) * 10**6 // 1)
            taken = after.settled + after.held
            self.check(taken <= owed, f"{book.id}: {taken} settled or held of {owed}")

    def oracle_owed(self, agreement: str) -> int:
        """Micros owed for all that the oracle knows, floored."""
        return int(self.oracle.worth(agreement) * 10**6 // 1)

    def _count_step(self, before: Escrow, after: Escrow, effects: Sequence[Any]) -> None:
        if before.word != after.word:
            self.count(("escrow", before.word, after.word))
            self.trace(f"{after.id} is {after.word} {after.reason}")
        was = before.release
        recorded = [effect.release for effect in effects if isinstance(effect, Record)]
        for release in recorded:
            known = {void.id: void.status.value for void in before.voids}
            status = was.status.value if was is not None and was.id == release.id else "none"
            self._count_release(known.get(release.id, status), release)
        now = after.release
        if now is not None and was is not None and now.status is not was.status and not recorded:
            self._count_release(was.status.value, now)
        for effect in effects:
            if isinstance(effect, Alarm):
                self.count(("alarm", effect.action))
                if effect.action == "escrow_frozen":
                    self.count(("frozen", *deviation(effect.detail)))

    def _count_release(self, old: str, release: Release) -> None:
        self.count(("release", old, release.status.value))
        self.trace(f"{release.id} {old} -> {release.status.value}")

    def check_send(self, release: Release) -> None:
        """A call is about to leave."""
        assert self.daemon is not None
        assert self.store is not None
        book = self.service.books[release.escrow]
        again = book.calls.get(release.id, 0)
        self.check(not again or self.honoured, f"{release.id} is sent again")
        connection = self.store._connection
        row = connection.execute(
            "SELECT status, amount FROM release WHERE id = ?", (release.id,)
        ).fetchone()
        self.check(row is not None, f"{release.id} is sent before it is durable")
        if row is not None:
            # Where keys are honoured, one that may never have left is sent as a repetition.
            wanted = ("in_doubt", "sent", "intended") if self.honoured else ("intended",)
            self.check(row[0] in wanted, f"{release.id} is sent as {row[0]}")
            self.check(int(row[1]) == release.amount, f"{release.id}: another amount is stored")
        statuses = ", ".join(f"'{status}'" for status in UNFINISHED)
        (open_,) = connection.execute(
            f"SELECT count(*) FROM release WHERE escrow = ? AND status IN ({statuses})", (book.id,)
        ).fetchone()
        self.check(open_ == 1, f"{book.id} has {open_} open releases")
        (status,) = connection.execute(
            "SELECT status FROM escrow WHERE id = ?", (book.id,)
        ).fetchone()
        known = self.daemon._bookkeeper.ledger.escrows[book.id]
        allowed = (
            (EscrowStatus.ACTIVE, EscrowStatus.PAUSED) if self.honoured else (EscrowStatus.ACTIVE,)
        )
        self.check(known.status in allowed, f"{book.id} sends while {known.status}")
        self.check(status != "frozen", f"{book.id} sends while its row is frozen")
        most = self.settings.escrow.release_max_micros
        self.check(0 < release.amount <= most, f"{release.id} is of {release.amount}")
        if book.deadline is not None:
            last = book.deadline - int(self.quarantine_s * 1000) + 5000  # And the send deadline.
            self.check(self.clock.wall() <= last, f"{release.id} is sent near the deadline")

    def books_check(self, book: Book) -> None:
        """Money has moved: never more than used, and by one `release_max` in the worst worlds."""
        agreement = book.id.removeprefix("esc_")
        most = self.oracle.worth(agreement) * 10**6 + book.given_away
        if self.scenario == "late":
            most += self.settings.escrow.release_max_micros
        self.check(
            book.ours <= most, f"{book.id} was paid {book.ours} of {float(most):.3f} micros used"
        )

    def judged(
        self, original: Any, keeper: Any, source: str, given: Deliveries, **more: Any
    ) -> Any:
        """Hold a batch against the oracle."""
        ledger, wall = keeper.ledger, self.clock.wall()
        oldest = max(wall - WINDOW_MS, hour_floor(keeper._identities.bucket_min * HOUR_MS))
        verdicts = self.oracle.judge(
            source,
            given,
            oldest,
            wall,
            lambda name: (
                name in ledger.accounts
                and ledger.escrows[f"esc_{name}"].status is EscrowStatus.CLOSED
            ),
            keeper._identities.bucket_min,
        )
        assert self.store is not None
        self.store.batch = verdicts
        recorded = original(keeper, source, given, **more)
        self.oracle.accept(verdicts)
        self.counts["late by number"] += verdicts.late
        self._check_numbers(keeper, self.oracle.numbers_now)
        self.trace(f"{source} {recorded.received} {recorded.accepted} {recorded.duplicates}")
        self.check(
            (len(verdicts.fresh), verdicts.duplicates) == (recorded.accepted, recorded.duplicates)
            and verdicts.rejected == {one.index for one in recorded.rejections},
            f"{source}: accepted {recorded.accepted}, duplicates {recorded.duplicates}, rejected"
            f" {[(one.index, one.reason.value) for one in recorded.rejections]}; the oracle says"
            f" {len(verdicts.fresh)}, {verdicts.duplicates}, {sorted(verdicts.rejected)}",
        )
        return recorded

    def _check_numbers(self, keeper: Any, expected: Any) -> None:
        """What is missing of a numbering producer is what was not counted, to the last number."""
        for source, numbers in expected.items():
            known = keeper.sequences.producer(source)
            pairs = [] if known is None else zip(known.firsts, known.lasts, strict=True)
            seen = {number for first, last in pairs for number in range(first, last + 1)}
            self.check(
                seen == numbers.seen, f"{source}: {sorted(seen)} seen, not {sorted(numbers.seen)}"
            )

    def _check_arrived(self) -> None:
        """Where all that was numbered has come, and none of it was refused, nothing is missing."""
        assert self.daemon is not None
        sequences = self.daemon._bookkeeper.sequences
        self._check_numbers(self.daemon._bookkeeper, self.oracle.numbers)
        if self.numbering is not None and not self.oracle.refused:
            self.count("numbers whole")
            self.check(sequences.missing == 0, f"{sequences.missing} numbers are missing for ever")

    def check_restored(self, keeper: Any) -> None:
        """After a start the ledger holds what was durable, neither less nor more."""
        self._check_numbers(keeper, self.oracle.numbers)
        for name, account in keeper.ledger.accounts.items():
            expected = self.oracle.worth(name)
            self.check(
                account.accrued == expected,
                f"{name} was restored with {account.accrued} USDC accrued, durable was {expected}",
            )
        self.check(
            keeper.dead_letters == self.oracle.rejected,
            f"{keeper.dead_letters} dead letters, {self.oracle.rejected} were durable",
        )

    # -- Lives of the daemon -----------------------------------------------------------------------

    def begin(self) -> None:
        """Start the daemon."""
        self.life = Life()
        self.clock = Clock(self)
        self._ended = asyncio.Event()
        self.oracle.restart()
        self.trace("start")
        self.count("start")
        task = self.loop.create_task(self._live(), context=self.life.context)
        life = self.life
        task.add_done_callback(lambda done: self._over(life, done), context=WORLD.copy())

    async def _live(self) -> None:
        kind = type("Store", (InlineStore,), {"sim": self})
        store = kind.open(self.directory, entries_max=self.settings.dedupe.entries_max)
        self.store = store
        try:
            facts = _Quiet()
            state = store.load(now_ms=self.clock.wall())
            keeper = await _open_books(self.settings, store, state, facts, self.clock)
            self.check_restored(keeper)
            wire = Wire(self.service, self.clock)
            sources = [StreamSource(self.stream), SessionSource(self.session)]
            opener = Opener(keeper, NoLocks(), Terms())
            self.daemon = SimDaemon(
                self.settings, None, keeper, wire, opener, sources, facts, store
            )
            self._watch_circuit(self.daemon)
            await self.daemon.run()
        finally:
            await store.close()

    def _watch_circuit(self, daemon: SimDaemon) -> None:
        original = daemon._settler.blocked

        def blocked() -> str:
            why = original()
            if "came into doubt" in why:
                self.count(("deviation", "circuit open"))
            return why

        daemon._settler.blocked = blocked  # type: ignore[method-assign]

    def crash(self) -> None:
        """Kill the daemon between two of its steps."""
        life = self.life
        if life is None or life.dead:
            return
        self.trace("crash")
        self.count("crash")
        if self.store is not None:
            self.store.abandon()
        self._end_of(life)
        self.loop.call_later(self.rng.uniform(0.1, 4), self.begin, context=WORLD.copy())

    def _end_of(self, life: Life) -> None:
        life.dead = True
        self.life = self.daemon = self.store = None
        self.loop.bury(life)
        self.loop.crash_in = -1

    def _over(self, life: Life, task: asyncio.Task[None]) -> None:
        """A life ended by itself: a stop that was asked for, or a failed commit."""
        if life.dead:
            return
        error = task.exception() if not task.cancelled() else asyncio.CancelledError()
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        self._end_of(life)
        if error is not None and not isinstance(error, StoreFailed):
            self.loop.fail(error)
        self.trace(f"over {type(error).__name__}")
        self.count(f"over {type(error).__name__}")
        self._ended.set()
        if not self._resting:
            self.loop.call_later(self.rng.uniform(0.1, 3), self.begin, context=WORLD.copy())

    async def act(self, call: Any) -> bool:
        """Let a person do something with the bookkeeper; whether it was done."""
        life, daemon = self.life, self.daemon
        if life is None or daemon is None:
            return False

        async def doing() -> str:
            try:
                await call(daemon._bookkeeper)
            except Refused as error:
                return str(error)
            except (StoreFailed, Unavailable) as error:
                return str(error) or "failed"
            return ""

        task = self.loop.create_task(doing(), context=life.context.copy())
        await asyncio.wait({task}, timeout=20.0)
        return task.done() and not task.cancelled() and not task.result()

    # -- Producers ---------------------------------------------------------------------------------

    async def post(self, events: Sequence[Event]) -> None:
        """Send events over HTTP, the same ones again until somebody says that they are safe."""
        given = Deliveries(
            payloads=[event.payload for event in events],
            fields=[dict(event.fields) for event in events],
        )
        self._unsent += 1
        while True:
            await asyncio.sleep(self.rng.uniform(0.01, 0.5 if self.calm else 2.0))
            life, daemon = self.life, self.daemon
            if life is None or daemon is None:
                continue
            answer = daemon._intake.submit("http", given)
            task = self.loop.create_task(answer, context=life.context.copy())
            task.add_done_callback(_look, context=WORLD.copy())
            await asyncio.wait({task}, timeout=5.0 if self.calm else self.rng.choice((0.004, 5.0)))
            if not task.done():
                if self.rng.random() < 0.5 and not life.dead:
                    task.cancel()
                continue
            if task.cancelled():
                continue
            error = task.exception()
            if error is None:
                break
            if not isinstance(error, Unavailable | StoreFailed):
                self.loop.fail(error)
        self.told("http", events)
        self._unsent -= 1

    async def _produce(self) -> None:  # noqa: C901, PLR0912  # A list of chances.
        """Make the workload: each event at some moment, by some way, some of them several times."""
        rng = self.rng
        plan: list[tuple[float, str, Event]] = []
        many = rng.random() < 0.15
        for _ in range(rng.randint(30, 80) if not many else 160):
            at = rng.uniform(0, self.until)
            event = self.factory.usage()
            ways = ("redis", "mqtt", "http")
            way = rng.choice(ways)
            plan.append((at, way, event))
            if rng.random() < 0.3:
                again = way if event.source == "" else rng.choice(ways)
                plan.append((at + rng.expovariate(0.1), again, self.factory.again(event)))
            if rng.random() < 0.05:
                plan.append((at + rng.uniform(-9, 9), way, self.factory.other(event)))
            if rng.random() < 0.08:
                garbage = self.factory.garbage()
                plan.append((at, "mqtt" if garbage.retained else rng.choice(ways), garbage))
            if rng.random() < 0.02:
                plan.append((at, rng.choice(ways), self.factory.misaddressed()))
        if rng.random() < 0.25:
            name = rng.choice(list(self.plans))
            plan.append((rng.uniform(self.until / 2, self.until), "mqtt", self.factory.close(name)))
        plan.sort(key=lambda entry: entry[0])
        numbering = self.loop.create_task(self._number())
        posts: list[asyncio.Task[Any]] = []
        for at, group in itertools.groupby(plan, key=lambda entry: round(entry[0], 0)):
            await asyncio.sleep(max(0.0, at - self.loop.now))
            by_http = []
            for _, way, event in group:
                known = self.oracle.know(event)
                if way == "http":
                    by_http.append(known)
                else:
                    self._broker(way).publish(known)
            if by_http:
                posts.append(self.loop.create_task(self.post(by_http)))
        if posts:
            await asyncio.wait(posts)
        for post in posts:
            post.result()
        await numbering

    async def _number(self) -> None:
        """Send the numbered events: each numbering's first one first, the others in any order.

        Half of them come when they are too old for the memory of identities.
        """
        if self.numbering is None:
            return
        rng = self.numbering.rng
        source, begun = "numbers", START_MS - 8 * HOUR_MS + 20 * 60_000
        first = [
            self.numbering.numbered(source, number, begun + number * 60_000)
            for number in range(1, rng.randint(8, 30))
        ]
        await self.post([self.oracle.know(first[0])])
        await self._scatter(first, self.until * 0.3)
        self.wall_base = 0
        self.trace("two hours pass")
        await self._scatter(first, self.until * 0.3)
        again = rng.random() < 0.5
        if again:
            begun = START_MS - 85 * 60_000
            second = [
                self.numbering.numbered(source, number, begun + number * 1000)
                for number in range(1, rng.randint(3, 20))
            ]
            await self.post([self.oracle.know(second[0])])
            await self._scatter(second + first, self.until * 0.2)
        await self.post([self.oracle.know(event) for event in (second if again else first)])

    async def _scatter(self, events: Sequence[Event], seconds: float) -> None:
        """Send some of them, by any way and some more than once, within so many seconds."""
        assert self.numbering is not None
        rng, ends = self.numbering.rng, self.loop.now + seconds
        chosen = [event for event in events if rng.random() < 0.6]
        rng.shuffle(chosen)
        for event in chosen:
            await asyncio.sleep(rng.uniform(0, 2 * seconds / len(chosen)))
            known = self.oracle.know(self.numbering.again(event))
            way = rng.choice(("redis", "mqtt", "http"))
            if way == "http":
                await self.post([known])
            else:
                self._broker(way).publish(known)
            if self.loop.now > ends:
                return

    def _broker(self, way: str) -> StreamBroker | SessionBroker:
        return self.stream if way == "redis" else self.session

    # -- Faults ------------------------------------------------------------------------------------

    async def _trouble(self) -> None:
        """One fault after the other, until it is calm."""
        rng = self.rng
        mean = rng.choice((2.0, 5.0) if self.slow else (2.0, 5.0, 12.0))
        faults = [self._fault_of_broker] * 4 + [self._fault_of_daemon] * 4
        faults += [self._fault_of_service] * 3 + [self._fault_of_disk] * 2
        faults += [self._act_of_person] * 3 + [self._fault_of_scenario] * 9
        if rng.random() < 0.15:
            await self._act_early()
        while True:
            await asyncio.sleep(rng.expovariate(1 / mean))
            await rng.choice(faults)()

    async def _fault_of_broker(self) -> None:
        rng = self.rng
        broker = rng.choice((self.stream, self.session))
        kind = rng.randrange(4)
        if kind == 0:
            broker.drop()
        elif kind == 1:
            self.stream.trim()
        elif broker.up:
            self.count("broker restart")
            broker.stop()
            self.loop.call_later(rng.uniform(0.1, 6), broker.start, context=WORLD.copy())

    async def _fault_of_daemon(self) -> None:
        rng, daemon = self.rng, self.daemon
        if rng.random() < 0.75 and self.counts["crash"] < 5:
            self.loop.crash_in = int(rng.expovariate(1 / rng.choice((10, 150)))) + 1
        elif daemon is not None and rng.random() < 0.3:
            self.trace("stop")
            daemon._stop.set()
            if rng.random() < 0.2:
                daemon._hard_stop.set()

    async def _fault_of_service(self) -> None:
        rng, now = self.rng, self.loop.now
        if rng.random() < 0.5:
            self.service.out_until = now + rng.expovariate(0.2)
        else:
            self.service.key_until = now + rng.expovariate(0.2)

    async def _fault_of_disk(self) -> None:
        rng = self.rng
        kind = rng.random()
        if kind < 0.3 and self.counts["over StoreFailed"] < 3:
            self.store_fault = rng.choice(("before", "after"))
        elif kind < 0.6:
            self.disk_full = True
            self.count("disk full")
            await asyncio.sleep(rng.uniform(0.5, 8))
            self.disk_full = False
        elif self.scenario != "ends":
            # Never so far that an identity would be forgotten while its event may come again.
            self.wall_step = rng.choice((0, 1, -1)) * rng.randrange(HOUR_MS)
            self.trace(f"wall clock {self.wall_step}")
            self.count("clock step")

    async def _act_early(self) -> None:
        """Let a person freeze an escrow before it is adopted, and thaw it later."""
        await asyncio.sleep(self.rng.uniform(0.5, 4))
        name = self.rng.choice(list(self.plans))
        await self.act(lambda keeper: keeper.freeze(keeper.ledger.accounts[name], "p", "early"))
        await asyncio.sleep(self.rng.uniform(1, 30))
        await self._help(self.service.books[f"esc_{name}"])

    async def _act_of_person(self) -> None:
        rng = self.rng
        name = rng.choice(list(self.plans))
        kind = rng.randrange(4)
        self.trace(f"person {kind} {name}")
        if kind == 0:
            await self.act(lambda keeper: keeper.freeze(keeper.ledger.accounts[name], "p", "looks"))
        elif kind == 1:
            await self.act(lambda keeper: keeper.settle(keeper.ledger.accounts[name], "p"))
        elif kind == 2 and rng.random() < 0.3:
            await self.act(lambda keeper: keeper.close(keeper.ledger.accounts[name], "p"))
        else:
            for book in self.service.books.values():
                await self._help(book)

    async def _fault_of_scenario(self) -> None:
        rng = self.rng
        book = rng.choice(list(self.service.books.values()))
        known = self._known(book)
        if known is None or known.status is EscrowStatus.CLOSED:
            return  # What happens to an escrow that meterd is done with it does not see.
        if self.scenario in ("foreign", "credit") and rng.random() < 0.6:
            owed = self.oracle_owed(known.agreement)
            if known.total > 0:
                small = rng.randint(1, max(1, min(20_000, owed)))
                self.service.foreign(book, rng.choice((small, small, 60_000)))
        elif self.scenario in ("liar", "cheat", "ghost"):
            await self._lie(book, known)
        elif self.scenario == "ends" and known.total > 0:
            self._end(book)
        elif self._tamperable:
            await self._tamper()

    @property
    def _tamperable(self) -> bool:
        few = self.counts["tampered"] < TAMPERED_MAX
        return self.scenario == "tampered" and few and self.daemon is not None

    def _end(self, book: Book) -> None:
        """Something happens to an escrow that meterd has no part in."""
        rng = self.rng
        if book.ended:
            return
        if rng.random() < 0.2:
            self.service.refund(book, rng.randint(1, 50_000))
            return
        words = ("refunded", "expired", "released")
        if rng.random() < 0.3:
            words = ("disputed", "active", "awaiting_release")
        self.service.end(book, rng.choice(words))

    async def _lie(self, book: Book, known: Escrow) -> None:
        rng = self.rng
        if book.lie and known.status is EscrowStatus.FROZEN and self.scenario != "cheat":
            book.lie = ""  # Found out: a person looks, and it may lie again.
            await self._help(book)
            return
        if book.lie or known.total == 0:
            return
        if self.scenario == "liar":
            lie = rng.choice(LIES)
        elif self.scenario == "ghost":
            lie = "ghost"
        else:
            lie = rng.choice(("more", "less", "less", "lost", "lost"))
        if lie == "lost":
            before = book.lost
            self.service.lose_write(book)
            if book.lost > before:
                self.count(("lie", "lost"))
            return
        book.lie = lie
        self.trace(f"{book.id} lies: {lie}")

    def _known(self, book: Book) -> Escrow | None:
        return None if self.daemon is None else self.daemon._bookkeeper.ledger.escrows[book.id]

    async def _tamper(self) -> None:
        """Change the file behind the daemon's back: the next start must refuse it."""
        self.crash()
        # The next life waits at least so long: nothing else touches the file meanwhile.
        path = self.directory / "meterd.db"
        copy = self.directory / "copy"
        shutil.copy(path, copy)
        connection = sqlite3.connect(path, isolation_level=None)
        which = ("counter", "journal")[(self.counts["tampered"] + self.seed) % 2]
        if which == "counter":
            done = connection.execute("UPDATE counter SET quantity = 1 + quantity").rowcount
        else:
            connection.execute("DROP TRIGGER journal_stays")
            done = connection.execute("UPDATE journal SET actor = 'x' WHERE number = 1").rowcount
        connection.close()
        if done:
            self.count("tampered")
            with contextlib.suppress(StoreCorrupt):
                store = InlineStore.open(self.directory, entries_max=4000)
                try:
                    state = SimpleState.load(store, self.clock.wall())
                    meterd.core.ledger.Ledger.restore(
                        meterd.app.plans_of(self.settings),
                        meterd.app.meters_of(self.settings),
                        state,
                    )
                except meterd.core.ledger.Conflict as error:
                    raise StoreCorrupt(str(error)) from None
                finally:
                    store.abandon()
                self.check(False, f"it starts on a store whose {which} was changed")
            self.count(("deviation", f"{which} broken"))
        for leftover in self.directory.glob("meterd.db-*"):
            leftover.unlink()
        shutil.copy(copy, path)

    # -- Calm --------------------------------------------------------------------------------------

    async def _become_calm(self) -> None:
        """Everything works from now on; what is under way may land yet."""
        self.trace("calm")
        self.calm = True
        self.disk_full, self.store_fault, self.loop.crash_in = False, "", -1
        self.service.out_until = self.service.key_until = 0.0
        self.stream.start()
        self.session.start()
        for book in self.service.books.values():
            book.lie = ""
            if book.status in ("disputed", "awaiting_release"):
                self.service.end(book, "active")

    async def _until(self, what: str, holds: Any, limit_s: float) -> None:
        start = self.loop.now
        while not holds():
            await asyncio.sleep(1.0)
            if self.loop.now - start > limit_s:
                states = [
                    (one.id, one.word, one.reason, one.settled, one.credited, one.observed)
                    for one in (self._known(book) for book in self.service.books.values())
                    if one is not None
                ]
                self.check(False, f"{what}: not within {limit_s:.0f} s of calm; {states}")
                await asyncio.sleep(1.0)

    def _delivered(self) -> bool:
        for broker in (self.stream, self.session):
            broker.sync()
        daemon = self.daemon
        if daemon is None or self._unsent:
            return False
        read = daemon._intake.sources[0]._at  # type: ignore[attr-defined]
        behind = [number for number, _ in self.stream.entries if number > read]
        return not behind and not self.session.messages and not daemon._bookkeeper.pending

    async def _help(self, book: Book) -> None:
        """Do what an operator does who can see the service's own log."""
        known = self._known(book)
        if known is None or known.status is not EscrowStatus.FROZEN:
            return
        name = known.agreement
        if known.release is not None:
            key = known.release.id
            if key in book.under_way or known.release.status not in (
                ReleaseStatus.IN_DOUBT,
                ReleaseStatus.ESCALATED,
            ):
                return
            landed = key in book.landed
            await self.act(
                lambda keeper: keeper.resolve(book.id, "p", "the log says so", landed=landed)
            )
        elif not book.under_way:
            await self.act(lambda keeper: keeper.resume(keeper.ledger.accounts[name], "p", "seen"))

    def _closed(self) -> bool:
        for book in self.service.books.values():
            known = self._known(book)
            if known is None or book.under_way or known.refund:
                return False
            ended = book.ended and known.total == 0
            if known.status is not EscrowStatus.CLOSED and not ended:
                return False
        return True

    def _check_closed(self) -> None:
        """Everything used is released, to the last quantum, capped by the deposit."""
        for book in self.service.books.values():
            known = self._known(book)
            assert known is not None
            owed = self.oracle_owed(known.agreement)
            self.check(
                self.oracle.recompute(known.agreement) == self.oracle.worth(known.agreement),
                "the oracle itself",
            )
            if book.ended and book.kept is None:
                self.check(book.ours <= owed, f"{book.id}: paid {book.ours} of {owed}")
                continue
            kept = book.total - book.refunded if book.kept is None else book.kept
            level = min(book.baseline + owed, kept)
            if self.trusting:
                self.check(
                    book.released == level,
                    f"{book.id}: released {book.released}, owed {level} when it closed",
                )
            else:
                self.check(
                    book.released >= level,
                    f"{book.id}: released {book.released}, owed {level} when it closed",
                )
            late = self.scenario == "late"  # It may land even after the agreement was closed.
            # A stranger may release behind the last reading, which the close rests on.
            unseen = book.released - known.expected
            self.check(
                unseen == 0 or (late and unseen > 0) or 0 < unseen <= book.foreign,
                f"{book.id}: the books say {known.expected}, the service {book.released}",
            )

    def _check_late(self, before: Escrow, after: Escrow, effects: Sequence[Any]) -> None:
        """What lands after it was given up is booked as that, not as a stranger's release."""
        landed = self.service.books[before.id].landed
        difference = after.observed - before.expected
        voids = [one for one in before.voids if one.status is ReleaseStatus.VOID]
        known = any(one.amount == difference and one.id in landed for one in voids)
        for effect in effects:
            if isinstance(effect, Alarm) and effect.action == "escrow_frozen":
                stranger = deviation(effect.detail)[0] in ("foreign", "overpaid")
                self.check(
                    not (known and stranger), f"{after.id}: a late void taken for a stranger's"
                )

    async def _stop(self) -> None:
        assert self.daemon is not None
        ended = self._ended
        self._resting = True
        self.daemon._stop.set()
        await ended.wait()

    def _dump(self) -> dict[str, list[Any]]:
        with contextlib.closing(sqlite3.connect(self.directory / "meterd.db")) as connection:
            tables = "counter agreement escrow release position dead_letter mark_block journal card"
            return {
                table: sorted(connection.execute(f"SELECT * FROM {table}"), key=repr)
                for table in tables.split()
            }

    async def main(self) -> None:
        """The whole run."""
        self.begin()
        loop = self.loop
        producing = loop.create_task(self._produce())
        trouble = loop.create_task(self._trouble())
        syncing = loop.create_task(self._sync())
        ending = loop.create_task(self._deadlines())
        await asyncio.sleep(self.until)
        trouble.cancel()
        await self._become_calm()
        await self._until("it runs", lambda: self.daemon is not None, 10)
        await self._until("all is delivered", lambda: producing.done() and self._delivered(), 120)
        producing.result()
        self._check_arrived()
        for name in self.plans:
            await self._close(name)
        helping = loop.create_task(self._helping())
        factor = max(
            one.quarantine_factor
            for one in (self._known(book) for book in self.service.books.values())
            if one is not None
        )
        # Twice the quarantine for a doubt, the longest back-off, and the deepest doubt's window.
        most = 2 * self.quarantine_s * factor + 60 + 300
        # And the pace of many small releases.
        owed = max(self.oracle_owed(name) for name in self.plans)
        most += 3.0 * owed / self.settings.escrow.release_max_micros
        if self.slow or self.scenario == "strict":
            most += 10 * self.quarantine_s
        await self._until("the books close", self._closed, most)
        self._check_closed()
        helping.cancel()
        syncing.cancel()
        ending.cancel()
        await self._start_and_stop()
        self.counts.update({("events", what): n for what, n in self.oracle.verdicts.items()})
        self.count("seed")
        self.count(("scenario", self.scenario))
        self.counts["virtual seconds"] += int(loop.now)
        self.counts["steps"] += loop.steps

    async def _close(self, name: str) -> None:
        """Close an agreement by an event or by a person."""
        if self.rng.random() < 0.5:
            await self.post([self.oracle.know(self.factory.close(name))])
        else:
            await self._until_done(lambda keeper: keeper.close(keeper.ledger.accounts[name], "p"))

    async def _until_done(self, call: Any) -> None:
        while not await self.act(call):  # The time is virtual.
            await asyncio.sleep(1.0)

    async def _start_and_stop(self) -> None:
        """A start and a stop change nothing."""
        await self._stop()
        before = self._dump()
        self._check_disk(before)
        self.begin()
        await asyncio.sleep(3.0)
        await self._stop()
        after = self._dump()
        changed = [table for table in before if before[table] != after[table]]
        self.check(not changed, f"a start and a stop changed {changed}")

    def _check_disk(self, tables: dict[str, list[Any]]) -> None:
        """The rows themselves, read without the ledger's code."""
        for name in self.plans:
            mine = [row for row in tables["counter"] if row[0] == name]
            events = [event for event in self.oracle.durable.values() if event.agreement == name]
            usage = [event for event in events if event.kind == "usage"]
            counted = sum((Fraction(int(row[4]), 10**9) for row in mine), Fraction(0))
            expected = sum((Fraction(event.content[3]) for event in usage), Fraction(0))  # type: ignore[arg-type]
            self.check(counted == expected, f"{name}: counters say {counted}, it was {expected}")
            number = sum(row[5] for row in mine)
            self.check(number == len(usage), f"{name}: {number} events, it were {len(usage)}")
        letters = len(tables["dead_letter"])
        self.check(
            letters == self.oracle.rejected, f"{letters} dead letters of {self.oracle.rejected}"
        )

    async def _sync(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self.stream.sync()
            self.session.sync()

    async def _deadlines(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            for book in self.service.books.values():
                if book.deadline is not None and self.clock.wall() >= book.deadline:
                    self.service.end(book, self.on_deadline)

    async def _helping(self) -> None:
        while True:
            await asyncio.sleep(3.0)
            for book in list(self.service.books.values()):
                await self._help(book)


class SimpleState:
    """Loads a store's state at a given moment."""

    @staticmethod
    def load(store: InlineStore, now_ms: int) -> Any:
        return super(InlineStore, store).load(now_ms=now_ms)


def deviation(detail: str) -> tuple[str]:
    """Name the row of settlement.md's "Deviations" that a freeze belongs to."""
    rows = (
        ("landed after it was given up", "late void"),
        ("somebody else released", "foreign"),
        ("overpaid", "overpaid"),
        ("less than was released", "low"),
        ("currency", "currency"),
        ("provider", "provider"),
        ("total of the escrow changed", "total"),
        ("is not the total", "sum"),
        ("another escrow", "other escrow"),
        ("history shows", "history"),
        ("shows a part of it", "part"),
        ("void of the day", "void of the day"),
        ("strict", "strict"),
        ("declined", "declined"),
    )
    return (next((name for text, name in rows if text in detail), detail),)


@cache
def _settings(text: str) -> Any:
    return config.parse(text, {})


def _ignore(*_: object, **__: object) -> None:
    """Nobody wants to know."""


def _look(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()


class _Quiet:
    """A log that nobody reads, or metrics."""

    def __getattr__(self, _: str) -> Any:
        return _ignore


@contextmanager
def _seams(sim: Simulation) -> Iterator[None]:
    """Put what is random, slow or talkative in the hands of the seed, and look on."""
    undo: list[tuple[Any, str, Any]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    ids = itertools.count(1)
    secrets = SimpleNamespace(token_hex=lambda _: f"{next(ids):024d}")
    put(meterd.settler, "secrets", secrets)
    put(meterd.store.sqlite, "_give_memory_back", _ignore)
    for module in (meterd.app, meterd.bookkeeper, meterd.intake, meterd.opener, meterd.settler):
        put(module, "log", _Quiet())
    pace = meterd.app.pace_of
    put(meterd.app, "pace_of", lambda one: replace(pace(one), reconcile_interval=20.0))
    record, step = meterd.bookkeeper.Bookkeeper.record, meterd.bookkeeper.Bookkeeper._put

    def recorded(keeper: Any, source: str, given: Deliveries, **more: Any) -> Any:
        return sim.judged(record, keeper, source, given, **more)

    def stepped(keeper: Any, escrow: str, event: Any) -> Any:
        before = keeper.ledger.escrows[escrow]
        after, effects = step(keeper, escrow, event)
        sim.stepped(before, event, after, effects)
        return after, effects

    put(meterd.bookkeeper.Bookkeeper, "record", recorded)
    put(meterd.bookkeeper.Bookkeeper, "_put", stepped)
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))  # No file: signing is not looked at.
    put(meterd.app, "_notary", lambda _, state: Notary(key, state.receipts))
    hooks = stamina.instrumentation.get_on_retry_hooks()
    stamina.instrumentation.set_on_retry_hooks([])
    state = random.getstate()
    random.seed(sim.seed)
    try:
        yield
    finally:
        random.setstate(state)
        stamina.instrumentation.set_on_retry_hooks(hooks)
        for owner, name, value in reversed(undo):
            setattr(owner, name, value)


def simulate(seed: int, *, keep_trace: bool = False) -> Simulation:
    """Run one seed to its end. Raises `Violation`, or whatever ended the daemon."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        sim = Simulation(seed, Path(name), keep_trace=keep_trace)
        with _seams(sim):
            _run(sim)
    return sim


def _run(sim: Simulation) -> None:
    loop = sim.loop
    try:
        task = loop.create_task(sim.main())
        while not task.done() and sim.loop.steps < STEPS_MAX:
            loop.run_until_complete(_first(task))
        task.result()
    except Deadlock as stuck:
        text = str(stuck) or "everybody waits for ever"
        raise Violation(f"METERD_SEED={sim.seed} ({sim.scenario}): {text}") from None
    finally:
        if sim.store is not None:
            sim.store.abandon()
        if sim.life is not None:
            sim.life.dead = True
            loop.bury(sim.life)
        for task in asyncio.all_tasks(loop):
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            with contextlib.suppress(BaseException):
                task.get_coro().close()  # type: ignore[union-attr]
        loop.close()


async def _first(task: asyncio.Task[None]) -> None:
    await asyncio.wait({task}, timeout=1000.0)
