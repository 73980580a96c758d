"""Everything that a measurement needs around it: sandbox, daemons, filled stores, gates and checks.

The gate makes starts fair: whoever is measured is up, connected and waiting, is stopped with
SIGSTOP while the backlog is laid down, and the clock starts with SIGCONT. The same for peers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from decimal import ROUND_FLOOR, Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import numpy as np

from bench.load import PLAN, Workload
from meterd import app, config
from meterd.core.changes import AgreementRow, CardRow, Change, CounterRow, MarkBlock
from meterd.core.money import MICROS
from meterd.core.pricing import MAIN, Usage
from meterd.core.settlement import Escrow, EscrowStatus
from meterd.sandbox.ledger import Ask, Deadline, Kind, Terms, apply, create, grant
from meterd.sandbox.ledger import Change as SandboxChange
from meterd.sandbox.store import Store as SandboxStore
from meterd.store.sqlite import SqliteStore
from tests.processes import Daemon, Sandbox, call, free_port

HOUR_MS = 3_600_000
HOURS = 72
DEPOSIT = 1000 * MICROS
BLOCK = 5000
CHANGE_ROWS = 5000
TICKS = os.sysconf("SC_CLK_TCK")
START_TIMEOUT_S = 120
DONE_TIMEOUT_S = 600

CONFIG = """
[daemon]
data_dir = "{data_dir}"

[log]
level = "warning"

[http]
listen = "127.0.0.1:{port}"

[dedupe]
entries_max = {entries_max}

[escrow]
base_url = "{escrow}"
api_key = "{key}"
"""
REDIS = '\n[[sources]]\nkind = "redis"\nurl = "{url}"\nmode = "{mode}"\n'
MQTT = '\n[[sources]]\nkind = "mqtt"\nport = {port}\n'


class WrongSum(Exception):
    """The books do not agree with the independent sum: the figure is worth nothing."""


def wait_for(done: Callable[[], bool], what: str, seconds: float, poll_s: float = 0.005) -> float:
    """Wait until something is done; the monotonic moment at which it was seen."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} s: {what}")
        time.sleep(poll_s)
    return time.monotonic()


# -- What a process costs -------------------------------------------------------------------------


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far, all of its threads, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def memory_mb(pid: int) -> tuple[float, float]:
    """Resident memory of a process now, and its peak."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in {"VmRSS", "VmHWM"}:
            found[name] = int(rest.split()[0]) * 1024 / 1e6
    return found["VmRSS"], found["VmHWM"]


# -- Stores that are full already -----------------------------------------------------------------


async def _fill_store(
    directory: Path, settings_file: Path, known: int, escrows: Sequence[str], *, used: bool
) -> None:
    settings = config.load(settings_file, {})
    plan = app.plans_of(settings)["tokens"]
    now_ms = time.time_ns() // 1_000_000
    store = SqliteStore.open(directory, entries_max=max(20_000_000, known * 2))
    store.load()
    await store.commit(Change(cards=(CardRow(plan.card.id, plan.card.text),)))
    quantity = 10**9 if used else 0  # One token: less than any threshold.
    dimensions = (("kind", "output"),)
    usage = {("tokens", dimensions): Usage(quantity)}
    accrued = plan.card.charge(usage)[MAIN] if used else Fraction(0)
    for first in range(0, len(escrows), CHANGE_ROWS):
        names = escrows[first : first + CHANGE_ROWS]
        rows = tuple(
            AgreementRow(
                *(name, "tokens", "", "api", (("main", name),), False, now_ms),
                *(accrued, int(used), quantity, now_ms if used else 0),
            )
            for name in names
        )
        counters = tuple(
            CounterRow(name, plan.card.id, "tokens", dimensions, quantity, 1, number=number)
            for number, name in enumerate(names, first + 1)
        )
        adopted = tuple(
            Escrow(
                *(name, name, "main", EscrowStatus.ACTIVE),
                total=DEPOSIT,
                remaining=DEPOSIT,
                service_status="funded",
                provider="agent_provider",
            )
            for name in names
        )
        await store.commit(
            Change(agreements=rows, counters=counters if used else (), escrows=adopted)
        )
    chance = np.random.default_rng(1)
    newest = now_ms // HOUR_MS
    for first in range(0, known, BLOCK):
        count = min(BLOCK, known - first)
        words = chance.integers(0, 2**64, 2 * count, dtype=np.uint64)
        words[:count].sort()
        data = words.tobytes() + chance.integers(0, 2**32, count, dtype=np.uint32).tobytes()
        bucket = newest - (HOURS - 2) + first * (HOURS - 2) // known
        commit = store.commit(Change(marks=(MarkBlock(bucket, count, data),)))
        if first // BLOCK % 64 == 0:
            await commit
    await store.close()


async def _fill_sandbox(data_file: Path, escrows: Sequence[str]) -> None:
    failed = asyncio.Event()
    store = SandboxStore.open(data_file, failed)
    books, _ = store.load(100)
    now_ms = time.time_ns() // 1_000_000
    payer = Ask("agent_payer")

    def enter(decision: object) -> asyncio.Future[None]:
        assert isinstance(decision, SandboxChange), decision
        apply(books, decision)
        return store.save(decision)

    enter(grant(books, DEPOSIT * (len(escrows) + 1), Kind.GRANT, payer, now_ms))
    for name in escrows:
        terms = Terms(name, "agent_provider", DEPOSIT, None, Deadline.RELEASE)
        enter(create(books, terms, payer, now_ms))
    await store.all_saved()
    await store.close()


# -- The stage ------------------------------------------------------------------------------------


class Stage:
    """A directory with a sandbox, and daemons on copies of filled stores."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="meterd-bench-"))
        self._filled: dict[tuple[int, str, bool, str], Path] = {}
        self._sandboxes: dict[str, Path] = {}
        self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def new_directory(self) -> Path:
        self._number += 1
        directory = self.directory / str(self._number)
        directory.mkdir()
        return directory

    @contextlib.contextmanager
    def sandbox(self, escrows: Sequence[str]) -> Iterator[Sandbox]:
        """Serve an escrow service that holds these escrows already."""
        directory = self.new_directory()
        key = f"{len(escrows)} {escrows[0]}"
        if key not in self._sandboxes:
            filled = self.new_directory() / "sandbox.db"
            asyncio.run(_fill_sandbox(filled, escrows))
            self._sandboxes[key] = filled
        shutil.copy(self._sandboxes[key], directory)
        with Sandbox(directory) as sandbox:
            yield sandbox
        shutil.rmtree(directory, ignore_errors=True)

    @contextlib.contextmanager
    def daemon(
        self,
        sandbox: Sandbox,
        escrows: Sequence[str],
        *,
        known: int = 0,
        sources: str = "",
        amount: str = "0.50",
        used: bool = False,
    ) -> Iterator[Measured]:
        """Run a daemon on a store of its own that knows so many identities and agreements."""
        directory = self.new_directory()
        port = free_port()
        file = directory / "meterd.toml"
        data_dir = directory / "state"
        file.write_text(
            CONFIG.format(
                data_dir=data_dir,
                port=port,
                escrow=sandbox.api,
                key=sandbox.provider_key,
                entries_max=max(20_000_000, known * 2),
            )
            + sources
            + PLAN.format(amount=amount)
        )
        key = (known, f"{len(escrows)} {escrows[0]}", used, amount)
        if key not in self._filled:
            filled = self.new_directory() / "state"
            asyncio.run(_fill_store(filled, file, known, escrows, used=used))
            self._filled[key] = filled
        shutil.copytree(self._filled[key], data_dir)
        os.sync()  # What is still to be written must not be in the way of what is measured.
        started = time.monotonic()
        with Daemon(file, port) as daemon:
            measured = Measured(daemon, sandbox, len(escrows), started)
            try:
                yield measured
            finally:
                measured.go()
                daemon.kill()  # What is measured is measured; a drain would settle for a minute.
        shutil.rmtree(directory, ignore_errors=True)


class Measured:
    """A daemon as a measurement sees it."""

    def __init__(self, daemon: Daemon, sandbox: Sandbox, agreements: int, started: float) -> None:
        self.daemon = daemon
        self.started = started  # Monotonic.
        self.url = daemon.url
        self._sandbox = sandbox
        self._agreements = agreements

    @property
    def pid(self) -> int:
        process = self.daemon._process  # noqa: SLF001  # The tests' own class has no need of it.
        assert process is not None
        return process.pid

    def wait_settled_in(self) -> None:
        """Wait until sources are connected and each escrow had its first visit."""
        self.daemon.wait_ready(START_TIMEOUT_S)
        wait_for(self._ready, "the daemon to be ready", START_TIMEOUT_S, 0.02)
        done = lambda: self.metric('escrow_requests_total{call="read"') >= self._agreements  # noqa: E731
        wait_for(done, "each escrow to be read", DONE_TIMEOUT_S, 0.2)
        time.sleep(0.2)  # For what follows the last reading.

    def _ready(self) -> bool:
        try:
            call("GET", f"{self.url}/readyz")
        except OSError:
            return False
        return True

    def metric(self, beginning: str) -> float:
        """Sum up the series that begin so."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        return sum(
            float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith(f"meterd_{beginning}")
        )

    def hold(self) -> None:
        """Stop it where it stands."""
        os.kill(self.pid, signal.SIGSTOP)

    def go(self) -> float:
        """Let it go on; the moment."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGCONT)
        return time.monotonic()

    def status(self) -> Any:
        return call("GET", f"{self.url}/v1/status")

    def agreements(self) -> list[Any]:
        rows: list[Any] = []
        cursor = ""
        while True:
            page = call("GET", f"{self.url}/v1/agreements?limit=1000{cursor}")
            rows += page["items"]
            if not page.get("next"):
                return rows
            cursor = f"&cursor={page['next']}"

    def check(self, workload: Workload, *, before: Decimal = Decimal(0)) -> None:
        """Hold the books against the workload's own sum. Raises `WrongSum`."""
        owed = workload.owed()
        rows = self.agreements()
        if {row["id"] for row in rows} != set(owed):
            raise WrongSum("the daemon has other agreements than were made")
        for row in rows:
            name = row["id"]
            accrued, released = Decimal(row["accrued"]), Decimal(row["released"])
            if accrued != owed[name] + before:
                raise WrongSum(f"{name}: accrued {accrued}, owed {owed[name] + before}")
            if released > accrued.quantize(Decimal("0.000001"), rounding=ROUND_FLOOR):
                raise WrongSum(f"{name}: released {released} of {accrued}")
        status = self.status()
        events = status["events"]
        expected = (sum(workload.distinct.values()), workload.sent, 0)
        found = (events["accepted"], events["accepted"] + events["duplicates"], events["rejected"])
        if found != expected or status["dead_letters"]:
            raise WrongSum(f"(accepted, delivered, rejected) is {found}, should be {expected}")
        paid = Decimal(call("GET", f"{self._sandbox.base}/_totals")["released_amount"])
        if paid < Decimal(status["totals"]["released"]) or paid > sum(owed.values()):
            raise WrongSum(f"the service paid {paid} of {sum(owed.values())}")


class Peer:
    """Somebody else's way, as a process: `python -m bench.peers WHAT …`."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "bench.peers", *map(str, arguments)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._output = self._process.stdout
        line = self._output.readline()
        if line.strip() != "ready":
            raise RuntimeError(f"the peer {arguments[0]} did not start")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.go()
        self._process.kill()
        self._process.wait()
        self._output.close()

    def hold(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)

    def go(self) -> float:
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGCONT)
        return time.monotonic()

    def result(self) -> dict[str, Any]:
        """Wait for its end; what it printed: at least `finished`, a monotonic moment."""
        line = self._output.readline()
        if not line:
            raise RuntimeError("the peer ended without a result")
        answer: dict[str, Any] = json.loads(line)
        return answer
