"""One daemon on a configuration that a test writes, and what a test asks of it."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.processes import Daemon, Sandbox, call, free_port

SECONDS = 30  # What a test waits for at most; what is waited for takes a second or two.
METERS = """
[meters.units]
[meters.tokens]
[meters.calls]
aggregation = "count"
"""
PLANS = """
[plans.stream]
pattern = "streaming"
rates = [{ meter = "units", price = "0.001" }]
settle = { amount = "0.01" }

[plans.lazy]
pattern = "streaming"
rates = [{ meter = "units", price = "0.001" }]
settle = { amount = "1000" }
"""


def until(
    condition: Callable[[], Any], what: str | Callable[[], object], seconds: float = SECONDS
) -> Any:
    """Wait until something is true and hand it out; a time-out says what was waited for."""
    give_up = time.monotonic() + seconds
    while not (found := condition()):
        late = time.monotonic() > give_up
        assert not late, f"not within {seconds} s: {what() if callable(what) else what}"
        time.sleep(0.03)
    return found


@dataclass(frozen=True)
class Answer:
    """One answer of the daemon."""

    status: int
    headers: Mapping[str, str]
    raw: bytes

    @property
    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.raw)


class Node(Daemon):
    """A daemon with its configuration, its log as records, and its API."""

    def __init__(
        self, directory: Path, text: str, *, name: str = "meterd", port: int = 0, **env: str
    ) -> None:
        self.directory = directory
        self.port = port or free_port()
        self.data_dir = directory / name
        self.config = directory / f"{name}.toml"
        self.name = name
        self.write(text)
        super().__init__(self.config, self.port, **env)

    def write(self, text: str) -> None:
        """Write the configuration; `[daemon]` and `[http]` may add keys behind what stands here."""
        own = text.replace("@data_dir@", str(self.data_dir))
        self.config.write_text(own.replace("@listen@", f"127.0.0.1:{self.port}"))

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    # -- Logs --------------------------------------------------------------------------------------

    def logged(self, action: str = "") -> list[dict[str, Any]]:
        """The lines of its log, those with this action alone where one is given."""
        lines = self._log.read_text(errors="replace").splitlines()
        records = [json.loads(line) for line in lines if line.startswith("{")]
        return [each for each in records if not action or each.get("action") == action]

    def wait_logged(self, action: str, times: int = 1) -> list[dict[str, Any]]:
        """Wait until it has said something."""
        return until(
            lambda: found if len(found := self.logged(action)) >= times else None,
            lambda: f"{action} in the log:\n{self.log_tail()}",
        )

    # -- Calls -------------------------------------------------------------------------------------

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | object = None,
        *,
        timeout: float = 20,
        **headers: str,
    ) -> Answer:
        """One call, whatever its status. A body that is no bytes is sent as JSON."""
        parts = urlsplit(self.url)
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=timeout)
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, content, named)
            response = connection.getresponse()
            return Answer(response.status, dict(response.headers), response.read())
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        """Ask for something; its JSON, whatever its status."""
        return self.ask("GET", path).json

    def send(self, *events: Mapping[str, object]) -> Any:
        """Post events as a list; what became of them."""
        answer = self.ask("POST", "/v1/events", list(events))
        assert answer.status == 200, answer.raw
        return answer.json

    def use(self, escrow: str, quantity: object, event_id: str, meter: str = "units") -> None:
        """Post one event that must be accepted."""
        event = {"id": event_id, "escrow_id": escrow, "meter": meter, "quantity": quantity}
        answer = self.send(event)
        assert answer == {"accepted": 1, "duplicates": 0, "rejected": []}

    def bind(self, escrow: str, plan: str, name: str = "") -> str:
        """Bind an escrow and wait until it is adopted; the agreement's id."""
        name = name or escrow
        body = {"plan": plan, "escrows": {"main": escrow}}
        answer = self.ask("PUT", f"/v1/agreements/{name}", body)
        assert answer.status == 201, answer.raw
        self.wait_state(name, "active")
        return name

    def agreement(self, name: str) -> Any:
        """An agreement as it stands."""
        return self.get(f"/v1/agreements/{name}")

    def releases(self, name: str) -> list[Any]:
        """Its releases, newest first."""
        return list(self.get(f"/v1/agreements/{name}/releases")["items"])

    def wait_state(self, name: str, *states: str) -> Any:
        """Wait until an agreement is in one of these states."""
        return until(
            lambda: found if (found := self.agreement(name))["state"] in states else None,
            lambda: f"{name} to be {states}: {self.agreement(name)}",
        )

    def wait_agreement(self, name: str, **figures: object) -> Any:
        """Wait until an agreement shows these figures."""
        return until(
            lambda: found if figures.items() <= (found := self.agreement(name)).items() else None,
            lambda: f"{name} to have {figures}: {self.agreement(name)}",
        )

    def wait_sources(self) -> None:
        """Wait until every source is connected."""
        until(
            lambda: self.ask("GET", "/readyz").status == 200,
            lambda: f"ready: {self.get('/readyz')}",
        )

    def requests(self, operation: str) -> int:
        """How many requests of a kind it has made of the escrow service."""
        text = self.ask("GET", "/metrics").raw.decode()
        found = [
            float(line.rsplit(" ", 1)[1])
            for line in text.splitlines()
            if line.startswith(f'meterd_escrow_requests_total{{call="{operation}"')
        ]
        return int(sum(found))

    def type(self, *words: str, env: Mapping[str, str] | None = None) -> Any:
        """Type a command against it; the finished process."""
        return meterd(*words, METERD_CONFIG=str(self.config), **(env or {}))


def meterd(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Type a command; what it printed and its exit code."""
    return subprocess.run(
        [sys.executable, "-m", "meterd", *words],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **env},
        timeout=60,
        check=False,
    )


def configuration(
    sandbox: Sandbox,
    *,
    daemon: str = "",
    http: str = "",
    escrow: str = "",
    rest: str = "",
    plans: str = PLANS,
    key: str = "",
) -> str:
    """A configuration with short durations; each argument adds lines to its table."""
    return f"""
[daemon]
data_dir = "@data_dir@"
{daemon}
[log]
format = "json"
[http]
listen = "@listen@"
{http}
[escrow]
base_url = "{sandbox.api}"
api_key = "{key or sandbox.provider_key}"
{_with_defaults(escrow)}
{METERS}
{plans}
{rest}
"""


def _with_defaults(escrow: str) -> str:
    usual = {
        "in_doubt_quarantine": '"400ms"',
        "observe_gap": '"100ms"',
        "min_interval": '"0s"',
        "request_timeout": '"1s"',
        "voids_per_day": "100",
        "doubts_max": "1000",
    }
    given = {line.split("=")[0].strip() for line in escrow.splitlines()}
    lines = [f"{name} = {value}" for name, value in usual.items() if name not in given]
    return "\n".join([*lines, escrow])


def paid(sandbox: Sandbox, escrow: str) -> Decimal:
    """What has left an escrow for its provider, by the service's own log."""
    return sum((Decimal(row["amount"]) for row in sandbox.operations(escrow)), Decimal(0))


def clear_faults(sandbox: Sandbox) -> None:
    """Let everything go well again."""
    call("DELETE", f"{sandbox.base}/_faults")


def move_clock(sandbox: Sandbox, seconds: float) -> None:
    """Move the service's clock."""
    call("POST", f"{sandbox.base}/_clock", {"advance_s": seconds})
