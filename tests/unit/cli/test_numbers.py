"""`meterd producers` on a terminal and for programs."""

from __future__ import annotations

import json

from meterd.cli.main import main


def producer(**fields):
    """One as the API shows it."""
    return {
        "source": "svc-a",
        "first": 1,
        "last": 90,
        "last_at": "2026-11-23T12:00:09.000Z",
        "missing": 0,
        "missing_ranges": [],
        "missing_since": None,
        "given_up": 0,
        "runs": 1,
        "exact": True,
        **fields,
    }


GAPS = [[3, 4], [9, 9], [20, 29], [40, 40], [50, 50]]


def test_what_is_missing_stands_in_a_table_with_the_next_command(daemon, capsys):
    """A few ranges, since when, and how to wait no more."""
    since = "2026-11-23T12:00:01.000Z"
    lacking = producer(missing=15, missing_ranges=GAPS, missing_since=since)
    daemon.answer("GET", "/v1/producers", {"items": [lacking, producer(source="b")], "next": "2"})
    code = main(["producers", "--limit", "2"])
    said = capsys.readouterr()

    assert code == 0
    for part in ("svc-a", "3-4, 9, 20-29, 40, …", "2026-11-23 12:00:01", "15", "90", "yes"):
        assert part in said.out
    assert "meterd producers --limit 20" in said.err
    assert "meterd producers give-up PRODUCER" in said.err


def test_producers_without_a_gap_need_no_command(daemon, capsys):
    """Few ranges are shown whole."""
    daemon.answer("GET", "/v1/producers", {"items": [producer()], "next": None})
    main(["producers"])

    assert capsys.readouterr().err == ""


def test_programs_get_what_the_api_gives(daemon, capsys):
    """With `--missing` those alone of which something is missing."""
    page = {"items": [producer(missing=1, missing_ranges=[[3, 3]])], "next": None}
    daemon.answer("GET", "/v1/producers", page)
    code = main(["producers", "--missing", "--json"])

    assert (code, json.loads(capsys.readouterr().out)) == (0, page)
    assert "/v1/producers?limit=50&missing=true" == daemon.asked[0].target


def test_nothing_is_shown_as_nothing(daemon, capsys):
    """In a sentence."""
    for _ in range(2):
        daemon.answer("GET", "/v1/producers", {"items": [], "next": None})
    main(["producers"])
    main(["producers", "--missing"])

    said = "No producer has numbered an event yet.\nNothing is missing.\n"
    assert said == capsys.readouterr().err


def test_giving_up_is_one_call(daemon, capsys):
    """With its reason; what it did is told."""
    for _ in range(2):
        daemon.answer("POST", "/v1/producers/give-up", {"source": "svc-a", "given_up": 1500})
    arguments = ["producers", "give-up", "svc-a", "--reason", "lost"]
    codes = (main(arguments), main([*arguments, "--json"]))
    said = capsys.readouterr().out

    assert codes == (0, 0)
    assert {"source": "svc-a", "reason": "lost"} == daemon.asked[0].document
    assert "1,500 events of svc-a are waited for no more." in said
    assert '"given_up": 1500' in said
