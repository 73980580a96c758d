"""`POST /v1/backup`: a copy of the whole store, as of one moment, into a new file on this machine.

The rule: nothing that exists is ever written over, and the copy holds the entry of the journal that
says who asked for it. Whoever may call this may write a new file wherever the daemon may.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
from aiohttp import web

from meterd.api.auth import ACTOR
from meterd.api.parts import Parts
from meterd.api.problems import Problem
from meterd.api.settings import Scope
from meterd.api.wire import Call, json_answer, read_command

EXAMPLE = '{"path": "/var/backups/meterd/monday.db"}'
PATH_CHARS_MAX = 1024
# Beside a database SQLite takes files with these names for a part of it.
NOT_FOR_COPIES = ("-wal", "-shm", "-journal")


class Wanted(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /v1/backup`."""

    path: str


class Backup:
    """The room of `/v1/backup`."""

    def __init__(self, parts: Parts) -> None:
        self._bookkeeper = parts.bookkeeper

    def calls(self) -> list[Call]:
        """List the calls of this room."""
        return [Call("POST", "/v1/backup", Scope.ADMIN, self._backup)]

    async def _backup(self, request: web.Request) -> web.Response:
        path = _path(await read_command(request, Wanted, example=EXAMPLE))
        await self._bookkeeper.backup(path, request[ACTOR])
        size = await asyncio.to_thread(lambda: path.stat().st_size)
        return json_answer({"path": str(path), "bytes": size}, 201)


def _path(wanted: Wanted) -> Path:
    """Where the copy goes. Raises `Problem` for what cannot be a new file's name."""
    path = Path(wanted.path)
    fit = wanted.path.isprintable() and len(wanted.path) <= PATH_CHARS_MAX
    if not fit or not path.is_absolute() or ".." in path.parts or not path.name:
        detail = f"path: an absolute one of this machine, such as {EXAMPLE}"
        raise Problem(400, "bad-body", detail)
    if path.name.endswith(NOT_FOR_COPIES):
        detail = f"path: a name that does not end with {', '.join(NOT_FOR_COPIES)}"
        raise Problem(400, "bad-body", detail)
    # A name that is taken is refused before anything is journalled; the store looks again.
    if path.exists() or not path.parent.is_dir():
        said = "exists: name a new file" if path.exists() else "has no directory: make it first"
        raise Problem(409, "refused", f"{path} {said}")
    return path
