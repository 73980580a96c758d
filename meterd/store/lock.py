"""One daemon on one data directory: an OS lock on a file that also tells who holds it.

The rule kept here: the lock decides, the text in the file only explains. The lock dies with its
process, whatever that dies of; the text may outlive it and is believed only while somebody holds
the lock.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

from meterd.errors import StoreLocked

LOCK_NAME = "meterd.lock"


class DirectoryLock:
    """The sole right to a data directory, until `release` or the end of the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def take(cls, data_dir: Path) -> DirectoryLock:
        """Lock it. Raises `StoreLocked`, which names the holder and what to do; or `OSError`."""
        descriptor = os.open(data_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(os.pread(descriptor, 4096, 0))
            os.close(descriptor)
            raise StoreLocked(
                f"{data_dir} is in use by {holder}: stop that daemon first, or give this one a"
                " directory of its own ([daemon] data_dir)"
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        _write(descriptor)
        return cls(descriptor)

    def release(self) -> None:
        """Let go. The file stays: removing it could remove the next holder's."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _write(descriptor: int) -> None:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since})
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
    except OSError:
        # A full disk must not keep a daemon from starting: only the explanation is lost.
        return


def _holder(text: bytes) -> str:
    try:
        said = json.loads(text)
        return f"process {int(said['pid'])} on {said['host']} since {said['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
