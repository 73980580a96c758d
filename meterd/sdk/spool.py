"""Where events wait until meterd has taken them: in memory, or in a spool on the disk.

The rule kept here: an event leaves the spool only when meterd has said that it has it. What is said
twice is a duplicate there, so after a crash everything that may not have been taken is sent again.

Theory of operation. A spool is a directory of segments: files of lines, appended to by one process
that holds a lock on each of its segments. An event is a line `E CRC JSON`; once a batch is taken,
`A CRC N` says how many of the segment's events are done. A segment with nothing left is emptied, or
removed where another one was begun. Whoever opens the directory takes over the segments that nobody
holds: those of processes that have ended, whichever way. Several processes share a directory and
never a segment.

What survives. The line is with the kernel before `append` returns: a process that is killed loses
none. Power that fails takes what was not yet flushed: with `fsync="each"` nothing, with "second"
the last second, with "never" what the kernel had not written by itself.

A line that is cut off at the end of a file is what a power cut leaves; it is passed over with a
warning. One that is wrong in the middle is not: the file is kept beside, under `.damaged`.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import secrets
import shutil
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol
from zlib import crc32

import msgspec

from meterd.sdk.failures import NotKept

log = logging.getLogger("meterd.sdk")

Fsync = Literal["never", "second", "each"]

SEGMENT_BYTES = 4 * 1024 * 1024
SUFFIX = ".spool"
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
READ_BYTES = 256 * 1024  # More than a line can have.
_NUMBER = msgspec.json.Decoder(dict[str, msgspec.Raw])


class Queue(Protocol):
    """Events in the order in which they were told. The caller holds a lock around each call."""

    pending: int
    pending_bytes: int

    def append(self, payload: bytes) -> None:
        """Keep one event. Raises `NotKept`."""

    def peek(self, events_max: int, bytes_max: int) -> list[bytes]:
        """Show the oldest events; [] when there is none."""

    def done(self, count: int) -> None:
        """Forget the oldest so many of those that were shown last."""

    def close(self) -> None:
        """Let go of it; what is on the disk stays there."""


class Memory:
    """Events in memory: they end with the process."""

    def __init__(self, bytes_max: int) -> None:
        self.pending = 0
        self.pending_bytes = 0
        self._bytes_max = bytes_max
        self._events: deque[bytes] = deque()

    def append(self, payload: bytes) -> None:
        """Keep one event. Raises `NotKept`."""
        if self.pending_bytes + len(payload) > self._bytes_max:
            raise NotKept(full(self.pending, self._bytes_max, "memory"))
        self._events.append(payload)
        self.pending += 1
        self.pending_bytes += len(payload)

    def peek(self, events_max: int, bytes_max: int) -> list[bytes]:
        """Show the oldest events."""
        shown: list[bytes] = []
        size = 0
        for payload in self._events:
            size += len(payload) + 1
            if shown and (len(shown) == events_max or size > bytes_max):
                break
            shown.append(payload)
        return shown

    def done(self, count: int) -> None:
        """Forget the oldest so many."""
        for _ in range(count):
            self.pending_bytes -= len(self._events.popleft())
        self.pending -= count

    def close(self) -> None:
        """Nothing is open."""


def full(pending: int, bytes_max: int, where: str) -> str:
    """Say that there is no more room."""
    return (
        f"{pending} events wait for meterd and the {bytes_max} bytes for them in {where} are full:"
        " see whether meterd runs, or allow more with bytes_max"
    )


@dataclass(slots=True, eq=False)
class _Segment:
    """One file. `at`: where its first event that is not done begins."""

    path: Path
    fd: int
    size: int = 0
    at: int = 0
    events: int = 0  # All of them, done or not.
    gone: int = 0  # How many are done.
    recovered: bool = False
    dirty: bool = False  # Not everything of it is flushed.

    @property
    def left(self) -> int:
        return self.events - self.gone


class Spool:
    """The spool of one process in a directory; see above. The caller holds a lock.

    Raises `NotKept` where the directory cannot be used.
    """

    def __init__(self, directory: Path, bytes_max: int, fsync: Fsync) -> None:
        self.directory = directory
        self.pending = 0
        self.pending_bytes = 0
        self.recovered = 0  # Events that an earlier process has left.
        self._bytes_max = bytes_max
        self._fsync = fsync
        self._begun = False  # A segment whose name is not flushed yet.
        self._segments: deque[_Segment] = deque()
        # What was shown last: of which segment, where each event ends and how long its line is.
        self._shown: tuple[_Segment, list[tuple[int, int]]] | None = None
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._take_over()
        except OSError as error:
            raise NotKept(f"the spool {directory} cannot be used: {error}") from error

    # -- Keeping -----------------------------------------------------------------------------------

    def append(self, payload: bytes) -> None:
        """Keep one event: it is with the kernel at the return. Raises `NotKept`."""
        line = _line(b"E", payload)
        if self.pending_bytes + len(line) > self._bytes_max:
            raise NotKept(full(self.pending, self._bytes_max, str(self.directory)))
        try:
            segment = self._current()
            self._write(segment, line)
            if self._fsync == "each":
                os.fsync(segment.fd)
        except OSError as error:
            raise NotKept(f"the spool {self.directory} refused an event: {error}") from error
        segment.events += 1
        self.pending += 1
        self.pending_bytes += len(line)
        segment.dirty = self._fsync == "second"

    def _current(self) -> _Segment:
        last = self._segments[-1] if self._segments else None
        if last is None or last.recovered or last.size >= SEGMENT_BYTES:
            last = self._new()
            self._segments.append(last)
        return last

    def _new(self) -> _Segment:
        while True:
            names = [path.name for path in self.directory.glob(f"*{SUFFIX}")]
            number = max(
                (int(name.split("-")[0]) for name in names if name[:12].isdigit()), default=0
            )
            path = self.directory / f"{number + 1:012d}-{secrets.token_hex(4)}{SUFFIX}"
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
            if _locked(fd):
                if self._fsync == "each":
                    self._flush_directory()
                self._begun = True
                return _Segment(path, fd)
            os.close(fd)  # Somebody who was looking for what was left has it; it is empty.

    def _write(self, segment: _Segment, line: bytes) -> None:
        """Write a whole line or none."""
        written = 0
        try:
            while written < len(line):
                written += os.write(segment.fd, line[written:])
        except OSError:
            if written:
                os.ftruncate(segment.fd, segment.size)
            raise
        segment.size += len(line)

    def _flush_directory(self) -> None:
        fd = os.open(self.directory, DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def unflushed(self) -> list[int]:
        """Copies of the descriptors that are to be flushed now; the caller closes them."""
        dirty = [segment for segment in self._segments if segment.dirty and segment.left]
        for segment in dirty:
            segment.dirty = False
        copies = [os.dup(segment.fd) for segment in dirty]
        if copies and self._begun:  # Or a new file could be lost with all that is in it.
            self._begun = False
            copies.append(os.open(self.directory, DIRECTORY))
        return copies

    # -- Sending -----------------------------------------------------------------------------------

    def peek(self, events_max: int, bytes_max: int) -> list[bytes]:
        """Show the oldest events, all of one segment."""
        while self._segments and not self._segments[0].left and len(self._segments) > 1:
            self._remove(self._segments.popleft())
        if not self._segments or not self._segments[0].left:
            return []
        segment, shown, size = self._segments[0], list[bytes](), 0
        ends: list[tuple[int, int]] = []
        for end, payload in _events_of(segment):
            size += len(payload) + 1
            if shown and (len(shown) == events_max or size > bytes_max):
                break
            shown.append(payload)
            ends.append((end, len(_line(b"E", payload))))
        self._shown = segment, ends
        return shown

    def done(self, count: int) -> None:
        """Forget the oldest so many of those that were shown last."""
        assert self._shown is not None
        segment, ends = self._shown
        self._shown = None
        segment.at = ends[count - 1][0]
        segment.gone += count
        self.pending -= count
        self.pending_bytes -= sum(length for _, length in ends[:count])
        try:
            self._note(segment)
        except OSError as error:
            log.warning("%s: what was sent is sent again after a crash: %s", segment.path, error)

    def _note(self, segment: _Segment) -> None:
        """Write down how much of a segment is done."""
        if segment.left:
            self._write(segment, _line(b"A", b"%d" % segment.gone))
        elif segment is self._segments[-1] and not segment.recovered:
            os.ftruncate(segment.fd, 0)
            segment.size = segment.at = segment.events = segment.gone = 0
        else:
            self._segments.popleft()
            self._remove(segment)

    def _remove(self, segment: _Segment) -> None:
        try:
            segment.path.unlink(missing_ok=True)  # Still locked: nobody takes it over.
        finally:
            os.close(segment.fd)

    def close(self) -> None:
        """Let go of all segments; the empty ones are removed."""
        for segment in self._segments:
            if not segment.left:
                segment.path.unlink(missing_ok=True)
            elif self._fsync != "never":
                os.fsync(segment.fd)
            os.close(segment.fd)
        self._segments.clear()

    def forsake(self) -> None:
        """Close what another process of the same descriptors goes on using: the parent's."""
        for segment in self._segments:
            os.close(segment.fd)
        self._segments.clear()

    # -- Recovery ----------------------------------------------------------------------------------

    def _take_over(self) -> None:
        for path in sorted(self.directory.glob(f"*{SUFFIX}")):
            segment = _taken(path)
            if segment is None:
                continue
            _read(segment)
            if not segment.left:
                self._remove(segment)
                continue
            self._segments.append(segment)
            self.pending += segment.left
            self.pending_bytes += sum(len(_line(b"E", p)) for _, p in _events_of(segment))
        self.recovered = self.pending

    def newest_sequence(self, source: str) -> int:
        """The highest `sequence` of a source among the events that wait; 0: there is none."""
        newest = 0
        for segment in self._segments:
            for _, payload in _events_of(segment):
                fields = _NUMBER.decode(payload)
                mine = fields.get("source") == msgspec.Raw(msgspec.json.encode(source))
                if mine and (number := bytes(fields.get("sequence", b"0"))).isdigit():
                    newest = max(newest, int(number))
        return newest


def _taken(path: Path) -> _Segment | None:
    """A segment that nobody holds any more; None: somebody does, or it has just gone."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND)
    except FileNotFoundError:
        return None
    if not _locked(fd) or not os.fstat(fd).st_nlink:
        os.close(fd)
        return None
    return _Segment(path, fd, size=os.fstat(fd).st_size, recovered=True)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(segment: _Segment) -> None:
    """Count what is in a segment that was taken over, and find where it goes on."""
    ends: list[int] = []
    whole, damaged = 0, False  # Where the last sound line ends.
    for end, kind, payload in _lines(segment.fd, 0, segment.size):
        if kind == b"E":
            ends.append(end)
        elif kind == b"A":
            segment.gone = int(payload)
        elif end < segment.size:
            damaged = True
        whole = end if kind else whole
    if damaged:
        beside = segment.path.with_suffix(".damaged")
        shutil.copyfile(segment.path, beside)
        log.error("the spool %s has damaged lines; they are left out: see %s", segment.path, beside)
    if whole < segment.size:
        log.warning("the end of the spool %s was cut off; it is left out", segment.path)
        os.ftruncate(segment.fd, whole)  # What is appended begins with a line of its own.
        segment.size = whole
    segment.events = len(ends)
    segment.gone = min(segment.gone, segment.events)
    segment.at = ends[segment.gone - 1] if segment.gone else 0


def _line(kind: bytes, payload: bytes) -> bytes:
    return b"%s %08x %s\n" % (kind, crc32(payload), payload)


def _events_of(segment: _Segment) -> Iterator[tuple[int, bytes]]:
    """The events that are not done: where each ends, and its payload."""
    for end, kind, payload in _lines(segment.fd, segment.at, segment.size):
        if kind == b"E":
            yield end, payload


def _lines(fd: int, at: int, size: int) -> Iterator[tuple[int, bytes, bytes]]:
    """Each line: where it ends, its kind (`E`, `A`, or nothing for a damaged one), its payload."""
    rest, end = b"", at
    while at < size:
        piece = os.pread(fd, min(READ_BYTES, size - at), at)
        if not piece:
            break
        at += len(piece)
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            end += len(line) + 1
            yield (end, *_parsed(line))
    if rest:
        yield size, b"", rest


def _parsed(line: bytes) -> tuple[bytes, bytes]:
    kind, checksum, payload = line[:1], line[2:10], line[11:]
    sound = line[1:2] == line[10:11] == b" " and checksum == b"%08x" % crc32(payload)
    if not sound or kind not in {b"E", b"A"} or (kind == b"A" and not payload.isdigit()):
        return b"", line
    return kind, payload


class Numbers:
    """The numbers of one source's events, one after the other, also after a crash.

    The file is behind what the spool holds, never behind what has left it. It is locked: two
    processes under one source would give the same number twice. Raises `NotKept`.
    """

    def __init__(self, spool: Spool, source: str) -> None:
        name = hashlib.sha256(source.encode()).hexdigest()[:16]
        path = spool.directory / f"{name}.sequence"
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise NotKept(f"{path} cannot be used: {error}") from error
        if not _locked(self._fd):
            os.close(self._fd)
            raise NotKept(f"another process numbers the events of {source!r}: give each its source")
        text = os.pread(self._fd, 20, 0).strip()
        self.last = max(int(text) if text.isdigit() else 0, spool.newest_sequence(source))

    def keep(self) -> None:
        """Write the last number down: the events with it may leave the spool from now on."""
        os.pwrite(self._fd, b"%019d\n" % self.last, 0)

    def close(self) -> None:
        """Let go of the source."""
        os.close(self._fd)
