"""A backlog in a Redis stream: meterd's whole path beside readers that throw the entries away."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import redis

from bench.figures import Figure, Goal, Row, ratios
from bench.load import Workload, escrow_ids
from bench.plan import Plan, chunks
from bench.stage import DONE_TIMEOUT_S, REDIS, Measured, Peer, cpu_seconds, wait_for
from tests.servers import RedisServer

STREAM = "meterd:usage"
BACKLOG = "backlog"
AGREEMENTS = 1000
GOALS = {"exclusive": Goal(0.8, 1.2), "group": Goal(0.4, 0.6)}


@contextmanager
def laid_down(workload: Workload, events: int) -> Iterator[tuple[RedisServer, redis.Redis]]:
    """A Redis with the backlog under a name of its own, to be copied under the stream's.

    It does not write to the disk: that would slow down the group readers most, meterd in
    `exclusive` mode least.
    """
    with RedisServer(appendonly=False) as server, redis.Redis.from_url(server.url) as client:
        for chunk in chunks([event for _, event in workload.events(events)], 1000):
            pipe = client.pipeline(transaction=False)
            for event in chunk:
                pipe.execute_command("XADD", BACKLOG, "*", "event", event)
            pipe.execute()
        for group in ("meterd", "bare"):
            client.xgroup_create(BACKLOG, group, "0")
        yield server, client


def lay(client: redis.Redis) -> bytes:
    """Put the backlog where whoever waits finds it; the id of its last entry."""
    client.copy(BACKLOG, STREAM, replace=True)
    last: bytes = client.xinfo_stream(STREAM)["last-generated-id"]
    return last


def acked(client: redis.Redis, last: bytes) -> bool:
    """Whether meterd has told Redis that all of it is done."""
    (group,) = [group for group in client.xinfo_groups(STREAM) if group["name"] == b"meterd"]
    return bool(group["last-delivered-id"] == last and group["pending"] == 0)


def drained(daemon: Measured, client: redis.Redis) -> tuple[float, float]:
    """Let a daemon loose on the backlog: wall and processor seconds until all is acked."""
    daemon.wait_settled_in()
    daemon.hold()
    last = lay(client)
    cpu = cpu_seconds(daemon.pid)
    started = daemon.go()
    finished = wait_for(lambda: acked(client, last), "the backlog's end", DONE_TIMEOUT_S)
    return finished - started, cpu_seconds(daemon.pid) - cpu


def bare(server: RedisServer, client: redis.Redis, what: str, events: int) -> float:
    """Let a peer loose on the backlog: entries a second."""
    client.delete(STREAM)
    client.xgroup_create(STREAM, "bare", "0", mkstream=True)
    with Peer(what, "--url", server.url, "--topic", STREAM, "--events", events) as peer:
        time.sleep(0.2)  # It has said that it is ready; now let it ask.
        peer.hold()
        lay(client)
        started = peer.go()
        return events / (float(peer.result()["finished"]) - started)


def run(plan: Plan, mode: str) -> list[Row]:
    """Measure one mode."""
    workload = Workload(escrow_ids(AGREEMENTS))
    released: list[float] = []
    cpu: list[float] = []
    with laid_down(workload, plan.events) as (server, client):

        def meterd() -> float:
            wall, processor, releases = _meterd(plan, server, client, mode, workload)
            released.append(releases)
            cpu.append(processor / plan.events * 1e6)
            return plan.events / wall

        found = plan.alternately(
            {
                "meterd": meterd,
                "bare XREADGROUP + XACK": lambda: bare(server, client, "redis-group", plan.events),
                "bare XREAD": lambda: bare(server, client, "redis-read", plan.events),
            },
            "events/s",
        )
    group = found["bare XREADGROUP + XACK"]
    return [
        Row(
            f"redis-{mode}",
            f"Redis backlog, {mode}: meterd : bare XREADGROUP + XACK",
            ratios(found["meterd"], group),
            GOALS[mode],
            {
                **found,
                "meterd : bare XREAD": ratios(found["meterd"], found["bare XREAD"]),
                "meterd's processor time": Figure(tuple(cpu), "us/event"),
                "releases meanwhile": Figure(tuple(released), ""),
            },
            (
                f"{plan.events:,} events, {AGREEMENTS:,} agreements, {plan.known:,} known ids",
                "the bare readers do not decode, dedupe, price or keep anything",
            ),
        )
    ]


def _meterd(
    plan: Plan, server: RedisServer, client: redis.Redis, mode: str, workload: Workload
) -> tuple[float, float, float]:
    client.delete(STREAM)
    sources = REDIS.format(url=server.url, mode=mode)
    with (
        plan.stage.sandbox(workload.escrows) as sandbox,
        plan.stage.daemon(sandbox, workload.escrows, known=plan.known, sources=sources) as daemon,
    ):
        wall, processor = drained(daemon, client)
        releases = daemon.metric('releases_total{outcome="confirmed"')
        daemon.check(workload)
        return wall, processor, releases
