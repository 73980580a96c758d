"""The escrow client that is awaited: over the same line as the daemon's.

The rule kept here: what moves money is put once, and the line knows whether it left. Readings are
put again when they fail.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self, TypeVar

from meterd.escrow.documents import Received
from meterd.escrow.line import Exchange, Line
from meterd.sdk.contract import (
    TIMEOUT_S,
    Amount,
    Contract,
    Done,
    Escrow,
    Look,
    Lost,
    Move,
    Walk,
    pause_before_next,
)
from meterd.sdk.errors import EscrowError

T = TypeVar("T")


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
        self._line: Line | None = None

    async def __aenter__(self) -> Self:
        self._line = Line(self._contract.api, mono=time.monotonic)
        await self._line.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        line, self._line = self._opened(), None
        await line.__aexit__(kind, error, trace)

    def _opened(self) -> Line:
        if self._line is None:
            raise RuntimeError("async with AsyncEscrowClient(...) as client: comes first")
        return self._line

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
        while walk.look is not None:
            for escrow in walk.take(await self._look(walk.look)):
                yield escrow
        walk.end()

    async def _move(self, move: Move[T]) -> T:
        address = self._contract.api.address(move.path)
        return move.read(_came(await self._opened().post("move", address, move.document, move.key)))

    async def _look(self, look: Look[T]) -> T:
        address = self._contract.api.address(look.path)
        looks = 0
        while True:
            looks += 1
            try:
                return look.read(_came(await self._opened().get("look", address, look.query)))
            except EscrowError as error:
                pause = pause_before_next(error, looks)
                if pause is None:
                    raise
            await asyncio.sleep(pause)


def _came(exchange: Exchange) -> Received | Lost:
    return exchange.received or Lost(exchange.left, exchange.flaw)
