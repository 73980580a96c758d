"""What was counted, held against what it was counted from: samples, periods, single events, holds.

A counter is a sum that somebody has added up. Beside it stands, for as long as it can be needed,
what each event added. Here the two are held together, as far as the window reaches.
"""

from __future__ import annotations

import re
import sqlite3
from collections import Counter as Tally

import msgspec
import numpy as np

from meterd.audit.books import MILESTONE, OUTCOME, OWN, PERIOD, Books, Counter, Sample
from meterd.audit.findings import Findings
from meterd.core.money import NANOS

# One narrow event: half of its identity, its counter's number, and nanos.
TAKEN = np.dtype([("key", "<u8"), ("counter", "<u4"), ("quantity", "<u8")])
_LOW = np.uint64(2**32 - 1)
_LATEST = re.compile(r"[0-9]{16} .*", re.DOTALL)


def check_usage(books: Books, findings: Findings) -> None:
    """Check each counter by itself, and the periods that have ended."""
    for counter in books.counters:
        for detail in (*_flaws(counter), *_sample_flaws(books, counter)):
            findings.broke("counters", counter.row, detail)
    numbers = {counter.number for counter in books.counters}
    for number in sorted(books.samples.keys() - numbers):
        findings.broke("references", f"sample of counter {number}", "there is no such counter")
    _check_periods(books, findings)


def _flaws(counter: Counter) -> list[str]:
    """What no counter can be, whatever was used."""
    quantity, events = counter.quantity, counter.events
    told = f"{quantity} nanos of {events} events"
    if counter.meter == PERIOD:
        return [] if (quantity, events) == (NANOS, 0) else [f"{told}: an ended period is one unit"]
    if counter.meter in (MILESTONE, OUTCOME):
        once = events in (0, 1) and 0 <= quantity <= events * NANOS
        whole = counter.meter == OUTCOME or quantity == events * NANOS
        return [] if once and whole else [f"{told}: it is reached once"]
    if not events:  # All that was counted was taken back.
        return [] if quantity == counter.amount == 0 else [f"{told}: what no event said"]
    if quantity <= 0 or events < 0 or counter.amount < 0:
        return [f"{told}: neither may be 0 or less"]
    return []


def _sample_flaws(books: Books, counter: Counter) -> list[str]:
    """What a counter shows is the greatest, the latest or the number of its samples."""
    samples = [sample for sample in books.samples.get(counter.number, []) if sample.count]
    if not samples:
        return []
    flaws = []
    said = sum(sample.count for sample in samples)
    if said != counter.events:
        flaws.append(f"{counter.events} events are stored, its samples are of {said}")
    readings = {shown for _, shown in _readings(samples)}
    if counter.quantity not in readings:
        shown = " or ".join(map(str, sorted(readings))) or "nothing that a meter can show"
        flaws.append(f"{counter.quantity} nanos are stored, its samples show {shown}")
    return flaws


def _readings(samples: list[Sample]) -> list[tuple[str, int]]:
    """Which kinds of meter can have left these samples, and what each makes of them."""
    readings = []
    if all(sample.key == str(sample.quantity) for sample in samples):
        readings.append(("max", max(sample.quantity for sample in samples)))
    if all(sample.quantity == NANOS for sample in samples):
        readings.append(("unique", len(samples) * NANOS))
    if all(_LATEST.fullmatch(sample.key) for sample in samples):
        readings.append(("latest", max(samples, key=lambda sample: sample.key).quantity))
    return readings


def _check_periods(books: Books, findings: Findings) -> None:
    """Each period ends once, in its order, and none before its time."""
    ended: dict[str, list[int]] = {}
    for counter in books.counters:
        if counter.meter == PERIOD:
            ended.setdefault(counter.agreement, []).append(counter.period)
    for name, periods in ended.items():
        agreement = books.agreements.get(name)
        if agreement is None:
            continue
        owed = list(range(agreement.period))
        at_close = [*owed, agreement.period]  # The running one ends with its agreement.
        findings.expect(
            sorted(periods) == owed or (agreement.closing and sorted(periods) == at_close),
            "periods",
            f"agreement {name}",
            f"period {agreement.period} is running, ended are {sorted(periods)}",
        )


def may_shrink(books: Books, agreement: str) -> bool:
    """Whether what an agreement owes may have been more at an earlier time.

    An event was taken back, a later figure was smaller, or more units reached a cheaper tier.
    """
    return agreement in books.taken_back or agreement in _shrinking(books)


def _shrinking(books: Books) -> set[str]:
    if books.shrinking is None:
        books.shrinking = set()
        for counter in books.counters:
            samples = [sample for sample in books.samples.get(counter.number, []) if sample.count]
            card = books.cards.get(counter.card)
            volume = counter.meter not in OWN and any(
                rate.model == "volume" and rate.meter == counter.meter
                for rate in (card.rates if card is not None else ())
            )
            if volume or (samples and "latest" in dict(_readings(samples))):
                books.shrinking.add(counter.agreement)
    return books.shrinking


# -- What each event added -----------------------------------------------------------------------


def check_taken(
    connection: sqlite3.Connection, first: int, books: Books, findings: Findings
) -> None:
    """Each event that can be taken back is one of its counter, and all of them are its sum."""
    events: Tally[int] = Tally()
    quantities: Tally[int] = Tally()
    amounts: Tally[int] = Tally()
    for number, bucket, wide, data in connection.execute(
        "SELECT number, bucket, wide, data FROM taken_block"
    ):
        row = f"taken_block {number}"
        findings.expect(
            bucket >= first,
            "taken events",
            row,
            f"hour {bucket} is older than {first}, from where events are kept",
        )
        try:
            taken = _wide(data) if wide else _narrow(data)
        except (ValueError, msgspec.MsgspecError) as error:
            findings.broke("taken events", row, f"it cannot be read: {error}")
            continue
        for name, count, quantity, amount in taken:
            events[name] += count
            quantities[name] += quantity
            amounts[name] += amount
    findings.checked["events that can be taken back"] = sum(events.values())
    known = {counter.number: counter for counter in books.counters}
    for name in sorted(events.keys() - known.keys()):
        findings.broke("taken events", f"counter {name}", "events name it, and it is not there")
    for name, counter in known.items():
        here = events[name], quantities[name], amounts[name]
        _check_sum(books, counter, here, findings)


def _narrow(data: bytes) -> list[tuple[int, int, int, int]]:
    """Sum a block up by counter: (number, events, nanos, amount)."""
    rows = np.frombuffer(data, TAKEN)  # Raises `ValueError` where a row is cut.
    rows = rows[np.argsort(rows["counter"], kind="stable")]
    numbers, starts, counts = np.unique(rows["counter"], return_index=True, return_counts=True)
    if not len(numbers):
        return []
    # In two halves, which no block is long enough to overflow.
    low = np.add.reduceat(rows["quantity"] & _LOW, starts).tolist()
    high = np.add.reduceat(rows["quantity"] >> np.uint64(32), starts).tolist()
    sums = [(above << 32) + below for above, below in zip(high, low, strict=True)]
    return list(zip(numbers.tolist(), counts.tolist(), sums, [0] * len(sums), strict=True))


def _wide(data: bytes) -> list[tuple[int, int, int, int]]:
    rows = msgspec.msgpack.decode(data, type=list[tuple[bytes, int, str, str, str]])
    return [(number, 1, int(quantity), int(amount)) for _, number, quantity, amount, _ in rows]


def _check_sum(
    books: Books, counter: Counter, taken: tuple[int, int, int], findings: Findings
) -> None:
    events, quantity, amount = taken
    back = books.taken_back.get(counter.agreement, 0)
    findings.expect(
        events <= counter.events + back,
        "taken events",
        counter.row,
        f"{events} events were taken for it, it has counted {counter.events}",
    )
    # Behind the window, and in a store that was older, there is not one for each event any more.
    if events != counter.events or back or counter.number in books.samples:
        return
    findings.expect(
        counter.meter == PERIOD or (quantity, amount) == (counter.quantity, counter.amount),
        "taken events",
        counter.row,
        f"its events come to {quantity} nanos and {amount} of 10^-21 USDC, stored are"
        f" {counter.quantity} and {counter.amount}",
    )


def check_holds(connection: sqlite3.Connection, findings: Findings) -> None:
    """What is set aside is an amount, until a moment behind the one at which it was."""
    for name, amount, created_at, expires_at in connection.execute(
        "SELECT id, amount, created_at, expires_at FROM hold"
    ):
        findings.expect(
            amount >= 0 and created_at <= expires_at,
            "holds",
            f"hold {name}",
            f"{amount} micros from {created_at} until {expires_at}",
        )
        findings.checked["holds"] += 1
