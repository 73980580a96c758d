"""The gate while usage comes in: how long a service waits for "may this call be served?".

Questions are asked at fixed moments, whether or not the ones before were answered, and the time
runs from the moment at which each was due: a daemon that stands still for a while is charged for
every question that it kept waiting.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

from bench.figures import Figure, Goal, Row
from bench.load import Workload, escrow_ids
from bench.plan import Plan
from bench.stage import DONE_TIMEOUT_S, REDIS, Measured, Peer, wait_for
from tests.servers import RedisServer

AGREEMENTS = 1000
EVENTS_A_SECOND = 10_000
QUESTIONS_A_SECOND = 200
CONNECTIONS = 32
SECONDS, SMOKE_SECONDS = 10.0, 1.0
STREAM = "meterd:usage"


def run(plan: Plan) -> list[Row]:
    """Measure the 99th percentile of `POST /v1/authorize`, alone, under load, and with holds."""
    p99: dict[str, list[float]] = {"quiet": [], "loaded": [], "loaded, with holds": []}
    middle: list[float] = []
    seconds = SMOKE_SECONDS if plan.smoke else SECONDS
    for _ in range(plan.repeat):
        workload = Workload(escrow_ids(AGREEMENTS))
        with (
            RedisServer(appendonly=False) as server,
            plan.stage.sandbox(workload.escrows) as sandbox,
            plan.stage.daemon(
                sandbox,
                workload.escrows,
                known=plan.known,
                sources=REDIS.format(url=server.url, mode="exclusive"),
            ) as daemon,
        ):
            daemon.wait_settled_in()
            times = _asked(daemon, workload.escrows, seconds, hold=None)
            p99["quiet"].append(_percentile(times, 99))
            for name, hold in (("loaded", None), ("loaded, with holds", 60)):
                file = plan.stage.new_directory() / "events"
                count = int(EVENTS_A_SECOND * seconds)
                file.write_bytes(b"\n".join(event for _, event in workload.events(count)))
                with Peer(
                    *("redis-paced", "--url", server.url, "--topic", STREAM),
                    *("--file", file, "--rate", EVENTS_A_SECOND),
                ) as producer:
                    times = _asked(daemon, workload.escrows, seconds, hold=hold)
                    producer.result()
                p99[name].append(_percentile(times, 99))
                if hold is None:
                    middle.append(_percentile(times, 50))
            taken = lambda: daemon.metric("deliveries_total") >= workload.sent  # noqa: B023, E731
            wait_for(taken, "all events to be counted", DONE_TIMEOUT_S, 0.05)
            daemon.check(workload)
            plan.say(", ".join(f"{name}: {found[-1]:.2f} ms" for name, found in p99.items()))
    parts = {f"p99, {name}": Figure(tuple(found), "ms") for name, found in p99.items()}
    parts["p50, loaded"] = Figure(tuple(middle), "ms")
    return [
        Row(
            "gate",
            "POST /v1/authorize while 10,000 events a second come in, 99th percentile",
            parts["p99, loaded"],
            Goal(5, 2, more_is_better=False),
            parts,
            (
                f"{QUESTIONS_A_SECOND} questions a second, {seconds:g} s, from when each was due",
                f"events over Redis; {plan.known:,} known ids, {AGREEMENTS:,} agreements",
                "a hold is on the disk when it is answered",
            ),
        )
    ]


def _percentile(times: Sequence[float], percent: int) -> float:
    return sorted(times)[min(len(times) - 1, len(times) * percent // 100)] * 1000


def _asked(
    daemon: Measured, escrows: Sequence[str], seconds: float, *, hold: int | None
) -> list[float]:
    port = int(daemon.url.rpartition(":")[2])
    return asyncio.run(_ask(port, escrows, seconds, hold))


async def _ask(port: int, escrows: Sequence[str], seconds: float, hold: int | None) -> list[float]:
    """Ask at fixed moments over a few connections; seconds until each answer."""
    count = int(QUESTIONS_A_SECOND * seconds)
    due: asyncio.Queue[tuple[float, bytes] | None] = asyncio.Queue()
    times: list[float] = []

    async def connection() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (question := await due.get()) is not None:
            moment, request = question
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
            answer = json.loads(await reader.readexactly(int(length)))
            times.append(time.monotonic() - moment)
            if not answer["allowed"]:
                raise ConnectionError(str(answer))
        writer.close()

    asking = [asyncio.create_task(connection()) for _ in range(CONNECTIONS)]
    began = time.monotonic() + 0.1
    for number in range(count):
        moment = began + number / QUESTIONS_A_SECOND
        await asyncio.sleep(moment - time.monotonic())
        due.put_nowait((moment, _question(escrows[number % len(escrows)], hold)))
    for _ in asking:
        due.put_nowait(None)
    await asyncio.gather(*asking)
    return times


def _question(escrow: str, hold: int | None) -> bytes:
    asked: dict[str, Any] = {
        "agreement": escrow,
        "meter": "tokens",
        "quantity": 1000,
        "dimensions": {"kind": "output"},
    }
    if hold is not None:
        asked["hold"] = hold
    body = json.dumps(asked).encode()
    head = (
        "POST /v1/authorize HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
