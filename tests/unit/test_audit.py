from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meterd.audit import Audit, Shown, audit
from meterd.audit import records as audit_records
from meterd.bookkeeper import Bookkeeper
from meterd.cli.main import main
from meterd.core.accounts import Agreement
from meterd.core.changes import Change, JournalEntry, MarkBlock
from meterd.core.events import EventDecoder
from meterd.core.ledger import Ledger
from meterd.core.settlement import (
    Answer,
    Answered,
    AnswerKind,
    Due,
    Go,
    Observed,
    Resolved,
    Restarted,
    Rules,
)
from meterd.errors import NotFound, StoreCorrupt, StoreLocked
from meterd.sources import Deliveries
from meterd.store.sqlite import SqliteStore
from tests.fakes import METERS, WINDOW_MS, FakeClock, NoFacts, adopt, make_plans, reading_of

TOTAL = 10_000_000


class Stage:
    """A real bookkeeper on a real store, driven by hand."""

    def __init__(self, data_dir: Path) -> None:
        self.clock = FakeClock()
        self.store = SqliteStore.open(data_dir, entries_max=10_000)
        self.books = Bookkeeper(
            Ledger(make_plans(), METERS),
            self.store,
            self.store.identities,
            Rules(observe_gap=1.0, quarantine=60.0),
            self.clock,
            NoFacts(),
            decoder=EventDecoder(sentinel=7_777_777_777_777),
            window_ms=WINDOW_MS,
            positions={},
            dead_letters=0,
            dead_letter_next=1,
        )
        self.numbers = iter(range(1, 10**9))

    async def bind(self, name: str, plan: str = "stream") -> None:
        agreement = Agreement(name, plan, "Ada", (("main", f"esc_{name}"),))
        await self.books.bind(agreement, "test")
        await adopt(self.books, self.clock, f"esc_{name}", total=TOTAL)

    async def use(self, name: str, quantity: object, meter: str = "calls", **more: Any) -> None:
        event = {"id": f"e{next(self.numbers)}", "agreement": name, "meter": meter, **more}
        payload = json.dumps({**event, "quantity": quantity}).encode()
        await self.books.record("svc", Deliveries(payloads=[payload])).durable

    async def read(self, name: str, released: int) -> None:
        self.clock.advance(5)
        mono = self.clock.mono()
        reading = reading_of(f"esc_{name}", total=TOTAL, mono=mono, released=released)
        await self.step(name, Observed(reading, mono, self.clock.wall(), self.owed(name)))

    def owed(self, name: str) -> int:
        return self.books.ledger.accounts[name].owed

    async def step(self, name: str, event: Any) -> None:
        await self.books.step(f"esc_{name}", event)

    async def resolve(self, name: str, *, landed: bool) -> None:
        await self.books.resolve(f"esc_{name}", "test", "asked the service", landed=landed)

    async def release(self, name: str, kind: AnswerKind, amount: int | None = None) -> None:
        """Release what is owed, or as much of it as asked, and be answered so."""
        escrow = self.books.ledger.escrows[f"esc_{name}"]
        await self.read(name, escrow.observed)
        account = self.books.ledger.accounts[name]
        owed = account.owed if amount is None else escrow.settled + amount
        mono, wall = self.clock.mono(), self.clock.wall()
        await self.step(
            name, Due(owed, "amount", f"rel_{next(self.numbers)}", account.units, mono, wall)
        )
        await self.step(name, Go(mono, wall))
        open_ = self.books.ledger.escrows[f"esc_{name}"].release
        assert open_ is not None
        await self.step(name, Answered(Answer(kind, "told", amount=open_.amount), mono, wall))


async def _fill(data_dir: Path) -> None:
    """`a` paid twice, once declined, and lost a doubt; `b` has a release in doubt; `c` is idle."""
    stage = Stage(data_dir)
    for name, plan in (("a", "stream"), ("b", "stream"), ("c", "model")):
        await stage.bind(name, plan)
    for quantity in (3, 1, 2):
        await stage.use("a", quantity)
    await stage.use("a", "1532.5", "tokens")
    await stage.release("a", AnswerKind.CONFIRMED, 2000)
    await stage.release("a", AnswerKind.LIMITED, 1000)
    stage.clock.advance(120)
    await stage.release("a", AnswerKind.DOUBT, 500)
    await stage.resolve("a", landed=False)
    await stage.release("a", AnswerKind.CONFIRMED, 1000)
    await stage.use("b", 1)
    await stage.use("b", 1, "unknown")
    await stage.use("b", 1, "nothing")
    await stage.release("b", AnswerKind.DOUBT)
    await stage.step("b", Restarted(stage.clock.mono(), stage.clock.wall()))
    await stage.use("c", "0.333333333", "tokens", dimensions={"model": "large"})
    await stage.store.close()


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state directory with a life behind it, made by meterd itself."""
    data_dir = tmp_path_factory.mktemp("filled") / "state"
    asyncio.run(_fill(data_dir))
    return data_dir


@pytest.fixture
def state(filled: Path, tmp_path: Path) -> Path:
    """A copy of it, to be tampered with."""
    data_dir = tmp_path / "state"
    data_dir.mkdir()
    (data_dir / "meterd.db").write_bytes((filled / "meterd.db").read_bytes())
    return data_dir


@contextlib.contextmanager
def shell(data_dir: Path) -> Iterator[sqlite3.Connection]:
    """A sqlite3 shell that no rule of the database stops."""
    with contextlib.closing(sqlite3.connect(data_dir / "meterd.db", isolation_level=None)) as other:
        other.execute("PRAGMA ignore_check_constraints = ON")
        for trigger in ("release_stays", "release_kept", "journal_stays", "journal_kept"):
            other.execute(f"DROP TRIGGER IF EXISTS {trigger}")
        yield other


def tamper(data_dir: Path, statement: str, *values: object) -> None:
    with shell(data_dir) as other:
        assert other.execute(statement, values).rowcount >= 1


def broken(found: Audit) -> list[tuple[str, str]]:
    return [(each.invariant, each.row) for each in found.findings.breaks]


def release_ids(data_dir: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(data_dir / "meterd.db")) as other:
        return [name for (name,) in other.execute("SELECT id FROM release ORDER BY number")]


# -- Untampered ----------------------------------------------------------------------------------


def test_auditor_finds_nothing_where_nothing_was_changed(filled: Path) -> None:
    """A store that meterd wrote agrees in every sum, and the sums are those of the plans."""
    found = audit(filled)

    assert [str(each) for each in found.findings.breaks] == []
    # Three calls at 0.001 (a call counts as one) and 1532.5 tokens at 0.002 a thousand.
    assert found.books.accrued["a"] * 10**6 == 3000 + 3065
    assert found.books.accrued["b"] * 10**6 == 1000
    assert found.books.accrued["c"] * 10**12 == 333333333
    assert [row.status for row in found.books.releases_of("esc_a")] == [
        "confirmed",
        "declined",
        "void",
        "confirmed",
    ]
    assert found.findings.checked["identities"] == 6
    assert found.findings.checked["dead letters"] == 2


def test_verify_says_in_short_what_it_checked(
    filled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 0, with the counts and the sums."""
    code = main(["verify", "--data-dir", str(filled)])
    printed = capsys.readouterr().out

    assert code == 0
    assert "3 agreements, 6 events in 4 counters" in printed
    assert "released 0.003 + in doubt 0.001 + credited 0.00" in printed
    assert printed.endswith("Everything agrees.\n")


def test_auditor_writes_nothing_into_the_directory(state: Path) -> None:
    """The same files with the same bytes, and no lock, before and after."""
    before = {file.name: file.read_bytes() for file in state.iterdir()}
    audit(state)

    assert {file.name: file.read_bytes() for file in state.iterdir()} == before


async def test_auditor_reads_what_a_killed_daemon_left_in_its_log(tmp_path: Path) -> None:
    """What is committed and not yet in the database counts, and the log stays as it was."""
    stage = Stage(tmp_path / "state")
    await stage.bind("a")
    await stage.use("a", 1)
    left = tmp_path / "left"
    left.mkdir()
    for name in ("meterd.db", "meterd.db-wal"):
        (left / name).write_bytes((tmp_path / "state" / name).read_bytes())
    await stage.store.close()
    log = (left / "meterd.db-wal").read_bytes()
    found = audit(left)

    assert log
    assert broken(found) == []
    assert found.books.accrued["a"] * 1000 == 1
    assert (left / "meterd.db-wal").read_bytes() == log
    assert sorted(file.name for file in left.iterdir()) == ["meterd.db", "meterd.db-wal"]


async def test_auditor_reads_a_backup_taken_while_the_store_is_used(tmp_path: Path) -> None:
    """A copy is whole, and is known as one."""
    stage = Stage(tmp_path / "state")
    await stage.bind("a")
    await stage.use("a", 1)
    await stage.store.backup(tmp_path / "copy.db")
    await stage.use("a", 1)
    await stage.store.close()
    found = audit(tmp_path / "copy.db")

    assert (found.is_copy, broken(found)) == (True, [])
    assert found.books.accrued["a"] * 1000 == 1


async def test_auditor_agrees_with_what_a_person_resumed(tmp_path: Path) -> None:
    """A foreign release is a break while it stands there, and none once somebody took it over."""
    stage = Stage(tmp_path / "state")
    await stage.bind("a")
    await stage.use("a", 1)
    await stage.read("a", 400)
    await stage.read("a", 400)
    await stage.store.backup(tmp_path / "frozen.db")
    account = stage.books.ledger.accounts["a"]
    await stage.books.resume(account, "test", "it was us")
    await stage.store.close()

    assert broken(audit(tmp_path / "frozen.db")) == [("level", "escrow esc_a")]
    assert broken(audit(tmp_path / "state")) == []


async def test_auditor_reports_a_release_that_landed_after_it_was_given_up(tmp_path: Path) -> None:
    """Paid twice by the world: one amount too much, told with its figures."""
    stage = Stage(tmp_path / "state")
    await stage.bind("a")
    await stage.use("a", 1)
    await stage.release("a", AnswerKind.DOUBT)
    await stage.resolve("a", landed=False)
    await stage.release("a", AnswerKind.CONFIRMED)
    await stage.read("a", 2000)
    await stage.read("a", 2000)
    await stage.store.close()
    found = audit(tmp_path / "state")

    assert broken(found) == [("released <= used", "agreement a"), ("overpaid", "agreement a")]
    assert "0.001 more than the 0.001 accrued" in found.findings.breaks[0].detail


async def test_a_request_to_close_is_an_identity_without_a_counter(tmp_path: Path) -> None:
    """More identities than counted events are no break where an agreement is closing."""
    stage = Stage(tmp_path / "state")
    await stage.bind("a")
    await stage.use("a", 1)
    payload = b'{"id": "end", "agreement": "a", "type": "meterd.close"}'
    await stage.books.record("svc", Deliveries(payloads=[payload])).durable
    await stage.store.close()

    assert broken(audit(tmp_path / "state")) == []


@pytest.mark.parametrize("name", ["\x00", "\x1f\x7f\n\t\b\f\r", '"\\/', "ä€😀\u2028", "\ud800"])
async def test_auditor_chains_the_journal_as_the_store_does(tmp_path: Path, name: str) -> None:
    """Whatever stands in an entry: two encoders that know nothing of one another agree."""
    store = SqliteStore.open(tmp_path / "state", entries_max=100)
    entry = JournalEntry(1, f"ops{name}", "looked", f"it{name}", f"all{name}")
    await store.commit(Change(journal=(entry, entry)))
    await store.close()

    assert broken(audit(tmp_path / "state")) == []


# -- One row is changed --------------------------------------------------------------------------

TAMPERED = {
    "a counter that grew": (
        "UPDATE counter SET quantity = quantity + 1 WHERE agreement = 'b'",
        ("accrued", "agreement b"),
    ),
    "a counter with one event more": (
        "UPDATE counter SET events = events + 1 WHERE agreement = 'b'",
        ("counters", "agreement b"),
    ),
    "a counter of nothing": (
        "UPDATE counter SET quantity = 0 WHERE agreement = 'b'",
        ("counters", "counter (b, card @card@, calls)"),
    ),
    "a counter of no card": (
        "UPDATE counter SET card = 'none' WHERE agreement = 'b'",
        ("counters", "counter (b, card none, calls)"),
    ),
    "a counter with other dimensions": (
        "UPDATE counter SET dimensions = '[[\"model\",\"small\"]]' WHERE agreement = 'c'",
        ("accrued", "agreement c"),
    ),
    "a counter of somebody else": (
        "UPDATE counter SET agreement = 'z' WHERE agreement = 'b'",
        ("references", "counter (z, card @card@, calls)"),
    ),
    "accrued": (
        "UPDATE agreement SET accrued = '1/999' WHERE id = 'b'",
        ("accrued", "agreement b"),
    ),
    "an agreement's events": (
        "UPDATE agreement SET events = 9 WHERE id = 'b'",
        ("counters", "agreement b"),
    ),
    "an agreement's units": (
        "UPDATE agreement SET units = 0 WHERE id = 'a'",
        ("counters", "agreement a"),
    ),
    "an agreement that is gone": (
        "DELETE FROM agreement WHERE id = 'c'",
        ("journal", "agreement c"),
    ),
    "an agreement with another's escrow": (
        "UPDATE agreement SET escrows = '[[\"main\",\"esc_a\"]]' WHERE id = 'b'",
        ("references", "agreement b"),
    ),
    "an agreement that cannot be read": (
        "UPDATE agreement SET escrows = 'main' WHERE id = 'b'",
        ("readable", "agreement b"),
    ),
    "a price": (
        "UPDATE card SET text = replace(text, '1000000000', '1000000001') WHERE id = '@card@'",
        ("card", "card @card@"),
    ),
    "settled": (
        "UPDATE escrow SET settled = 2999 WHERE id = 'esc_a'",
        ("settled", "escrow esc_a"),
    ),
    "a baseline": (
        "UPDATE escrow SET baseline = -1 WHERE id = 'esc_a'",
        ("level", "escrow esc_a"),
    ),
    "observed": (
        "UPDATE escrow SET observed = 3001 WHERE id = 'esc_a'",
        ("level", "escrow esc_a"),
    ),
    "observed beyond all usage": (
        "UPDATE escrow SET observed = 2001 WHERE id = 'esc_b'",
        ("overpaid", "agreement b"),
    ),
    "a credit that nobody gave": (
        "UPDATE escrow SET credited = 5, observed = 3005 WHERE id = 'esc_a'",
        ("journal", "escrow esc_a"),
    ),
    "a total": ("UPDATE escrow SET total = 5 WHERE id = 'esc_a'", ("total", "escrow esc_a")),
    "a remainder": (
        "UPDATE escrow SET remaining = remaining + 1 WHERE id = 'esc_a'",
        ("total", "escrow esc_a"),
    ),
    "an escrow of somebody else": (
        "UPDATE escrow SET agreement = 'z' WHERE id = 'esc_a'",
        ("references", "escrow esc_a"),
    ),
    "an escrow that was closed with a release open": (
        "UPDATE escrow SET status = 'closed' WHERE id = 'esc_b'",
        ("release history", "release @r5@"),
    ),
    "an escrow that its agreement does not name": (
        "UPDATE agreement SET escrows = '[]' WHERE id = 'b'",
        ("references", "escrow esc_b"),
    ),
    "an escrow that was closed with usage unpaid": (
        "UPDATE escrow SET status = 'closed' WHERE id = 'esc_a'",
        ("settled at close", "escrow esc_a"),
    ),
    "an escrow that nobody froze": (
        "UPDATE escrow SET status = 'frozen' WHERE id = 'esc_c'",
        ("frozen", "escrow esc_c"),
    ),
    "units that are settled": (
        "UPDATE escrow SET units_settled = units_settled + 1 WHERE id = 'esc_a'",
        ("settled", "escrow esc_a"),
    ),
    "an amount": (
        "UPDATE release SET amount = amount - 1 WHERE id = '@r1@'",
        ("settled", "escrow esc_a"),
    ),
    "an amount of nothing": (
        "UPDATE release SET amount = 0 WHERE id = '@r3@'",
        ("amount", "release @r3@"),
    ),
    "an amount beyond the escrow": (
        "UPDATE release SET before = 9999999 WHERE id = '@r3@'",
        ("amount", "release @r3@"),
    ),
    "an amount beyond all usage": (
        "UPDATE release SET amount = 1001 WHERE id = '@r5@'",
        ("released <= used", "agreement b"),
    ),
    "a status": (
        "UPDATE release SET status = 'confirmed' WHERE id = '@r3@'",
        ("release history", "release @r3@"),
    ),
    "a release that is gone": (
        "DELETE FROM release WHERE id = '@r2@'",
        ("release kept", "release number 2"),
    ),
    "a release of units that never were": (
        "UPDATE release SET units = 99000000000000 WHERE id = '@r1@'",
        ("counters", "release @r1@"),
    ),
    "a release of no escrow": (
        "UPDATE release SET escrow = 'esc_z' WHERE id = '@r3@'",
        ("references", "release @r3@"),
    ),
    "a release behind another level": (
        "UPDATE release SET before = before + 1 WHERE id = '@r4@'",
        ("level", "release @r4@"),
    ),
    "when a release changed": (
        "UPDATE release SET changed_at = changed_at - 1 WHERE id = '@r3@'",
        ("release history", "release @r3@"),
    ),
    "a history that cannot be read": (
        "UPDATE release SET history = '[1]' WHERE id = '@r3@'",
        ("readable", "release @r3@"),
    ),
    "a journal entry": (
        "UPDATE journal SET detail = 'nothing' WHERE number = 2",
        ("journal", "journal 2"),
    ),
    "a journal entry that is gone": (
        "DELETE FROM journal WHERE number = 2",
        ("journal", "journal 3"),
    ),
    "the last journal entry that is gone": (
        "DELETE FROM journal WHERE number = (SELECT max(number) FROM journal)",
        ("journal", "journal @last@"),
    ),
    "a block of identities that is gone": (
        "DELETE FROM mark_block WHERE number = 1",
        ("marks", "mark_block"),
    ),
    "a block of identities twice": (
        "INSERT INTO mark_block SELECT 99, bucket, count, data FROM mark_block WHERE number = 1",
        ("marks", "mark_block 99"),
    ),
    "a block of identities that is cut": (
        "UPDATE mark_block SET data = x'00' WHERE number = 1",
        ("marks", "mark_block 1"),
    ),
    "a block of identities from before the window": (
        "INSERT INTO setting VALUES ('marks_from', 999999)",
        ("marks", "mark_block 1"),
    ),
    "a dead letter's number": (
        "UPDATE dead_letter SET number = 7 WHERE number = 1",
        ("dead letters", "dead_letter 7"),
    ),
    "the next dead letter's number": (
        "UPDATE sqlite_sequence SET seq = 1 WHERE name = 'dead_letter'",
        ("dead letters", "dead_letter 2"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERED)
def test_one_changed_row_is_named(
    state: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 3, and the invariant with the very row that breaks it."""
    statement, (invariant, row) = TAMPERED[name]
    ids = release_ids(state)
    with shell(state) as other:
        (card,) = other.execute("SELECT card FROM counter WHERE agreement = 'b'").fetchone()
        (last,) = other.execute("SELECT max(number) - 1 FROM journal").fetchone()
    places = {"@card@": card, "@last@": str(last)}
    places.update({f"@r{place}@": name for place, name in enumerate(ids, start=1)})
    for place, value in places.items():
        statement, row = statement.replace(place, value), row.replace(place, value)
    tamper(state, statement)
    code = main(["verify", "--data-dir", str(state), "--json"])
    document = json.loads(capsys.readouterr().out)

    assert (code, document["agrees"]) == (3, False)
    assert (invariant, row) in [(each["invariant"], each["row"]) for each in document["breaks"]]


def test_two_open_releases_of_an_escrow_are_named(state: Path) -> None:
    """The partial index is the database's; that there is one is looked at all the same."""
    with shell(state) as other:
        other.execute("DROP INDEX release_unfinished")
        other.execute(
            "INSERT INTO release SELECT 6, 'rel_x', escrow, amount, before, status, why, units,"
            " created_at, changed_at, history FROM release WHERE number = 5"
        )

    assert ("one open release", "escrow esc_b") in broken(audit(state))


@pytest.mark.parametrize(
    "rule",
    [
        "INDEX release_unfinished",
        "TRIGGER release_stays",
        "TRIGGER release_kept",
        "TRIGGER journal_stays",
        "TRIGGER journal_kept",
    ],
)
def test_a_rule_that_the_database_has_lost_is_named(state: Path, rule: str) -> None:
    """What the file itself refuses, it must still refuse; nothing else has to be wrong."""
    with contextlib.closing(sqlite3.connect(state / "meterd.db", isolation_level=None)) as other:
        other.execute(f"DROP {rule}")

    assert broken(audit(state)) == [("guards", rule.split()[1])]


async def _frozen_and_resumed(data_dir: Path) -> Stage:
    """`a` pays, is frozen by a person for a minute, is resumed, and pays again."""
    stage = Stage(data_dir)
    await stage.bind("a")
    await stage.use("a", 1)
    await stage.release("a", AnswerKind.CONFIRMED)
    account = stage.books.ledger.accounts["a"]
    stage.clock.advance(60)
    await stage.books.freeze(account, "test", "odd usage")
    stage.clock.advance(60)
    await stage.read("a", 1000)
    await stage.books.resume(account, "test", "looked at it")
    await stage.use("a", 1)
    await stage.release("a", AnswerKind.CONFIRMED)
    await stage.store.close()
    return stage


async def test_a_release_while_its_escrow_was_frozen_is_named(tmp_path: Path) -> None:
    """By the journal's times: frozen, nothing is intended and nothing sent."""
    await _frozen_and_resumed(tmp_path / "state")
    untouched = broken(audit(tmp_path / "state"))
    last = release_ids(tmp_path / "state")[-1]
    with shell(tmp_path / "state") as other:
        query = "SELECT min(at) FROM journal WHERE action = 'escrow_frozen'"
        (frozen_at,) = other.execute(query).fetchone()
        (history,) = other.execute("SELECT history FROM release WHERE id = ?", (last,)).fetchone()
        moves = json.loads(history)
        moves[0][0] = moves[1][0] = frozen_at + 1
        statement = "UPDATE release SET history = ?, created_at = ? WHERE id = ?"
        other.execute(statement, (json.dumps(moves), frozen_at + 1, last))

    assert untouched == []
    assert ("frozen", f"release {last}") in broken(audit(tmp_path / "state"))


async def test_a_clock_that_was_set_back_is_a_note_and_no_break(tmp_path: Path) -> None:
    """Times prove nothing then, and what they cannot prove is not claimed."""
    stage = Stage(tmp_path / "state")
    await stage.bind("a")
    account = stage.books.ledger.accounts["a"]
    await stage.books.freeze(account, "test", "odd usage")
    await stage.read("a", 0)
    stage.clock.wall_ms -= 3_600_000
    await stage.books.resume(account, "test", "looked at it")
    await stage.use("a", 1)
    await stage.release("a", AnswerKind.CONFIRMED)
    await stage.store.close()
    found = audit(tmp_path / "state")

    assert broken(found) == []
    assert any("clock was set back" in note for note in found.findings.notes)


def test_an_escrow_that_left_the_freezer_by_itself_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only `meterd resume` ends it, and that is in the journal."""

    async def freeze() -> None:
        stage = Stage(tmp_path / "state")
        await stage.bind("a")
        await stage.books.freeze(stage.books.ledger.accounts["a"], "test", "odd usage")
        await stage.store.close()

    asyncio.run(freeze())
    tamper(tmp_path / "state", "UPDATE escrow SET status = 'active' WHERE id = 'esc_a'")
    code = main(["verify", "--data-dir", str(tmp_path / "state")])

    assert code == 3
    assert "frozen: escrow esc_a: it is active" in capsys.readouterr().out


@pytest.mark.parametrize("landed", [True, False])
async def test_a_word_that_no_person_said_is_named(tmp_path: Path, landed: bool) -> None:
    """A doubt that was resolved by hand has its act in the journal."""
    stage = Stage(tmp_path / "state")
    await stage.bind("a")
    await stage.use("a", 1)
    await stage.release("a", AnswerKind.DOUBT)
    event = Resolved(landed, "nobody", stage.clock.mono(), stage.clock.wall())
    await stage.step("a", event)
    await stage.store.close()

    assert broken(audit(tmp_path / "state")) == [("journal", "escrow esc_a")]


async def test_an_escrow_that_was_frozen_before_it_was_adopted_breaks_nothing(
    tmp_path: Path,
) -> None:
    """What it shows was released by others, before meterd has a baseline to hold it against."""
    stage = Stage(tmp_path / "state")
    agreement = Agreement("a", "stream", "Ada", (("main", "esc_a"),))
    account = await stage.books.bind(agreement, "test")
    await stage.books.freeze(account, "test", "not yet")
    await stage.read("a", 3000)
    await stage.store.close()
    found = audit(tmp_path / "state")

    assert (found.books.escrows["esc_a"].observed, broken(found)) == (3000, [])


async def test_an_agreement_that_is_closed_with_usage_unpaid_says_so_in_its_journal(
    tmp_path: Path,
) -> None:
    """What was lost with an escrow that its service ended is on record, and then no break."""
    stage = Stage(tmp_path / "state")
    await stage.bind("a")
    await stage.use("a", 1)
    stage.clock.advance(5)
    mono = stage.clock.mono()
    reading = replace(reading_of("esc_a", total=TOTAL, mono=mono), status="refunded")
    await stage.step("a", Observed(reading, mono, stage.clock.wall(), stage.owed("a")))
    await stage.store.close()
    found = audit(tmp_path / "state")

    assert found.books.escrows["esc_a"].status == "closed"
    assert broken(found) == []


HISTORIES = {
    "sent twice": ["intended", "sent", "sent"],
    "sent again behind a doubt": ["intended", "sent", "in_doubt", "sent", "confirmed"],
    "never intended": ["sent", "confirmed"],
    "confirmed unsent": ["intended", "confirmed"],
    "confirmed twice": ["intended", "sent", "confirmed", "confirmed"],
    "void without a doubt": ["intended", "sent", "void"],
    "back from the dead": ["intended", "sent", "in_doubt", "void", "confirmed"],
    "declined behind a doubt": ["intended", "sent", "in_doubt", "sent:same", "declined"],
    "not sent behind a doubt": ["intended", "in_doubt", "sent:same", "not_sent"],
    "late without a void": ["intended", "sent", "confirmed", "late"],
    "unknown": ["intended", "paid"],
    "empty": [],
}
LEGAL = {
    "answered": ["intended", "sent", "confirmed"],
    "found after two restarts": ["intended", "in_doubt", "in_doubt", "confirmed"],
    "repeated with its key": ["intended", "sent", "in_doubt", "sent:same", "confirmed"],
    "landed late": ["intended", "sent", "in_doubt", "void", "late"],
    "a person's word": ["intended", "sent", "in_doubt", "escalated", "void", "late"],
}


def write_history(data_dir: Path, release: str, words: list[str]) -> None:
    lines = []
    for word in words:
        status, _, same = word.partition(":")
        lines.append([1, status, "repeated with the same key" if same else "why"])
    status = lines[-1][1] if lines else "confirmed"
    times = "created_at = 1, changed_at = 1"
    statement = f"UPDATE release SET history = ?, status = ?, {times} WHERE id = ?"
    tamper(data_dir, statement, json.dumps(lines), status, release)


@pytest.mark.parametrize("name", HISTORIES)
def test_a_history_that_leaves_the_table_is_named(state: Path, name: str) -> None:
    """Each move that the release table does not have, and each second sending, is a break."""
    first = release_ids(state)[0]
    write_history(state, first, HISTORIES[name])

    assert ("release history", f"release {first}") in broken(audit(state))


@pytest.mark.parametrize("name", LEGAL)
def test_a_history_within_the_table_is_none(state: Path, name: str) -> None:
    """Every way that the daemon can go is legal to the auditor."""
    first = release_ids(state)[0]
    write_history(state, first, LEGAL[name])

    assert ("release history", f"release {first}") not in broken(audit(state))


async def test_identities_out_of_order_are_named(tmp_path: Path) -> None:
    """A block is sorted by key, or look-ups would miss what stands in it."""
    store = SqliteStore.open(tmp_path / "state", entries_max=100)
    keys = (2).to_bytes(8, "little") + (1).to_bytes(8, "little")
    await store.commit(Change(marks=(MarkBlock(5, 2, keys + bytes(24)),)))
    await store.close()

    assert ("marks", "mark_block 1") in broken(audit(tmp_path / "state"))


async def test_identities_that_share_a_key_are_two(tmp_path: Path) -> None:
    """Only the whole of an identity tells it from another."""
    store = SqliteStore.open(tmp_path / "state", entries_max=100)
    for rest in (1, 2):
        data = bytes(8) + rest.to_bytes(8, "little") + bytes(4)
        await store.commit(Change(marks=(MarkBlock(5, 1, data),)))
    await store.close()
    found = audit(tmp_path / "state")

    assert [row for _, row in broken(found)] == ["mark_block"]  # No event was counted for them.


def test_all_breaks_are_counted_and_some_are_kept(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store in ruins does not fill the terminal, and its breaks are still counted."""
    monkeypatch.setattr("meterd.audit.findings.BREAKS_MAX", 2)
    tamper(state, "UPDATE escrow SET settled = 77, total = 1")
    found = audit(state)

    assert len(found.findings.breaks) == 2
    assert found.findings.broken > 4


# -- What is refused -----------------------------------------------------------------------------


def test_auditor_refuses_a_directory_with_a_daemon_on_it(state: Path) -> None:
    """It names the holder and the way to look all the same."""
    descriptor = os.open(state / "meterd.lock", os.O_RDWR | os.O_CREAT)
    os.write(descriptor, b'{"pid": 4711, "host": "here", "since": "today"}')
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(StoreLocked, match=r"4711 on here.*meterd backup"):
            audit(state)
        with pytest.raises(StoreLocked, match="meterd backup"):
            audit(state / "meterd.db")
    finally:
        os.close(descriptor)


def test_auditor_says_nothing_of_a_store_that_changed_meanwhile(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that starts meanwhile is not hindered; what was read is worth nothing."""
    real = audit_records._check_file

    def slow(connection: sqlite3.Connection, findings: Any) -> None:
        real(connection, findings)
        tamper(state, "UPDATE escrow SET reason = 'written meanwhile'")

    monkeypatch.setattr(audit_records, "_check_file", slow)
    with pytest.raises(StoreLocked, match="changed while it was read"):
        audit(state)


def test_auditor_knows_other_files_from_a_store(tmp_path: Path) -> None:
    """No store, another program's database, no database, another version: each in a sentence."""
    other = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE t (x)")
    (tmp_path / "text.db").write_text("no database at all, and a good deal longer than a header")
    newer = tmp_path / "newer.db"
    with contextlib.closing(sqlite3.connect(newer)) as connection:
        connection.executescript("PRAGMA application_id = 1836348004; PRAGMA user_version = 99;")

    for file, error in (("none.db", NotFound), (".", NotFound), ("other.db", StoreCorrupt),
                        ("text.db", StoreCorrupt), ("newer.db", StoreCorrupt)):  # fmt: skip
        with pytest.raises(error):
            audit(tmp_path / file)


def test_verify_takes_one_place(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two places at once are wrong use."""
    code = main(["verify", "--data-dir", str(filled), "--backup", str(filled)])

    assert code == 2
    assert "name one" in capsys.readouterr().err


# -- Against the service -------------------------------------------------------------------------


def shown(found: Audit, escrow: str, **changes: Any) -> Shown:
    """What a service that agrees would show."""
    row = found.books.escrows[escrow]
    ids = {
        release.id for release in found.books.releases_of(escrow) if release.status == "confirmed"
    }
    rest = TOTAL - row.expected
    honest = Shown("active", TOTAL, row.expected, rest, 0, frozenset(ids), row.provider)
    return replace(honest, **changes)


def against(place: Path, **changes: Any) -> Audit:
    """An audit against a service that agrees but for escrow `a`."""
    found = audit(place)
    answers = {name: shown(found, name) for name in found.escrows}
    found.hold_against({**answers, "esc_a": shown(found, "esc_a", **changes)})
    return found


def test_service_that_agrees_breaks_nothing(filled: Path) -> None:
    """All escrows and all confirmed releases were compared."""
    found = against(filled)

    assert broken(found) == []
    assert found.findings.checked["escrows asked"] == 3
    assert found.findings.checked["releases found in the service's history"] == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"released": 4000, "remaining": TOTAL - 4000}, "somebody else released"),
        ({"released": 9000, "remaining": TOTAL - 9000}, "0.002935 of it beyond all usage"),
        ({"released": 2000, "remaining": TOTAL - 2000}, "0.001 less"),
        ({"remaining": 1}, "is not its total"),
        ({"total": TOTAL + 1, "remaining": TOTAL - 2999}, "10.00 when adopted"),
        ({"provider": "agent_thief"}, "provider-1 when adopted"),
    ],
)
def test_service_with_other_figures_is_a_break(
    filled: Path, changes: dict[str, Any], words: str
) -> None:
    """Both figures and their difference are told."""
    found = against(filled, **changes)

    assert broken(found) == [("service", "escrow esc_a")]
    assert words in found.findings.breaks[0].detail


def test_service_without_a_confirmed_release_is_a_break(filled: Path) -> None:
    """What the store holds for paid, the service must show; unless it shows only newer ones."""
    first, _, _, last, _ = release_ids(filled)
    lost_last = against(filled, release_ids=frozenset({first}))
    lost_first = against(filled, release_ids=frozenset({last}))

    assert broken(lost_last) == [("service", f"release {last}")]
    assert broken(lost_first) == []
    assert lost_first.findings.checked["releases older than the history shown"] == 1


def test_service_with_a_release_of_ours_that_the_store_does_not_know_is_a_break(
    filled: Path, tmp_path: Path
) -> None:
    """Another daemon, or a restored backup; in a backup itself it is only newer than that."""
    ids = {release_ids(filled)[0], release_ids(filled)[3], "rel_unknown"}
    copy = tmp_path / "copy.db"
    copy.write_bytes((filled / "meterd.db").read_bytes())
    newer = against(copy, release_ids=frozenset(ids), released=4000, remaining=TOTAL - 4000)

    assert broken(against(filled, release_ids=frozenset(ids))) == [
        ("service", "release rel_unknown")
    ]
    assert broken(newer) == []
    assert len(newer.findings.notes) == 2


async def test_releases_that_a_person_credited_are_no_break(tmp_path: Path) -> None:
    """Behind a restored backup: what was released in between was looked at and taken over."""
    stage = Stage(tmp_path / "state")
    await stage.bind("a")
    await stage.read("a", 400)
    await stage.read("a", 400)
    await stage.books.resume(stage.books.ledger.accounts["a"], "test", "it was us")
    await stage.store.close()
    lost = frozenset({"rel_lost"})
    agreeing = against(tmp_path / "state", release_ids=lost)
    more = against(tmp_path / "state", release_ids=lost, released=401, remaining=TOTAL - 401)

    assert broken(agreeing) == []
    assert broken(more) == [("service", "escrow esc_a"), ("service", "release rel_lost")]


def test_service_that_did_what_was_given_up_is_a_break(filled: Path) -> None:
    """A void in the service's history was paid after all."""
    ids = release_ids(filled)[:4]
    found = against(filled, release_ids=frozenset(ids))

    assert broken(found) == [("service", f"release {ids[1]}"), ("service", f"release {ids[2]}")]


def test_service_that_ended_an_escrow_may_have_paid_the_rest(filled: Path) -> None:
    """What a deadline released is no release of meterd's: a note."""
    found = against(filled, status="released", released=TOTAL, remaining=0)

    assert broken(found) == []
    assert any("ended" in note for note in found.findings.notes)


def test_service_that_tells_nothing_is_told(filled: Path) -> None:
    """What could not be compared is counted, and does not pass for agreement."""
    found = audit(filled)
    found.hold_against({"esc_a": "missing: there is no such escrow"})

    assert broken(found) == []
    assert found.findings.unasked == 3


def test_service_that_shows_the_doubt_as_landed_is_a_note(filled: Path) -> None:
    """A release in doubt may have landed: either is in order."""
    found = audit(filled)
    answers = {name: shown(found, name) for name in found.escrows}
    doubt = frozenset({release_ids(filled)[4]})
    landed = shown(found, "esc_b", released=1000, remaining=TOTAL - 1000, release_ids=doubt)
    found.hold_against({**answers, "esc_b": landed})

    assert broken(found) == []
    assert any("landed" in note for note in found.findings.notes)
