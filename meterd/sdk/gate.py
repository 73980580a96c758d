"""The clients of the gate: may this call be served, and what is set aside while it is.

The rule kept here: a caller waits for the gate a moment and no longer. What meterd did not answer
within that time, the program's own policy answers; and what was used under a hold is told of, also
when meterd is away meanwhile, where a meter with a spool stands behind the gate.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import aiohttp

from meterd.sdk.failures import BadUsage, Denied, NotAnswered, Unreachable
from meterd.sdk.meter import URL, Meter
from meterd.sdk.usage import Quantity, nanos_of
from meterd.sdk.verdicts import (
    AUTHORIZE,
    CAPTURE_TRIES,
    TIMEOUT_S,
    TRIES,
    Policy,
    Question,
    Verdict,
    capture_body,
    is_lost,
    question,
    read_capture,
    refuse,
)
from meterd.sdk.wire import Place, Reply, Wire, seconds_of

CONNECTIONS = 16
PAUSE_S = 0.05  # Between the tries of one question.
HOLD_S = 60


@dataclass(slots=True)
class _Held:
    """A hold while the work is done: captured or voided, once."""

    verdict: Verdict
    question: Question
    meter: Meter | None
    over: bool = field(default=False, init=False)

    @property
    def id(self) -> str:
        """The hold's id; "": meterd did not answer, and the work is done without one."""
        return self.verdict.hold

    def _finish(self) -> None:
        if self.over:
            raise BadUsage("the hold was captured or voided before")
        self.over = True

    def _told(self, quantity: Quantity | None) -> bool:
        """Tell the meter of the usage; False: there is none, and meterd itself is to be asked."""
        if self.meter is None:
            if not self.id:
                raise Unreachable(
                    "the work was allowed without meterd, so there is no hold to capture: tell a"
                    " meter of it, or give the gate one: meter=…"
                )
            return False
        asked = self.question
        self.meter.emit(
            asked.agreement,
            asked.meter,
            asked.quantity if quantity is None else quantity,
            dimensions=asked.dimensions,
            hold=self.id,
            id=self.id or None,
        )
        return True


def _unused(quantity: Quantity | None) -> bool:
    return quantity is not None and nanos_of(quantity) == 0


class Hold(_Held):
    """A hold of `Gate.hold`."""

    gate: Gate

    def capture(self, quantity: Quantity | None = None) -> None:
        """Tell what was really used; None: what was asked for, 0: nothing.

        Raises `BadUsage` the second time. With a meter behind the gate it waits for nobody, and
        raises as `Meter.emit`; else `Unreachable` or `NotAnswered` where meterd did not take it.
        """
        if _unused(quantity):
            self.void()
            return
        self._finish()
        if not self._told(quantity):
            self.gate.capture(self.id, quantity)

    def void(self) -> None:
        """Free what was set aside: nothing was used. Raises `BadUsage` the second time.

        Where meterd does not answer, the hold ends by itself.
        """
        self._finish()
        if self.id:
            with suppress(Unreachable, NotAnswered):
                self.gate.void(self.id)


class Gate:
    """Asks meterd before a call is served, and waits for the answer. Threads share one.

    url, token, trusted, tls, secret  as for `Meter`; the token's scope is `gate`.
    meter           captures go through this meter, and so survive whatever happens to meterd; None:
                    they are calls, which raise when they fail.
    on_unreachable  what to do where meterd does not answer: "deny" or "allow".
    timeout_s       for one question, in seconds, all tries together.
    connections     at most so many at a time; who comes then waits, within `timeout_s`.
    """

    def __init__(
        self,
        url: str = URL,
        token: str = "",
        *,
        meter: Meter | None = None,
        on_unreachable: Policy = "deny",
        timeout_s: float = TIMEOUT_S,
        connections: int = CONNECTIONS,
        trusted: bool = False,
        tls: Any = None,
        secret: str = "",
    ) -> None:
        self._place = Place(url, token, trusted, tls, secret)
        self._meter = meter
        self._policy = _checked(on_unreachable, timeout_s, connections)
        self._timeout_s = timeout_s
        self._free = threading.BoundedSemaphore(connections)
        self._kept: queue.LifoQueue[Wire] = queue.LifoQueue()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def authorize(
        self,
        agreement: str,
        meter: str,
        quantity: Quantity = 1,
        dimensions: Mapping[str, str] | None = None,
        *,
        hold: int | None = None,
        key: str | None = None,
    ) -> Verdict:
        """Ask whether a call may be served.

        hold  set its price aside for so many seconds, 1 to 86400; None: ask only.
        key   the idempotency key of the hold; None: one is made, the same for all tries of it.

        Raises `BadUsage`, and `NotAnswered` where meterd refuses the question itself.
        """
        asked = question(agreement, meter, quantity, dimensions, hold, key)
        reply = self._ask(AUTHORIZE, asked.body, asked.headers, TRIES)
        return asked.read(reply, self._policy)

    @contextmanager
    def hold(
        self,
        agreement: str,
        meter: str,
        quantity: Quantity = 1,
        dimensions: Mapping[str, str] | None = None,
        *,
        seconds: int = HOLD_S,
    ) -> Iterator[Hold]:
        """Set a price aside while the work is done: `with gate.hold(…) as hold`.

        Left without a capture, the hold is captured as it was asked for; left by an exception, it
        is voided. Raises `Denied` where the gate says no, and as `authorize`.
        """
        asked = question(agreement, meter, quantity, dimensions, seconds, None)
        verdict = asked.read(self._ask(AUTHORIZE, asked.body, asked.headers, TRIES), self._policy)
        if not verdict.allowed:
            raise Denied(verdict)
        held = Hold(verdict, asked, self._meter)
        held.gate = self
        try:
            yield held
        except BaseException:
            if not held.over:
                held.void()
            raise
        if not held.over:
            held.capture()

    def capture(self, hold: str, quantity: Quantity | None = None) -> None:
        """Turn a hold into usage by a call; once more is no more usage.

        Raises `Unreachable`, and `NotAnswered` where the hold is not live any more.
        """
        body = capture_body(quantity)
        read_capture(self._ask(f"/v1/holds/{hold}/capture", body, {}, CAPTURE_TRIES), hold)

    def void(self, hold: str) -> None:
        """Free a hold by a call. Raises `Unreachable` and `NotAnswered`; it ends by itself."""
        reply = self._ask(f"/v1/holds/{hold}/void", b"{}", {}, TRIES)
        refuse(reply)
        if reply.status != 200:
            raise Unreachable(f"the hold {hold} was not voided: {reply.said}")

    def close(self) -> None:
        """Let go of the connections. Whoever asks later opens others."""
        with suppress(queue.Empty):
            while True:
                self._kept.get_nowait().close()

    def _ask(self, path: str, body: bytes, headers: Mapping[str, str], tries: int) -> Reply:
        if not self._free.acquire(timeout=self._timeout_s):
            return Reply(0, flaw=f"all connections were busy for {self._timeout_s:g} s")
        try:
            return self._tried(path, body, headers, tries)
        finally:
            self._free.release()

    def _tried(self, path: str, body: bytes, headers: Mapping[str, str], tries: int) -> Reply:
        try:
            wire = self._kept.get_nowait()
        except queue.Empty:
            wire = Wire(self._place, self._timeout_s / tries)
        reply = wire.post(path, body, headers)
        for _ in range(tries - 1):
            if not is_lost(reply):
                break
            threading.Event().wait(PAUSE_S)
            reply = wire.post(path, body, headers)
        self._kept.put(wire)
        return reply


class AsyncHold(_Held):
    """A hold of `AsyncGate.hold`."""

    gate: AsyncGate

    async def capture(self, quantity: Quantity | None = None) -> None:
        """Tell what was really used; as `Hold.capture`."""
        if _unused(quantity):
            await self.void()
            return
        self._finish()
        if not self._told(quantity):
            await self.gate.capture(self.id, quantity)

    async def void(self) -> None:
        """Free what was set aside; as `Hold.void`."""
        self._finish()
        if self.id:
            with suppress(Unreachable, NotAnswered):
                await self.gate.void(self.id)


class AsyncGate:
    """Asks meterd before a call is served, awaited; as `Gate`. For one event loop.

    It opens its connections when it is asked first; `async with`, or `await gate.aclose()`, closes
    them.
    """

    def __init__(
        self,
        url: str = URL,
        token: str = "",
        *,
        meter: Meter | None = None,
        on_unreachable: Policy = "deny",
        timeout_s: float = TIMEOUT_S,
        connections: int = CONNECTIONS,
        trusted: bool = False,
        tls: Any = None,
        secret: str = "",
    ) -> None:
        self._place = Place(url, token, trusted, tls, secret)
        self._meter = meter
        self._policy = _checked(on_unreachable, timeout_s, connections)
        self._timeout_s = timeout_s
        self._connections = connections
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Let go of the connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def authorize(
        self,
        agreement: str,
        meter: str,
        quantity: Quantity = 1,
        dimensions: Mapping[str, str] | None = None,
        *,
        hold: int | None = None,
        key: str | None = None,
    ) -> Verdict:
        """Ask whether a call may be served; as `Gate.authorize`."""
        asked = question(agreement, meter, quantity, dimensions, hold, key)
        return await self._verdict(asked)

    async def _verdict(self, asked: Question) -> Verdict:
        return asked.read(
            await self._ask(AUTHORIZE, asked.body, asked.headers, TRIES), self._policy
        )

    @asynccontextmanager
    async def hold(
        self,
        agreement: str,
        meter: str,
        quantity: Quantity = 1,
        dimensions: Mapping[str, str] | None = None,
        *,
        seconds: int = HOLD_S,
    ) -> AsyncIterator[AsyncHold]:
        """Set a price aside while the work is done: `async with`; as `Gate.hold`."""
        asked = question(agreement, meter, quantity, dimensions, seconds, None)
        verdict = await self._verdict(asked)
        if not verdict.allowed:
            raise Denied(verdict)
        held = AsyncHold(verdict, asked, self._meter)
        held.gate = self
        try:
            yield held
        except BaseException:
            if not held.over:
                await held.void()
            raise
        if not held.over:
            await held.capture()

    async def capture(self, hold: str, quantity: Quantity | None = None) -> None:
        """Turn a hold into usage by a call; as `Gate.capture`."""
        body = capture_body(quantity)
        read_capture(await self._ask(f"/v1/holds/{hold}/capture", body, {}, CAPTURE_TRIES), hold)

    async def void(self, hold: str) -> None:
        """Free a hold by a call; as `Gate.void`."""
        reply = await self._ask(f"/v1/holds/{hold}/void", b"{}", {}, TRIES)
        refuse(reply)
        if reply.status != 200:
            raise Unreachable(f"the hold {hold} was not voided: {reply.said}")

    async def _ask(self, path: str, body: bytes, headers: Mapping[str, str], tries: int) -> Reply:
        reply = await self._post(path, body, headers, tries)
        for _ in range(tries - 1):
            if not is_lost(reply):
                break
            await asyncio.sleep(PAUSE_S)
            reply = await self._post(path, body, headers, tries)
        return reply

    async def _post(self, path: str, body: bytes, headers: Mapping[str, str], tries: int) -> Reply:
        try:
            async with asyncio.timeout(self._timeout_s / tries):
                async with self._opened().post(
                    self._place.base + path,
                    data=body,
                    headers=self._place.headers(body, headers),
                    allow_redirects=False,
                ) as response:
                    content = await response.read()
                    after = seconds_of(response.headers.get("Retry-After"))
                    return Reply(response.status, content, retry_after_s=after)
        except TimeoutError:
            return Reply(0, flaw=f"no answer within {self._timeout_s:g} s")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return Reply(0, flaw=f"{type(error).__name__}: {error}"[:300])

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            limit = self._connections
            path = self._place.socket_path
            connector: aiohttp.BaseConnector
            if path:
                connector = aiohttp.UnixConnector(path, limit=limit)
            else:
                connector = aiohttp.TCPConnector(limit=limit, ssl=self._place.tls or True)
            self._session = aiohttp.ClientSession(connector=connector, trust_env=False)
        return self._session


def _checked(policy: Policy, timeout_s: float, connections: int) -> Policy:
    if policy not in {"allow", "deny"}:
        raise BadUsage('on_unreachable is "allow" or "deny"')
    if not timeout_s > 0 or connections < 1:
        raise BadUsage("timeout_s is more than 0, connections 1 or more")
    return policy
