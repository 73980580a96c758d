"""`meterd demo`: everything on this machine for a minute, and then the proof.

An escrow service, brokers, the daemon and a paid service with customers run as processes of their
own, exactly as they would in earnest. The paid service keeps its own account of what was used, in
its own arithmetic. At the end the agreements are closed, and what was used, accrued and released
must be one figure for each customer. With `--crash` the daemon is killed again and again meanwhile,
which must not change a single digit.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import tempfile
import webbrowser
from pathlib import Path

from rich.console import Console

from meterd.demo.stage import Stage
from meterd.demo.story import play
from meterd.errors import MeterdError


def run(*, crash: bool, seconds: int, no_browser: bool) -> int:
    """Run the demo for `seconds`; 0 when every sum agrees, 1 when one does not.

    Leaves nothing running.
    """
    console = Console()
    try:
        return asyncio.run(_run(console, crash=crash, seconds=seconds, no_browser=no_browser))
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("\nStopped; nothing is left running.")
        return 1


async def _run(console: Console, *, crash: bool, seconds: int, no_browser: bool) -> int:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with tempfile.TemporaryDirectory(prefix="meterd-demo-") as directory:
        async with Stage(Path(directory)) as stage:
            try:
                await stage.build(console, crash=crash)
                if not no_browser:
                    with contextlib.suppress(webbrowser.Error):
                        webbrowser.get()  # Raises on a machine without a browser.
                        await asyncio.to_thread(webbrowser.open, stage.dashboard)
                agreed = await play(stage, console, crash=crash, seconds=seconds)
            except MeterdError as error:
                console.print(f"[red]{error}[/red]")
                console.print(stage.last_words(), markup=False)
                return 1
            if not agreed:
                console.print(stage.last_words(), markup=False)
    return 0 if agreed else 1
