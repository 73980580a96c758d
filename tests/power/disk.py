"""What a power cut leaves of a disk: the model that both rigs of this directory rest on.

The rule kept here: what was fsynced is there. Of what was not, any part is: each write whole,
absent, or torn and garbled at the borders of sectors, in any order; a name that the directory was
not fsynced for comes or goes; a directory whose parent was not fsynced may be gone whole. After an
fsync that failed, nobody can know what of the file's earlier writes is there, and no later fsync
brings it: Linux takes those pages for clean.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

SECTOR = 512
Files = dict[str, bytearray]


@dataclass(frozen=True, slots=True)
class Call:
    """One call as it returned: what it was, on which name, and with what."""

    # create, link, write, truncate, sync, sync_failed, sync_names, sync_parent, mkdir, unlink
    # or told.
    kind: str
    name: str = ""
    at: int = 0
    data: bytes = b""


@dataclass
class File:
    """What a power cut cannot take, and what was written since."""

    synced: bytearray = field(default_factory=bytearray)
    since: list[Call] = field(default_factory=list)

    def settle(self) -> None:
        for call in self.since:
            apply(self.synced, call, call.data)
        self.since.clear()

    def lose(self, rng: random.Random) -> None:
        """An fsync has failed: what is not on the disk by now never will be."""
        self.synced = self.remains(rng)
        self.since.clear()

    def remains(self, rng: random.Random) -> bytearray:
        """One of the contents that a cut may leave."""
        content = bytearray(self.synced)
        keep = rng.choice((0.0, 0.5, 0.5, 0.9, 1.0))  # Of the writes; the rest is torn or absent.
        for call in self.since:
            if rng.random() < keep:
                apply(content, call, call.data)
            elif call.kind == "write" and rng.random() < 0.5:
                for at, data in _sectors(call):
                    if rng.random() < 0.5:
                        garbled = rng.random() < 0.05
                        part = Call("write", call.name, at)
                        apply(content, part, rng.randbytes(len(data)) if garbled else data)
        return content


def apply(content: bytearray, call: Call, data: bytes) -> None:
    """Write to, or truncate, the content of a file."""
    if call.kind == "truncate":
        del content[call.at :]
        content += bytes(call.at - len(content))
        return
    content += bytes(max(0, call.at - len(content)))
    content[call.at : call.at + len(data)] = data


def _sectors(call: Call) -> Iterator[tuple[int, bytes]]:
    """A write in the pieces that the disk takes whole."""
    at, end = call.at, call.at + len(call.data)
    while at < end:
        stop = min(end, (at // SECTOR + 1) * SECTOR)
        yield at, call.data[at - call.at : stop - call.at]
        at = stop


class Disk:
    """The data directory as the calls so far have made it, and what a cut would leave of it."""

    def __init__(self, files: Mapping[str, bytearray] | None = None, told: int = 0) -> None:
        self.told = told
        self._files = {name: File(bytearray(data)) for name, data in (files or {}).items()}
        self._named = dict(self._files)  # As the directory was last fsynced.
        self._rooted = True  # Its own name is durable.
        self._rng = random.Random(len(self._files))

    def run(self, call: Call) -> None:
        """Take over one call."""
        match call.kind:
            case "told":
                self.told = int(call.data)
            case "create":
                self._files.setdefault(call.name, File())
            case "link":
                self._files[call.name] = self._files[call.data.decode()]
            case "unlink":
                self._files.pop(call.name, None)
            case "sync":
                self._files[call.name].settle()
            case "sync_failed":
                self._files[call.name].lose(self._rng)
            case "sync_names":
                self._named = dict(self._files)
            case "mkdir":
                self._rooted = False
            case "sync_parent":
                self._rooted = True
            case _:
                self._files[call.name].since.append(call)

    def cut(self, rng: random.Random) -> Files:
        """One of the directories that a cut at this moment may leave."""
        left: Files = {}
        if not self._rooted and rng.random() < 0.5:
            return left
        for name in sorted(self._files.keys() | self._named.keys()):
            views = [view.get(name) for view in (self._files, self._named)]
            file = views[0] if views[0] is views[1] else rng.choice(views)
            if file is not None:
                left[name] = file.remains(rng)
        return left
