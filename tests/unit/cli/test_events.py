from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from meterd.cli import events
from meterd.cli.main import main

REPOSITORY = Path(__file__).parents[3]


def taken(accepted: int, duplicates: int = 0, *rejected: dict[str, Any]) -> dict[str, Any]:
    """The daemon's answer to a batch."""
    return {"accepted": accepted, "duplicates": duplicates, "rejected": list(rejected)}


def written(path: Path, count: int) -> Path:
    """A file of so many events."""
    path.write_text("".join(f'{{"id": "e{number}"}}\n' for number in range(count)))
    return path


def test_replay_sends_a_file_in_chunks_and_adds_up(
    daemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every line goes out once, in order, a thousand at a time."""
    file = written(tmp_path / "usage.ndjson", 2500)
    for answer in (taken(1000), taken(900, 100), taken(500)):
        daemon.answer("POST", "/v1/events", answer)
    code = main(["replay", str(file)])

    assert (code, capsys.readouterr().out) == (0, "2400 accepted, 100 duplicates, 0 rejected\n")
    assert [one.body.count(b"\n") for one in daemon.asked] == [1000, 1000, 500]
    assert b"".join(one.body for one in daemon.asked) == file.read_bytes()
    assert {one.headers["Content-Type"] for one in daemon.asked} == {"application/x-ndjson"}


def test_replay_names_the_line_of_a_rejected_event_and_fails(
    daemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Blank lines do not shift the numbers; one bad line is exit 1."""
    file = tmp_path / "usage.ndjson"
    file.write_text('{"id": "a"}\n\n   \n{"id": "b"}\n{"id": "c"}')
    bad = {"index": 1, "id": "b", "reason": "unknown_meter", "detail": "there is none"}
    daemon.answer("POST", "/v1/events", taken(2, 0, bad))
    code = main(["replay", str(file)])
    said = capsys.readouterr()

    assert (code, said.out) == (1, "2 accepted, 0 duplicates, 1 rejected\n")
    assert said.err == f"{file}:4: unknown_meter: there is none\n"


def test_replay_as_json_prints_totals_and_the_first_rejections(
    daemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A program gets the sums, and as many rejections as a person would read."""
    file = written(tmp_path / "usage.ndjson", 30)
    bad = [{"index": n, "id": f"e{n}", "reason": "late", "detail": "old"} for n in range(30)]
    daemon.answer("POST", "/v1/events", taken(0, 0, *bad))
    code = main(["replay", str(file), "--json"])
    totals = json.loads(capsys.readouterr().out)

    assert (code, totals["rejected"], len(totals["rejections"])) == (1, 30, events.SHOWN_MAX)
    assert totals["rejections"][0]["line"] == 1


def test_replay_waits_for_a_daemon_that_is_full_and_sends_the_same_again(
    daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """503 means not taken: the chunk is sent again after what Retry-After says."""
    waits: list[float] = []
    monkeypatch.setattr(events.time, "sleep", waits.append)
    file = written(tmp_path / "usage.ndjson", 3)
    daemon.answer("POST", "/v1/events", {"detail": "full"}, 503, Retry_After="7")
    daemon.answer("POST", "/v1/events", taken(3))
    code = main(["replay", str(file)])

    assert (code, waits) == (0, [7])
    assert daemon.asked[0].body == daemon.asked[1].body


def test_replay_halves_what_is_too_large_until_it_is_taken(
    daemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A small http.body_limit costs time and no event; one event beyond it is rejected alone."""
    file = written(tmp_path / "usage.ndjson", 3)
    daemon.answer("POST", "/v1/events", {}, 413)  # Lines 1 to 3.
    daemon.answer("POST", "/v1/events", {}, 413)  # Line 1 alone.
    daemon.answer("POST", "/v1/events", taken(2))  # Lines 2 and 3.
    code = main(["replay", str(file)])
    said = capsys.readouterr()

    assert (code, said.out) == (1, "2 accepted, 0 duplicates, 1 rejected\n")
    assert f"{file}:1: too_large" in said.err


def test_replay_that_breaks_off_says_from_which_line_to_go_on(
    daemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is in counts once, so the same command brings in the rest."""
    file = written(tmp_path / "usage.ndjson", 1500)
    daemon.answer("POST", "/v1/events", taken(1000))
    daemon.answer("POST", "/v1/events", {"detail": "meterd made a mistake"}, 500)
    code = main(["replay", str(file)])
    said = capsys.readouterr().err

    assert code == 1
    assert f"{file} from line 1001 on" in said
    assert "same command" in said


def test_replay_reads_standard_input(daemon) -> None:
    """A pipe is a file."""
    daemon.answer("POST", "/v1/events", taken(2))
    answer = subprocess.run(
        [sys.executable, "-m", "meterd", "replay", "-"],
        input='{"id": "a"}\n{"id": "b"}\n',
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
    )

    assert (answer.returncode, answer.stdout) == (0, "2 accepted, 0 duplicates, 0 rejected\n")
    assert answer.stderr == ""


def test_chunks_stay_below_the_limit_of_a_body() -> None:
    """Long lines make short chunks; a line longer than a chunk stands alone."""
    lines = [b"x" * 200_000 + b"\n"] * 4 + [b"y" * 600_000 + b"\n", b"z\n"]
    cut = list(events.chunks("f", lines))

    assert [chunk.numbers for chunk in cut] == [[1, 2], [3, 4], [5], [6]]
    assert sum(chunk.read for chunk in cut) == sum(map(len, lines))


def test_emit_sends_one_event_exactly_as_typed(daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """The quantity travels as the decimal text that was typed."""
    daemon.answer("POST", "/v1/events", taken(1))
    typed = ["emit", "agr-1", "tokens", "0.000000001", "--id", "e1", "-d", "model=m"]
    code = main(typed)

    assert (code, capsys.readouterr().out) == (0, "e1 is accepted\n")
    assert daemon.asked[0].document == {
        "id": "e1",
        "agreement": "agr-1",
        "meter": "tokens",
        "quantity": "0.000000001",
        "dimensions": {"model": "m"},
    }


def test_emit_of_a_rejected_event_fails_and_says_why(
    daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """An event that accrues nothing is no success."""
    bad = {"index": 0, "id": "e1", "reason": "unknown_meter", "detail": "there is none"}
    daemon.answer("POST", "/v1/events", taken(0, 0, bad))
    code = main(["emit", "agr-1", "tokens", "--id", "e1"])

    assert code == 1
    assert "unknown_meter: there is none" in capsys.readouterr().err
