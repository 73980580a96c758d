"""`meterd demo`: everything on this machine for a minute, and then the proof.

An escrow service, brokers, the daemon and a paid service with customers run as processes of their
own, exactly as they would in earnest. The paid service keeps its own account of what was used, in
its own arithmetic. At the end the agreements are closed, and what was used, accrued and released
must be one figure for each customer. With `--crash` the daemon is killed again and again meanwhile,
which must not change a single digit.

`meterd demo --pattern NAME` plays the life of one agreement instead, under that pattern's example.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import tempfile
import webbrowser
from collections.abc import Awaitable, Callable
from pathlib import Path

from rich.console import Console

from meterd.demo.lives import live
from meterd.demo.stage import Stage
from meterd.demo.story import play
from meterd.errors import MeterdError


def run(*, crash: bool, seconds: int, no_browser: bool) -> int:
    """Run the demo for `seconds`; 0 when every sum agrees, 1 when one does not.

    Leaves nothing running.
    """

    async def perform(stage: Stage, console: Console) -> bool:
        await stage.build(console, crash=crash)
        if not no_browser:
            with contextlib.suppress(webbrowser.Error):
                webbrowser.get()  # Raises on a machine without a browser.
                await asyncio.to_thread(webbrowser.open, stage.dashboard)
        return await play(stage, console, crash=crash, seconds=seconds)

    return _played(perform)


def run_pattern(name: str, example: str, *, seconds: int) -> int:
    """Live through a pattern's example, its text; 0 when every sum agrees, else 1."""

    async def perform(stage: Stage, console: Console) -> bool:
        return await live(stage, console, name, example, seconds=seconds)

    return _played(perform)


Perform = Callable[[Stage, Console], Awaitable[bool]]


def _played(perform: Perform) -> int:
    console = Console()
    try:
        return asyncio.run(_run(console, perform))
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("\nStopped; nothing is left running.")
        return 1


async def _run(console: Console, perform: Perform) -> int:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with tempfile.TemporaryDirectory(prefix="meterd-demo-") as directory:
        async with Stage(Path(directory)) as stage:
            try:
                agreed = await perform(stage, console)
            except MeterdError as error:
                console.print(f"[red]{error}[/red]")
                console.print(stage.last_words(), markup=False)
                return 1
            if not agreed:
                console.print(stage.last_words(), markup=False)
    return 0 if agreed else 1
