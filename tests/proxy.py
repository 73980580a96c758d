"""A TCP proxy that does to a connection what networks do: every fault by script, or by seed.

It stands between the daemon and one server, looks at no meaning, and runs on a thread of its own,
so that a test may block. A *fate* is what befalls one connection: a fault, the phase in which it
strikes, and after how many bytes. Fates of a script are taken in their order, each by the first
connection that sends what the fate waits for; without a script they are drawn from the seed.

The three phases: *connect*, nothing of the request has reached the server; *request*, so many bytes
of it have; *answer*, the server has all of it and so many bytes of its answer have come back. Bytes
are counted from the moment when a connection takes its fate. A fault strikes once; a connection
that survives it may meet the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import random
import socket
import ssl
import struct
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

HOST = "127.0.0.1"
CHUNK_BYTES = 65_536
QUIET_S = 0.05  # A request that pauses for so long is taken for whole.
GHOST_TIMEOUT_S = 2.0  # For the answer to a request that the network delivers a second time.
TRICKLE_PIECES = 32
BAD_GATEWAY_ANSWER = (
    b"HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n"
    b"<html><body><h1>502 Bad Gateway</h1></body></html>\n"
)


class Fault(enum.StrEnum):
    """What a network does. All but the first hold for each phase."""

    REFUSED = "refused"  # At connect alone: nobody listens, for `seconds`.
    LATENCY = "latency"  # A pause of `seconds`; nothing is lost.
    SLICES = "slices"  # From here on pieces of 1 to 7 bytes.
    RESET = "reset"  # RST both ways.
    CUT = "cut"  # FIN both ways: with TLS in mid-record, without its farewell.
    BLACK_HOLE = "black_hole"  # The connection stays, what is sent into it does not arrive.
    HALF_CLOSE = "half_close"  # FIN one way; the other goes on.
    TWICE = "twice"  # The request arrives again, over a connection of its own.
    BAD_GATEWAY = "bad_gateway"  # A page of HTML in place of the answer, then the end.
    SLOW_LORIS = "slow_loris"  # A few bytes at a time, for `seconds`; then as usual.


class Phase(enum.StrEnum):
    """When a fault strikes."""

    CONNECT = "connect"
    REQUEST = "request"
    ANSWER = "answer"


def every_fault() -> list[tuple[Fault, Phase]]:
    """Each fault with each phase in which it can strike."""
    return [
        (fault, phase)
        for fault in Fault
        for phase in Phase
        if fault is not Fault.REFUSED or phase is Phase.CONNECT
    ]


@dataclass(frozen=True, slots=True)
class Fate:
    """What befalls one connection, once a piece of its request holds `only`.

    One that ends before its fate has struck leaves it to the next.
    """

    fault: Fault
    phase: Phase
    after: int = 0  # Bytes of the phase's own direction.
    seconds: float = 0.5
    only: bytes = b""  # Empty: it strikes any connection, at connect before its first byte.


class _Cut(Exception):
    """The connection ends here, on both sides."""


class FaultProxy:
    """One listening port in front of one server. Made by `Network.proxy`."""

    def __init__(
        self, upstream: int, fates: Sequence[Fate], rng: random.Random, share: float
    ) -> None:
        self.port = 0
        self.struck: list[Fate] = []
        self.connections = 0
        self._upstream = upstream
        self._script = list(fates)
        self._rng = rng
        self._share = share
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Task[None], _Connection] = {}

    @property
    def left(self) -> list[Fate]:
        """The fates of the script that nobody has met yet, or that have not struck yet."""
        taken = [c.fate for c in list(self._open.values()) if c.fate is not None and not c.struck]
        return [*taken, *self._script]

    def script(self, *fates: Fate) -> None:
        """Add fates for connections to come."""
        self._script += fates

    def calm(self) -> None:
        """From now on no fault strikes; what one has left of a connection stays as it is."""
        self._script.clear()
        self._share = 0.0
        for connection in self._open.values():
            connection.struck = True

    async def listen(self) -> None:
        """Open the port: a free one first, later the same again."""
        self._server = await asyncio.start_server(self._accept, HOST, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Close the port and cut what is open."""
        if self._server is not None:
            self._server.close()
        tasks = list(self._open)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def refuse(self, seconds: float) -> None:
        """Have nobody listen for a while."""
        if self._server is not None:
            self._server.close()
            self._server = None
            await asyncio.sleep(seconds)
            await self.listen()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        connection = _Connection(self, reader, writer, self._rng)
        self._open[task] = connection
        try:
            await connection.run(self._upstream)
        except asyncio.CancelledError:
            pass  # The proxy closes; asyncio would log a cancelled handler as an error.
        finally:
            connection.abort()
            del self._open[task]
            if connection.fate is not None and not connection.struck:
                self._script.insert(0, connection.fate)  # It ended before; the next one meets it.

    def take(self, piece: bytes) -> Fate | None:
        """Find the fate for a connection that sends `piece`; empty: that was just accepted."""
        for place, fate in enumerate(self._script):
            at_accept = fate.phase is Phase.CONNECT and not fate.only
            if fate.only in piece and (piece or at_accept):
                return self._script.pop(place)
        if piece and self._rng.random() < self._share:
            fault, phase = self._rng.choice(every_fault())
            after = self._rng.choice((0, self._rng.randrange(400)))
            return Fate(fault, phase, after, self._rng.uniform(0.05, 1.0))
        return None


class _Connection:
    """One connection through the proxy."""

    def __init__(
        self,
        proxy: FaultProxy,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        rng: random.Random,
    ) -> None:
        self.fate: Fate | None = None
        self.struck = False
        self._proxy = proxy
        self._rng = rng
        self._client = reader, writer
        self._server: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._request = b""  # Since the fate was taken: for the one that is delivered twice.
        self._passed = {Phase.REQUEST: 0, Phase.ANSWER: 0}
        self._manner: dict[Phase, Fault] = {}

    async def run(self, upstream: int) -> None:
        """Pass bytes both ways until both ends have said all, or a fault ends it."""
        with contextlib.suppress(_Cut, OSError):
            await self._meet(b"")
            self._server = await asyncio.open_connection(HOST, upstream)
            request = asyncio.create_task(self._pump(Phase.REQUEST, self._client[0]))
            answer = asyncio.create_task(self._pump(Phase.ANSWER, self._server[0]))
            try:
                await asyncio.gather(request, answer)
            finally:
                for task in (request, answer):
                    task.cancel()
                await asyncio.gather(request, answer, return_exceptions=True)

    def abort(self, *, reset: bool = False) -> None:
        """End both sides at once, by RST if asked."""
        for side in (self._client, self._server):
            if side is None:
                continue
            wire = side[1].get_extra_info("socket")
            if reset and wire is not None and wire.fileno() >= 0:
                linger = struct.pack("ii", 1, 0)
                wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            side[1].transport.abort() if reset else side[1].close()

    async def _pump(self, way: Phase, reader: asyncio.StreamReader) -> None:
        while piece := await reader.read(CHUNK_BYTES):
            if way is Phase.REQUEST:
                piece = await self._noted(piece, reader)
            await self._pass(way, piece)
        if self._manner.get(way) is not Fault.BLACK_HOLE:
            self._end(way)

    async def _noted(self, piece: bytes, reader: asyncio.StreamReader) -> bytes:
        """Let the connection meet its fate, and remember what a second delivery would repeat."""
        if self.fate is None or (self.struck and Fault.BLACK_HOLE not in self._manner.values()):
            await self._meet(piece)
        if self.fate is None or self.fate.fault is not Fault.TWICE or self._request:
            return piece
        with contextlib.suppress(TimeoutError):
            while more := await asyncio.wait_for(reader.read(CHUNK_BYTES), QUIET_S):
                piece += more
        self._request = piece
        if self.fate.phase is Phase.CONNECT:
            await self._again()
        return piece

    async def _meet(self, piece: bytes) -> None:
        fate = self._proxy.take(piece)
        if fate is None:
            return
        self.fate, self.struck, self._request = fate, False, b""
        self._passed = {Phase.REQUEST: 0, Phase.ANSWER: 0}
        self._manner.clear()
        # Twice at connect wants the whole request first.
        if fate.phase is Phase.CONNECT and fate.fault is not Fault.TWICE:
            await self._strike(Phase.REQUEST)

    async def _pass(self, way: Phase, piece: bytes) -> None:
        fate = self.fate
        if fate is None or self.struck or fate.phase is not way:
            await self._emit(way, piece)
            return
        room = max(0, fate.after - self._passed[way])
        if fate.fault is Fault.BAD_GATEWAY and way is Phase.ANSWER:
            room = 0  # In place of an answer: inside one it would forge what the server says.
        self._passed[way] += len(piece)
        if fate.fault is Fault.TWICE and way is Phase.REQUEST:
            await self._emit(way, piece)
            await self._again()
            return
        if len(piece) < room:
            await self._emit(way, piece)
            return
        if room:
            await self._emit(way, piece[:room])
        await self._strike(way)
        await self._emit(way, piece[room:])

    async def _strike(self, way: Phase) -> None:
        """Do what the fault does, here and now. Raises `_Cut` where nothing is left to pass."""
        fate = self.fate
        assert fate is not None
        self.struck = True
        self._proxy.struck.append(fate)
        ways = (Phase.REQUEST, Phase.ANSWER) if fate.phase is Phase.CONNECT else (way,)
        match fate.fault:
            case Fault.REFUSED | Fault.RESET:
                self.abort(reset=True)
                if fate.fault is Fault.REFUSED:
                    await self._proxy.refuse(fate.seconds)
                raise _Cut
            case Fault.CUT:
                raise _Cut
            case Fault.LATENCY:
                await asyncio.sleep(fate.seconds)
            case Fault.TWICE:
                await self._again()
            case Fault.HALF_CLOSE:
                self._end(Phase.ANSWER if fate.phase is Phase.CONNECT else way)
                self._manner[way] = Fault.BLACK_HOLE
            case Fault.BAD_GATEWAY:
                self._client[1].write(BAD_GATEWAY_ANSWER)
                with contextlib.suppress(OSError):
                    await self._client[1].drain()
                raise _Cut
            case _:
                self._manner.update(dict.fromkeys(ways, fate.fault))

    async def _emit(self, way: Phase, data: bytes) -> None:
        writer = self._writer(way)
        match self._manner.get(way):
            case Fault.BLACK_HOLE:
                return
            case Fault.SLICES:
                await self._sliced(writer, data)
            case Fault.SLOW_LORIS:
                assert self.fate is not None
                self._manner.pop(way)
                for at in range(0, min(len(data), 2 * TRICKLE_PIECES), 2):
                    writer.write(data[at : at + 2])
                    await asyncio.sleep(self.fate.seconds / TRICKLE_PIECES)
                data = data[2 * TRICKLE_PIECES :]
                writer.write(data)
            case _:
                writer.write(data)
        await writer.drain()

    async def _sliced(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        at = 0
        while at < len(data):
            size = self._rng.randint(1, 7)
            writer.write(data[at : at + size])
            await writer.drain()
            await asyncio.sleep(0)
            at += size

    async def _again(self) -> None:
        """Deliver the request a second time, and throw its answer away."""
        if not self.struck:
            self.struck = True
            assert self.fate is not None
            self._proxy.struck.append(self.fate)
        port = self._server[1].get_extra_info("peername")[1] if self._server is not None else 0
        with contextlib.suppress(OSError, TimeoutError):
            reader, writer = await asyncio.open_connection(HOST, port)
            try:
                writer.write(self._request)
                await asyncio.wait_for(reader.read(CHUNK_BYTES), GHOST_TIMEOUT_S)
            finally:
                writer.close()

    def _end(self, way: Phase) -> None:
        writer = self._writer(way)
        with contextlib.suppress(OSError, RuntimeError):
            if writer.can_write_eof():
                writer.write_eof()

    def _writer(self, way: Phase) -> asyncio.StreamWriter:
        if way is Phase.ANSWER:
            return self._client[1]
        if self._server is None:
            raise _Cut
        return self._server[1]


class TlsFront:
    """TLS in front of one server that speaks none. Made by `Network.tls`."""

    def __init__(self, upstream: int, context: ssl.SSLContext) -> None:
        self.port = 0
        self._upstream = upstream
        self._context = context
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()

    async def listen(self) -> None:
        """Open a port that is free."""
        self._server = await asyncio.start_server(self._accept, HOST, 0, ssl=self._context)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Close the port and cut what is open."""
        assert self._server is not None
        self._server.close()
        tasks = list(self._open)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        sides = [writer]
        try:
            server = await asyncio.open_connection(HOST, self._upstream)
            sides.append(server[1])
            ways = [
                asyncio.create_task(self._pass(reader, server[1])),
                asyncio.create_task(self._pass(server[0], writer)),
            ]
            # TLS knows no half-closed connection: who ends one way ends both.
            _, left = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in left:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass  # As in the proxy: asyncio would log a cancelled handler as an error.
        finally:
            for side in sides:
                side.transport.abort()
            self._open.discard(task)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):  # ssl.SSLError is one.
            while piece := await reader.read(CHUNK_BYTES):
                writer.write(piece)
                await writer.drain()


class Network:
    """A thread that runs proxies, all drawn from one seed; a context manager."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        self.proxies: list[FaultProxy] = []
        self._fronts: list[TlsFront] = []

    def proxy(self, upstream: int, *fates: Fate, share: float = 0.0) -> FaultProxy:
        """Stand in front of a port of this machine.

        `fates` are the script; behind it `share` of all requests meet one by seed.
        """
        proxy = FaultProxy(upstream, fates, random.Random(self._rng.random()), share)
        self._wait(proxy.listen())
        self.proxies.append(proxy)
        return proxy

    def tls(self, upstream: int, certificate: Path, key: Path) -> int:
        """Speak TLS for a server of this machine that does not; the port where that is."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate, key)
        front = TlsFront(upstream, context)
        self._wait(front.listen())
        self._fronts.append(front)
        return front.port

    def calm(self) -> None:
        """No more faults, anywhere."""
        for proxy in self.proxies:
            self._loop.call_soon_threadsafe(proxy.calm)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for listener in (*self.proxies, *self._fronts):
            self._wait(listener.close())
        self._wait(asyncio.sleep(0))  # Let closed transports go.
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, Any]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)
