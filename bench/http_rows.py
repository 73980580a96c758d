"""Events over HTTP, 100 in a request: meterd's whole path beside a handler that only parses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from bench.figures import Goal, Row, ratios
from bench.load import Workload, escrow_ids
from bench.plan import Plan, chunks
from bench.stage import Peer
from tests.processes import free_port

AGREEMENTS = 1000
PER_REQUEST = 100
CONNECTIONS = 16
EVENTS_SHARE = 0.4


def requests(events: list[bytes]) -> list[bytes]:
    """Whole requests, ready to be written."""
    found = []
    for chunk in chunks(events, PER_REQUEST):
        body = b"[" + b",".join(chunk) + b"]"
        head = (
            "POST /v1/events HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        found.append(head.encode() + body)
    return found


async def _send(port: int, prepared: Sequence[bytes]) -> float:
    """Send all over a few connections, each request after the answer to the one before it."""
    waiting = iter(prepared)

    async def connection() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for request in waiting:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise ConnectionError(head.decode())
            lower = head.lower()
            length = lower.partition(b"content-length:")[2].partition(b"\r\n")[0]
            await reader.readexactly(int(length))
        writer.close()

    started = time.monotonic()
    await asyncio.gather(*(connection() for _ in range(CONNECTIONS)))
    return time.monotonic() - started


def run(plan: Plan) -> list[Row]:
    count = int(plan.events * EVENTS_SHARE)
    workload = Workload(escrow_ids(AGREEMENTS))
    prepared = requests([event for _, event in workload.events(count)])

    def meterd() -> float:
        with (
            plan.stage.sandbox(workload.escrows) as sandbox,
            plan.stage.daemon(sandbox, workload.escrows, known=plan.known) as daemon,
        ):
            daemon.wait_settled_in()
            seconds = asyncio.run(_send(int(daemon.url.rpartition(":")[2]), prepared))
            daemon.check(workload)
            return count / seconds

    def bare() -> float:
        port = free_port()
        with Peer("http-parse", "--port", port):
            return count / asyncio.run(_send(port, prepared))

    found = plan.alternately({"meterd": meterd, "aiohttp, parsing only": bare}, "events/s")
    return [
        Row(
            "http",
            "POST /v1/events, 100 a request: meterd : aiohttp handler that only parses",
            ratios(found["meterd"], found["aiohttp, parsing only"]),
            Goal(0.5, 0.8),
            found,
            (
                f"{count:,} events over {CONNECTIONS} connections, {plan.known:,} known ids",
                "meterd answers after the commit, the peer keeps nothing",
            ),
        )
    ]
