from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import sqlite3
import stat
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meterd.core.changes import (
    AgreementRow,
    CardRow,
    Change,
    CounterRow,
    DeadLetter,
    JournalEntry,
    MarkBlock,
    ProducerRow,
    State,
)
from meterd.core.settlement import Escrow, EscrowStatus, Release, ReleaseStatus
from meterd.errors import NotFound, Refused, StoreCorrupt, StoreFailed, StoreLocked
from meterd.store import sqlite as room
from meterd.store.identities import digest
from meterd.store.sqlite import SqliteStore

NOW = 1_800_000_000_000
DAY = 24 * 3600 * 1000


def agreement(name: str = "a", **changes) -> AgreementRow:
    row = AgreementRow(name, "p", "payer", "api", (("main", f"esc_{name}"),), False, NOW,
                       Fraction(1, 3), 1, 10**24, 0)  # fmt: skip
    return replace(row, **changes)


def escrow(name: str = "a", **changes) -> Escrow:
    return replace(Escrow(f"esc_{name}", name, "main", EscrowStatus.ACTIVE, total=10), **changes)


def release(name: str = "r1", status=ReleaseStatus.INTENDED, **changes) -> Release:
    row = Release(name, "esc_a", 5, 0, status, "amount", 7, NOW, ((NOW, status.value, "why"),))
    return replace(row, **changes)


def letter(number: int, **changes) -> DeadLetter:
    row = DeadLetter(number, "svc", "e1", "malformed", "no", b"\x00{", "1-1", (("a", "b"),), NOW)
    return replace(row, **changes)


def counter(**changes) -> CounterRow:
    row = CounterRow("a", "card", "tokens", (("kind", "in"),), 10**24, 3, number=1)
    return replace(row, **changes)


def entry(detail: str = "d") -> JournalEntry:
    return JournalEntry(NOW, "ops", "bound", "a", detail)


BASE = Change(cards=(CardRow("card", "{}"),), agreements=(agreement(),), escrows=(escrow(),))


def opened(path: Path, entries_max: int = 1000) -> SqliteStore:
    return SqliteStore.open(path, entries_max=entries_max)


@contextlib.asynccontextmanager
async def running(path: Path):
    store = opened(path)
    try:
        yield store
    finally:
        await store.close()


async def state_after(path: Path, *changes: Change) -> State:
    """Commit changes one after the other, close, and load from the disk."""
    async with running(path) as store:
        for change in changes:
            await store.commit(change)
    async with running(path) as store:
        return store.load(now_ms=NOW)


def tamper(path: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(path / "meterd.db", isolation_level=None)) as other:
        for statement in statements:
            other.execute(statement)


async def until(true) -> None:
    while not true():  # What is waited for is done by another thread.
        await asyncio.sleep(0.002)


async def fill(store: SqliteStore) -> None:
    """Leave the database no page to grow by."""

    def limit(connection):
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        return connection.execute(f"PRAGMA max_page_count = {pages}").fetchone()

    await store._ask(limit)


def make_room(store: SqliteStore) -> None:
    """Give the database room again; the writer is waiting, so the connection is free."""
    store._connection.execute("PRAGMA max_page_count = 1073741823").fetchone()


BIG = Change(dead_letters=(letter(50, payload=b"x" * 100_000),))


# -- Opening


async def test_store_is_private_when_created(tmp_path):
    """The directory is its owner's alone, and so is every file in it."""
    path = tmp_path / "deep" / "data"
    async with running(path) as store:
        await store.commit(BASE)
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()}

    assert 0o700 == stat.S_IMODE(path.stat().st_mode)
    assert {0o600} == set(modes.values())
    assert {"meterd.db", "meterd.db-wal", "meterd.lock", "meterd.reserve"} == set(modes)


async def test_empty_store_loads_an_empty_state(tmp_path):
    """A new store holds nothing, and dead letters are numbered from 1."""
    async with running(tmp_path) as store:
        state = store.load()

    assert State() == state


async def test_second_store_names_the_holder(tmp_path):
    """A second open is refused with the holder's process id, host and start, and what to do."""
    async with running(tmp_path):
        said = json.loads((tmp_path / "meterd.lock").read_text())
        with pytest.raises(StoreLocked) as refused:
            opened(tmp_path)

    assert str(os.getpid()) in str(refused.value)
    assert f"on {said['host']} since {said['since']}" in str(refused.value)
    assert "stop that daemon" in str(refused.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x", "host": 1, "since": 2}'])
async def test_second_store_is_refused_when_the_lock_file_says_nothing(tmp_path, text):
    """The lock decides; a text that is not understood only makes the explanation poorer."""
    descriptor = os.open(tmp_path / "meterd.lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.write(descriptor, text.encode())
        with pytest.raises(StoreLocked, match="in use by another process"):
            opened(tmp_path)
    finally:
        os.close(descriptor)


async def test_lock_text_of_the_dead_is_not_believed(tmp_path):
    """A lock file that somebody left behind, without the lock, keeps nobody out."""
    (tmp_path / "meterd.lock").write_text('{"pid": 1, "host": "elsewhere", "since": "always"}')
    async with running(tmp_path):
        said = json.loads((tmp_path / "meterd.lock").read_text())

    assert os.getpid() == said["pid"]


async def test_store_is_refused_when_another_program_has_the_file(tmp_path):
    """An open sqlite3 shell is told from a damaged file."""
    await state_after(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "meterd.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreLocked, match="another program"):
            opened(tmp_path)


async def test_newer_store_is_refused(tmp_path):
    """A schema that this program does not know is left alone, and the message says what to do."""
    await state_after(tmp_path)
    tamper(tmp_path, "PRAGMA user_version = 99")
    with pytest.raises(StoreCorrupt, match=r"newer meterd \(version 99"):
        opened(tmp_path)


async def test_database_of_another_program_is_refused(tmp_path):
    """Tables that are not meterd's are not touched."""
    tamper(tmp_path, "CREATE TABLE theirs (x)")
    with pytest.raises(StoreCorrupt, match="another program"):
        opened(tmp_path)


async def test_file_that_is_no_database_is_refused(tmp_path):
    """Garbage in the place of the database is corrupt, and the lock is free again afterwards."""
    (tmp_path / "meterd.db").write_bytes(b"garbage " * 4096)
    with pytest.raises(StoreCorrupt, match="damaged"):
        opened(tmp_path)
    (tmp_path / "meterd.db").unlink()
    async with running(tmp_path) as store:
        assert store.writable


async def test_directory_that_is_a_file_is_refused(tmp_path):
    """A data directory that cannot be made fails with its reason."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreFailed, match="cannot be used"):
        opened(tmp_path / "file")


async def test_store_refuses_when_a_setting_is_not_taken(tmp_path, monkeypatch):
    """What durability rests on is read back, and another answer than the wanted one is refused."""
    monkeypatch.setattr(room, "_PRAGMAS", (("synchronous", "FULL", 1),))
    with pytest.raises(StoreFailed, match="synchronous"):
        opened(tmp_path)


async def test_settings_are_those_that_durability_rests_on(tmp_path):
    """WAL, FULL and EXCLUSIVE are what the open connection answers."""
    async with running(tmp_path) as store:
        answers = [
            store._connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "locking_mode", "wal_autocheckpoint")
        ]

    assert ["wal", 2, "exclusive", 0] == answers


# -- Writing and reading back


async def test_state_comes_back_as_it_was_written(tmp_path):
    """Every row, with numbers far beyond 64 bits and exact thirds, is the same after a reopen."""
    rows = Change(
        counters=(counter(), counter(meter="calls", dimensions=(), quantity=0, number=2)),
        positions=(("redis", "17-0"), ("mqtt", "é\x00x")),
        dead_letters=(letter(1), letter(2)),
        releases=(release(units=10**24, before=2**80),),
        journal=(entry(),),
    )
    wide = escrow(
        reason="r", closing=True, total=2**70, baseline=1, settled=2, credited=-3, observed=4,
        remaining=5, service_status="funded", provider="agent", deadline=2**66,
        quarantine_factor=4, units_settled=10**24, settled_at=NOW,
    )  # fmt: skip
    state = await state_after(tmp_path, BASE, replace(rows, escrows=(wide,)))

    assert (
        State(
            cards=list(BASE.cards),
            agreements=[agreement()],
            counters=[counter(meter="calls", dimensions=(), quantity=0, number=2), counter()],
            escrows=[replace(wide, release=rows.releases[0])],
            positions=dict(rows.positions),
            dead_letters=2,
            dead_letter_next=3,
        )
        == state
    )


async def test_escrow_loads_with_its_open_release_and_recent_voids(tmp_path):
    """Of an escrow's releases the open one comes along, and the voids and late ones of 30 days."""
    old = ((NOW - 31 * DAY, "void", ""),)
    rows = (
        release("v0", ReleaseStatus.VOID, history=old),
        release("v1", ReleaseStatus.VOID),
        release("l1", ReleaseStatus.LATE),
        release("c1", ReleaseStatus.CONFIRMED),
        release("open", ReleaseStatus.IN_DOUBT),
    )
    state = await state_after(tmp_path, BASE, Change(releases=rows))

    assert [replace(escrow(), release=rows[4], voids=(rows[1], rows[2]))] == state.escrows


async def test_later_rows_supersede_earlier_ones_in_one_commit_and_in_several(tmp_path):
    """Whatever shares a commit, the last write of a row is what is found."""
    first = replace(BASE, counters=(counter(quantity=1),), positions=(("s", "1"),))
    steps = (
        Change(agreements=(agreement(events=2),), counters=(counter(quantity=2),)),
        Change(releases=(release(),), positions=(("s", "2"),)),
        Change(releases=(release(status=ReleaseStatus.CONFIRMED),), escrows=(escrow(settled=5),)),
        Change(releases=(release("r2"),)),
    )
    async with running(tmp_path) as store:
        await asyncio.gather(*[store.commit(change) for change in (first, *steps)])
    async with running(tmp_path) as store:
        state = store.load(now_ms=NOW)

    assert [agreement(events=2)] == state.agreements
    assert [2] == [row.quantity for row in state.counters]
    assert {"s": "2"} == state.positions
    assert [escrow(settled=5, release=release("r2"))] == state.escrows


NUMBERS = st.integers(0, 10**25)
KEYS = [
    (meter, dimensions)
    for meter in ("tokens", "calls")
    for dimensions in ((), (("kind", "in"),), (("kind", "out"), ("model", "é")))
]
COUNTERS = st.builds(
    lambda place, quantity, events, amount: CounterRow(
        "a", "card", *KEYS[place], quantity, events, amount=amount, number=place + 1
    ),
    st.integers(0, len(KEYS) - 1),
    NUMBERS,
    st.integers(0, 2**40),
    NUMBERS,
)
CHANGES = st.builds(
    Change,
    agreements=st.tuples(
        st.builds(
            agreement,
            accrued=st.fractions(0, 10**12),
            units=NUMBERS,
            events=st.integers(0, 2**40),
        )
    ),
    counters=st.lists(COUNTERS, max_size=8).map(tuple),
    positions=st.lists(
        st.tuples(st.sampled_from("xy"), st.text(st.characters(codec="utf-8"))), max_size=3
    ).map(tuple),
    journal=st.lists(st.builds(entry, st.text()), max_size=3).map(tuple),
    dead_letters=st.lists(st.builds(letter, st.integers(1, 9)), max_size=3).map(tuple),
    dead_letters_gone=st.lists(st.integers(1, 9), max_size=2).map(tuple),
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=st.lists(CHANGES, min_size=1, max_size=8), together=st.booleans())
def test_any_changes_leave_what_a_dict_would_hold(tmp_path_factory, changes, together):
    """In one commit or in many: the last write of each key is loaded, and the chain holds."""
    path = tmp_path_factory.mktemp("any")

    async def run() -> State:
        async with running(path) as store:
            futures = [store.commit(BASE)]
            for change in changes:
                futures.append(store.commit(change))
                if not together:
                    await futures[-1]
            await asyncio.gather(*futures)
            entries = await store.journal()

            assert sum(len(change.journal) for change in changes) == len(entries)

        async with running(path) as store:
            return store.load(now_ms=NOW)

    state = asyncio.run(run())
    counters, positions, letters, used = {}, {}, {}, 0
    for change in changes:
        counters |= {(row.meter, row.dimensions): row for row in change.counters}
        positions |= dict(change.positions)
        for row in change.dead_letters:
            letters[row.number] = row
            used = max(used, row.number)
        for number in change.dead_letters_gone:
            letters.pop(number, None)

    assert counters == {(row.meter, row.dimensions): row for row in state.counters}
    assert changes[-1].agreements == tuple(state.agreements)
    assert (positions, len(letters)) == (state.positions, state.dead_letters)
    assert used + 1 == state.dead_letter_next


PRODUCER = ProducerRow("svc-é", 2, ((0, 7), (9, 10**18 - 1)), NOW, NOW + 5, False, NOW, 10**22)


async def test_producers_come_back_as_they_were_last_written(tmp_path):
    """Forgotten ones do not, in whatever commit they were forgotten."""
    other = replace(PRODUCER, source="b", exact=True)
    one, two = replace(PRODUCER, run=1), Change(producers=(PRODUCER, other))
    state = await state_after(tmp_path / "1", BASE, Change(producers=(one,)), two)
    assert [other, PRODUCER] == sorted(state.producers, key=lambda row: row.source)
    assert 0 == state.numbers_from

    gone = Change(producers_gone=("b", "nobody"), numbers_from=NOW)
    state = await state_after(tmp_path / "2", two, gone)
    assert ([PRODUCER], NOW) == (state.producers, state.numbers_from)

    state = await state_after(tmp_path / "3", two, gone, two)
    assert 2 == len(state.producers)


async def test_identities_come_back_with_the_store(tmp_path):
    """Marks of a commit are known after a reopen; hours that were given up are not, and stay so."""
    ids = [digest("s", str(number)) for number in range(60)]
    async with running(tmp_path) as store:
        for number, one in enumerate(ids):
            marks = store.identities.add(one, [number], [100 + number // 20])
            await store.commit(Change(marks=marks))
        store.identities.expire(101)
        await store.commit(Change(marks_from=101))
    async with running(tmp_path) as store:
        known = store.identities.find(b"".join(ids))

        assert [-1] * 20 + list(range(20, 60)) == known
        assert (101, 40) == (store.identities.bucket_min, len(store.identities))


async def test_number_of_a_dead_letter_is_never_used_again(tmp_path):
    """Numbers go on behind the highest ever given, even if it came and went in one commit."""
    gone = Change(dead_letters=(letter(7),))
    async with running(tmp_path) as store:
        await asyncio.gather(store.commit(gone), store.commit(Change(dead_letters_gone=(7,))))
    async with running(tmp_path) as store:
        state = store.load()

    assert (0, 8) == (state.dead_letters, state.dead_letter_next)


async def test_texts_that_no_database_takes_are_stored_with_question_marks(tmp_path):
    """Lone surrogates from outside neither stop the writer nor break the chain."""
    bad = "a\ud800b"
    async with running(tmp_path) as store:
        await store.commit(
            Change(dead_letters=(letter(1, event_id=bad, detail=bad),), journal=(entry(bad),))
        )
    async with running(tmp_path) as store:
        found = await store.dead_letter(1)

        assert ("a?b", "a?b") == (found.event_id, found.detail)


async def test_futures_are_done_in_order_and_commits_are_shared(tmp_path):
    """Many changes share few commits; their futures are done first in, first out."""
    order, batches = [], []
    async with running(tmp_path) as store:
        store.on_commit = lambda _, changes: batches.append(changes)
        futures = [store.commit(replace(BASE, positions=(("s", str(n)),))) for n in range(2000)]
        for number, future in enumerate(futures):
            future.add_done_callback(lambda _, number=number: order.append(number))
        await asyncio.gather(*futures)
        stats = store.stats()

    assert list(range(2000)) == order
    assert (2000, True, True) == (sum(batches), len(batches) < 50, max(batches) <= 512)
    assert (batches[-1], 0) == (stats.last_commit_changes, stats.waiting)
    assert stats.bytes > 0


async def test_cancelled_waiter_does_not_disturb_the_others(tmp_path):
    """A future that its owner cancelled is left alone; the change is committed all the same."""
    async with running(tmp_path) as store:
        first = store.commit(BASE)
        first.cancel()
        await store.commit(Change(positions=(("s", "2"),)))
    async with running(tmp_path) as store:
        assert [agreement()] == store.load().agreements


async def test_closed_store_takes_nothing_more(tmp_path):
    """What was put in before `close` is durable; then a commit fails and the lock is free."""
    store = opened(tmp_path)
    last = store.commit(BASE)
    await store.close()

    assert last.done()
    with pytest.raises(StoreFailed, match="closed"):
        await store.commit(BASE)
    async with running(tmp_path) as again:
        assert [agreement()] == again.load().agreements


# -- What the database itself refuses


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (Change(releases=(release("r1"), release("r2"))), "UNIQUE constraint failed"),
        (Change(releases=(release(amount=0),)), "amount > 0"),
        (Change(releases=(release(escrow="esc_other"),)), "FOREIGN KEY"),
        (Change(counters=(counter(card="none"),)), "FOREIGN KEY"),
        (Change(counters=(counter(quantity=-1),)), "CHECK"),
        (Change(counters=(counter(quantity=-(10**24)),)), "CHECK"),
        (Change(agreements=(agreement(accrued=Fraction(-1, 3)),)), "CHECK"),
        (Change(marks=(MarkBlock(5, 2, b"x" * 20),)), "CHECK"),
    ],
)
async def test_database_refuses_what_must_never_be(tmp_path, bad, why):
    """A row against the rules of money fails its commit and all later ones; nothing of it stays."""
    store = opened(tmp_path)
    told = []
    store.on_failed = told.append
    await store.commit(BASE)
    refused, behind = store.commit(bad), store.commit(Change(positions=(("s", "1"),)))
    with pytest.raises(StoreFailed, match=why):
        await refused
    with pytest.raises(StoreFailed):
        await behind
    with pytest.raises(StoreFailed):
        await store.commit(BASE)
    with pytest.raises(StoreFailed):
        await store.dead_letters()
    await store.failed.wait()
    await store.close()

    assert ([store.failure], False) == (told, store.writable)
    async with running(tmp_path) as again:
        state = again.load(now_ms=NOW)

        assert ([escrow()], {}) == (state.escrows, state.positions)


async def test_second_unfinished_release_is_refused_in_a_later_commit(tmp_path):
    """While one release of an escrow is open, in whatever state, the database takes no second."""
    for status in ("intended", "sent", "in_doubt", "escalated"):
        path = tmp_path / status
        store = opened(path)
        await store.commit(replace(BASE, releases=(release("r1", ReleaseStatus(status)),)))
        with pytest.raises(StoreFailed, match=r"release\.escrow"):
            await store.commit(Change(releases=(release("r2"),)))
        await store.close()


async def test_release_never_changes_its_amount(tmp_path):
    """A row of a known release with another amount stops the store."""
    store = opened(tmp_path)
    await store.commit(replace(BASE, releases=(release(),)))
    with pytest.raises(StoreFailed, match="never changes"):
        await store.commit(Change(releases=(release(amount=6),)))
    await store.close()


@pytest.mark.parametrize(
    "statement",
    ["UPDATE journal SET detail = 'x'", "DELETE FROM journal", "DELETE FROM release"],
)
async def test_history_cannot_be_rewritten_by_a_statement(tmp_path, statement):
    """Journal and releases are only ever added to: the tables say so themselves."""
    await state_after(tmp_path, replace(BASE, journal=(entry(),), releases=(release(),)))
    with pytest.raises(sqlite3.IntegrityError):
        tamper(tmp_path, statement)


# -- Journal


@pytest.mark.parametrize(
    ("statement", "where"),
    [
        ("UPDATE journal SET detail = 'other' WHERE number = 2", "breaks at entry 2"),
        ("UPDATE journal SET at = at + 1 WHERE number = 1", "breaks at entry 1"),
        ("UPDATE journal SET hash = zeroblob(32) WHERE number = 3", "breaks at entry 3"),
        ("DELETE FROM journal WHERE number = 2", "breaks at entry 2"),
        ("DELETE FROM journal WHERE number = 4", "ends at entry 3, it should end at 4"),
        ("DELETE FROM journal", "ends at entry 0"),
        ("DELETE FROM setting", "ends at entry 4"),
    ],
)
async def test_tampered_journal_is_refused(tmp_path, statement, where):
    """A changed, missing or cut off entry keeps the store from opening, and is named."""
    await state_after(tmp_path, *[Change(journal=(entry(str(n)),)) for n in range(4)])
    tamper(tmp_path, "DROP TRIGGER journal_stays", "DROP TRIGGER journal_kept", statement)
    with pytest.raises(StoreCorrupt, match=where):
        opened(tmp_path)


async def test_journal_is_listed_newest_first_and_goes_on_after_a_reopen(tmp_path):
    """Entries keep their order and numbers over restarts."""
    await state_after(tmp_path, Change(journal=(entry("1"), entry("2"))))
    async with running(tmp_path) as store:
        await store.commit(Change(journal=(entry("3"),)))
        newest = await store.journal(limit=2)
        rest = await store.journal(before=newest[-1].number)

    assert [(3, entry("3")), (2, entry("2"))] == [(row.number, row.entry) for row in newest]
    assert [entry("1")] == [row.entry for row in rest]


# -- Listing


async def test_releases_are_listed_by_escrow_agreement_and_status(tmp_path):
    """Newest first, in pages, seeing every commit that was put in before."""
    two = Change(agreements=(agreement("b"),), escrows=(escrow("b"),))
    rows = [release(f"r{n}", ReleaseStatus.CONFIRMED) for n in range(3)]
    other = release("x", escrow="esc_b")
    async with running(tmp_path) as store:
        store.commit(BASE)
        store.commit(two)
        store.commit(Change(releases=(*rows, other)))
        every = await store.releases()
        page = await store.releases(escrow="esc_a", limit=1, before="r2")
        of_b = await store.releases(agreement="b")
        open_ = await store.releases(status="intended")
        nothing = await store.releases(agreement="a", status="intended")
        with pytest.raises(NotFound):
            await store.releases(before="never")

    assert [other, rows[2], rows[1], rows[0]] == every
    assert ([rows[1]], [other], [other], []) == (page, of_b, open_, nothing)


async def test_dead_letters_are_listed_by_reason_and_in_pages(tmp_path):
    """Newest first; a single one is found by its number; a replaced one has its new reason."""
    rows = [letter(n, reason="late" if n % 2 else "malformed") for n in range(1, 6)]
    async with running(tmp_path) as store:
        store.commit(Change(dead_letters=tuple(rows)))
        store.commit(Change(dead_letters=(letter(2, reason="conflict"),), dead_letters_gone=(4,)))
        late = await store.dead_letters(reason="late", limit=2)
        older = await store.dead_letters(before=3)
        found, missing = await store.dead_letter(2), await store.dead_letter(4)

    assert [rows[4], rows[2]] == late
    assert [letter(2, reason="conflict"), rows[0]] == older
    assert (letter(2, reason="conflict"), None) == (found, missing)


# -- A full disk


async def test_full_disk_loses_nothing_and_tells_nobody_done(tmp_path, monkeypatch):
    """Without room changes wait, in order; with room again all of them become durable."""
    monkeypatch.setattr(room, "RETRY_S_MIN", 0.005)
    monkeypatch.setattr(room, "RETRY_S_MAX", 0.01)
    seen, done = [], []
    async with running(tmp_path) as store:
        store.on_writable = seen.append
        await store.commit(BASE)
        await fill(store)
        waiting = [store.commit(BIG), store.commit(Change(positions=(("s", "1"),)))]
        for number, future in enumerate(waiting):
            future.add_done_callback(lambda _, number=number: done.append(number))
        await until(lambda: not store.writable and not store._reserve.exists())

        assert ([False], []) == (seen, done)

        make_room(store)
        await asyncio.gather(*waiting)
        await until(lambda: store.writable)

        assert ([False, True], [0, 1]) == (seen, done)
        assert room.RESERVE_BYTES == store._reserve.stat().st_size
        assert not store.failed.is_set()
    async with running(tmp_path) as store:
        state = store.load()

        assert (1, {"s": "1"}) == (state.dead_letters, state.positions)


async def test_store_on_a_full_disk_fails_what_waits_when_it_is_closed(tmp_path, monkeypatch):
    """Closing does not wait for room: what could not be written fails, and was never done."""
    monkeypatch.setattr(room, "RETRY_S_MIN", 0.005)
    store = opened(tmp_path)
    await store.commit(BASE)
    await fill(store)
    waiting = store.commit(BIG)
    await until(lambda: not store.writable)
    await store.close()
    with pytest.raises(StoreFailed, match="disk is full"):
        await waiting
    async with running(tmp_path) as again:
        assert (0, [agreement()]) == (again.load().dead_letters, again.load().agreements)


async def test_store_that_cannot_make_its_reserve_starts_unwritable(tmp_path, monkeypatch):
    """A disk that is full at the start is seen at the start, and left as soon as there is room."""
    monkeypatch.setattr(room, "RETRY_S_MIN", 0.005)
    monkeypatch.setattr(room, "RESERVE_BYTES", 2**62)
    async with running(tmp_path) as store:
        unwritable = store.writable
        await store.commit(BASE)  # A change that fits is written all the same.
        monkeypatch.setattr(room, "RESERVE_BYTES", 4096)
        await until(lambda: store.writable)

    assert not unwritable


# -- Housekeeping


async def test_single_events_leave_few_rows(tmp_path):
    """Identities that come one by one are joined in idle moments, and none is lost by it."""
    ids = [digest("s", str(number)) for number in range(1500)]
    async with running(tmp_path) as store:
        for number, one in enumerate(ids):
            await store.commit(Change(marks=store.identities.add(one, [number], [number % 2])))
        count = "SELECT count(*) FROM mark_block"
        await until(lambda: store._small_blocks < room.JOIN_AT)
        (rows,) = await store._ask(lambda connection: connection.execute(count).fetchone())

        assert rows < 2 * 3 * room.JOIN_AT
    async with running(tmp_path) as store:
        assert list(range(1500)) == store.identities.find(b"".join(ids))


async def test_blocks_are_joined_without_an_idle_moment_when_there_are_many(tmp_path, monkeypatch):
    """A store that is never idle still joins its small blocks."""
    monkeypatch.setattr(room, "JOIN_AT", 4)
    monkeypatch.setattr(room, "JOIN_ANYWAY_AT", 8)
    monkeypatch.setattr(room, "CHANGES_MAX", 1)
    ids = [digest("s", str(number)) for number in range(64)]
    async with running(tmp_path) as store:
        await asyncio.gather(
            *[store.commit(Change(marks=store.identities.add(one, [1], [5]))) for one in ids]
        )
        count = "SELECT count(*) FROM mark_block"
        (rows,) = await store._ask(lambda connection: connection.execute(count).fetchone())

        assert rows < 24
    async with running(tmp_path) as store:
        assert [1] * 64 == store.identities.find(b"".join(ids))


async def test_log_is_checkpointed_when_it_has_grown(tmp_path, monkeypatch):
    """The WAL is emptied into the database beyond its limit, and at the end."""
    monkeypatch.setattr(room, "WAL_BYTES_MAX", 50_000)
    async with running(tmp_path) as store:
        for number in range(20):
            await store.commit(Change(dead_letters=(letter(number + 1, payload=b"x" * 30_000),)))
        await store.journal()

        assert store._wal.stat().st_size < 150_000
    assert not (tmp_path / "meterd.db-wal").exists()


async def test_backup_is_a_store_of_its_own(tmp_path):
    """A backup opens as a store with the same state, and an existing file is never overwritten."""
    target = tmp_path / "copy"
    target.mkdir()
    async with running(tmp_path / "data") as store:
        await store.commit(replace(BASE, journal=(entry(),)))
        await store.backup(target / "meterd.db")
        with pytest.raises(Refused, match="exists"):
            await store.backup(target / "meterd.db")
        with pytest.raises(Refused, match="cannot be written"):
            await store.backup(tmp_path / "nowhere" / "meterd.db")
        await store.commit(Change(positions=(("s", "later"),)))

        assert ["meterd.db"] == [file.name for file in target.iterdir()]
    async with running(target) as again:
        state = again.load()

        assert ([agreement()], {}) == (state.agreements, state.positions)


# -- The end


async def test_error_of_the_disk_fails_everything_that_waits_and_will_come(tmp_path):
    """After one I/O error no future is ever done again, and the process is told to end."""
    store = opened(tmp_path)
    await store.commit(BASE)

    class Broken:
        in_transaction = False

        def execute(self, *_):
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
            error.sqlite_errorname = "SQLITE_IOERR_FSYNC"
            raise error

    sound, store._connection = store._connection, Broken()
    futures = [store.commit(BASE), store.commit(BASE)]
    results = await asyncio.gather(*futures, return_exceptions=True)
    store._connection = sound
    results.append((await asyncio.gather(store.commit(BASE), return_exceptions=True))[0])
    await store.close()

    assert [StoreFailed] * 3 == [type(result) for result in results]
    assert "SQLITE_IOERR_FSYNC" in str(results[0])
    assert (70, True) == (store.failure.exit_code, store.failed.is_set())
