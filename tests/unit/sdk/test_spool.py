"""What waits in a spool, and what is left of it after each way to end."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meterd.sdk import spool as spools
from meterd.sdk.failures import NotKept
from meterd.sdk.spool import Memory, Numbers, Spool

MANY = 1 << 30


def opened(directory: Path, bytes_max: int = MANY, fsync: spools.Fsync = "never") -> Spool:
    return Spool(directory, bytes_max, fsync)


def event(number: int) -> bytes:
    return b'{"id":"%d","source":"svc","sequence":%d}' % (number, number)


def left(spool: Spool) -> list[bytes]:
    """Everything that waits, in order, taken out."""
    found: list[bytes] = []
    while batch := spool.peek(3, MANY):
        found += batch
        spool.done(len(batch))
    return found


def die(spool: Spool) -> None:
    """End as a killed process does: nothing is written, the locks are gone."""
    for segment in spool._segments:
        os.close(segment.fd)
    spool._segments.clear()


def fill(queue: Memory | Spool) -> None:
    for number in range(100):
        queue.append(event(number))


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.spool"))


@pytest.mark.parametrize("ended", [die, Spool.close])
def test_successor_finds_what_was_not_taken_in_order(tmp_path, ended):
    """Whichever way the process ended, and with a part of it taken."""
    first = opened(tmp_path)
    for number in range(10):
        first.append(event(number))
    assert first.peek(4, MANY) == [event(number) for number in range(4)]
    first.done(4)
    ended(first)

    second = opened(tmp_path)
    second.append(event(10))

    assert (second.recovered, second.pending) == (6, 7)
    assert left(second) == [event(number) for number in range(4, 11)]
    assert (second.pending, second.pending_bytes) == (0, 0)
    second.close()
    assert files(tmp_path) == []


def test_two_processes_never_share_a_segment(tmp_path):
    """A second one in the same directory has nothing of the first, which lives."""
    first, second = opened(tmp_path), None
    first.append(event(1))
    second = opened(tmp_path)
    second.append(event(2))

    assert second.recovered == 0
    assert (left(first), left(second)) == ([event(1)], [event(2)])
    first.close()
    second.close()


def test_end_that_was_cut_off_is_left_out_with_a_warning(tmp_path, caplog):
    """As after a power cut: everything before it is there, and what follows is sound again."""
    first = opened(tmp_path)
    for number in range(3):
        first.append(event(number))
    die(first)
    (file,) = files(tmp_path)
    os.truncate(file, file.stat().st_size - 5)

    with caplog.at_level(logging.WARNING, "meterd.sdk"):
        second = opened(tmp_path)
    assert "cut off" in caplog.text
    second.peek(1, MANY)
    second.done(1)
    die(second)
    third = opened(tmp_path)

    assert left(third) == [event(1)]
    third.close()


def test_line_that_is_damaged_in_the_middle_is_kept_for_a_person(tmp_path, caplog):
    """Its neighbours are sent; the file stays beside."""
    first = opened(tmp_path)
    for number in range(3):
        first.append(event(number))
    die(first)
    (file,) = files(tmp_path)
    file.write_bytes(file.read_bytes().replace(b'"id":"1"', b'"id":"9"'))

    second = opened(tmp_path)

    assert left(second) == [event(0), event(2)]
    assert "damaged" in caplog.text
    assert [b'"id":"9"' in one.read_bytes() for one in tmp_path.glob("*.damaged")] == [True]
    second.close()


@pytest.mark.parametrize("kind", ["memory", "spool"])
def test_full_queue_says_so_and_keeps_what_it_has(tmp_path, kind):
    """Nothing is dropped: the new event is refused, and there is room again after a while."""
    queue = Memory(400) if kind == "memory" else opened(tmp_path, 400)
    with pytest.raises(NotKept, match="events wait for meterd"):
        fill(queue)
    held = queue.pending
    assert held > 3
    assert queue.peek(3, MANY) == [event(number) for number in range(3)]
    queue.done(3)
    queue.append(event(100))

    assert queue.pending == held - 2
    queue.close()


def test_disk_that_refuses_a_line_leaves_no_half_of_it(tmp_path, monkeypatch):
    """The caller is told, and the next event stands on a line of its own."""
    spool = opened(tmp_path)
    spool.append(event(1))
    real, writes = os.write, []

    def full(fd: int, data: bytes) -> int:
        writes.append(data)
        if len(writes) == 1:
            return real(fd, data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spools.os, "write", full)
    with pytest.raises(NotKept, match="No space left"):
        spool.append(event(2))
    monkeypatch.undo()
    spool.append(event(3))
    die(spool)
    again = opened(tmp_path)

    assert left(again) == [event(1), event(3)]
    again.close()


def test_directory_that_cannot_be_used_is_said_at_once(tmp_path):
    """Not when the first event is lost."""
    (tmp_path / "file").write_text("")

    with pytest.raises(NotKept, match="cannot be used"):
        opened(tmp_path / "file")


def test_spool_is_for_its_owner_alone(tmp_path):
    """Usage tells much of a customer."""
    spool = opened(tmp_path / "deep" / "spool", fsync="each")
    spool.append(event(1))

    assert spool.directory.stat().st_mode & 0o777 == 0o700
    assert files(spool.directory)[0].stat().st_mode & 0o777 == 0o600
    spool.close()


def test_numbers_go_on_after_a_crash_and_belong_to_one_process(tmp_path):
    """What waits in the spool counts as well as what was written down."""
    first = opened(tmp_path)
    numbers = Numbers(first, "svc")
    assert numbers.last == 0
    for number in (1, 2, 3):
        first.append(event(number))
    numbers.last = 3
    with pytest.raises(NotKept, match="give each its source"):
        Numbers(first, "svc")
    other = Numbers(first, "another")
    numbers.close()
    die(first)

    second = opened(tmp_path)
    again = Numbers(second, "svc")
    assert again.last == 3
    again.keep()
    left(second)
    second.close()
    again.close()
    third = opened(tmp_path)

    assert Numbers(third, "svc").last == 3
    other.close()
    third.close()


ACTS = st.lists(
    st.one_of(
        st.just("append"),
        st.tuples(st.just("take"), st.integers(1, 5)),
        st.sampled_from(["die", "close", "tear"]),
    ),
    max_size=60,
)


@settings(max_examples=100, deadline=None)
@given(acts=ACTS)
def test_nothing_is_lost_and_nothing_changes_its_place_whatever_happens(acts):
    """Kills, ends, torn ends and small segments: what was taken is gone, all else is there."""
    directory = Path(tempfile.mkdtemp())
    small, spools.SEGMENT_BYTES = spools.SEGMENT_BYTES, 200
    try:
        spool, model, told = opened(directory), list[bytes](), 0
        for act in acts:
            if act == "append":
                spool.append(event(told))
                model.append(event(told))
                told += 1
            elif isinstance(act, tuple):
                batch = spool.peek(act[1], MANY)
                assert batch == model[: len(batch)]
                assert bool(batch) == bool(model)
                if batch:
                    spool.done(len(batch))
                    del model[: len(batch)]
            else:
                (Spool.close if act == "close" else die)(spool)
                if act == "tear" and (found := files(directory)):
                    with found[-1].open("ab") as file:
                        file.write(b"E 0123")
                spool = opened(directory)
            assert spool.pending == len(model)
        assert left(spool) == model
        spool.close()
        assert files(directory) == []
    finally:
        spools.SEGMENT_BYTES = small
        shutil.rmtree(directory)
