from __future__ import annotations

from typing import Any

import pytest

from meterd.cli.main import main

WHY = ["--reason", "seen by hand"]
BECAUSE = {"reason": "seen by hand"}


@pytest.mark.parametrize(
    ("arguments", "method", "target", "body"),
    [
        (
            ["bind", "esc_1", "--plan", "stream"],
            "PUT",
            "/v1/agreements/esc_1",
            {"plan": "stream", "escrows": {"main": "esc_1"}},
        ),
        (
            ["bind", "esc_1", "--plan", "stream", "--id", "agr-1", "--payer", "Ada"],
            "PUT",
            "/v1/agreements/agr-1",
            {"plan": "stream", "escrows": {"main": "esc_1"}, "payer": "Ada"},
        ),
        (["settle", "agr-1"], "POST", "/v1/agreements/agr-1/settle", {"reason": ""}),
        (["close", "agr-1", *WHY], "POST", "/v1/agreements/agr-1/close", BECAUSE),
        (["freeze", "agr-1", *WHY], "POST", "/v1/agreements/agr-1/freeze", BECAUSE),
        (["resume", "agr-1", *WHY], "POST", "/v1/agreements/agr-1/resume", BECAUSE),
        (
            ["resolve", "rel_1", "--landed", *WHY],
            "POST",
            "/v1/releases/rel_1/resolve",
            {"landed": True, **BECAUSE},
        ),
        (
            ["resolve", "rel_1", "--absent", *WHY],
            "POST",
            "/v1/releases/rel_1/resolve",
            {"landed": False, **BECAUSE},
        ),
        (
            ["dead-letters", "discard", "7", *WHY],
            "DELETE",
            "/v1/dead-letters/7?reason=seen+by+hand",
            None,
        ),
    ],
)
def test_an_act_is_one_call_of_the_api(
    daemon, arguments: list[str], method: str, target: str, body: Any
) -> None:
    """Each command makes exactly the call that the interface names."""
    daemon.answer(method, target.partition("?")[0], {"id": "agr-1"})
    code = main(arguments)

    assert code == 0
    assert [(one.method, one.target, one.document) for one in daemon.asked] == [
        (method, target, body)
    ]


ITEM = {
    "id": "agr-1",
    "state": "frozen",
    "reason": "somebody else released",
    "accrued": "0.05",
    "released": "0.024",
    "unsettled": "0.026",
    "escrows": [{"id": "esc_1", "released": "0.024", "expected": "0.02"}],
}
OPEN = {
    "id": "rel_1",
    "escrow": "esc_1",
    "amount": "0.02",
    "status": "in_doubt",
    "history": [{"detail": "no answer"}],
}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["close", "agr-1", *WHY], ["0.05", "0.026", "closed for good"]),
        (["resume", "agr-1", *WHY], ["shows 0.024 USDC", "knows of 0.02", "0.004 beyond", "0.026"]),
        (["resolve", "rel_1", "--landed", *WHY], ["0.02", "no answer", "you have lost"]),
        (["resolve", "rel_1", "--absent", *WHY], ["esc_1", "pays it twice"]),
    ],
)
def test_a_dry_run_shows_what_an_act_would_do_and_does_nothing(
    daemon, arguments: list[str], said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """With its sums, so that a mistake is seen before it costs something."""
    daemon.answer("GET", "/v1/agreements/agr-1", ITEM)
    daemon.answer("GET", "/v1/releases", {"items": [OPEN], "next": None})
    code = main([*arguments, "--dry-run"])
    shown = capsys.readouterr().out

    assert code == 0
    assert [part for part in said if part not in shown] == []
    assert {one.method for one in daemon.asked} == {"GET"}


def test_a_dry_run_tells_what_a_service_that_shows_less_costs(
    daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is taken as lost may be paid again: with the amount."""
    less = {**ITEM, "escrows": [{"id": "esc_1", "released": "0.01", "expected": "0.02"}]}
    daemon.answer("GET", "/v1/agreements/agr-1", less)
    code = main(["resume", "agr-1", "--dry-run", *WHY])

    assert (code, "0.01 that it lacks" in capsys.readouterr().out) == (0, True)


def test_a_dry_run_of_a_release_that_is_not_open_says_so(
    daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """It fails as the act would."""
    daemon.answer("GET", "/v1/releases", {"items": [OPEN], "next": None})
    code = main(["resolve", "rel_2", "--absent", "--dry-run", *WHY])

    assert (code, "meterd releases" in capsys.readouterr().err) == (1, True)


def test_a_refused_act_fails_with_the_daemons_sentence(
    daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the daemon refuses is said in its words, and is not done."""
    detail = "it is not frozen; look: meterd agreements agr-1"
    daemon.answer("POST", "/v1/agreements/agr-1/resume", {"detail": detail}, 409)
    code = main(["resume", "agr-1", *WHY])

    assert (code, capsys.readouterr().err) == (1, f"meterd: {detail}\n")


def letter(number: int, **more: Any) -> dict[str, Any]:
    """A dead letter as the API shows it."""
    return {
        "id": number,
        "source": "http",
        "event_id": f"e{number}",
        "reason": "unknown_meter",
        "detail": "there is no meter x",
        "received_at": "2026-11-23T12:00:00.000Z",
        **more,
    }


def test_dead_letters_are_listed_newest_first_over_all_pages(
    daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """A list that comes in pages is shown as one."""
    daemon.answer("GET", "/v1/dead-letters", {"items": [letter(3), letter(2)], "next": "2"})
    daemon.answer("GET", "/v1/dead-letters", {"items": [letter(1)], "next": None})
    code = main(["dead-letters", "--reason", "unknown_meter"])
    lines = capsys.readouterr().out.splitlines()

    assert code == 0
    assert [line.split()[0] for line in lines[3:6]] == ["3", "2", "1"]
    assert "2026-11-23 12:00:00" in lines[3]
    assert [one.target.partition("?")[2] for one in daemon.asked] == [
        "limit=50&reason=unknown_meter",
        "limit=48&cursor=2&reason=unknown_meter",
    ]


def test_what_came_from_outside_cannot_write_to_the_terminal(
    daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """Control characters and markup in an event are shown as what they are."""
    forged = letter(1, event_id="\x1b[2J[red]x[/red]", detail="a\nb")
    daemon.answer("GET", "/v1/dead-letters", {"items": [forged], "next": None})
    main(["dead-letters"])
    shown = capsys.readouterr().out

    assert "\x1b" not in shown
    assert "[red]x[/red]" in shown
    assert "a\\nb" in shown


def test_replaying_all_dead_letters_goes_from_the_oldest_and_counts(
    daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every letter is tried once, in the order in which they came; one rejected again is exit 1."""
    daemon.answer("GET", "/v1/dead-letters", {"items": [letter(3), letter(1)], "next": None})
    accepted = {"accepted": 1, "duplicates": 0, "rejected": []}
    again = {"index": 0, "id": "e3", "reason": "unknown_meter", "detail": "still none"}
    rejected = {"accepted": 0, "duplicates": 0, "rejected": [again]}
    daemon.answer("POST", "/v1/dead-letters/1/replay", accepted)
    daemon.answer("POST", "/v1/dead-letters/3/replay", rejected)
    code = main(["dead-letters", "replay", "--all"])
    said = capsys.readouterr()

    assert code == 1
    assert said.out == "1 accepted, 0 duplicates, 1 rejected\n"
    assert said.err == "3: unknown_meter: still none\n"
    assert [one.target for one in daemon.asked[1:]] == [
        "/v1/dead-letters/1/replay",
        "/v1/dead-letters/3/replay",
    ]
