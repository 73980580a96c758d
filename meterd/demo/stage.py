"""The stage of the demo: every process, its address, and the configuration between them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
from rich.console import Console

from meterd.demo import brokers
from meterd.demo.processes import Child, free_port
from meterd.errors import MeterdError

DASHBOARD_PORT = 8787
PROVIDER_KEY = "pf_live_sandbox_provider"  # The sandbox's own development keys; no secrets.
PAYER_KEY = "pf_live_sandbox_payer"

CONFIG = """
[daemon]
data_dir = "{directory}/state"

[http]
listen = "127.0.0.1:{port}"

[escrow]
base_url = "{escrow}/api/v1"
api_key = "{key}"
in_doubt_quarantine = "2s"
observe_gap = "300ms"
min_interval = "500ms"
request_timeout = "5s"
voids_per_day = 1000
doubts_max = 100

[meters.tokens]
unit = "token"

[meters.calls]
aggregation = "count"
unit = "call"

[meters.seconds]
unit = "second"

[plans.tokens]
pattern = "pay_per_token"
rates = [
    {{ meter = "tokens", price = "0.0005", per = 1000, where = {{ kind = "input" }} }},
    {{ meter = "tokens", price = "0.002", per = 1000, where = {{ kind = "output" }} }},
]
settle = {{ amount = "0.02", interval = "5s", min_release = "0.000001" }}

[plans.calls]
pattern = "streaming"
rates = [{{ meter = "calls", price = "0.001" }}]
settle = {{ units = "100", interval = "10s", min_release = "0.000001" }}

[plans.speech]
pattern = "streaming"
rates = [{{ meter = "seconds", price = "0.36", per = 3600 }}]
settle = {{ amount = "0.005", interval = "5s", min_release = "0.000001" }}

[meters.requests]
aggregation = "count"

[meters.pages]
aggregation = "count"

[meters.units]

[plans.single]
pattern = "pay_per_call"
rates = [{{ meter = "calls", price = "0.001" }}]

[plans.pages]
pattern = "pay_per_call"
draws_on = "escrow"
rates = [{{ meter = "pages", price = "0.05" }}]
settle = {{ amount = "0.10", min_release = "0.000001" }}

[plans.pass]
pattern = "subscription"
fee = "2.00"
quota = {{ meter = "requests", units = 1000 }}

[plans.project]
pattern = "milestone"
deposit = "2.00"
tranches = [
    {{ name = "draft", amount = "0.50" }},
    {{ name = "build", amount = "1.00" }},
    {{ name = "launch", amount = "0.50" }},
]

[plans.answer]
pattern = "performance"
deposit = "3.00"
steps = [{{ score = "0.9", share = "1" }}, {{ score = "0.7", share = "0.70" }}]

[meters.words]
event_type = "completion"
value = "$.usage.words"
dimensions = {{ model = "$.model" }}

[meters.answers]
event_type = "completion"
aggregation = "count"

[plans.chat]
pattern = "streaming"
rates = [
    {{ meter = "words", price = "0.00002", where = {{ model = "large" }} }},
    {{ meter = "words", price = "0.00001" }},
    {{ meter = "answers", price = "0.0005" }},
]
settle = {{ amount = "0.02", interval = "5s", min_release = "0.000001" }}

[plans.mixed]
pattern = "hybrid"
fee = "2.00"
deposit = "2.00"
rates = [{{ meter = "units", price = "0.01", free_units = 100 }}]
settle = {{ amount = "0.20", interval = "5s", min_release = "0.000001" }}
"""
REDIS = """
[[sources]]
kind = "redis"
name = "redis"
url = "redis://127.0.0.1:{port}/0"
"""
MQTT = """
[[sources]]
kind = "mqtt"
name = "mqtt"
port = {port}
protocol = "{protocol}"
username = "meterd"
"""


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the processes listen."""

    daemon: str
    escrow: str
    redis_port: int | None = None
    mqtt_port: int | None = None


class Stage:
    """All child processes of one demo."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._children: list[Child] = []
        self._session: aiohttp.ClientSession | None = None
        self.daemon: Child
        self.port: int
        self.addresses: Addresses

    async def __aenter__(self) -> Self:
        for name in ("redis", "mqtt"):
            (self._directory / name).mkdir()
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for child in reversed(self._children):
            await child.stop()
        if self._session is not None:
            await self._session.close()

    @property
    def data_dir(self) -> Path:
        """Where the daemon keeps its data."""
        return self._directory / "state"

    @property
    def dashboard(self) -> str:
        """The address of the daemon's page."""
        return f"{self.addresses.daemon}/"

    async def build(self, console: Console, *, crash: bool) -> None:
        """Start everything, and say what runs where. Raises `MeterdError`."""
        await self.open_service(console)
        redis = await brokers.redis(self._directory / "redis")
        if redis is not None:
            self._children.append(redis.child)
            console.print(f"Redis            port {redis.port}  ({redis.origin})")
        mqtt = await brokers.mqtt(self._directory / "mqtt")
        if mqtt is not None:
            self._children.append(mqtt.child)
            console.print(f"MQTT broker      port {mqtt.port}  ({mqtt.origin})")
        if redis is None or mqtt is None:
            missing = " and ".join(
                name for name, broker in (("Redis", redis), ("MQTT", mqtt)) if broker is None
            )
            console.print(
                f"No {missing} on this machine and none in the Python packages: "
                "those customers' usage goes over HTTP instead."
            )
        if mqtt is not None and crash and not mqtt.keeps_unacked:
            console.print(
                "This MQTT broker forgets what a killed client has not acked; with --crash "
                "those customers' usage goes over HTTP instead."
            )
            mqtt = None
        config = CONFIG.format(
            directory=self._directory,
            port=self.port,
            escrow=self.addresses.escrow,
            key=PROVIDER_KEY,
        )
        if redis is not None:
            config += REDIS.format(port=redis.port)
        if mqtt is not None:
            config += MQTT.format(port=mqtt.port, protocol=mqtt.protocol)
        self.addresses = replace(
            self.addresses,
            redis_port=None if redis is None else redis.port,
            mqtt_port=None if mqtt is None else mqtt.port,
        )
        await self.open_daemon(console, config)

    async def open_service(self, console: Console) -> None:
        """Start the escrow service; addresses are settled from now on. Raises `MeterdError`."""
        escrow_port, self.port = free_port(8788), free_port(DASHBOARD_PORT)
        escrow = f"http://127.0.0.1:{escrow_port}"
        self.addresses = Addresses(f"http://127.0.0.1:{self.port}", escrow)
        sandbox = Child(
            "sandbox",
            [
                *(sys.executable, "-m", "meterd", "sandbox"),
                *("--listen", f"127.0.0.1:{escrow_port}"),
                *("--data-file", str(self._directory / "sandbox.db")),
            ],
            self._directory / "sandbox.log",
        )
        await self._add(sandbox, f"{escrow}/_totals")
        console.print(f"Escrow service   {escrow}  (the sandbox; its money is made up)")

    async def open_daemon(self, console: Console, config: str) -> None:
        """Start meterd on a configuration. Raises `MeterdError`."""
        path = self._directory / "meterd.toml"
        path.write_text(config)
        self.daemon = Child(
            "meterd",
            [sys.executable, "-m", "meterd", "run", "-c", str(path)],
            self._directory / "meterd.log",
        )
        await self._add(self.daemon, f"{self.addresses.daemon}/healthz")
        there = importlib.util.find_spec("mcp") is not None
        agents = "for agents" if there else "for agents, after: pip install 'meterd[mcp]'"
        console.print(f"MCP server       {self.addresses.daemon}/mcp  ({agents})", markup=False)
        console.print(f"[bold]Dashboard        {self.dashboard}[/bold]")

    async def _add(self, child: Child, health: str) -> None:
        self._children.append(child)
        await child.start()
        await child.ready(lambda: self.answers(health))

    async def answers(self, url: str) -> bool:
        """Whether an address answers with success."""
        try:
            await self.call("GET", url)
        except MeterdError:
            return False
        return True

    async def call(
        self,
        method: str,
        url: str,
        body: object = None,
        key: str = "",
        allowed: Container[int] = (),
    ) -> Any:
        """One call; the decoded JSON answer, or None. `allowed`: refusals that are answers too.

        Raises `MeterdError` for whatever goes wrong.
        """
        assert self._session is not None
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            async with self._session.request(method, url, json=body, headers=headers) as answer:
                if answer.status >= 400 and answer.status not in allowed:
                    text = (await answer.text())[:200]
                    raise MeterdError(f"{method} {url} answered {answer.status}: {text}")
                if answer.content_type != "application/json":
                    return None
                return await answer.json()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise MeterdError(f"{method} {url}: {error}") from None

    async def restart_daemon(self) -> None:
        """Start the daemon again after it was killed."""
        await self.daemon.start()
        await self.daemon.ready(lambda: self.answers(f"{self.addresses.daemon}/healthz"))

    def last_words(self) -> str:
        """The end of every log."""
        return "\n".join(child.last_words() for child in self._children)
