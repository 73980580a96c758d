"""From usage to money: how soon a release is confirmed, and how many a second leave at once."""

from __future__ import annotations

import json
import time
from decimal import Decimal
from typing import Any

import redis

from bench.figures import Figure, Goal, Row, ratios
from bench.load import Workload, escrow_ids
from bench.plan import Plan
from bench.stage import DONE_TIMEOUT_S, REDIS, Measured, Peer, WrongSum, wait_for
from tests.processes import Sandbox, call
from tests.servers import RedisServer

STREAM = "meterd:usage"
CROSSING = 10_000  # Tokens: 0.02 USDC, twice the threshold.
AMOUNT = "0.01"
SOON_COUNT = 40


def soon(plan: Plan) -> list[Row]:
    """Measure, in a quiet system, from sending the event that crosses to its release."""
    workload = Workload(escrow_ids(2 if plan.smoke else SOON_COUNT, "s"))
    values = []
    with (
        plan.stage.sandbox(workload.escrows) as sandbox,
        plan.stage.daemon(sandbox, workload.escrows, amount=AMOUNT) as daemon,
    ):
        daemon.wait_settled_in()
        time.sleep(2.5)  # An escrow that was just read is paced like one that was just paid.
        for escrow, event in workload.one_each(CROSSING):
            values.append(_until_released(daemon, escrow, event) * 1000)
        daemon.check(workload)
        _check_paid(sandbox, workload)
    figure = Figure(tuple(values), "ms")
    return [
        Row(
            "release-latency",
            "Threshold crossed to release confirmed, quiet system",
            figure,
            Goal(50, 20, more_is_better=False),
            {},
            ("from sending the event over HTTP to seeing the release confirmed, by looking often",),
        )
    ]


def _until_released(daemon: Measured, escrow: str, event: bytes) -> float:
    url = f"{daemon.url}/v1/agreements/{escrow}"
    started = time.monotonic()
    call("POST", f"{daemon.url}/v1/events", json.loads(event))
    released = lambda: call("GET", url)["released"] == "0.02"  # noqa: E731
    return wait_for(released, "a release", 30, 0.001) - started


def _check_paid(sandbox: Sandbox, workload: Workload) -> None:
    """Each escrow was released exactly once, and exactly what is owed."""
    owed = workload.owed()
    rows: list[Any] = []
    page: dict[str, Any] = {"next": 0}
    while page["next"] is not None:
        page = call("GET", f"{sandbox.base}/_operations?limit=1000&after={page['next']}")
        rows += [row for row in page["operations"] if row["kind"].startswith("release")]
    paid = {row["escrow_id"]: Decimal(row["amount"]) for row in rows}
    if len(rows) != len(owed) or paid != owed:
        raise WrongSum(f"{len(rows)} releases of {sum(paid.values())}, owed {sum(owed.values())}")


def at_once(plan: Plan) -> list[Row]:
    """Measure how fast releases leave when every agreement crosses its threshold at once."""
    count = plan.releases

    def meterd() -> float:
        workload = Workload(escrow_ids(count, "m"))
        with (
            RedisServer(appendonly=False) as server,
            redis.Redis.from_url(server.url) as client,
            plan.stage.sandbox(workload.escrows) as sandbox,
            plan.stage.daemon(
                sandbox,
                workload.escrows,
                sources=REDIS.format(url=server.url, mode="exclusive"),
                amount=AMOUNT,
            ) as daemon,
        ):
            daemon.wait_settled_in()
            time.sleep(2.5)
            daemon.hold()
            pipe = client.pipeline(transaction=False)
            for _, event in workload.one_each(CROSSING):
                pipe.execute_command("XADD", STREAM, "*", "event", event)
            pipe.execute()
            started = daemon.go()
            finished = wait_for(lambda: _released(sandbox) == count, "all", DONE_TIMEOUT_S, 0.05)
            confirmed = lambda: daemon.metric('releases_total{outcome="confirmed"') == count  # noqa: E731
            wait_for(confirmed, "all confirmed", 30, 0.05)
            daemon.check(workload)
            _check_paid(sandbox, workload)
            return count / (finished - started)

    def bare() -> float:
        escrows = escrow_ids(count, "m")
        file = plan.stage.new_directory() / "escrows"
        file.write_text("\n".join(escrows))
        with plan.stage.sandbox(escrows) as sandbox:
            arguments = ("--url", sandbox.api, "--escrows-file", file, "--amount", "0.02")
            with Peer("pairs", *arguments) as peer:
                return count / float(peer.result()["seconds"])

    found = plan.alternately({"meterd": meterd, "bare GET + POST": bare}, "releases/s")
    return [
        Row(
            "releases",
            "All agreements due at once, releases a second: meterd : bare GET and POST pairs",
            ratios(found["meterd"], found["bare GET + POST"]),
            Goal(0.5, 0.8),
            found,
            (f"{count:,} agreements, 16 at once; the peer keeps nothing and trusts every answer",),
        )
    ]


def _released(sandbox: Sandbox) -> int:
    operations = call("GET", f"{sandbox.base}/_totals")["operations"]
    return int(operations.get("release_partial", {}).get("count", 0))
