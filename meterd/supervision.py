"""What a service manager is told: ready, alive, stopping. Where there is none, nobody is told.

It is one datagram of text to the socket that the environment names, as sd_notify(3) of systemd has
it. The rule kept here: "alive" is said from the event loop, so a loop that no longer turns is
restarted, which costs nothing but time: what was told to anybody is on the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping

SOCKET, MICROSECONDS, PID = "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"
READY, ALIVE, STOPPING = "READY=1", "WATCHDOG=1", "STOPPING=1"


class Supervision:
    """The way to the service manager of this process."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        address = environment.get(SOCKET, "")
        # An @ stands for the zero byte of a name that is in no directory.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        text = environment.get(MICROSECONDS, "")
        ours = environment.get(PID, "") in {"", str(os.getpid())}
        self._within_s = int(text) / 1_000_000 if ours and text.isdecimal() else 0.0

    def tell(self, state: str) -> None:
        """Say something; a manager that does not hear it is no reason to stop."""
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as way:
            way.setblocking(False)
            way.sendto(state.encode(), self._address)

    async def keep_alive(self) -> None:
        """Say twice in each time that is allowed that the loop turns, for as long as it does."""
        while self._within_s:
            self.tell(ALIVE)
            await asyncio.sleep(self._within_s / 2)
