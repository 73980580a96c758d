from __future__ import annotations

import os
import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from meterd.errors import StoreCorrupt
from meterd.store import identities as room
from meterd.store.identities import Identities, digest, fingerprint, join


def pack(key: int, rest: int) -> bytes:
    return struct.pack("<QQ", key, rest)


def digests_of(names: list[str]) -> list[bytes]:
    return [digest("svc", name) for name in names]


def add(index: Identities, marks: dict[bytes, tuple[int, int]]):
    prints, buckets = [m[0] for m in marks.values()], [m[1] for m in marks.values()]
    return index.add(b"".join(marks), prints, buckets)


def loaded(blocks, entries_max: int = 1000, bucket_min: int = 0) -> Identities:
    index = Identities(entries_max, bucket_min)
    index.load((block.bucket, block.data) for block in blocks)
    return index


def test_digest_tells_source_from_id():
    """Moving characters from the source to the id makes another identity of 16 bytes."""
    first, second = digest("ab", "c"), digest("a", "bc")

    assert (16, True) == (len(first), first != second)


def test_fingerprint_is_32_bits_of_the_content():
    """The same content has the same fingerprint, other content another one."""
    prints = [fingerprint(b"12"), fingerprint(b"12"), fingerprint(b"13")]

    assert prints[0] == prints[1] != prints[2]
    assert all(0 <= value < 2**32 for value in prints)


def test_index_finds_what_was_added_and_nothing_else():
    """A known identity gives its fingerprint, also the highest one; an unknown one gives -1."""
    known, new = digests_of(["a", "b"]), digests_of(["c"])
    index = Identities(1000)
    index.add(b"".join(known), [7, 2**32 - 1], [5, 5])

    assert [7, -1, 2**32 - 1] == index.find(known[0] + new[0] + known[1])


def test_index_is_empty_when_nothing_was_added():
    """Nothing is known, nothing is oldest, and an empty question has an empty answer."""
    index = Identities(1000)

    assert ([], 0, None, None) == (index.find(b""), len(index), index.oldest, index.shrink())
    assert () == index.add(b"", [], [])


@pytest.mark.parametrize("count", [3, 40])
def test_index_tells_identities_with_the_same_first_half_apart(count):
    """Equal keys are told apart by their second halves, however many there are."""
    marks = {pack(2**63 + 1, rest): (rest, 9) for rest in range(count)}
    index = Identities(1000)
    add(index, marks)
    unknown = pack(2**63 + 1, count)

    assert [*range(count), -1] == index.find(b"".join(marks) + unknown)


@pytest.mark.parametrize("key", [0, 1, 2**58 - 1, 2**58, 2**63, 2**64 - 1])
@pytest.mark.parametrize("filled", [0, 100])
def test_index_finds_keys_at_the_edges_of_shards(key, filled):
    """The least and the greatest key of a shard are found before and after loading."""
    marks = {pack(key, 1): (5, 9)} | {os.urandom(16): (1, 9) for _ in range(filled)}
    index = Identities(1000)
    blocks = add(index, marks)

    assert [5] == index.find(pack(key, 1)) == loaded(blocks).find(pack(key, 1))


def test_blocks_hold_one_hour_each_and_load_again():
    """An added batch comes back as one packed block for each hour, which a new index can load."""
    marks = {os.urandom(16): (place, 100 + place % 3) for place in range(300)}
    blocks = add(Identities(1000), marks)
    index = loaded(blocks)

    assert {100: 100, 101: 100, 102: 100} == {block.bucket: block.count for block in blocks}
    assert list(range(300)) == index.find(b"".join(marks))
    assert (300, 100) == (len(index), index.oldest)


def test_joined_block_holds_what_its_parts_held():
    """Blocks of one hour make one sorted block with the same identities."""
    index = Identities(1000)
    marks = {os.urandom(16): (place, 7) for place in range(50)}
    blocks = [add(index, {one: mark})[0] for one, mark in marks.items()]
    block = join(blocks)

    assert (7, 50) == (block.bucket, block.count)
    assert list(range(50)) == loaded([block]).find(b"".join(marks))


def test_damaged_block_is_refused():
    """A block whose length no count of identities gives is corrupt, and says of which hour."""
    with pytest.raises(StoreCorrupt, match="hour 12"):
        Identities(10).load([(12, b"x" * 21)])


def test_expired_hours_are_unknown_at_once():
    """After `expire` the earlier hours are unknown; the limit never moves back."""
    marks = {os.urandom(16): (place, 10 + place // 10) for place in range(40)}
    index = Identities(1000)
    add(index, marks)

    assert index.expire(12)
    assert not index.expire(12)
    assert not index.expire(3)
    assert [-1] * 20 + list(range(20, 40)) == index.find(b"".join(marks))
    assert (20, 12, 12) == (len(index), index.oldest, index.bucket_min)


def test_forgotten_identity_can_be_added_again():
    """What was expired and comes again, in a later hour, has its new fingerprint."""
    one = digest("svc", "again")
    index = Identities(1000)
    index.add(one, [1], [10])
    index.expire(11)
    index.add(one, [2], [11])

    assert ([2], 1) == (index.find(one), len(index))


def test_loading_leaves_out_hours_before_the_limit():
    """Blocks from before the limit are not taken in, whoever still stores them."""
    index = Identities(1000)
    blocks = [*index.add(digest("s", "old"), [1], [5]), *index.add(digest("s", "new"), [2], [6])]
    again = loaded(blocks, bucket_min=6)

    assert [-1, 2] == again.find(digest("s", "old") + digest("s", "new"))
    assert 1 == len(again)


def test_window_shrinks_by_whole_hours_when_the_limit_is_reached():
    """Beyond the limit `shrink` names the first hour to keep; the newest one is never given up."""
    index = Identities(25)
    for hour in (10, 11, 12):
        add(index, {os.urandom(16): (1, hour) for _ in range(10)})
    first = index.shrink()
    index.expire(first)
    single = Identities(5)
    add(single, {os.urandom(16): (1, 4) for _ in range(10)})

    assert (11, 20, None, None) == (first, len(index), index.shrink(), single.shrink())


def test_window_shrinks_to_the_newest_hour_when_that_alone_is_too_much():
    """A flood in the newest hour leaves that hour."""
    index = Identities(5)
    add(index, {os.urandom(16): (1, hour) for hour in (1, 2) for _ in range(10)})

    assert 2 == index.shrink()


def test_many_identities_are_found_while_and_after_they_are_folded(monkeypatch):
    """Through merges, folds and expiry a large index answers as a dict does, and lets memory go."""
    monkeypatch.setattr(room, "FOLD_MIN", 500)
    monkeypatch.setattr(room, "RUN_MAX", 300)
    chance = random.Random(7)
    index, model = Identities(100_000), {}
    for step in range(120):
        count = chance.choice([1, 5, 17, 200, 900])
        marks = {chance.randbytes(16): (chance.getrandbits(32), step // 10) for _ in range(count)}
        asked = [*marks, *chance.sample(sorted(model), min(len(model), 100))]

        assert [model.get(one, (-1, 0))[0] for one in asked] == index.find(b"".join(asked))

        add(index, marks)
        model |= marks
        if step % 10 == 9:
            index.expire(step // 10 - 2)
            model = {one: mark for one, mark in model.items() if mark[1] >= step // 10 - 2}

        assert len(model) == len(index)

    assert [mark[0] for mark in model.values()] == index.find(b"".join(model))
    assert index._held < 2 * len(index)
    kept = sum(map(len, (*index._shards, *index._folding, *index._runs, index._fresh)))
    assert index._held <= kept  # Those being folded stand in two places.


def test_filter_never_hides_a_known_key_when_shards_are_folded_between():
    """A fold that is caused by the waiting single events does not unlearn the batch behind them."""
    index = Identities(1000)
    index._fold_next = 0
    index._folding = []
    marks = {os.urandom(16): (1, 1) for _ in range(500)}
    add(index, marks)
    index.expire(2)
    add(index, {os.urandom(16): (1, 5)})
    index._fold_next = 0
    fresh = {os.urandom(16): (9, 5) for _ in range(500)}
    add(index, fresh)

    assert [9] * 500 == index.find(b"".join(fresh))


def test_order_is_that_of_a_stable_sort_when_upper_halves_are_equal():
    """Keys that differ in the lower half alone, and equal ones, come out sorted and stable."""
    chance = np.random.default_rng(3)
    keys = chance.integers(0, 4, 5000, dtype=np.uint64) << np.uint64(40)
    keys += chance.integers(0, 3, 5000, dtype=np.uint64)
    expected = np.argsort(keys, kind="stable")

    assert expected.tolist() == room._order(keys).tolist()


# Few keys, so that equal ones and full shards are met often.
KEYS = st.sampled_from([0, 1, 5, 2**58, 2**58 + 1, 2**63, 2**64 - 1])
DIGESTS = st.one_of(st.builds(pack, KEYS, st.integers(0, 3)), st.binary(min_size=16, max_size=16))


class IndexAgainstDict(RuleBasedStateMachine):
    """Any order of add, find, expire and load gives what a dict gives."""

    @initialize(few=st.sampled_from([0, 16]), fold=st.sampled_from([1, 20, 65_536]))
    def start(self, few, fold):
        self.saved = room.FEW, room.FOLD_MIN, room.FRESH_MAX
        room.FEW, room.FOLD_MIN, room.FRESH_MAX = few, fold, 8
        self.index = Identities(1000)
        self.model: dict[bytes, tuple[int, int]] = {}
        self.blocks = []
        self.asked: set[bytes] = set()

    @rule(marks=st.dictionaries(DIGESTS, st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 9))))
    def add(self, marks):
        marks = {one: mark for one, mark in marks.items() if one not in self.model}
        self.blocks += add(self.index, marks)
        self.asked |= set(marks)
        low = self.index.bucket_min
        self.model |= {one: mark for one, mark in marks.items() if mark[1] >= low}

    @rule(others=st.lists(DIGESTS, max_size=20))
    def find(self, others):
        asked = [*self.asked, *others]
        expected = [self.model.get(one, (-1, 0))[0] for one in asked]

        assert expected == self.index.find(b"".join(asked))

    @rule(bucket=st.integers(0, 10))
    def expire(self, bucket):
        low = max(bucket, self.index.bucket_min)
        forgotten = any(mark[1] < low for mark in self.model.values())

        assert forgotten == self.index.expire(bucket)

        self.model = {one: mark for one, mark in self.model.items() if mark[1] >= low}
        self.blocks = [block for block in self.blocks if block.bucket >= low]

    @precondition(lambda self: self.blocks)
    @rule(shuffle=st.randoms(use_true_random=False))
    def load(self, shuffle):
        blocks = list(self.blocks)
        shuffle.shuffle(blocks)
        self.index = loaded(blocks, 1000, self.index.bucket_min)

    @invariant()
    def counts(self):
        if hasattr(self, "index"):
            oldest = min((mark[1] for mark in self.model.values()), default=None)

            assert (len(self.model), oldest) == (len(self.index), self.index.oldest)

    def teardown(self):
        if hasattr(self, "saved"):
            room.FEW, room.FOLD_MIN, room.FRESH_MAX = self.saved


TestIndexAgainstDict = IndexAgainstDict.TestCase
TestIndexAgainstDict.settings = settings(max_examples=120, stateful_step_count=25, deadline=None)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), max_size=60), st.lists(st.integers(0, 2**64 - 1)))
def test_merged_runs_are_sorted(older, newer):
    """Merging two sorted runs gives one sorted run with all of both."""

    def run(keys):
        words = np.array(sorted(keys), np.uint64)
        halves = np.zeros(len(keys), np.uint32)
        return room._Run(words, words, halves, halves)

    assert sorted(older + newer) == room._merge(run(older), run(newer)).keys.tolist()
