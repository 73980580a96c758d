"""One agreement on the demo's stage: its example configuration, its own account, and the proof.

The rule: what is expected is worked out here in decimals of the standard library, from the prices
that stand in the example file. It knows nothing of meterd's ledger, so that the two can disagree.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import time
import tomllib
from collections.abc import Awaitable, Callable, Mapping
from decimal import ROUND_FLOOR, Decimal
from typing import Any

from rich.console import Console
from rich.table import Table

from meterd.demo.stage import PAYER_KEY, PROVIDER_KEY, Stage
from meterd.errors import MeterdError

QUANTUM = Decimal("0.000001")
WAIT_S = 30.0
LOOK_S = 0.05
TEXT_CHARS = 66
PAYER, PROVIDER = "agent_payer", "agent_provider"
SERVICE_URL = 'base_url = "https://escrow.purpleflea.com/api/v1"'
# What is added to the example, so that seconds are enough for it.
HEAD = """\
[daemon]
data_dir = "{data_dir}"

[http]
listen = "127.0.0.1:{port}"

"""
ESCROW = """\
base_url = "{escrow}/api/v1"
api_key = "{key}"
in_doubt_quarantine = "2s"
observe_gap = "300ms"
min_interval = "300ms"
request_timeout = "5s\""""
_SOURCE = re.compile(r"^\[\[sources\]\]\n(?:[^\n\[].*\n)*\n*", re.MULTILINE)
_PERIOD = re.compile(r'^period = ".*"$', re.MULTILINE)

Usage = dict[str, Any]


class Scene:
    """One agreement under one example, and what the paid service knows of it.

    expected   what the usage so far costs, and all that was due besides.
    usage      by period, what `POST /v1/quote` is asked about at the end.
    beat       seconds between two steps; `week`: what a period lasts here.
    """

    def __init__(
        self,
        stage: Stage,
        console: Console,
        name: str,
        example: str,
        *,
        seconds: int,
        renewed: bool = False,
    ) -> None:
        self.stage, self.console, self.name = stage, console, name
        self._example = example
        document = tomllib.loads(example)
        ((self.plan_name, self.plan),) = document["plans"].items()
        self._entry: Mapping[str, Any] = document["agreements"][0]
        self._agent: str = document["escrow"].get("agent_id", PROVIDER)
        self._numbers = itertools.count(1)
        self.beat = seconds / 10
        # A story that does not wait for its week's end has time enough.
        self.week = max(6, seconds * 3 // 5) if renewed else 60 + 2 * seconds
        self.escrows: dict[str, list[str]] = {}
        self.agreement = ""
        self.expected = Decimal(0)
        self.usage: list[list[Usage]] = [[]]

    # -- Before it begins --------------------------------------------------------------------------

    async def begin(self) -> None:
        """Lock what the plan says, start meterd on the example, wait until it is adopted."""
        await self.stage.open_service(self.console)
        for role, name in self._entry["escrows"].items():
            self.escrows[role] = [PAYER if role == "wallet" else await self.lock(role)]
            self._example = self._example.replace(f'"{name}"', f'"{self.escrows[role][0]}"')
        self.agreement = self._entry.get("id") or next(iter(self.escrows.values()))[0]
        await self.stage.open_daemon(self.console, self._configuration())
        self._say_what_is_played()
        await self.until(self._adopted, "the escrows are not adopted")

    async def _adopted(self) -> bool:
        return all(Decimal(one["total"]) > 0 for one in (await self.shown())["escrows"])

    def _configuration(self) -> str:
        text = _SOURCE.sub("", self._example)
        text = text.replace(f'"{self._agent}"', f'"{PROVIDER}"')
        text = text.replace(f'"{self._entry["payer"]}"', f'"{PAYER}"')
        text = _PERIOD.sub(f'period = "{self.week}s"', text)
        own = ESCROW.format(escrow=self.stage.addresses.escrow, key=PROVIDER_KEY)
        head = HEAD.format(data_dir=self.stage.data_dir, port=self.stage.port)
        return head + text.replace(SERVICE_URL, own)

    def _say_what_is_played(self) -> None:
        self.console.print(
            f"config/{self.name}.toml as it stands, but for addresses, keys, agents and escrows; "
            "usage goes over HTTP, and waits that protect real money are short."
        )
        if "period" in self.plan:
            self.console.print(f"A week lasts {self.week} s here.")
        self.console.print()

    async def lock(self, role: str) -> str:
        """Lock an escrow as the payer does, with the amount that the plan says; its id."""
        fee = self.plan.get("fee")
        amount = fee if role == "base" else self.plan.get("deposit", fee)
        body: dict[str, Any] = {
            "to_agent_id": PROVIDER,
            "amount": amount,
            "memo": self.plan.get("memo", ""),
        }
        if "auto_release_hours" in self.plan:
            body["auto_release_hours"] = self.plan["auto_release_hours"]
        locked = await self.stage.call("POST", self._service("/escrow"), body, PAYER_KEY)
        escrow = str(locked["escrow_id"])
        self.console.print(f"The payer locks   {amount} USDC in {escrow} ({role})")
        return escrow

    async def bind_next(self, role: str, escrow: str) -> None:
        """Bind one more escrow, behind those that the agreement has."""
        self.escrows[role].append(escrow)
        url = self._daemon(f"/v1/agreements/{self.agreement}")
        await self.stage.call("PUT", url, {"plan": self.plan_name, "escrows": self.escrows})

    # -- What happens ------------------------------------------------------------------------------

    async def send(self, *events: dict[str, Any]) -> Any:
        """Send events that need no id of one's own; what became of them."""
        whole = [
            {"id": self.next_id(), "source": "demo", "agreement": self.agreement, **event}
            for event in events
        ]
        return await self.stage.call("POST", self._daemon("/v1/events"), whole)

    def next_id(self) -> str:
        """An id for an event."""
        return f"{self.name}-{next(self._numbers)}"

    async def use(self, meter: str, quantity: int, **dimensions: str) -> str:
        """Tell a usage and note it for the bill; the event's id. The price is the story's."""
        event = {"id": self.next_id(), "meter": meter, "quantity": quantity}
        await self._accepted(await self.send({**event, "dimensions": dimensions}))
        self.note(meter, quantity, **dimensions)
        return str(event["id"])

    async def count(self, meter: str, calls: int) -> None:
        """Tell so many calls, each an event of its own, in one request."""
        events = [{"meter": meter, "quantity": 1} for _ in range(calls)]
        await self._accepted(await self.send(*events))
        self.note(meter, calls)

    async def _accepted(self, answer: Any) -> None:
        if answer["rejected"]:
            raise MeterdError(f"an event was rejected: {answer['rejected'][0]}")

    def note(self, meter: str, quantity: int | str, **dimensions: str) -> None:
        """Keep a usage of the running period for the bill."""
        self.usage[-1].append({"meter": meter, "quantity": quantity, "dimensions": dimensions})

    async def ask_gate(self, meter: str, quantity: int, *, hold: bool = False) -> Any:
        """Ask whether a call may be served, and set its price aside where `hold`."""
        body: dict[str, Any] = {"agreement": self.agreement, "meter": meter, "quantity": quantity}
        if hold:
            body["hold"] = 60
        url = self._daemon("/v1/authorize")
        return await self.stage.call("POST", url, body, allowed=(402,))

    async def end_hold(self, hold: str, how: str) -> None:
        """Capture or void a hold."""
        await self.stage.call("POST", self._daemon(f"/v1/holds/{hold}/{how}"), {})

    # -- Looking -----------------------------------------------------------------------------------

    async def shown(self) -> Any:
        """The agreement as meterd shows it."""
        return await self.stage.call("GET", self._daemon(f"/v1/agreements/{self.agreement}"))

    async def accrued(self) -> Decimal:
        """What meterd says is owed for usage so far, exactly."""
        return Decimal((await self.shown())["accrued"])

    async def moved(self) -> tuple[Decimal, Decimal]:
        """What the service says that it has released, and refunded."""
        released = refunded = Decimal(0)
        for role, ids in self.escrows.items():
            for escrow in ids:
                if role == "wallet":
                    url = self._service(f"/wallet/{escrow}")
                    wallet = await self.stage.call("GET", url, key=PROVIDER_KEY)
                    released += Decimal(wallet["debited"])
                    continue
                url = self._service(f"/escrow/{escrow}")
                read = await self.stage.call("GET", url, key=PAYER_KEY)
                released += Decimal(read["released_amount"])
                refunded += Decimal(read["refunded_amount"])
        return released, refunded

    async def step(self, text: str) -> None:
        """Wait until meterd owes what is expected, a beat for money to move, then say so."""
        await self.until(self.owes_it, f"{text}: not what is expected")
        await asyncio.sleep(self.beat)
        shown = await self.shown()
        released, _ = await self.moved()
        held = f"  held {shown['holds']}" if Decimal(shown["holds"]) else ""
        self.console.print(
            f"{text:<{TEXT_CHARS}}  accrued {plain(Decimal(shown['accrued'])):<8}"
            f"  released {plain(released)}{held}",
            highlight=False,
            soft_wrap=True,
        )

    async def owes_it(self) -> bool:
        """Whether meterd owes what is expected."""
        return await self.accrued() == self.expected

    async def until(self, condition: Callable[[], Awaitable[bool]], otherwise: str) -> None:
        """Wait for something that may take a moment. Raises `MeterdError`."""
        give_up = time.monotonic() + WAIT_S + self.week
        while True:
            with contextlib.suppress(MeterdError):
                if await condition():
                    return
            if time.monotonic() > give_up:
                raise MeterdError(f"{otherwise} within {WAIT_S:g} s")
            await asyncio.sleep(LOOK_S)

    # -- The end -----------------------------------------------------------------------------------

    async def close(self) -> None:
        """Close the agreement, and wait until the last amount has moved.

        To close is to end the running period, so its fee is due.
        """
        fee = Decimal(self.plan.get("fee", 0))
        self.expected += fee
        url = self._daemon(f"/v1/agreements/{self.agreement}/close")
        await self.stage.call("POST", url, {"reason": "the life of the demo is over"})
        await self.until(self._closed, "the agreement is not closed")
        await self.step("closed: the week ends with it, its fee is due" if fee else "closed")

    async def _closed(self) -> bool:
        return bool((await self.shown())["state"] == "closed")

    async def bill(self) -> Decimal:
        """Print what was used with its working, period by period, as meterd quotes it; the sum."""
        table = Table(title="The bill, with its working", title_justify="left")
        for name in ("what", "working"):
            table.add_column(name, overflow="fold")
        for name in ("charge", "from"):
            table.add_column(name, justify="right", no_wrap=True)
        total = Decimal(0)
        for usage in self.usage:
            body = {"plan": self.plan_name, "usage": usage}
            quoted = await self.stage.call("POST", self._daemon("/v1/quote"), body)
            total += Decimal(quoted["total"])
            for line in quoted["lines"]:
                working = "\n".join(line["working"])
                table.add_row(line["rate"], working, line["charge"], line["role"])
        self.console.print(table)
        return total

    async def prove(self) -> bool:
        """Hold four accounts together: the service's own, meterd's, its bill, the escrow's."""
        billed = await self.bill()
        locked = await self._locked()
        back = self._back(locked)
        with contextlib.suppress(MeterdError):  # A refund may take the service a moment.
            await self.until(lambda: self._refunded(back), "not refunded")
        accrued = await self.accrued()
        released, refunded = await self.moved()
        table = Table(title="The proof", title_justify="left")
        figures = {
            "expected\nthe service": self.expected,
            "billed\nquote": billed,
            "accrued\nmeterd": accrued,
            "released\nthe escrow": released,
            "refunded\nthe escrow": refunded,
            "difference": self.payable - released,
        }
        for heading in figures:
            table.add_column(heading, justify="right")
        table.add_row(*map(plain, figures.values()))
        self.console.print(table)
        agreed = (
            self.expected == accrued == billed and released == self.payable and refunded == back
        )
        self.console.print(
            "[green]Difference 0: paid is exactly what was used.[/green]"
            if agreed
            else "[red]The figures differ. That must not happen: please report it.[/red]"
        )
        return agreed

    @property
    def payable(self) -> Decimal:
        """What must have been released in the end: the expected, cut at the quantum."""
        return self.expected.quantize(QUANTUM, ROUND_FLOOR)

    async def _locked(self) -> Decimal:
        shown = await self.shown()
        return sum((Decimal(one["total"]) for one in shown["escrows"]), Decimal(0))

    def _back(self, locked: Decimal) -> Decimal:
        """What the payer must have back: the rest, where the example asks for it."""
        return locked - self.payable if self.plan.get("at_close") == "refund" else Decimal(0)

    async def _refunded(self, back: Decimal) -> bool:
        _, refunded = await self.moved()
        return refunded == back

    def _service(self, path: str) -> str:
        return f"{self.stage.addresses.escrow}/api/v1{path}"

    def _daemon(self, path: str) -> str:
        return f"{self.stage.addresses.daemon}{path}"


def plain(amount: Decimal) -> str:
    """An amount without needless zeros."""
    return "0" if amount == 0 else f"{amount.normalize():f}"
