"""Child processes that never outlive the demo."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from meterd.errors import MeterdError

STOP_TIMEOUT_S = 10.0


class Child:
    """One child process with its output in a file, in a process group of its own.

    A Ctrl-C in the terminal reaches the demo alone, which then stops its children in order.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name = name
        self._command = list(command)
        self._log = log
        self._process: asyncio.subprocess.Process | None = None

    @property
    def running(self) -> bool:
        """Whether it has been started and has not ended."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start it; `ready` waits until it answers."""
        with self._log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**_environment(), "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )

    async def ready(self, answers: Callable[[], Awaitable[bool]], seconds: float = 30.0) -> None:
        """Wait until it answers. Raises `MeterdError` when it ends before, or takes too long."""
        try:
            async with asyncio.timeout(seconds):
                while not await answers():
                    if not self.running:
                        raise MeterdError(f"{self.name} ended at once:\n{self.last_words()}")
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise MeterdError(
                f"{self.name} did not answer within {seconds:g} s:\n{self.last_words()}"
            ) from None

    async def kill(self) -> None:
        """SIGKILL: the process has no chance to put anything in order."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> None:
        """Ask it to end, and make it end when it does not."""
        await self._end(signal.SIGTERM)

    async def _end(self, number: signal.Signals) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()

    def last_words(self, lines: int = 8) -> str:
        """The end of what it wrote."""
        if not self._log.exists():
            return ""
        said = self._log.read_text(errors="replace").splitlines()[-lines:]
        return "\n".join(f"  {self.name}: {line}" for line in said)


def _environment() -> dict[str, str]:
    """The environment without what is meant for somebody's own meterd: it would override ours."""
    return {name: text for name, text in os.environ.items() if not name.startswith("METERD_")}


async def listens(port: int) -> bool:
    """Whether somebody takes connections on a loopback port."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


def free_port(wanted: int = 0) -> int:
    """Find a loopback port that is free: the wanted one where possible."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise MeterdError("no port is free on this machine")
