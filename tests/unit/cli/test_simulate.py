from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from meterd.cli import plots
from meterd.cli.main import main
from meterd.cli.simulate import Variant, duration
from meterd.core.plans import Pattern, Plan, Settle
from meterd.core.pricing import Rate, RateCard
from meterd.errors import MeterdError

CONFIGURATION = """
[escrow]
base_url = "http://127.0.0.1:1/api/v1"
api_key = "pf_live_simulated_key"
[meters.units]
[plans.stream]
pattern = "streaming"
rates = [{ meter = "units", price = "0.001" }]
settle = { amount = "0.10" }
[plans.dear]
pattern = "pay_per_token"
rates = [{ meter = "units", price = "0.01" }]
settle = { escrow_percent = 10 }
deposit = "10.00"
[[agreements]]
id = "a"
plan = "stream"
escrows = { main = "esc_a" }
"""


@pytest.fixture(autouse=True)
def files(tmp_path: Path) -> None:
    """A configuration, and a hundred seconds of usage in the order of its coming."""
    (tmp_path / "meterd.toml").write_text(CONFIGURATION)
    lines = [
        json.dumps(
            {
                "id": f"{second}",
                "escrow_id": "esc_a",
                "meter": "units",
                "quantity": 10,
                "time": f"2026-11-24T10:{second // 60:02}:{second % 60:02}Z",
            }
        )
        for second in range(100)
    ]
    (tmp_path / "usage.ndjson").write_text("\n".join(lines))


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """Type it for its JSON."""
    assert main(["simulate", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Type it wrongly; the sentence."""
    assert main(["simulate", *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def test_operator_compares_thresholds_and_plans_in_one_document(capsys):
    """Calls, fees, exposure and time to payment of each variant, the configured one first."""
    answer = asked(
        capsys, "usage.ndjson", "--against", "amount=0.50", "--against", "plan=dear",
        "--fee-per-call", "0.002",
    )  # fmt: skip

    assert (answer["events"], answer["agreements"]) == (100, 1)
    first, fewer, dear = answer["variants"]
    assert [each["variant"] for each in (first, fewer, dear)] == [
        "as configured",
        "amount=0.50",
        "plan=dear",
    ]
    assert first == {
        "variant": "as configured",
        "calls": 10,
        "why": {"amount": 10},
        "charged": "1.00",
        "paid": "1.00",
        "unpaid": "0.00",
        "fee": "0.01",
        "calls_fee": "0.02",
        "exposure": first["exposure"],
        "together": first["exposure"],
        "wait": first["wait"],
    }
    assert first["exposure"]["worst"] == "0.10"
    assert first["wait"]["worst"] == 10_000
    assert (fewer["calls"], fewer["charged"]) == (2, "1.00")
    # A tenth of the deposit, though the escrow has no end.
    assert (dear["calls"], dear["charged"]) == (10, "10.00")


def test_operator_reads_a_table_and_what_is_not_in_it(capsys):
    """The figures on standard output, what they leave out beside it."""
    assert main(["simulate", "usage.ndjson", "--against", "adaptive,exposure_max=0.40"]) == 0

    said = capsys.readouterr()
    assert said.out.startswith("100 events of 1 agreement\n")
    assert "adaptive,exposure_max=0.40" in said.out
    assert "amount 10" in said.out
    assert "doubts, outages and deadlines are not modelled" in said.err


def test_same_usage_gives_the_same_document(capsys):
    """A simulation throws no dice."""
    words = (
        "usage.ndjson",
        "--against",
        "units=100,interval=60s",
        "--against",
        "adaptive,exposure_max=1",
    )

    assert asked(capsys, *words) == asked(capsys, *words)


def test_deposit_that_ends_leaves_usage_unpaid(capsys):
    """With a deposit the escrow can be exhausted."""
    answer = asked(capsys, "usage.ndjson", "--deposit", "0.60")

    assert answer["variants"][0]["unpaid"] == "0.40"


def test_events_without_a_price_are_told(capsys, tmp_path):
    """They are what the daemon would keep as dead letters."""
    lines = (tmp_path / "usage.ndjson").read_text().replace('"units"', '"tokens"', 3)
    (tmp_path / "usage.ndjson").write_text(lines)

    answer = asked(capsys, "usage.ndjson")

    assert answer["events"] == 97
    assert answer["notes"][0].startswith("3 events have no price under plan stream")


WRONG = [
    (("--against", "amount=0.001"), "is below min_release (0.01) of plan stream"),
    (("--against", "amount=-1"), "amount=-1: must be greater than 0"),
    (("--against", "amount"), "is no threshold; write some of adaptive, plan=NAME, amount=…"),
    (("--against", "speed=3"), "is no threshold"),
    (("--against", "amount=1,amount=2"), "is no threshold"),
    (("--against", "escrow_percent=200"), "write a whole number from 1 to 100"),
    (("--against", "interval=60"), 'such as "250ms"'),
    (("--against", "adaptive"), "plan stream names no exposure_max; write"),
    (("--against", "plan=other"), "there is no plan 'other'; known: dear, stream"),
    (("--plan", "other"), "there is no plan 'other'; known: dear, stream"),
    (("--latency", "soon"), "--latency: write a duration"),
    (("--deposit", "0"), "--deposit: must be greater than 0"),
    (("--store", "data"), "name files of events or --store, not both"),
    (("--plot", "picture.gif"), "write a name that ends with .svg or .png"),
]


@pytest.mark.parametrize(("words", "sentence"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_wrong_use_is_a_sentence_before_the_long_run(capsys, words, sentence):
    """It says what to write instead."""
    assert sentence in refused(capsys, "usage.ndjson", *words)


def test_agreement_whose_plan_is_not_known_needs_a_name(capsys, tmp_path):
    """Of two plans nobody can guess; --plan names it for all."""
    text = (tmp_path / "usage.ndjson").read_text().replace("esc_a", "esc_b")
    (tmp_path / "usage.ndjson").write_text(text)

    assert "which plan esc_b has is not known: name one for all, --plan" in refused(
        capsys, "usage.ndjson"
    )
    answer = asked(capsys, "usage.ndjson", "--plan", "dear")
    assert answer["variants"][0]["variant"] == "plan=dear"
    assert answer["variants"][0]["charged"] == "10.00"


def test_file_without_usage_is_told(capsys, tmp_path):
    """Nothing to simulate is no table of zeros."""
    (tmp_path / "usage.ndjson").write_text("\n")

    assert "there is no usage with a time" in refused(capsys, "usage.ndjson")


def test_thresholds_that_are_named_replace_the_plans_and_its_limits_stay():
    """An amount instead of an interval, not beside it."""
    card = RateCard((Rate("units", 10**9),))
    own = Settle(interval=60_000, units=5, before_deadline=7, min_release=20_000)
    plan = Plan("stream", Pattern.STREAMING, card, own)

    assert Variant.as_configured("").settle_of(plan) == own
    assert Variant.of("plan=stream").settle_of(plan) == own
    assert Variant.of("amount=0.50").settle_of(plan) == Settle(
        amount=500_000, before_deadline=7, min_release=20_000
    )
    assert Variant.of("min_release=0.5").settle_of(plan).min_release == 500_000
    assert Variant.of("exposure_max=2").settle_of(plan) == Variant.of(
        "adaptive, exposure_max=2"
    ).settle_of(plan)
    with pytest.raises(MeterdError):
        Variant.of("adaptive").settle_of(plan)


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, "0.0 s"),
        (59_999, "59.9 s"),
        (60_000, "1 min 00 s"),
        (3_599_999, "59 min 59 s"),
        (7_260_000, "2 h 01 min"),
        (48 * 3_600_000, "2 d 0 h"),
    ],
)
def test_time_is_written_as_people_say_it(ms, text):
    """In its two largest units."""
    assert duration(ms) == text


# -- Pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "begins"), [("x.svg", b"<?xml"), ("x.png", b"\x89PNG")])
def test_operator_draws_a_picture(capsys, tmp_path, name, begins):
    """As a vector or as pixels; the same run gives the same file."""
    words = ("usage.ndjson", "--against", "amount=0.50,min_release=0.20", "--plot", name)

    asked(capsys, *words)
    first = (tmp_path / name).read_bytes()
    asked(capsys, *words)

    assert first.startswith(begins)
    assert first == (tmp_path / name).read_bytes()
    if name.endswith(".svg"):
        assert b"amount=0.50,min_release=0.20" in first


def test_picture_without_its_library_says_what_to_install(capsys, monkeypatch):
    """Before the long run, and everything else works without it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    assert "pip install 'meterd[plot]'" in refused(capsys, "usage.ndjson", "--plot", "x.svg")


def test_picture_that_cannot_be_written_is_told(capsys):
    """A directory that is not there."""
    assert "name another file" in refused(capsys, "usage.ndjson", "--plot", "none/x.svg")


def test_picture_of_many_points_keeps_the_highest():
    """Thinning must never hide the worst exposure."""
    points = [(at, 10 if at != 54_321 else 99) for at in range(100_000)]

    thin = plots.thinned(points)

    assert len(thin) <= 2 * plots.POINTS_MAX
    assert (54_321, 99) in thin
    assert thin == sorted(thin)
    assert plots.thinned(points[:3]) == points[:3]
