"""A machine whose disk is in memory: it records all that the store does to it, and fails on cue.

The rule kept here: the store, unchanged, cannot tell it from a real one. SQLite reaches it through
a VFS, which answers and fails as the one for unix does (same sector size, same promise about bytes
beside a write, same error codes, an fsync of the directory with the first fsync of a new log). The
calls that the store makes without SQLite (directory, lock, reserve, fsyncs of names) reach it
through `os`, `fcntl` and a path. All of them stand in one record, in their order.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import apsw

from meterd.store import identities, lock, sqlite
from tests.power import dbapi
from tests.power.disk import Call, Files, apply

VFS_NAME = "meterd-memory"
ROOT = "/store"
SYNTHETIC = 1_000_000  # Descriptors from here on are ours.
# When a call of this kind fails: what SQLite is told. A full disk is `SQLITE_FULL` for a write
# alone, and what is not here is `SQLITE_CANTOPEN`.
_CODES = {
    "read": apsw.SQLITE_IOERR_READ,
    "write": apsw.SQLITE_IOERR_WRITE,
    "truncate": apsw.SQLITE_IOERR_TRUNCATE,
    "sync": apsw.SQLITE_IOERR_FSYNC,
    "size": apsw.SQLITE_IOERR_FSTAT,
    "access": apsw.SQLITE_IOERR_ACCESS,
    "unlink": apsw.SQLITE_IOERR_DELETE,
}

Fault = Callable[[str, str], int]  # Kind of call and name: the errno it fails with, or 0.


class Machine:
    """The files of one data directory as processes see them, and the record of its calls."""

    def __init__(self, files: Files | None = None) -> None:
        self.files: Files = {} if files is None else files
        self.exists = files is not None
        self.calls: list[Call] = []
        self.fault: Fault | None = None
        self.dead = False  # Its process was killed: what it still does reaches nothing.
        self._fresh_logs: set[str] = set()

    def killed(self) -> Machine:
        """Kill the process that uses it; the machine as the next process finds it."""
        self.dead = True
        return Machine({name: bytearray(data) for name, data in self.files.items()})

    def asks(self, kind: str, name: str) -> None:
        """Fail, if it is this call's turn."""
        if self.fault is not None and (code := self.fault(kind, name)):
            raise OSError(code, os.strerror(code), name)

    def does(self, kind: str, name: str = "", at: int = 0, data: bytes = b"") -> None:
        """One call that changes the disk: fail, or record it."""
        self.asks(kind, name)
        self.calls.append(Call(kind, name, at, data))

    def create(self, name: str) -> None:
        self.does("create", name)
        self.files[name] = bytearray()

    def write(self, name: str, content: bytearray, at: int, data: bytes) -> None:
        try:
            self.does("write", name, at, data)
        except OSError:
            self.calls.append(Call("write", name, at, data[: len(data) // 2]))
            apply(content, self.calls[-1], self.calls[-1].data)
            raise
        apply(content, self.calls[-1], data)

    def truncate(self, name: str, content: bytearray, size: int) -> None:
        self.does("truncate", name, size)
        apply(content, self.calls[-1], b"")

    def sync(self, name: str) -> None:
        try:
            self.does("sync", name)
        except OSError:
            self.calls.append(Call("sync_failed", name))
            raise

    def sync_log(self, name: str) -> None:
        """An fsync by SQLite: the first one of a new log makes its name durable, too."""
        self.sync(name)
        if name in self._fresh_logs:
            self._fresh_logs.discard(name)
            with contextlib.suppress(OSError):  # SQLite does not look at what this one says.
                self.does("sync_names", name)

    def create_log(self, name: str) -> None:
        self.create(name)
        self._fresh_logs.add(name)

    def unlink(self, name: str) -> None:
        self.does("unlink", name)
        del self.files[name]


# -- SQLite's way to it ---------------------------------------------------------------------------


def _failure(kind: str, error: OSError) -> apsw.Error:
    full = error.errno == errno.ENOSPC and kind == "write"
    code = apsw.SQLITE_FULL if full else _CODES.get(kind, apsw.SQLITE_CANTOPEN)
    failure = apsw.exception_for(code)
    failure.extendedresult = code
    return failure


@contextlib.contextmanager
def _failing(kind: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _failure(kind, error) from None


# What a file or a VFS belongs to whose own machine is gone: when a killed process is swept up, its
# connection may be closed after the attributes of both have been taken away.
_SWEPT = Machine()
_SWEPT.dead = True


class _OpenFile:
    """A file as SQLite has it open."""

    _machine = _SWEPT
    _name = ""
    _content = bytearray()

    def __init__(self, machine: Machine, name: str) -> None:
        self._machine, self._name = machine, name
        self._content = machine.files[name]

    def xRead(self, amount: int, offset: int) -> bytearray:  # noqa: N802
        if self._machine.fault is not None:
            with _failing("read"):
                self._machine.asks("read", self._name)
        return self._content[offset : offset + amount]

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        if not self._machine.dead:
            with _failing("write"):
                self._machine.write(self._name, self._content, offset, bytes(data))

    def xTruncate(self, size: int) -> None:  # noqa: N802
        if not self._machine.dead:
            with _failing("truncate"):
                self._machine.truncate(self._name, self._content, size)

    def xSync(self, _flags: int) -> None:  # noqa: N802
        if not self._machine.dead:
            with _failing("sync"):
                self._machine.sync_log(self._name)

    def xFileSize(self) -> int:  # noqa: N802
        with _failing("size"):
            self._machine.asks("size", self._name)
        return len(self._content)

    def xSectorSize(self) -> int:  # noqa: N802
        return 4096

    def xDeviceCharacteristics(self) -> int:  # noqa: N802
        return apsw.SQLITE_IOCAP_POWERSAFE_OVERWRITE

    def xFileControl(self, _operation: int, _pointer: int) -> bool:  # noqa: N802
        return False

    def xCheckReservedLock(self) -> bool:  # noqa: N802
        return False

    def _nothing(self, *_: object) -> None:
        """There is one process: it has every lock."""

    xLock = xUnlock = xClose = _nothing  # noqa: N815


class _Vfs(apsw.VFS):
    """SQLite's way to whichever machine is on."""

    machine = _SWEPT

    def __init__(self) -> None:
        super().__init__(VFS_NAME, "")
        self.machine = Machine()

    def xFullPathname(self, name: str) -> str:  # noqa: N802
        return name

    def xAccess(self, path: str, _flags: int) -> bool:  # noqa: N802
        with _failing("access"):
            self.machine.asks("access", _name(path))
        return _name(path) in self.machine.files

    def xDelete(self, path: str, sync_names: bool) -> None:  # noqa: N802
        if self.machine.dead:
            return
        with _failing("unlink"):
            self.machine.unlink(_name(path))
            if sync_names:
                self.machine.does("sync_names")

    def xOpen(self, path: str | apsw.URIFilename | None, flags: list[int]) -> Any:  # noqa: N802
        assert path is not None, "the store keeps temporary tables in memory"
        machine = self.machine
        name = _name(path if isinstance(path, str) else path.filename())
        with _failing("open"):
            machine.asks("open", name)
            if name not in machine.files:
                if not flags[0] & apsw.SQLITE_OPEN_CREATE:
                    raise FileNotFoundError(name)
                log = flags[0] & (apsw.SQLITE_OPEN_WAL | apsw.SQLITE_OPEN_MAIN_JOURNAL)
                (machine.create_log if log else machine.create)(name)
        flags[1] = flags[0]
        return _OpenFile(machine, name)

    def excepthook(self, *_: object) -> bool:
        """SQLite drops some failures (of a file that it deletes in closing): so it does here."""
        return True


def _name(path: str) -> str:
    return path.removeprefix(f"{ROOT}/")


# -- The store's own way to it --------------------------------------------------------------------


class Place:
    """What stands for the `Path` of the data directory and of the files in it."""

    def __init__(self, rig: Rig, name: str = "") -> None:
        self._rig, self.name = rig, name

    def __str__(self) -> str:
        return f"{ROOT}/{self.name}" if self.name else ROOT

    def __truediv__(self, name: str) -> Place:
        return Place(self._rig, name)

    @property
    def parent(self) -> Place:
        return Place(self._rig, "" if self.name else "..")

    def with_name(self, name: str) -> Place:
        return Place(self._rig, name)

    def is_dir(self) -> bool:
        return self._rig.machine.exists

    def mkdir(self, **_: object) -> None:
        self._rig.machine.does("mkdir")
        self._rig.machine.exists = True

    def exists(self) -> bool:
        return self.name in self._rig.machine.files

    def unlink(self, *, missing_ok: bool = False) -> None:
        if not (missing_ok and not self.exists()):
            self._rig.machine.unlink(self.name)

    def open(self, mode: str) -> _Reader:
        assert mode == "rb"
        descriptor = self._rig.system.open(self, os.O_RDONLY)
        return _Reader(self._rig.machine.files[self.name], descriptor)

    def stat(self) -> SimpleNamespace:
        if not self.exists():
            raise FileNotFoundError(self.name)
        return SimpleNamespace(st_size=len(self._rig.machine.files[self.name]))


class _Reader(io.BytesIO):
    """A file that is open for reading, and may be fsynced by its descriptor."""

    def __init__(self, content: bytearray, descriptor: int) -> None:
        super().__init__(content)
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor


class _Os:
    """What stands for the module `os` in the store; whatever else it asks for is the real one's."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._open: dict[int, str] = {}
        self._next = SYNTHETIC

    def __getattr__(self, name: str) -> Any:
        assert name.startswith("O_") or name == "getpid", f"os.{name} is not on the machine yet"
        return getattr(os, name)

    def open(self, path: Place, flags: int, _mode: int = 0o777) -> int:
        machine, name = self._rig.machine, path.name
        machine.asks("open", name)
        if not flags & os.O_DIRECTORY and name not in machine.files:
            if not flags & os.O_CREAT:
                raise FileNotFoundError(name)
            machine.create(name)
        self._next += 1
        self._open[self._next] = name
        return self._next

    def close(self, descriptor: int) -> None:
        del self._open[descriptor]

    def fsync(self, descriptor: int) -> None:
        name = self._open[descriptor]
        machine = self._rig.machine
        if name in ("", ".."):
            machine.does("sync_parent" if name else "sync_names")
        else:
            machine.sync(name)

    def posix_fallocate(self, descriptor: int, _offset: int, size: int) -> None:
        machine, name = self._rig.machine, self._open[descriptor]
        machine.asks("allocate", name)
        if len(machine.files[name]) < size:
            machine.truncate(name, machine.files[name], size)

    def ftruncate(self, descriptor: int, size: int) -> None:
        name = self._open[descriptor]
        self._rig.machine.truncate(name, self._rig.machine.files[name], size)

    def pread(self, descriptor: int, size: int, at: int) -> bytes:
        return bytes(self._rig.machine.files[self._open[descriptor]][at : at + size])

    def pwrite(self, descriptor: int, data: bytes, at: int) -> int:
        name = self._open[descriptor]
        self._rig.machine.write(name, self._rig.machine.files[name], at, data)
        return len(data)

    def link(self, old: Place, new: Place) -> None:
        machine = self._rig.machine
        if new.exists():
            raise FileExistsError(new.name)
        machine.does("link", new.name, data=old.name.encode())
        machine.files[new.name] = machine.files[old.name]


class Rig:
    """The store's modules, put on a machine."""

    def __init__(self) -> None:
        self._vfs = _Vfs()
        self.system = _Os(self)
        self.place: Any = Place(self)

    @property
    def machine(self) -> Machine:
        """The one that is on now."""
        return self._vfs.machine

    @machine.setter
    def machine(self, machine: Machine) -> None:
        self._vfs.machine = machine

    @classmethod
    @contextlib.contextmanager
    def installed(cls) -> Iterator[Rig]:
        """Have the store run on it, as long as this lasts."""
        rig = cls()
        unlocked = SimpleNamespace(**vars(fcntl) | {"flock": lambda *_: None})
        with (
            mock.patch.object(sqlite, "sqlite3", dbapi.module(VFS_NAME)),
            mock.patch.object(sqlite, "os", rig.system),
            mock.patch.object(lock, "os", rig.system),
            mock.patch.object(lock, "fcntl", unlocked),
            # What a start spends its milliseconds on, and no disk sees.
            mock.patch.object(sqlite, "_give_memory_back"),
            mock.patch.object(sqlite, "RESERVE_BYTES", 4096),
            mock.patch.multiple(
                identities, SHARD_BITS=1, SHARDS=2, _BOUNDS=identities._BOUNDS[31:32]
            ),
        ):
            yield rig
        rig._vfs.unregister()
        assert sys.modules["sqlite3"] is sqlite.sqlite3
