"""The escrow client that is awaited, on aiohttp.

The rule kept here: a question that moves money is put once, on a connection of its own, so that
whatever fails before its first byte was certainly not asked. Readings go over kept-alive
connections and are asked again when they fail.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, TypeVar

import aiohttp
from yarl import URL

from meterd.escrow.documents import BODY_BYTES_MAX, Received
from meterd.sdk.contract import (
    TIMEOUT_S,
    Amount,
    Contract,
    Done,
    Escrow,
    Lost,
    Question,
    Walk,
    pause_before_next,
)
from meterd.sdk.errors import EscrowError

T = TypeVar("T")

# What a wire can do to a request. Anything else is a mistake in here.
_WIRE_FAILURES = (aiohttp.ClientError, OSError, ValueError)


class AsyncEscrowClient:
    """The escrow service, awaited. An async context manager; its calls may run side by side.

    base_url   where the contract begins, such as "https://escrow.example/api/v1"; http is taken for
               loopback alone. No redirect is followed and no proxy asked.
    api_key    the key of the agent who pays or is paid. It is in no text of any error.
    timeout_s  seconds for one call, from the name's look-up to the end of the answer.

    Raises `BadArgument` for an address to which no key may be sent. What every method may raise
    stands in `meterd.sdk.errors`. A cancellation while money is moved leaves the call in doubt: be
    ready to read the escrow, as for `InDoubt`.
    """

    def __init__(self, base_url: str, api_key: str, *, timeout_s: float = TIMEOUT_S) -> None:
        self._contract = Contract(base_url, api_key, timeout_s)
        self._stack = AsyncExitStack()
        self._looks: aiohttp.ClientSession | None = None
        self._moves: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._looks = await self._stack.enter_async_context(_session(reuse=True))
        self._moves = await self._stack.enter_async_context(_session(reuse=False))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._looks = self._moves = None
        await self._stack.__aexit__(kind, error, trace)

    async def lock(
        self,
        to: str,
        amount: Amount,
        memo: str,
        auto_release_hours: int | None = None,
        *,
        idempotency_key: str | None = None,
    ) -> Escrow:
        """Lock an amount, at least 1.00 USDC, for the agent `to`; the new escrow.

        As `EscrowClient.lock`. Raises `InDoubt` when there may be an escrow nobody was told of.
        """
        return await self._move(
            self._contract.lock(to, amount, memo, auto_release_hours, idempotency_key)
        )

    async def release_partial(
        self,
        escrow_id: str,
        amount: Amount,
        memo: str | None = None,
        *,
        idempotency_key: str | None = None,
        released_before: Amount | None = None,
    ) -> Done:
        """Pay an amount, USDC above 0, to the escrow's provider.

        As `EscrowClient.release_partial`. Raises `InDoubt` when it may have been paid.
        """
        return await self._move(
            self._contract.release_partial(
                escrow_id, amount, memo, idempotency_key, released_before
            )
        )

    async def release_all(self, escrow_id: str, *, idempotency_key: str | None = None) -> Done:
        """Pay everything that is left in the escrow to its provider.

        As `EscrowClient.release_all`. Raises `InDoubt` when it may have been paid.
        """
        return await self._move(self._contract.release_all(escrow_id, idempotency_key))

    async def refund_part(
        self, escrow_id: str, amount: Amount, *, idempotency_key: str | None = None
    ) -> Done:
        """Ask for an amount, USDC above 0, to go back to the escrow's payer.

        As `EscrowClient.refund_part`. Raises `InDoubt` when it may have been asked for.
        """
        return await self._move(self._contract.refund_part(escrow_id, amount, idempotency_key))

    async def refund_all(self, escrow_id: str, *, idempotency_key: str | None = None) -> Done:
        """Ask for everything that is left to go back to the escrow's payer.

        As `EscrowClient.refund_all`. Raises `InDoubt` when it may have been asked for.
        """
        return await self._move(self._contract.refund_all(escrow_id, idempotency_key))

    async def status(self, escrow_id: str) -> Escrow:
        """Read an escrow, up to three times until it answers; as `EscrowClient.status`."""
        return await self._look(self._contract.status(escrow_id))

    def list(self, agent_id: str) -> AsyncIterator[Escrow]:
        """Every escrow of an agent, to the last page; as `EscrowClient.list`, with `async for`."""
        return self._walk(self._contract.list(agent_id))

    async def _walk(self, walk: Walk) -> AsyncIterator[Escrow]:
        while walk.question is not None:
            for escrow in walk.take(await self._look(walk.question)):
                yield escrow
        walk.end()

    # -- One question ------------------------------------------------------------------------------

    async def _move(self, question: Question[T]) -> T:
        assert question.method == "POST"
        return question.read(await self._ask(self._moves, question))

    async def _look(self, question: Question[T]) -> T:
        assert question.method == "GET"
        looks = 0
        while True:
            looks += 1
            try:
                return question.read(await self._ask(self._looks, question))
            except EscrowError as error:
                pause = pause_before_next(error, looks)
                if pause is None:
                    raise
            await asyncio.sleep(pause)

    async def _ask(
        self, session: aiohttp.ClientSession | None, question: Question[T]
    ) -> Received | Lost:
        """Put a question once, within the time-out. Raises only a cancellation."""
        if session is None:
            raise RuntimeError("async with AsyncEscrowClient(...) as client: comes first")
        exchange = _Exchange()
        try:
            async with (
                asyncio.timeout(self._contract.timeout_s),
                session.request(
                    question.method,
                    URL(self._contract.origin + question.target, encoded=True),
                    data=question.body,
                    headers=question.headers,
                    allow_redirects=False,
                    trace_request_ctx=exchange,
                ) as response,
            ):
                exchange.status, exchange.headers = response.status, response.headers
                await _receive(response, exchange)
        except TimeoutError:
            exchange.flaw = f"it took longer than {self._contract.timeout_s:g} s"
        except _WIRE_FAILURES as error:
            exchange.flaw = self._contract.mask.excerpt(f"{type(error).__name__}: {error}")
        return exchange.came


@dataclass(slots=True)
class _Exchange:
    """How far one question came."""

    left: bool = False
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    flaw: str = ""

    @property
    def came(self) -> Received | Lost:
        if not self.status:
            return Lost(self.left, self.flaw)
        return Received(self.status, self.headers, self.body, self.flaw)


def _session(*, reuse: bool) -> aiohttp.ClientSession:
    """A session that adds nothing of its own: no proxy, netrc, cookies, decompression, clock."""
    trace = aiohttp.TraceConfig()
    # Both fire before the bytes they speak of are written: a doubt is never taken for `NotSent`.
    trace.on_request_headers_sent.append(_note_departure)
    trace.on_request_chunk_sent.append(_note_departure)
    connector = aiohttp.TCPConnector() if reuse else aiohttp.TCPConnector(force_close=True)
    return aiohttp.ClientSession(
        connector=connector,
        trace_configs=[trace],
        trust_env=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,  # A small answer could become a large one.
        timeout=aiohttp.ClientTimeout(total=None),  # `_ask` has the one time-out there is.
    )


async def _note_departure(_: aiohttp.ClientSession, context: object, __: object) -> None:
    exchange = getattr(context, "trace_request_ctx", None)
    assert isinstance(exchange, _Exchange)
    exchange.left = True


async def _receive(response: aiohttp.ClientResponse, exchange: _Exchange) -> None:
    """Read the body as far as it may be long; what is longer ends the connection."""
    async for piece in response.content.iter_any():
        exchange.body += piece
        if len(exchange.body) > BODY_BYTES_MAX:
            exchange.flaw = "the body is longer than 64 KiB"
            response.close()
            return
