"""The memory of seen events: which identities were accepted, with what content, in which hour.

The rule kept here: an identity that was added and whose hour has not been expired is found,
whatever was added, merged or expired since. It is built for ten million known identities and
batches of thousands, not for the empty table.

Theory of operation. A table with a random key costs tens of microseconds an event once it has
outgrown the caches, whatever the database. So the disk only ever gets packed blocks appended, and
the index lives here, in numpy arrays:

1. An identity is 128 bits of xxh3 over source and id. Its first half is the *key*; the second half
   tells equal keys apart. Keys of a hash are spread evenly, and much below follows from that.
2. New identities make small sorted *runs*. Two runs of like size are merged, up to a limit, so
   there are few.
3. The bulk lies in 64 *shards* by the key's first six bits, each sorted. When the runs have grown
   to a sixteenth of the bulk they are folded into it, one shard after the other, a few with each
   `add`. One shard of ten million identities holds 156,000, so no fold takes more than some
   milliseconds and none needs more spare memory than one shard. It is done in line and not by a
   thread: it costs a fraction of a microsecond for each event, it is the same in every run of a
   simulation, and there is nothing to lock.
4. In front of both stands a *filter*: a bit for each possible beginning of a key (2^27 of them for
   20 million entries), set when some known key begins so. Nearly all events are new, and nine of
   ten new ones end there, for the price of one look at one byte, without sorting and without a
   binary search. Without the filter a look-up among ten million costs about 0.5 microseconds an
   event more in batches of 5,000, and 3 in batches of 1,000 (bench/store_marks.py --plain).
5. Expiry only moves a limit; entries below it are unknown at once, and leave memory when their
   shard is folded next.

A handful of identities at a time (single events over HTTP) would pay numpy's fixed costs, so they
wait in a dict and become a run when there are a thousand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from meterd.core.changes import MarkBlock
from meterd.errors import StoreCorrupt
from meterd.store import taken

DIGEST_BYTES = 16
MARK_BYTES = 20  # Key, rest and fingerprint.
SHARD_BITS = 6
SHARDS = 1 << SHARD_BITS
FEW = 16  # Up to here Python beats numpy's fixed costs.
FRESH_MAX = 1024
FOLD_MIN = 65_536  # Folding less would cost more in calls than it saves in look-ups.
FOLD_SHARE = 16  # Each identity is moved about this many times in its life.
RUN_MAX = 131_072  # Merging longer runs would stop the event loop for too long.
LOAD_GROUP = 2_500_000  # Identities sorted at once while loading: bounds the peak of memory.
KEYS_PER_CELL_MAX = 4  # The filter has at least so many cells for each identity.

Keys = npt.NDArray[np.uint64]
Prints = npt.NDArray[np.uint32]
Places = npt.NDArray[np.int64]

_WORD = np.dtype("<u8")  # Blocks are little-endian on every machine.
_HALF = np.dtype("<u4")
_BOUNDS: Keys = np.arange(1, SHARDS, dtype=np.uint64) << np.uint64(64 - SHARD_BITS)


def digest(source: str, event_id: str) -> bytes:
    """Make 16 bytes of an identity. Neither text may hold a NUL, which `core.events` sees to."""
    return xxh3_128_digest(f"{source}\0{event_id}".encode())


def fingerprint(content: bytes) -> int:
    """Make 32 bits of an event's canonical content, to tell a duplicate from a conflict."""
    return xxh3_64_intdigest(content) & 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class _Run:
    """Identities in parallel arrays, sorted by key; of equal keys the last added stands last."""

    keys: Keys
    rests: Keys
    prints: Prints
    buckets: Prints

    def __len__(self) -> int:
        return len(self.keys)

    def part(self, first: int, end: int) -> _Run:
        """A view of some of them."""
        cut = slice(first, end)
        return _Run(self.keys[cut], self.rests[cut], self.prints[cut], self.buckets[cut])

    def chosen(self, which: npt.NDArray[np.bool_] | Places) -> _Run:
        """A copy of some of them, in the order given."""
        return _Run(self.keys[which], self.rests[which], self.prints[which], self.buckets[which])

    def shard(self, number: int) -> _Run:
        """A view of those that belong to a shard."""
        first = 0 if number == 0 else int(np.searchsorted(self.keys, _BOUNDS[number - 1]))
        last = number == SHARDS - 1
        return self.part(first, len(self) if last else int(self.keys.searchsorted(_BOUNDS[number])))

    def pack(self) -> bytes:
        """The bytes of a block: all keys, then all rests, then all fingerprints."""
        return self.keys.tobytes() + self.rests.tobytes() + self.prints.tobytes()


def _no_run() -> _Run:
    words, halves = np.empty(0, _WORD), np.empty(0, _HALF)
    return _Run(words, words, halves, halves)


def _order(keys: Keys) -> Places:
    """A stable order of keys: two counting sorts over the upper half do nearly all of it."""
    if len(keys) < FRESH_MAX:
        return np.argsort(keys, kind="stable")
    order = np.argsort((keys >> np.uint64(32)).astype(np.uint16), kind="stable")
    order = order[np.argsort((keys >> np.uint64(48)).astype(np.uint16)[order], kind="stable")]
    nearly = keys[order]
    if np.any(nearly[1:] < nearly[:-1]):
        order = order[np.argsort(nearly, kind="stable")]
    return order


def _sorted(run: _Run) -> _Run:
    return run.chosen(_order(run.keys))


def _together(runs: Sequence[_Run]) -> _Run:
    """Runs one behind the other, unsorted."""
    return _Run(
        np.concatenate([run.keys for run in runs]),
        np.concatenate([run.rests for run in runs]),
        np.concatenate([run.prints for run in runs]),
        np.concatenate([run.buckets for run in runs]),
    )


def _merge(older: _Run, newer: _Run) -> _Run:
    """Merge two sorted runs in linear time; among equal keys the older stand first."""
    if not len(older) or not len(newer):
        return newer if len(newer) else older
    places = older.keys.searchsorted(newer.keys, side="right") + np.arange(len(newer))
    gaps = np.ones(len(older) + len(newer), np.bool_)
    gaps[places] = False

    def column(old: npt.NDArray[np.uint64], new: npt.NDArray[np.uint64]) -> Keys:
        merged = np.empty(len(gaps), old.dtype)
        merged[gaps] = old
        merged[places] = new
        return merged

    return _Run(
        column(older.keys, newer.keys),
        column(older.rests, newer.rests),
        column(older.prints, newer.prints),  # type: ignore[arg-type]  # The type is that of `old`.
        column(older.buckets, newer.buckets),  # type: ignore[arg-type]
    )


def _unpack(bucket: int, data: bytes) -> _Run:
    count, left = divmod(len(data), MARK_BYTES)
    if left:
        raise StoreCorrupt(
            f"a block of identities of hour {bucket} has {len(data)} bytes, no multiple of"
            f" {MARK_BYTES}: restore a backup"
        )
    return _Run(
        np.frombuffer(data, _WORD, count),
        np.frombuffer(data, _WORD, count, 8 * count),
        np.frombuffer(data, _HALF, count, 16 * count),
        np.full(count, bucket, _HALF),
    )


def join(blocks: Sequence[MarkBlock]) -> MarkBlock:
    """Make one block of several of the same hour, so that many small batches leave few rows."""
    if len(blocks) == 1:
        return blocks[0]
    bucket = blocks[0].bucket
    run = _sorted(_together([_unpack(bucket, block.data) for block in blocks]))
    return MarkBlock(bucket, len(run), run.pack())


class _Filter:
    """A bit for each beginning of a key: clear means that no known key begins so."""

    def __init__(self, entries_max: int) -> None:
        bits = max(16, (entries_max * KEYS_PER_CELL_MAX - 1).bit_length())
        self._shift = np.uint64(64 - bits)
        self._shift_int = 64 - bits
        self._bytes = np.zeros(1 << (bits - 3), np.uint8)
        self._view = self._bytes.data

    def maybe(self, keys: Keys) -> Places:
        """The places of the keys that may be known."""
        cells = keys >> self._shift
        bits = self._bytes[cells >> np.uint64(3)] >> (cells & np.uint64(7)).astype(np.uint8)
        return np.flatnonzero(bits & np.uint8(1))

    def maybe_one(self, digest_: bytes) -> bool:
        """Whether the key of one digest may be known."""
        cell = int.from_bytes(digest_[:8], "little") >> self._shift_int
        return bool(self._view[cell >> 3] >> (cell & 7) & 1)

    def note(self, keys: Keys) -> None:
        """Remember the beginnings of keys."""
        cells = keys >> self._shift
        bits = np.uint8(1) << (cells & np.uint64(7)).astype(np.uint8)
        np.bitwise_or.at(self._bytes, cells >> np.uint64(3), bits)

    def note_one(self, digest_: bytes) -> None:
        """Remember the beginning of the key of one digest."""
        cell = int.from_bytes(digest_[:8], "little") >> self._shift_int
        self._view[cell >> 3] |= 1 << (cell & 7)

    def forget_shard(self, number: int) -> None:
        """Clear what belongs to a shard: a shard's beginnings lie side by side."""
        width = len(self._bytes) // SHARDS
        self._bytes[number * width : (number + 1) * width] = 0


class Identities:
    """The index of known identities. Its methods run on one thread; none waits for anything.

    `entries_max` is the limit beyond which `shrink` asks for a shorter window; `bucket_min` the
    first hour that is remembered: what happened earlier is unknown here, so it must not be
    accepted.
    """

    digest = staticmethod(digest)
    fingerprint = staticmethod(fingerprint)
    pack = staticmethod(taken.pack)

    def __init__(self, entries_max: int, bucket_min: int = 0) -> None:
        self.entries_max = entries_max
        self.bucket_min = bucket_min
        self._filter = _Filter(entries_max)
        self._counts: dict[int, int] = {}  # Remembered identities by hour.
        self._shards = [_no_run()] * SHARDS
        self._runs: list[_Run] = []  # Oldest and largest first.
        self._folding: list[_Run] = []  # Runs on their way into the shards, oldest first.
        self._fold_next = SHARDS  # The first shard that does not hold them yet.
        self._fresh: dict[bytes, tuple[int, int]] = {}  # The newest: digest -> fingerprint, hour.
        self._held = 0  # Entries in memory, forgotten ones included.
        self._settled = 0  # Those of them in shards.

    def __len__(self) -> int:
        """How many identities are remembered."""
        return sum(self._counts.values())

    @property
    def oldest(self) -> int | None:
        """The first hour of which an identity is remembered; None: there is none."""
        return min(self._counts, default=None)

    # -- Asking -----------------------------------------------------------------------------------

    def find(self, digests: bytes) -> list[int]:
        """For each packed digest, the fingerprint under which it is known, or -1."""
        count = len(digests) // DIGEST_BYTES
        if count <= FEW:
            starts = range(0, len(digests), DIGEST_BYTES)
            maybe = self._filter.maybe_one
            if not any(maybe(digests[start : start + DIGEST_BYTES]) for start in starts):
                return [-1] * count
        words = np.frombuffer(digests, _WORD).reshape(count, 2)
        places = self._filter.maybe(words[:, 0])
        if not len(places):
            return [-1] * count
        return self._search(digests, words, places).tolist()  # type: ignore[no-any-return]

    def _search(self, digests: bytes, words: Keys, places: Places) -> Places:
        """Look for the digests at some places, in age order: what was added last counts."""
        known = np.full(len(words), -1, np.int64)
        keys = words[places, 0]
        order = np.argsort(keys)  # Neighbours in the batch become neighbours in memory.
        places, keys = places[order], keys[order]
        rests = words[places, 1]
        numbers = keys >> np.uint64(64 - SHARD_BITS)
        for number in np.unique(numbers).tolist():
            first, end = numbers.searchsorted([number, number + 1]).tolist()
            cut = slice(first, end)
            self._match(self._shards[number], keys[cut], rests[cut], places[cut], known)
        for run in chain(self._folding, self._runs):
            self._match(run, keys, rests, places, known)
        if self._fresh:
            for place in places.tolist():
                start = place * DIGEST_BYTES
                mark = self._fresh.get(digests[start : start + DIGEST_BYTES])
                if mark is not None and mark[1] >= self.bucket_min:
                    known[place] = mark[0]
        return known

    def _match(self, run: _Run, keys: Keys, rests: Keys, places: Places, known: Places) -> None:
        """Write the fingerprints of those found in a run. Several entries may share a key."""
        end = len(run)
        at = run.keys.searchsorted(keys)
        open_ = np.flatnonzero(at < end)
        while len(open_):
            open_ = open_[run.keys[at[open_]] == keys[open_]]
            here = at[open_]
            hit = (run.rests[here] == rests[open_]) & (run.buckets[here] >= self.bucket_min)
            known[places[open_[hit]]] = run.prints[here[hit]]
            at[open_] += 1
            open_ = open_[at[open_] < end]

    # -- Adding -----------------------------------------------------------------------------------

    def add(
        self, digests: bytes, prints: Sequence[int] | Prints, buckets: Sequence[int] | Prints
    ) -> tuple[MarkBlock, ...]:
        """Remember identities that are not known. The blocks, one an hour, go into the same commit.

        An identity must not stand twice in one call. `prints` are 32 bits each, `buckets` hours
        since the epoch.
        """
        count = len(digests) // DIGEST_BYTES
        self._held += count
        if count <= FEW:
            blocks = self._add_few(digests, prints, buckets)
        else:
            blocks = self._add_run(digests, prints, buckets)
        for block in blocks:
            if block.bucket >= self.bucket_min:
                self._counts[block.bucket] = self._counts.get(block.bucket, 0) + block.count
        return blocks

    def _add_few(
        self, digests: bytes, prints: Sequence[int] | Prints, buckets: Sequence[int] | Prints
    ) -> tuple[MarkBlock, ...]:
        blocks: dict[int, list[MarkBlock]] = {}
        for place, (print_, bucket) in enumerate(zip(prints, buckets, strict=True)):
            one = digests[place * DIGEST_BYTES : (place + 1) * DIGEST_BYTES]
            mark = int(print_), int(bucket)
            if one in self._fresh:
                self._held -= 1  # It was forgotten and comes anew.
            self._fresh[one] = mark
            self._filter.note_one(one)
            block = MarkBlock(mark[1], 1, one + mark[0].to_bytes(4, "little"))
            blocks.setdefault(mark[1], []).append(block)
        if len(self._fresh) >= FRESH_MAX:
            self._keep(self._take_fresh())
        return tuple(join(of_hour) for of_hour in blocks.values())

    def _add_run(
        self, digests: bytes, prints: Sequence[int] | Prints, buckets: Sequence[int] | Prints
    ) -> tuple[MarkBlock, ...]:
        words = np.frombuffer(digests, _WORD).reshape(-1, 2)
        unsorted = _Run(
            words[:, 0], words[:, 1], np.asarray(prints, _HALF), np.asarray(buckets, _HALF)
        )
        run = _sorted(unsorted)
        if self._fresh:
            self._keep(self._take_fresh())  # A run must not be older than what lies before it.
        # Behind the line above: a fold takes back the bits of what it cannot see.
        self._filter.note(run.keys)
        self._keep(run)
        return tuple(_blocks(run))

    def _take_fresh(self) -> _Run:
        words = np.frombuffer(b"".join(self._fresh), _WORD).reshape(-1, 2)
        marks = np.array(list(self._fresh.values()), _HALF)
        self._fresh.clear()
        return _sorted(_Run(words[:, 0], words[:, 1], marks[:, 0], marks[:, 1]))

    def _keep(self, run: _Run) -> None:
        """Append a run, merge runs of like size, and go on with the folding."""
        runs = self._runs
        runs.append(run)
        while (
            len(runs) > 1
            and len(runs[-2]) < 2 * len(runs[-1])
            and len(runs[-2]) + len(runs[-1]) <= RUN_MAX
        ):
            newer = runs.pop()
            runs[-1] = _merge(runs[-1], newer)
        self._fold(len(run))

    # -- Folding and forgetting -------------------------------------------------------------------

    @property
    def _fold_at(self) -> int:
        return max(FOLD_MIN, self._settled // FOLD_SHARE)

    def _fold(self, added: int) -> None:
        """Fold as much as `added` identities owe: a pass ends before the next one is due."""
        if self._fold_next == SHARDS:
            waiting = sum(map(len, self._runs))
            forgotten = self._held - len(self)
            if waiting < self._fold_at and forgotten <= max(FOLD_MIN, len(self) // 8):
                return
            self._folding, self._runs, self._fold_next = self._runs, [], 0
        owed = 1 + added * SHARDS * 2 // self._fold_at
        for _ in range(min(owed, SHARDS - self._fold_next)):
            self._fold_shard(self._fold_next)
            self._fold_next += 1
        if self._fold_next == SHARDS:
            self._folding = []

    def _fold_shard(self, number: int) -> None:
        """Make one shard of itself and its part of the folding runs, without what is forgotten."""
        shard = self._shards[number]
        before = len(shard)
        if self._folding:
            parts = [run.shard(number) for run in self._folding]
            shard = _merge(shard, _sorted(_together(parts)))
        remembered = shard.buckets >= self.bucket_min
        dropped = len(shard) - int(np.count_nonzero(remembered))
        if dropped:
            shard = shard.chosen(remembered)
        self._shards[number] = shard
        self._settled += len(shard) - before
        if dropped:
            self._held -= dropped
            self._refilter(number)

    def _refilter(self, number: int) -> None:
        """Set the filter of a shard anew: bits cannot be taken back one by one."""
        self._filter.forget_shard(number)
        self._filter.note(self._shards[number].keys)
        for run in self._runs:
            self._filter.note(run.shard(number).keys)
        for one in self._fresh:
            self._filter.note_one(one)

    def expire(self, bucket_min: int) -> bool:
        """Forget the hours before `bucket_min`; whether there was anything to forget."""
        if bucket_min <= self.bucket_min:
            return False
        self.bucket_min = bucket_min
        gone = [bucket for bucket in self._counts if bucket < bucket_min]
        for bucket in gone:
            del self._counts[bucket]
        return bool(gone)

    def shrink(self) -> int | None:
        """Where the limit of entries moves the window's start to; None: it is not reached.

        The newest hour is never given up: None, too, when it is all there is.
        """
        over = len(self) - self.entries_max
        if over <= 0 or len(self._counts) < 2:
            return None
        buckets = sorted(self._counts)
        for bucket, following in pairwise(buckets):
            over -= self._counts[bucket]
            if over <= 0:
                return following
        return buckets[-1]

    # -- Loading ----------------------------------------------------------------------------------

    def load(self, blocks: Iterable[tuple[int, bytes]]) -> None:
        """Take in stored blocks, (hour, data) each, in any order; for an index that is empty.

        Raises `StoreCorrupt` for a block that no `add` made.
        """
        assert self._held == 0
        parts: list[list[_Run]] = [[] for _ in range(SHARDS)]
        for group in _groups(blocks):
            runs = [_unpack(*block) for block in group if block[0] >= self.bucket_min]
            if runs:
                self._deal(runs, parts)
        for number, of_shard in enumerate(parts):
            if of_shard:
                shard = _sorted(_together(of_shard))
                of_shard.clear()  # So that the peak of memory is one shard above what stays.
                self._filter.note(shard.keys)
                self._shards[number] = shard

    def _deal(self, runs: list[_Run], parts: list[list[_Run]]) -> None:
        """Deal loaded identities out to shards, which are small enough for the caches."""
        for run in runs:
            if len(run):
                bucket = int(run.buckets[0])
                self._counts[bucket] = self._counts.get(bucket, 0) + len(run)
        run = _together(runs)
        numbers = (run.keys >> np.uint64(64 - SHARD_BITS)).astype(np.uint8)
        order = np.argsort(numbers, kind="stable")
        ends = np.cumsum(np.bincount(numbers, minlength=SHARDS))
        first = 0
        for number, end in enumerate(ends.tolist()):
            parts[number].append(run.chosen(order[first:end]))
            first = end
        self._held += len(run)
        self._settled += len(run)


def _blocks(run: _Run) -> Iterator[MarkBlock]:
    """One block for each hour of a run."""
    low, high = int(run.buckets.min()), int(run.buckets.max())
    if low == high:  # As a rule: a batch is of this hour.
        yield MarkBlock(low, len(run), run.pack())
        return
    for bucket in np.unique(run.buckets).tolist():
        part = run.chosen(run.buckets == bucket)
        yield MarkBlock(bucket, len(part), part.pack())


def _groups(blocks: Iterable[tuple[int, bytes]]) -> Iterator[list[tuple[int, bytes]]]:
    """Blocks in groups of about `LOAD_GROUP` identities."""
    group: list[tuple[int, bytes]] = []
    held = 0
    for block in blocks:
        group.append(block)
        held += len(block[1]) // MARK_BYTES
        if held >= LOAD_GROUP:
            yield group
            group, held = [], 0
    if group:
        yield group
