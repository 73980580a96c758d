"""The story of the demo: open agreements, use the service, close, and compare the figures."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from decimal import Decimal
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from meterd.demo.customers import cast
from meterd.demo.service import (
    Customer,
    Gate,
    bad_event,
    open_agreements,
    serve,
    transports,
)
from meterd.demo.stage import PROVIDER_KEY, Stage
from meterd.errors import MeterdError

LOOK_INTERVAL_S = 0.5
PLAIN_INTERVAL_S = 5.0  # Without a terminal the table is printed anew, so less often.
CATCH_UP_S = 60.0


async def play(stage: Stage, console: Console, *, crash: bool, seconds: int) -> bool:
    """Play all of it; whether every figure agrees. Raises `MeterdError`."""
    customers = cast()
    await open_agreements(stage, customers)
    console.print(
        f"{len(customers)} customers use the service for {seconds} s"
        + ("; meterd is killed again and again meanwhile." if crash else ".")
    )
    over = asyncio.Event()
    kills = Kills()
    async with transports(stage) as ways:
        async with asyncio.TaskGroup() as group:
            for number, customer in enumerate(customers):
                serving = serve(customer, ways[customer.transport], Gate(stage), over, number)
                group.create_task(serving, name=customer.name)
            await ways["redis"].send([bad_event(customers[1])])
            if crash:
                group.create_task(kill_again_and_again(stage, over, kills), name="kills")
            await watch(stage, console, customers, kills, seconds)
            over.set()
        for customer in customers:
            await customer.leave(ways[customer.transport])
    await settle_up(stage, console, customers)
    return await prove(stage, console, customers, kills)


class Kills:
    """How often the daemon was killed."""

    count = 0


async def kill_again_and_again(stage: Stage, over: asyncio.Event, kills: Kills) -> None:
    """Kill the daemon every few seconds, at no particular moment."""
    while not over.is_set():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(random.uniform(1.0, 5.0)):  # noqa: S311 - no secret.
                await over.wait()
        if not over.is_set():
            await stage.daemon.kill()
            kills.count += 1
            await stage.restart_daemon()


async def watch(
    stage: Stage, console: Console, customers: list[Customer], kills: Kills, seconds: int
) -> None:
    """Show how money flows until the time is over."""
    end = time.monotonic() + seconds
    interval = LOOK_INTERVAL_S if console.is_terminal else PLAIN_INTERVAL_S
    shown = await picture(stage, customers, kills, end)
    with Live(shown, console=console, auto_refresh=False, transient=True) as live:
        while (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(interval, left))
            shown = await picture(stage, customers, kills, end)
            if console.is_terminal:
                live.update(shown, refresh=True)
            else:
                console.print(shown)


async def picture(
    stage: Stage, customers: list[Customer], kills: Kills, end: float
) -> Group | Text:
    """The state of things as meterd tells it, or that it is down."""
    left = max(0, round(end - time.monotonic()))
    try:
        agreements = await _agreements(stage)
        status = await stage.call("GET", f"{stage.addresses.daemon}/v1/status")
    except MeterdError:
        return Text(f"meterd is down (killed {kills.count} times); it comes back. {left} s left.")
    table = Table(title=f"Is money flowing? {left} s left", title_justify="left")
    for name in ("customer", "plan", "over", "state"):
        table.add_column(name)
    for name in ("events", "accrued", "released", "unsettled"):
        table.add_column(name, justify="right")
    for customer in customers:
        row = agreements.get(customer.agreement, {})
        table.add_row(
            customer.name,
            customer.plan,
            customer.transport,
            str(row.get("state", "")),
            str(row.get("events", "")),
            *(str(row.get(name, ""))[:12] for name in ("accrued", "released", "unsettled")),
        )
    words = f"dead letters: {status.get('dead_letters', 0)}   dashboard: {stage.dashboard}"
    if kills.count:
        words += f"   killed: {kills.count} times"
    return Group(table, Text(words))


async def _agreements(stage: Stage) -> dict[str, Any]:
    page = await stage.call("GET", f"{stage.addresses.daemon}/v1/agreements?limit=100")
    return {row["id"]: row for row in page["items"]}


async def settle_up(stage: Stage, console: Console, customers: list[Customer]) -> None:
    """Wait until every event has come through, close the agreements, wait for the last release."""
    console.print("The time is over: waiting for the last events, then closing the agreements …")

    async def counted() -> bool:
        rows = await _agreements(stage)
        return all(rows[customer.agreement]["events"] >= customer.events for customer in customers)

    async def closed() -> bool:
        return all(row["state"] == "closed" for row in (await _agreements(stage)).values())

    await _until(counted, "not every event has come through")
    for customer in customers:
        url = f"{stage.addresses.daemon}/v1/agreements/{customer.agreement}/close"
        await stage.call("POST", url, {"reason": "the demo is over"})
    await _until(closed, "not every agreement is closed")


async def _until(condition: Any, otherwise: str) -> None:
    deadline = time.monotonic() + CATCH_UP_S
    while True:
        with contextlib.suppress(MeterdError):
            if await condition():
                return
        if time.monotonic() > deadline:
            raise MeterdError(f"{otherwise} within {CATCH_UP_S:g} s")
        await asyncio.sleep(0.1)


async def prove(stage: Stage, console: Console, customers: list[Customer], kills: Kills) -> bool:
    """Hold three accounts together: the paid service's, meterd's and the escrow service's."""
    rows = await _agreements(stage)
    table = Table(title="The proof", title_justify="left", show_footer=True)
    sums = [Decimal(0)] * 4
    lines = []
    for customer in customers:
        released = await _released(stage, customer)
        figures = [
            customer.used,
            Decimal(rows[customer.agreement]["accrued"]),
            released,
            customer.payable - released,
        ]
        sums = [total + figure for total, figure in zip(sums, figures, strict=True)]
        agrees = figures[0] == figures[1] and figures[3] == 0
        lines.append((customer, figures, agrees))
    table.add_column("customer", footer="all")
    table.add_column("events", justify="right", footer=str(sum(c.events for c in customers)))
    names = ("used (the service)", "accrued (meterd)", "released (the escrow)", "difference")
    for name, total in zip(names, sums, strict=True):
        table.add_column(name, justify="right", footer=_plain(total))
    table.add_column("")
    for customer, figures, agrees in lines:
        mark = "agrees" if agrees else "[red]DIFFERS[/red]"
        shown = map(_plain, figures)
        table.add_row(customer.name, str(customer.events), *shown, mark)
    console.print(table)
    status = await stage.call("GET", f"{stage.addresses.daemon}/v1/status")
    if kills.count:
        console.print(f"meterd was killed with SIGKILL {kills.count} times meanwhile.")
    console.print(
        f"Dead letters: {status['dead_letters']} (one event was broken on purpose). What is used "
        "beyond the last 0.000001 USDC is never rounded away; it stays accrued."
    )
    agreed = all(agrees for _, _, agrees in lines)
    console.print(
        "[green]Difference 0: paid is exactly what was used.[/green]"
        if agreed
        else "[red]The figures differ. That must not happen: please report it.[/red]"
    )
    return agreed


async def _released(stage: Stage, customer: Customer) -> Decimal:
    """What the service says has left his escrows, or his wallet, for the provider."""
    released = Decimal(0)
    for role, escrow in customer.escrows.items():
        of_wallet = role == "wallet"
        place, figure = ("wallet", "debited") if of_wallet else ("escrow", "released_amount")
        url = f"{stage.addresses.escrow}/api/v1/{place}/{escrow}"
        released += Decimal((await stage.call("GET", url, key=PROVIDER_KEY))[figure])
    return released


def _plain(amount: Decimal) -> str:
    return "0" if amount == 0 else f"{amount.normalize():f}"
