"""The escrow client that waits, on the standard library's http.client.

The rule kept here: every request has a connection of its own and is put once on it. What fails
until the connection stands was certainly not asked; what fails after that may have been. Nothing is
shared between calls, so threads may share a client.
"""

from __future__ import annotations

import http.client
import io
import json
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlencode, urlsplit

from meterd.escrow.documents import BODY_BYTES_MAX, Received
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

# What a wire can do to a request. Anything else is a mistake in here.
_WIRE_FAILURES = (http.client.HTTPException, OSError, ValueError)


class EscrowClient:
    """The escrow service, for programs that wait for it. Threads may share one.

    base_url   where the contract begins, such as "https://escrow.example/api/v1"; http is taken for
               loopback alone. No redirect is followed and no proxy asked.
    api_key    the key of the agent who pays or is paid. It is in no text of any error.
    timeout_s  seconds for connecting, and again for the question and the whole answer. Looking the
               name up is the system's affair and is not counted.

    It holds nothing open: `with EscrowClient(...)` is for symmetry with `AsyncEscrowClient`. Raises
    `BadArgument` for an address to which no key may be sent. What every method may raise stands in
    `meterd.sdk.errors`. An interruption (Ctrl-C) while money is moved leaves the call in doubt.
    """

    def __init__(self, base_url: str, api_key: str, *, timeout_s: float = TIMEOUT_S) -> None:
        self._contract = Contract(base_url, api_key, timeout_s)
        self._to = urlsplit(self._contract.api.base_url)
        self._tls = ssl.create_default_context() if self._to.scheme == "https" else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing is open."""

    def lock(
        self,
        to: str,
        amount: Amount,
        memo: str,
        auto_release_hours: int | None = None,
        *,
        idempotency_key: str | None = None,
    ) -> Escrow:
        """Lock an amount out of the own wallet for the agent `to`; the new escrow.

        amount              USDC, at least 1.00, at most 6 decimals.
        memo                1 to 200 printable characters. Make it one of a kind: by it an escrow is
                            found again in `list`, also after an `InDoubt`.
        auto_release_hours  when the service is to act by itself, in whole hours; None: never.
        idempotency_key     one from `new_key()`, kept before the call; None: one is made.

        What the answer leaves out of the new escrow is as it was asked for. Raises `BadAmount`,
        `BadArgument`, `NotSent`, `Limited`, `Refused`, `KeyRefused`, and `InDoubt` when there may
        be an escrow nobody was told of.
        """
        return self._move(
            self._contract.lock(to, amount, memo, auto_release_hours, idempotency_key)
        )

    def release_partial(
        self,
        escrow_id: str,
        amount: Amount,
        memo: str | None = None,
        *,
        idempotency_key: str | None = None,
        released_before: Amount | None = None,
    ) -> Done:
        """Pay an amount to the escrow's provider, gross of the service's fee.

        amount           USDC above 0, at most 6 decimals.
        memo             what stands beside it in the service's history; None: the key, by which
                         `Escrow.release_keys` shows it again.
        idempotency_key  one from `new_key()`, kept before the call; None: one is made. No service
                         is relied on to honour it.
        released_before  what was released until now, USDC, where it is known. A service whose
                         answers show the new total alone can then be believed; without it they are
                         `InDoubt`.

        Raises `BadAmount`, `BadArgument`, `NotSent`, `Limited`, `Refused`, `NotFound`,
        `KeyRefused`, and `InDoubt` or `Conflict` when it may have been paid.
        """
        return self._move(
            self._contract.release_partial(
                escrow_id, amount, memo, idempotency_key, released_before
            )
        )

    def release_all(self, escrow_id: str, *, idempotency_key: str | None = None) -> Done:
        """Pay everything that is left in the escrow to its provider, and so end it.

        Raises as `release_partial`. `InDoubt` also for an answer that does not show that nothing is
        left.
        """
        return self._move(self._contract.release_all(escrow_id, idempotency_key))

    def refund_part(
        self, escrow_id: str, amount: Amount, *, idempotency_key: str | None = None
    ) -> Done:
        """Ask for an amount, USDC above 0, to go back to the escrow's payer.

        Done means that the service has taken the request; it may act on it later, and
        `status(escrow_id).refunded` shows when. Raises as `release_partial`.
        """
        return self._move(self._contract.refund_part(escrow_id, amount, idempotency_key))

    def refund_all(self, escrow_id: str, *, idempotency_key: str | None = None) -> Done:
        """Ask for everything that is left in the escrow to go back to its payer.

        Done means what it means for `refund_part`, and the same is raised.
        """
        return self._move(self._contract.refund_all(escrow_id, idempotency_key))

    def status(self, escrow_id: str) -> Escrow:
        """Read an escrow, up to three times until it answers within a minute.

        Raises `BadArgument`, `NotFound`, `KeyRefused`, `Limited` when the service wants to be left
        alone for more than 5 seconds, `NotSent` and `Unavailable`.
        """
        return self._look(self._contract.status(escrow_id))

    def list(self, agent_id: str) -> Iterator[Escrow]:
        """Every escrow of an agent, to the last page, as they are asked for.

        Raises as `status`, on the way: what was handed over until then is then a part. Entries that
        make no sense are left out, and `Unavailable` is raised behind the last.
        """
        return self._walk(self._contract.list(agent_id))

    def _walk(self, walk: Walk) -> Iterator[Escrow]:
        while walk.look is not None:
            yield from walk.take(self._look(walk.look))
        walk.end()

    def _move(self, move: Move[T]) -> T:
        headers = {
            "Content-Type": "application/json",
            self._contract.api.idempotency_header: move.key,
        }
        body = json.dumps(move.document).encode()
        return move.read(self._ask("POST", move.path, body, headers))

    def _look(self, look: Look[T]) -> T:
        target = f"{look.path}?{urlencode(look.query)}" if look.query else look.path
        looks = 0
        while True:
            looks += 1
            try:
                return look.read(self._ask("GET", target))
            except EscrowError as error:
                pause = pause_before_next(error, looks)
                if pause is None:
                    raise
            time.sleep(pause)

    # -- One request -------------------------------------------------------------------------------

    def _ask(
        self,
        method: str,
        target: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Received | Lost:
        """Put one request, once. Raises only an interruption."""
        connection = self._connection()
        try:
            connection.connect()
        except _WIRE_FAILURES as error:
            connection.close()
            return Lost(left=False, flaw=self._flaw(error))
        # http.client closes its own socket once it has read a head; this is the real one.
        with connection.sock as sock:
            # Without this, http.client would connect a second time where it finds no socket.
            connection.auto_open = 0
            connection.sock = _Bounded(sock, self._contract.api.request_timeout_s)
            try:
                connection.request(method, self._to.path + target, body, self._headers(headers))
                response = connection.getresponse()
            except _WIRE_FAILURES as error:
                return Lost(left=True, flaw=self._flaw(error))
            body_read, flaw = self._receive(response)
            return Received(response.status, dict(response.getheaders()), body_read, flaw)

    def _headers(self, further: Mapping[str, str] | None) -> dict[str, str]:
        return {
            "Authorization": f"Bearer {self._contract.api.api_key}",
            "Accept": "application/json",
            "Accept-Encoding": "identity",  # A small answer could become a large one.
            "User-Agent": "meterd",
            "Connection": "close",
            **(further or {}),
        }

    def _connection(self) -> http.client.HTTPConnection:
        host, timeout_s = self._to.hostname or "", self._contract.api.request_timeout_s
        if self._tls is None:
            return http.client.HTTPConnection(host, self._to.port or 80, timeout=timeout_s)
        return http.client.HTTPSConnection(
            host, self._to.port or 443, timeout=timeout_s, context=self._tls
        )

    def _receive(self, response: http.client.HTTPResponse) -> tuple[bytes, str]:
        """The body as far as it may be long, and why not all of it."""
        body = b""
        try:
            while len(body) <= BODY_BYTES_MAX:
                piece = response.read1(BODY_BYTES_MAX + 1 - len(body))
                if not piece:
                    return body, _missing(response)
                body += piece
        except _WIRE_FAILURES as error:
            return body, self._flaw(error)
        return body, "the body is longer than 64 KiB"

    def _flaw(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return f"no whole answer within {self._contract.api.request_timeout_s:g} s"
        return self._contract.mask.excerpt(f"{type(error).__name__}: {error}")


def _missing(response: http.client.HTTPResponse) -> str:
    """`read1` ends without a word where a body is shorter than its head promised."""
    return "the body is cut off" if response.length else ""


class _Bounded:
    """A socket with one time-out for all that passes through it, however it drips.

    Has what http.client uses of a socket.
    """

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        self._sock = sock
        self._until = time.monotonic() + timeout_s

    def sendall(self, data: bytes) -> None:
        self._wait()
        self._sock.sendall(data)

    def makefile(self, _: str) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self))

    def receive(self, buffer: Any) -> int:
        self._wait()
        return self._sock.recv_into(buffer)

    def close(self) -> None:
        """The socket is closed by whoever opened it, once the body was read."""

    def _wait(self) -> None:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)


class _Reader(io.RawIOBase):
    """What comes out of a bounded socket, for a buffer in front of it."""

    def __init__(self, sock: _Bounded) -> None:
        self._sock = sock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._sock.receive(buffer)
