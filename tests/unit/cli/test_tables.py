from __future__ import annotations

import json
from typing import Any

import pytest

from meterd.cli.main import main
from meterd.cli.tables import SENTENCES


def status(**flow: Any) -> dict[str, Any]:
    """A status as the API gives it, of a daemon that is well."""
    return {
        "version": "0.1.0",
        "now": "2026-11-23T12:00:10.000Z",
        "started_at": "2026-11-23T12:00:00.000Z",
        "flow": {
            "word": "flowing",
            "blocked": "",
            "last_event_at": "2026-11-23T12:00:09.500Z",
            "last_release_at": None,
            "settlement_lag_s": 0,
            "next": "",
            **flow,
        },
        "needs_a_person": flow.get("word") == "needs_a_person",
        "totals": {
            "accrued": "12.000000000001",
            "released": "11.99",
            "unsettled": "0.01",
            "headroom": "88.00",
            "in_doubt": "0.00",
            "uncollectible": "0.00",
            "reconciliation_difference": "0.00",
        },
        "events": {"accepted": 12345, "duplicates": 2, "rejected": 1, "pending": 0},
        "agreements": {"total": 3, "by_state": {"active": 2, "closing": 1}},
        "releases_in_doubt": 0,
        "frozen": [],
        "in_doubt": [],
        "exhausted": [],
        "paused": [],
        "sources": [
            {
                "name": "edge",
                "kind": "redis",
                "address": "redis://127.0.0.1:6379 meterd:usage",
                "connected": False,
                "since": "2026-11-23T12:00:00.000Z",
                "error": "connection refused",
                "warning": "",
                "lag": None,
                "unacked": 0,
            }
        ],
        "store": {"writable": True, "bytes": 4096},
        "dead_letters": 1,
    }


FROZEN = {
    "agreement": "agr-1",
    "escrow": "esc_1",
    "state": "frozen",
    "reason": "foreign_release: 1.00 more was released",
    "amount": "0.00",
    "next": "meterd resume agr-1 --reason TEXT",
}


def test_status_tells_in_one_screen_whether_money_flows(
    daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """The word, the sums, the events, the sources: all of it fits a terminal."""
    daemon.answer("GET", "/v1/status", status())
    code = main(["status"])
    shown = capsys.readouterr().out

    assert code == 0
    assert len(shown.splitlines()) <= 24
    for part in ("Money is flowing.", "12.000000000001", "12,345 accepted", "2 active, 1 closing",
                 "connection refused", "meterd dead-letters", "2026-11-23 12:00:09"):  # fmt: skip
        assert part in shown


def test_status_says_what_is_missing_of_numbered_events(
    daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the next command; where nothing is missing, nothing is said."""
    for missing in (1200, 0):
        found = {**status(), "missing_events": missing, "incomplete_producers": 2}
        daemon.answer("GET", "/v1/status", found)
    main(["status"])
    said = "1,200 numbered events have not come: meterd producers"
    assert said in capsys.readouterr().out
    main(["status"])
    assert "numbered" not in capsys.readouterr().out


@pytest.mark.parametrize("word", ["flowing", "idle", "waiting_for_sources", "blocked", "stopped"])
def test_status_has_a_sentence_for_every_word(
    daemon, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No word of the daemon's is shown bare, and none of these needs a person's act here."""
    daemon.answer("GET", "/v1/status", status(word=word, blocked="the key is refused"))
    code = main(["status"])

    assert code == 0
    assert SENTENCES[word][1].format(blocked="the key is refused") in capsys.readouterr().out


def test_status_ends_with_3_when_something_is_frozen(
    daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """A frozen agreement is shown with the next command, and a script sees it by the exit code."""
    daemon.answer("GET", "/v1/status", {**status(word="needs_a_person"), "frozen": [FROZEN]})
    code = main(["status"])
    shown = capsys.readouterr().out

    assert code == 3
    assert "meterd resume agr-1 --reason TEXT" in shown


def test_status_as_json_is_the_daemons_own_document(
    daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """Programs get all of it, money as the strings that it is; the exit code is the same."""
    document = {**status(word="needs_a_person"), "frozen": [FROZEN]}
    daemon.answer("GET", "/v1/status", document)
    code = main(["status", "--json"])

    assert (code, json.loads(capsys.readouterr().out)) == (3, document)


def trouble(state: str, agreement: str, amount: str, command: str) -> dict[str, str]:
    return {
        "agreement": agreement,
        "escrow": f"esc_{agreement}",
        "state": state,
        "reason": f"why {agreement} is {state}",
        "amount": amount,
        "next": command,
    }


def test_status_shows_each_trouble_with_its_cost_and_a_command_in_one_piece(
    daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each agreement once, the gravest last, next to where the next command is typed."""
    resolve = "meterd resolve rel_0123456789abcdef01234567 --landed|--absent --reason TEXT"
    found = {
        **status(word="needs_a_person"),
        "frozen": [
            trouble("escalated", "a", "0.30", resolve),
            trouble("late", "b", "0.40", "meterd resume b --reason TEXT"),
        ],
        "in_doubt": [
            trouble("escalated", "a", "0.10", resolve),
            trouble("in_doubt", "c", "0.20", "meterd releases c"),
        ],
        "paused": [trouble("paused", "d", "0.00", "meterd check --live")],
    }
    daemon.answer("GET", "/v1/status", found)
    code = main(["status"])
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in lines if line.startswith(("escalated", "late", "in_doubt", "paused"))]

    assert code == 3
    assert sorted(shown[:2]) == [
        "in_doubt c  0.20 USDC may or may not be paid",
        "paused d",
    ]
    assert sorted(shown[2:]) == [
        "escalated a  0.10 USDC may or may not be paid",
        "late b  0.40 USDC landed late",
    ]
    assert f"  > {resolve}" in lines
    assert lines.count("  why a is escalated") == 1


def test_status_says_what_helps_when_nothing_is_released_anywhere(
    daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second line is the next step."""
    blocked = status(word="blocked", blocked="the key is refused", next="meterd check --live")
    daemon.answer("GET", "/v1/status", {**blocked, "needs_a_person": True})
    code = main(["status"])

    assert code == 3
    assert capsys.readouterr().out.splitlines()[1].rstrip() == "Next: meterd check --live"


def test_the_journal_shows_who_did_what_and_why(daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each act; for programs as the daemon has it; a limit says that there is more."""
    entry = {
        "number": 7,
        "at": "2026-11-23T12:00:00.000Z",
        "actor": "admin",
        "action": "escrow_frozen",
        "subject": "esc_1",
        "detail": "odd \x1b[31musage",
        "hash": "00" * 32,
    }
    daemon.answer("GET", "/v1/journal", {"items": [entry], "next": "7"})
    codes = main(["journal", "--limit", "1"]), main(["journal", "--limit", "1", "--json"])
    said = capsys.readouterr()

    assert codes == (0, 0)
    assert all(part in said.out for part in ("admin", "escrow_frozen", "esc_1", "12:00:00"))
    assert "\x1b[31m" not in said.out
    assert "meterd journal --limit 10" in said.err
    assert daemon.asked[0].target == "/v1/journal?limit=1"


def test_holds_are_listed_with_what_they_set_aside(
    daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line for each live one; for programs as the daemon has it."""
    hold = {
        "id": "hold_1",
        "agreement": "agr-1",
        "meter": "tokens",
        "quantity": "1500",
        "amount": "0.003",
        "created_at": "2026-11-23T12:00:00.000Z",
        "expires_at": "2026-11-23T12:01:00.000Z",
    }
    daemon.answer("GET", "/v1/holds", {"items": [hold], "next": None})
    codes = main(["holds"]), main(["holds", "--json"])
    said = capsys.readouterr()

    assert codes == (0, 0)
    assert all(part in said.out for part in ("hold_1", "agr-1", "0.003", "12:01:00"))


AGREEMENT = {
    "id": "agr-1",
    "plan": "stream",
    "payer": "Ada",
    "origin": "api",
    "state": "active",
    "reason": "",
    "next": None,
    "opened_at": "2026-11-23T12:00:00.000Z",
    "events": 3,
    "accrued": "0.000000000003",
    "released": "0.00",
    "unsettled": "0.00",
    "in_doubt": "0.00",
    "headroom": "10.00",
    "uncollectible": "0.00",
    "unsettled_since": None,
    "escrows": [{"id": "esc_1", "role": "main", "total": "10.00", "deadline": None}],
}
USAGE = {
    "meter": "tokens",
    "unit": "token",
    "dimensions": {"model": "m"},
    "quantity": "3",
    "events": 3,
    "accrued": "0.000000000003",
}


def test_agreements_are_listed_and_a_limit_says_that_there_are_more(
    daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """A list that is cut off says how to see the rest."""
    daemon.answer("GET", "/v1/agreements", {"items": [AGREEMENT], "next": "agr-1"})
    code = main(["agreements", "--limit", "1"])
    said = capsys.readouterr()

    assert code == 0
    assert "0.000000000003" in said.out
    assert "meterd agreements --limit 10" in said.err


def test_an_agreement_is_shown_with_its_escrow_and_usage(
    daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """One agreement fits together: what was used, at what price, out of which escrow."""
    daemon.answer("GET", "/v1/agreements/agr-1", AGREEMENT)
    daemon.answer("GET", "/v1/agreements/agr-1/usage", {"items": [USAGE], "next": None})
    code = main(["agreements", "agr-1"])
    shown = capsys.readouterr().out

    assert code == 0
    assert all(part in shown for part in ("Ada", "esc_1", "model = m", "0.000000000003"))


def test_releases_show_the_last_word_of_their_history(
    daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """What happened last is what a person wants to know of a release."""
    release = {
        "id": "rel_1",
        "agreement": "agr-1",
        "escrow": "esc_1",
        "amount": "0.50",
        "status": "in_doubt",
        "why": "amount",
        "created_at": "2026-11-23T12:00:00.000Z",
        "history": [{"detail": "intended"}, {"detail": "no answer within 30 s"}],
    }
    daemon.answer("GET", "/v1/releases", {"items": [release], "next": None})
    code = main(["releases", "agr-1", "--status", "in_doubt"])

    assert code == 0
    assert "no answer within 30 s" in capsys.readouterr().out
    assert daemon.asked[0].target == "/v1/releases?limit=50&agreement=agr-1&status=in_doubt"


@pytest.mark.parametrize("command", ["agreements", "releases", "dead-letters", "journal"])
def test_an_empty_list_says_so(daemon, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is shown as nothing, in a sentence; for programs as an empty list."""
    daemon.answer("GET", f"/v1/{command}", {"items": [], "next": None})
    codes = (main([command]), main([command, "--json"]))
    said = capsys.readouterr()

    assert codes == (0, 0)
    assert "no" in said.err
    assert json.loads(said.out) == {"items": [], "next": None}
