"""Keys of idempotent calls: remembered for a day, bounded for each owner."""

from __future__ import annotations

from meterd.core import keys
from meterd.core.changes import KeyRow
from meterd.core.keys import KEPT_MS, Keys


def row(key: str, owner: str = "ops", at: int = 0, body: bytes = b"{}") -> KeyRow:
    return KeyRow(owner, key, bytes(32), at, 200, "application/json", body)


def test_key_is_remembered_for_its_owner_and_for_a_day():
    """To the millisecond; another owner's same key is another one."""
    known = Keys([row("a", at=5)])

    assert row("a", at=5) == known.get("ops", "a", 4 + KEPT_MS)
    assert known.get("ops", "a", 5 + KEPT_MS) is None
    assert known.get("other", "a", 6) is None
    assert known.get("ops", "b", 6) is None


def test_old_keys_are_handed_out_to_be_forgotten_on_the_disk_as_well():
    """With the next one of their owner, and no other's."""
    known = Keys([row("b", at=1), row("a", at=0), row("a", owner="other")])

    assert [("ops", "a")] == known.put(row("c", at=KEPT_MS), KEPT_MS)
    assert 3 == len(known)


def test_oldest_keys_make_room_for_new_ones(monkeypatch):
    """By number and by bytes, for each owner by itself; a row that is put anew is counted once."""
    monkeypatch.setattr(keys, "ROWS_MAX", 2)
    monkeypatch.setattr(keys, "BYTES_MAX", 10)
    known = Keys()
    gone = [known.put(row(key, body=b"12"), 0) for key in ("a", "b", "b", "c")]
    heavy = known.put(row("d", body=b"123456789"), 0)

    assert [[], [], [], [("ops", "a")]] == gone
    assert [("ops", "b"), ("ops", "c")] == heavy
    assert [] == known.put(row("a", owner="other", body=b"1"), 0)


def test_forgotten_key_is_free_again():
    """One that is not known may be forgotten too."""
    known = Keys([row("a")])
    known.forget("ops", "a")
    known.forget("ops", "a")
    known.forget("nobody", "a")

    assert 0 == len(known)
    assert known.get("ops", "a", 0) is None


def test_answer_that_is_larger_than_all_that_is_kept_is_not_kept(monkeypatch):
    """Nor is what was there before it; what comes next has room again."""
    monkeypatch.setattr(keys, "BYTES_MAX", 10)
    known = Keys([row("a")])

    assert [("ops", "a"), ("ops", "b")] == known.put(row("b", body=b"12345678901"), 0)
    assert 0 == len(known)
    assert [] == known.put(row("c", body=b"1234567890"), 0)
