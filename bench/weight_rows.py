"""What meterd weighs: memory, start, idle time, and how its cost grows with what it remembers."""

from __future__ import annotations

import time

from bench.figures import Figure, Goal, Row
from bench.load import PRICES, Workload, escrow_ids
from bench.plan import Plan
from bench.redis_rows import STREAM, drained, laid_down
from bench.stage import MQTT, REDIS, START_TIMEOUT_S, cpu_seconds, memory_mb
from tests.servers import MosquittoServer, RedisServer

FEW = 10
GROWTH_SHARE = 0.4
NEVER = "100"  # A threshold that nothing here crosses.
USED_BEFORE = PRICES["output"]  # What `used` stores have counted for each agreement: one token.


def size(plan: Plan) -> list[Row]:
    """Measure start and memory with much to remember; the books must be right afterwards."""
    workload = Workload(escrow_ids(plan.agreements, "w"))
    starts, memory, peak = [], [], []
    with plan.stage.sandbox(workload.escrows) as sandbox:
        for number in range(plan.repeat):
            started = time.monotonic()
            with plan.stage.daemon(
                sandbox, workload.escrows, known=plan.known, used=True, amount=NEVER
            ) as daemon:
                daemon.daemon.wait_ready(START_TIMEOUT_S)
                starts.append(time.monotonic() - daemon.started)
                plan.say(f"{number + 1}. up after {starts[-1]:.2f} s")
                if number == 0:
                    daemon.wait_settled_in()
                    daemon.check(workload, before=USED_BEFORE)
                    plan.say(f"every escrow read after {time.monotonic() - started:.0f} s")
                now, most = memory_mb(daemon.pid)
                memory.append(now)
                peak.append(most)
    what = f"{plan.known:,} known ids and {plan.agreements:,} agreements"
    return [
        Row(
            "memory",
            f"Memory with {what}",
            Figure((memory[0],), "MB"),
            Goal(700, 400, more_is_better=False),
            {
                "peak": Figure((peak[0],), "MB"),
                "just started": Figure(tuple(memory[1:] or memory), "MB"),
            },
            ("resident, after every escrow was read and every agreement listed once",),
        ),
        Row(
            "start",
            f"Start with {what}",
            Figure(tuple(starts), "s"),
            Goal(3, 1, more_is_better=False),
            {},
            ("from starting the process to its first answer over HTTP",),
        ),
    ]


def idle(plan: Plan) -> list[Row]:
    """Measure the processor time of a daemon that has sources and agreements and nothing to do."""
    workload = Workload(escrow_ids(FEW, "i"))
    with (
        RedisServer(appendonly=False) as redis_server,
        MosquittoServer(persistence=False) as mosquitto,
        plan.stage.sandbox(workload.escrows) as sandbox,
        plan.stage.daemon(
            sandbox,
            workload.escrows,
            sources=REDIS.format(url=redis_server.url, mode="exclusive")
            + MQTT.format(port=mosquitto.port),
        ) as daemon,
    ):
        daemon.wait_settled_in()
        before = cpu_seconds(daemon.pid)
        time.sleep(plan.idle_s)
        spent = (cpu_seconds(daemon.pid) - before) * 60 / plan.idle_s
        daemon.check(workload)
    return [
        Row(
            "idle",
            "Idle: processor time in a minute, Redis and MQTT connected",
            Figure((spent,), "s/min"),
            Goal(0.6, 0.2, more_is_better=False),
            {},
            (f"over {plan.idle_s:g} s, {FEW} agreements",),
        )
    ]


def growth(plan: Plan) -> list[Row]:
    """Measure an event's processor time as known ids and agreements grow, one after the other."""
    count = int(plan.events * GROWTH_SHARE)
    small = Workload(escrow_ids(FEW, "g"))
    large = Workload(escrow_ids(plan.agreements, "w"))

    def cost(workload: Workload, known: int) -> float:
        with laid_down(workload, count) as (server, client):
            client.delete(STREAM)
            sources = REDIS.format(url=server.url, mode="exclusive")
            with (
                plan.stage.sandbox(workload.escrows) as sandbox,
                plan.stage.daemon(
                    sandbox, workload.escrows, known=known, sources=sources, amount=NEVER
                ) as daemon,
            ):
                _, processor = drained(daemon, client)
                daemon.check(workload)
                return processor / count * 1e6

    def fresh(workload: Workload) -> Workload:
        return Workload(workload.escrows)

    most = f"{plan.known:,} known"
    found = plan.alternately(
        {
            f"{FEW} agreements, 0 known": lambda: cost(fresh(small), 0),
            f"{FEW} agreements, {most}": lambda: cost(fresh(small), plan.known),
            f"{plan.agreements:,} agreements, {most}": lambda: cost(fresh(large), plan.known),
        },
        "us/event",
        1 if plan.smoke else min(plan.repeat, 3),
    )
    first, second, third = found.values()
    return [
        Row(
            f"growth-{name}",
            f"Processor time for one event as {what}",
            Figure((later.median / first.median,), "x"),
            Goal(2, 1.3, more_is_better=False),
            parts,
            notes,
        )
        for name, what, later, parts, notes in (
            ("ids", f"known ids grow from 0 to {plan.known:,}", second, found, ()),
            (
                "agreements",
                f"agreements grow from {FEW} to {plan.agreements:,}, too",
                third,
                {},
                (
                    f"{count:,} events: nearly each of a batch is another agreement's,",
                    "so nearly each event writes a counter and an agreement of its own",
                ),
            ),
        )
    ]
