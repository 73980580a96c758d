from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from prometheus_client import CollectorRegistry

from meterd import api
from meterd.bookkeeper import Bookkeeper
from meterd.core.accounts import Account, Agreement
from meterd.core.settlement import Answer, Answered, AnswerKind, Confirm, Due, Go, Observed
from meterd.intake import Intake, SourceState
from meterd.metrics import Metrics, Reads
from meterd.receipts import Notary
from tests.fakes import (
    METERS,
    FakeClock,
    FakeIdentities,
    FakeOpener,
    FakeSettler,
    FakeStore,
    adopt,
    make_bookkeeper,
    reading_of,
)


@dataclass
class Reply:
    """One answer, read whole."""

    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class World:
    """A daemon's HTTP face over a real bookkeeper and a real intake, listening on loopback."""

    clock: FakeClock
    store: FakeStore
    identities: FakeIdentities
    metrics: Metrics
    bookkeeper: Bookkeeper
    intake: Intake
    settler: FakeSettler
    opener: FakeOpener
    overview: api.Overview
    session: aiohttp.ClientSession
    base: str
    runner: web.AppRunner
    fatal: list[BaseException] = field(default_factory=list)

    async def call(self, method: str, path: str, body: Any = None, **options: Any) -> Reply:
        """Make one request; a body that is no bytes is sent as JSON."""
        if body is not None:
            options["data"] = io.BytesIO(
                body if isinstance(body, bytes) else json.dumps(body).encode()
            )
        async with self.session.request(method, self.base + path, **options) as response:
            return Reply(response.status, response.headers, await response.read())

    async def get(self, path: str, **options: Any) -> Reply:
        return await self.call("GET", path, **options)

    async def post(self, path: str, body: Any = None, **options: Any) -> Reply:
        return await self.call("POST", path, body, **options)

    async def bind(self, name: str = "esc_1", plan: str = "stream", total: int = 10**7) -> Account:
        """Bind an agreement whose escrow is adopted."""
        agreement = Agreement(name, plan, f"payer of {name}", (("main", name),))
        account = await self.bookkeeper.bind(agreement, "test")
        await adopt(self.bookkeeper, self.clock, name, total=total)
        return account

    async def release(
        self, escrow: str, release_id: str, kind: AnswerKind, why: str = "amount"
    ) -> None:
        """Take one release of all that is owed through the state table, to this answer."""
        account = self.bookkeeper.ledger.account(escrow)
        assert account is not None
        await adopt_again(self, escrow)
        due = Due(
            account.owed, why, release_id, account.units, self.clock.mono(), self.clock.wall()
        )
        assert Confirm() in await self.bookkeeper.step(escrow, due)
        await self.bookkeeper.step(escrow, Go(self.clock.mono(), self.clock.wall()))
        release = self.bookkeeper.ledger.escrows[escrow].release
        assert release is not None
        answer = Answer(kind, "told so", amount=release.amount)
        await self.bookkeeper.step(escrow, Answered(answer, self.clock.mono(), self.clock.wall()))


async def adopt_again(world: World, escrow: str) -> None:
    """Read the escrow as it should be, so that a release may be intended."""
    world.clock.advance(5)
    state = world.bookkeeper.ledger.escrows[escrow]
    reading = reading_of(
        escrow, total=state.total, mono=world.clock.mono(), released=state.observed
    )
    await world.bookkeeper.step(
        escrow, Observed(reading, world.clock.mono(), world.clock.wall(), 10**9)
    )


MakeWorld = Callable[..., Awaitable[World]]


@pytest.fixture
async def make_world() -> AsyncIterator[MakeWorld]:
    """Make worlds that end with the test."""
    async with AsyncExitStack() as stack:

        async def make(settings: api.ApiSettings | None = None, pending_max: int = 1000) -> World:
            clock, store, identities = FakeClock(), FakeStore(), FakeIdentities()
            metrics = Metrics(CollectorRegistry(), meters=tuple(METERS), sources=("mqtt",))
            bookkeeper = make_bookkeeper(store, facts=metrics, clock=clock, identities=identities)
            bookkeeper.notary = Notary(Ed25519PrivateKey.generate(), {})
            intake = Intake(bookkeeper, [], pending_max=pending_max)
            settler, opener = FakeSettler(), FakeOpener()
            overview = api.Overview(bookkeeper)
            fatal: list[BaseException] = []
            metrics.watch(
                Reads(
                    overview.latest,
                    intake.states.values,
                    lambda: bookkeeper.dead_letters,
                    lambda: bookkeeper.holds.total,
                    lambda: 4096,
                )
            )
            app = api.build(
                settings or api.ApiSettings(),
                bookkeeper,
                intake,
                settler=settler,
                opener=opener,
                overview=overview,
                instruments=metrics,
                store_bytes=lambda: 4096,
                fatal=fatal.append,
            )
            runner = api.runner(app, shutdown_timeout=5.0)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            port = runner.addresses[0][1]
            session = await stack.enter_async_context(aiohttp.ClientSession())
            return World(
                clock,
                store,
                identities,
                metrics,
                bookkeeper,
                intake,
                settler,
                opener,
                overview,
                session,
                f"http://127.0.0.1:{port}",
                runner,
                fatal,
            )

        yield make


@pytest.fixture
async def world(make_world: MakeWorld) -> World:
    """An open daemon with one adopted agreement, `esc_1`, of 10 USDC under the plan `stream`."""
    world = await make_world()
    await world.bind()
    return world


def source_state(name: str = "mqtt", *, connected: bool = True) -> SourceState:
    """A source as the intake would describe it."""
    return SourceState(name, "mqtt", "mqtt://broker:1883", connected=connected, error="")
