"""What each taken event added, packed: so that a `meterd.void` can take exactly that back.

The rule kept here: an event that is remembered as an identity can be found here too, with the
counter that it was added to and with all that was added; both are forgotten by the hour.

Nearly all events are *narrow*: 20 bytes, of which 8 are the first half of the identity's digest,
4 the counter's number and 8 the quantity in nanos. Where a quantity does not fit or more was added
(an amount, a sample), the event is *wide*, and stored as msgpack. Nothing is held in memory: taking
back is rare, so it may look through the blocks on the disk, newest first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from meterd.core.changes import Taken, TakenBlock

NARROW = np.dtype([("key", "<u8"), ("counter", "<u4"), ("quantity", "<u8")])
NARROW_BYTES = NARROW.itemsize
KEY_BYTES = 8
DIGEST_BYTES = 16
_QUANTITY_MAX = 2**64 - 1


class _Wide(msgspec.Struct, array_like=True, frozen=True):
    key: bytes
    counter: int
    quantity: str  # It may pass 64 bits.
    amount: str
    sample: str


_wides = msgspec.msgpack.Decoder(list[_Wide])


def pack(
    bucket: int,
    digests: bytes,
    counters: Sequence[int],
    quantities: Sequence[int],
    extras: Mapping[int, tuple[int, str]],
) -> tuple[TakenBlock, ...]:
    """Pack a batch. `extras`: by place, the amount in 10^-21 USDC and the key of the sample."""
    if not extras:
        try:
            return (TakenBlock(bucket, False, _narrow(digests, counters, quantities)),)
        except OverflowError:
            pass
    wide = [
        _Wide(
            digests[place * DIGEST_BYTES : place * DIGEST_BYTES + KEY_BYTES],
            counter,
            str(quantities[place]),
            str(extras.get(place, (0, ""))[0]),
            extras.get(place, (0, ""))[1],
        )
        for place, counter in enumerate(counters)
    ]
    return (TakenBlock(bucket, True, msgspec.msgpack.encode(wide)),)


def _narrow(digests: bytes, counters: Sequence[int], quantities: Sequence[int]) -> bytes:
    rows = np.empty(len(counters), NARROW)
    rows["key"] = np.frombuffer(digests, "<u8")[::2]
    rows["counter"] = counters
    rows["quantity"] = np.array(quantities, np.uint64)
    return rows.tobytes()


def unpack(data: bytes, *, wide: bool) -> list[Taken]:
    """Read what all events of one block added, in the order in which they were taken."""
    if wide:
        return [
            Taken(one.counter, int(one.quantity), int(one.amount), one.sample)
            for one in _wides.decode(data)
        ]
    rows = np.frombuffer(data, NARROW)
    return [
        Taken(counter, quantity, 0, "")
        for counter, quantity in zip(
            rows["counter"].tolist(), rows["quantity"].tolist(), strict=True
        )
    ]


def search(key: bytes, data: bytes, *, wide: bool) -> list[Taken]:
    """Find what was added under a key, the first 8 bytes of a digest, in one block."""
    if wide:
        return [
            Taken(one.counter, int(one.quantity), int(one.amount), one.sample)
            for one in _wides.decode(data)
            if one.key == key
        ]
    if key not in data:
        return []
    rows = np.frombuffer(data, NARROW)
    found = rows[rows["key"] == np.frombuffer(key, "<u8")[0]]
    return [Taken(int(row["counter"]), int(row["quantity"]), 0, "") for row in found]
