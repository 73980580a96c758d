"""How long the headroom lasts, as the API says it."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

from meterd.api.runway import SECONDS_MAX, Runways

MINUTE = 60_000


@dataclass
class Named:
    id: str = "a-1"


@dataclass
class FakeAccount:
    """What a runway looks at."""

    accrued: Fraction = Fraction(0)
    opened_at: int = 1_000
    agreement: Named = field(default_factory=Named)


def test_runway_of_an_agreement_that_was_never_asked_for_is_by_all_its_usage():
    """1 USDC in ten seconds: 5 more last fifty."""
    account = FakeAccount(Fraction(1))

    assert 50 == Runways().seconds(account, 5_000_000, 11_000)


def test_runway_follows_the_latest_minutes():
    """What was used an hour ago tells nothing any more."""
    runways, account = Runways(), FakeAccount(Fraction(100))
    runways.seconds(account, 1, 10 * MINUTE)
    account.accrued += 1
    first = runways.seconds(account, 1_000_000, 11 * MINUTE)
    soon = runways.seconds(account, 1_000_000, 11 * MINUTE + 30_000)
    account.accrued += 3
    later = runways.seconds(account, 1_000_000, 12 * MINUTE)

    assert (60, 90, 20) == (first, soon, later)


def test_runway_is_not_known_without_usage_headroom_or_time():
    """None is no number of seconds; an agreement that used all has none left."""
    idle, busy = FakeAccount(), FakeAccount(Fraction(1))

    assert Runways().seconds(idle, 5, MINUTE) is None
    assert Runways().seconds(busy, None, MINUTE) is None
    assert Runways().seconds(busy, 5, busy.opened_at) is None
    assert 0 == Runways().seconds(busy, 0, MINUTE) == Runways().seconds(busy, -5, MINUTE)


def test_runway_of_usage_that_was_taken_back_is_not_known():
    """The pace is below nothing."""
    runways, account = Runways(), FakeAccount(Fraction(2))
    runways.seconds(account, 1, MINUTE)
    account.accrued -= 1

    assert runways.seconds(account, 1, 3 * MINUTE) is None


def test_runway_has_an_end():
    """A crumb of usage in years."""
    assert SECONDS_MAX == Runways().seconds(FakeAccount(Fraction(1, 10**15)), 10**12, 10**12)


async def test_agreement_shows_its_runway(world):
    """Holds shorten it: they are no headroom."""
    account = world.bookkeeper.ledger.accounts["esc_1"]
    event = {"id": "e-1", "agreement": "esc_1", "meter": "tokens", "quantity": 1_000_000}
    await world.post("/v1/events", event)
    world.clock.advance(100 - (world.clock.wall() - account.opened_at) / 1000)

    assert 400 == (await world.get("/v1/agreements/esc_1")).json["runway"]
    ask = {"agreement": "esc_1", "meter": "tokens", "quantity": 1_000_000, "hold": 60}
    await world.post("/v1/authorize", ask)
    assert 300 == (await world.get("/v1/agreements/esc_1")).json["runway"]
