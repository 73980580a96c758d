"""What remembering an event durably costs: find, add and commit, beside how many are known.

Each batch is looked up, added to the memory and committed with as many counters as it touches and a
position, as the bookkeeper does it; the next batch is made ready while a commit is under way. A
store with `--known` identities is made first, closed and opened again, so that the start is
measured too. `--plain` takes the filter away. At the end every identity that was committed must be
known to a store that is opened anew: a fast loss fails.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import numpy as np

from meterd.core.changes import AgreementRow, CardRow, Change, CounterRow, MarkBlock
from meterd.store.identities import digest
from meterd.store.sqlite import SqliteStore

HOUR = 500_000
HOURS = 72
CHANCE = random.Random(1)


def rss_mb() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 1_000_000


async def filled(path: Path, known: int, block: int) -> None:
    """Make a store with `known` identities spread over the window, in blocks as batches are."""
    store = SqliteStore.open(path, entries_max=max(20_000_000, known))
    chance = np.random.default_rng(1)
    agreements = tuple(
        AgreementRow(f"agr-{n}", "p", "x", "api", (), False, 0, Fraction(0), 0, 0, 0)
        for n in range(1000)
    )
    await store.commit(Change(cards=(CardRow("c", "{}"),), agreements=agreements))
    futures = []
    for first in range(0, known, block):
        count = min(block, known - first)
        words = chance.integers(0, 2**64, 2 * count, dtype=np.uint64)
        words[:count].sort()
        data = words.tobytes() + chance.integers(0, 2**32, count, dtype=np.uint32).tobytes()
        marks = (MarkBlock(HOUR - HOURS + first * HOURS // known, count, data),)
        futures.append(store.commit(Change(marks=marks)))
        if len(futures) >= 64:
            await asyncio.gather(*futures)
            futures.clear()
    await asyncio.gather(*futures)
    await store.close()


async def timed(store: SqliteStore, batch: int, agreements: int, seconds: float) -> list[int]:
    """Drive batches for a while; nanoseconds of [all, find, add, the longest add], events."""
    number = 0
    find = add = longest = events = 0
    durable: asyncio.Future[None] | None = None
    print_, hours = list(range(batch)), [HOUR] * batch
    began = time.perf_counter_ns()
    while time.perf_counter_ns() - began < seconds * 1e9:
        digests = CHANCE.randbytes(16 * batch)
        t0 = time.perf_counter_ns()
        known = store.identities.find(digests)
        t1 = time.perf_counter_ns()
        marks = store.identities.add(digests, print_, hours)
        t2 = time.perf_counter_ns()
        find, add, longest = find + t1 - t0, add + t2 - t1, max(longest, t2 - t1)
        assert max(known) == -1
        number += 1
        counters = tuple(
            CounterRow(f"agr-{n}", "c", "tokens", (), number * 10**9, number)
            for n in range(min(agreements, batch))
        )
        if durable is not None:
            await durable
        durable = store.commit(
            Change(counters=counters, marks=marks, positions=(("redis", str(number)),))
        )
        await asyncio.sleep(0)
        events += batch
    assert durable is not None
    await durable
    return [time.perf_counter_ns() - began, find, add, longest, events]


def opened(path: Path, known: int, plain: bool) -> tuple[SqliteStore, float]:
    began = time.perf_counter()
    store = SqliteStore.open(path, entries_max=max(20_000_000, known))
    store.load()
    seconds = time.perf_counter() - began
    if plain:  # Every key may be known.
        filter_ = store.identities._filter  # noqa: SLF001  # The trick is what is measured.
        filter_.maybe = lambda keys: np.arange(len(keys))  # type: ignore[method-assign]
    return store, seconds


async def measured(
    arguments: argparse.Namespace, path: Path, known: int
) -> list[dict[str, object]]:
    gc.collect()
    before = rss_mb()
    store, seconds = opened(path, known, arguments.plain)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 // 1_000_000
    print(
        f"{known:>12,} known: opened in {seconds:.2f} s, memory {before} -> {rss_mb()} MB"
        f" (peak {peak}), {store.stats().bytes // 1_000_000} MB on the disk"
    )
    rows = []
    for batch in arguments.batch:
        runs = []
        for _ in range(arguments.repeat):
            wall, find, add, longest, events = await timed(
                store, batch, arguments.agreements, arguments.seconds
            )
            runs.append((events * 1e9 / wall, find / events, add / events, longest / 1e6))
        columns = zip(*runs, strict=True)
        rate, find_ns, add_ns, pause = (statistics.median(column) for column in columns)
        low, high = min(run[0] for run in runs), max(run[0] for run in runs)
        print(
            f"{known:>12,} known, batch {batch:>6,}: {rate / 1000:7.1f} k events/s"
            f" ({low / 1000:.0f}-{high / 1000:.0f}), find {find_ns / 1000:.3f} us,"
            f" add {add_ns / 1000:.3f} us, longest add {pause:.1f} ms"
        )
        rows.append({"known": known, "batch": batch, "events_per_second": round(rate)})
    remembered = len(store.identities)
    one = digest("bench", "exact")
    await store.commit(Change(marks=store.identities.add(one, [7], [HOUR])))
    await store.close()
    print(f"{known:>12,} known at first, {remembered:,} in the end: memory {rss_mb()} MB")
    del store
    again, _ = opened(path, known, plain=False)
    assert (remembered + 1, [7]) == (len(again.identities), again.identities.find(one))
    await again.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--known", type=int, nargs="+", default=[0, 10_000_000])
    parser.add_argument("--batch", type=int, nargs="+", default=[100, 1000, 5000, 10_000])
    parser.add_argument("--agreements", type=int, default=1, help="counters written with a batch")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--plain", action="store_true", help="without the filter")
    parser.add_argument("--json", action="store_true", help="print the results as JSON, too")
    parser.add_argument("--switch-interval", type=float, default=sys.getswitchinterval())
    parser.add_argument("--fill", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.fill is not None:
        asyncio.run(filled(arguments.fill, arguments.known[0], 5000))
        return
    sys.setswitchinterval(arguments.switch_interval)
    results = []
    for known in arguments.known:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as directory:
            # In a process of its own, so that the memory measured is that of the store alone.
            fill = [sys.executable, __file__, "--fill", directory, "--known", str(known)]
            subprocess.run(fill, check=True)
            results += asyncio.run(measured(arguments, Path(directory), known))
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
