"""The door itself: an aiohttp request in, the protocol's answer out, the SDK loaded on the way.

The rule kept here: the SDK is an extra, and costs half a second and tens of megabytes. Who never
calls `/mcp` pays neither, and where it is not installed nothing else changes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from meterd.mcp import asgi
from meterd.mcp.tools import Explain, Tool

PATH = "/mcp"
BODY_BYTES_MAX = 256 * 1024  # A quote of a thousand lines has room in it.
INSTALL = "pip install 'meterd[mcp]'"


class NotInstalled(Exception):
    """The SDK is not there; the message has the command that brings it."""

    def __init__(self) -> None:
        super().__init__(f"{PATH} needs the Python package mcp, which is an extra: {INSTALL}")


class Door:
    """Answers requests for these tools."""

    def __init__(
        self,
        name: str,
        version: str,
        instructions: str,
        tools: Sequence[Tool[Any]],
        explain: Explain,
    ) -> None:
        self._told = (name, version, instructions, tools, explain)
        self._app: asgi.App | None = None
        self._one_at_a_time = asyncio.Lock()

    async def answer(self, request: web.Request, caller: object) -> web.StreamResponse:
        """Answer one request of a caller.

        Raises `NotInstalled`, `HTTPRequestEntityTooLarge`, and what the protocol's own code raises
        by a mistake: none of the tools is behind such an error.
        """
        app = await self._loaded()
        return await asgi.answer(app, request, caller, BODY_BYTES_MAX)

    async def _loaded(self) -> asgi.App:
        """Import the SDK on the first call, in a thread: everything else goes on meanwhile."""
        async with self._one_at_a_time:
            if self._app is None:
                try:
                    self._app = await asyncio.to_thread(self._load)
                except ImportError:
                    raise NotInstalled from None
            return self._app

    def _load(self) -> asgi.App:
        from meterd.mcp.server import AgentServer  # noqa: PLC0415  # See the top.

        return AgentServer(*self._told, BODY_BYTES_MAX)
