"""The daemon and the sandbox as real processes, for tests that kill them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PROVIDER_KEY = "pf_live_sandbox_provider"
PAYER_KEY = "pf_live_sandbox_payer"


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def wait_until(condition: Callable[[], Awaitable[bool]], seconds: float) -> None:
    """Wait for a condition; a time-out is a failure that names what was waited for."""
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {condition}"
        await asyncio.sleep(0.1)


def call(method: str, url: str, body: object = None, key: str = "") -> Any:
    """One JSON call; the decoded answer. Raises `urllib.error.HTTPError` for 4xx and 5xx."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, data, headers, method=method)
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.loads(response.read() or b"null")


class Process:
    """One `python -m meterd …` with its output in a file."""

    def __init__(
        self, arguments: list[str], log: Path, ready_url: str, env: dict[str, str]
    ) -> None:
        self._command = [sys.executable, "-m", "meterd", *arguments]
        self._log = log
        self._ready_url = ready_url
        self._env = {**os.environ, **env}
        self._process: subprocess.Popen[bytes] | None = None
        self.kills = 0
        self.returncode: int | None = None

    def start(self) -> None:
        """Start, and do not wait."""
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=self._env
            )

    def wait_ready(self, seconds: float = 30) -> None:
        """Wait until it answers; fails with the end of its log."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                with urllib.request.urlopen(self._ready_url, timeout=5):
                    return
            except (OSError, urllib.error.URLError):
                assert self._process is not None
                dead = self._process.poll() is not None
                if dead or time.monotonic() > deadline:
                    raise AssertionError(f"not ready:\n{self.log_tail()}") from None
                time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL: no handler runs, nothing is flushed."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self.kills += 1

    def stop(self, seconds: float = 40) -> None:
        """SIGTERM, and wait for the drain."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        self.returncode = self._process.wait(seconds)

    def signal(self, number: int) -> None:
        """Send any other signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self, seconds: float = 30) -> int:
        """Wait for its own end; the exit code."""
        assert self._process is not None
        self.returncode = self._process.wait(seconds)
        return self.returncode

    def log_tail(self, lines: int = 40) -> str:
        """The end of what it said."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if kind is not None and self._log.exists():
            print(self.log_tail())


class Daemon(Process):
    """`meterd run` on a configuration file."""

    def __init__(self, config: Path, port: int, **env: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        super().__init__(
            ["run", "-c", str(config)], config.with_suffix(".log"), f"{self.url}/healthz", env
        )


class Sandbox(Process):
    """`meterd sandbox` on a directory of its own."""

    provider_key = PROVIDER_KEY

    def __init__(self, directory: Path, **env: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.base = f"http://127.0.0.1:{port}"
        self.api = f"{self.base}/api/v1"
        arguments = [
            "sandbox",
            "--listen",
            f"127.0.0.1:{port}",
            "--data-file",
            str(directory / "sandbox.db"),
        ]
        super().__init__(arguments, directory / "sandbox.log", f"{self.base}/_totals", env)

    def __enter__(self) -> Self:
        super().__enter__()
        self.wait_ready()
        return self

    def lock(self, amount: str, memo: str = "", **more: object) -> str:
        """Lock an escrow for the provider; its id."""
        body = {"to_agent_id": "agent_provider", "amount": amount, "memo": memo, **more}
        return str(call("POST", f"{self.api}/escrow", body, PAYER_KEY)["escrow_id"])

    def status(self, escrow: str) -> Any:
        """The escrow as its payer sees it."""
        return call("GET", f"{self.api}/escrow/{escrow}", key=PAYER_KEY)

    def operations(self, escrow: str) -> list[Any]:
        """All that moved money out of an escrow to its provider, from the service's own log."""
        rows: list[Any] = []
        after = 0
        while after is not None:
            url = f"{self.base}/_operations?escrow_id={escrow}&limit=1000&after={after}"
            page = call("GET", url)
            rows += page["operations"]
            after = page["next"]
        return [row for row in rows if row["kind"].startswith("release")]

    def fault(self, **rule: object) -> None:
        """Ask for a failure."""
        call("POST", f"{self.base}/_faults", rule)
