from __future__ import annotations

import asyncio
import base64

import pytest

from meterd.core.accounts import Agreement

LOST = {"id": "a", "escrow_id": "esc_2", "meter": "tokens", "quantity": 1000}


@pytest.fixture
async def letters(world):
    """A world with three dead letters: two without an agreement, one of an unknown meter."""
    await world.post("/v1/events", [LOST, {**LOST, "id": "b"}])
    await world.post("/v1/events", {**LOST, "id": "c", "escrow_id": "esc_1", "meter": "none"})
    return world


async def repair(world):
    await world.bookkeeper.bind(Agreement("esc_2", "stream", "", (("main", "esc_2"),)), "test")


async def test_dead_letters_are_listed_newest_first_in_pages(letters):
    """Each with its reason and its payload as it came."""
    first = (await letters.get("/v1/dead-letters?limit=2")).json
    second = (await letters.get(f"/v1/dead-letters?limit=2&cursor={first['next']}")).json

    assert [item["id"] for item in first["items"] + second["items"]] == [3, 2, 1]
    assert (first["items"][0]["reason"], first["items"][0]["source"]) == ("unknown_meter", "http")
    assert '"id": "a"' in second["items"][0]["payload"]
    assert second["next"] is None


async def test_dead_letters_are_filtered_by_reason(letters):
    """An unknown reason is a problem that names those there are."""
    found = (await letters.get("/v1/dead-letters?reason=unknown_meter")).json
    unknown = await letters.get("/v1/dead-letters?reason=bored")

    assert [item["id"] for item in found["items"]] == [3]
    assert (unknown.status, "malformed" in unknown.json["detail"]) == (400, True)


async def test_one_dead_letter_is_shown_whole(world):
    """Also when it is no UTF-8."""
    body = b'{"id": "\xff' + b"x" * 5000 + b'"}'
    await world.post("/v1/events", body, headers={"Content-Type": "application/x-ndjson"})
    shown = (await world.get("/v1/dead-letters/1")).json
    listed = (await world.get("/v1/dead-letters")).json["items"][0]

    assert base64.b64decode(shown["payload_base64"]) == body
    assert (shown["payload_bytes"], len(listed["payload"])) == (len(body), 2048)


async def test_a_repaired_letter_is_replayed_once(letters):
    """After the repair it accrues; a second try finds it gone."""
    before = await letters.post("/v1/dead-letters/1/replay")
    await repair(letters)
    after = await letters.post("/v1/dead-letters/1/replay")
    again = await letters.post("/v1/dead-letters/1/replay")

    assert [item["reason"] for item in before.json["rejected"]] == ["unknown_agreement"]
    assert after.json == {"accepted": 1, "duplicates": 0, "rejected": []}
    assert again.status == 404
    assert letters.bookkeeper.dead_letters == 2


async def test_two_replays_at_the_same_moment_count_once(letters):
    """One act at a time."""
    await repair(letters)
    answers = await asyncio.gather(*(letters.post("/v1/dead-letters/1/replay") for _ in range(5)))

    assert sorted(answer.status for answer in answers) == [200, 404, 404, 404, 404]
    assert letters.bookkeeper.dead_letters == 2


async def test_letters_of_one_reason_are_replayed_together(letters):
    """Those of other reasons stay; the answer says what became of each."""
    await repair(letters)
    answer = await letters.post("/v1/dead-letters/replay", {"reason": "unknown_agreement"})

    assert answer.json == {"tried": 2, "accepted": 2, "duplicates": 0, "rejected": [], "next": None}
    assert [letter.reason for letter in letters.store.letters.values()] == ["unknown_meter"]


async def test_a_replay_of_many_goes_on_page_by_page(letters):
    """A limit bounds one call; `next` goes on behind it."""
    first = (
        await letters.post("/v1/dead-letters/replay", {"reason": "unknown_agreement", "limit": 1})
    ).json
    body = {"reason": "unknown_agreement", "limit": 1, "before": first["next"]}
    second = (await letters.post("/v1/dead-letters/replay", body)).json

    assert [page["rejected"][0]["id"] for page in (first, second)] == [2, 1]


@pytest.mark.parametrize(
    "body",
    [None, {}, {"reason": "x"}, {"reason": "late", "limit": 0}, {"reason": "late", "limit": 1001}],
)
async def test_a_replay_of_many_names_a_reason_and_a_sane_limit(letters, body):
    """Nobody replays everything by mistake."""
    assert (await letters.post("/v1/dead-letters/replay", body)).status == 400


async def test_throwing_away_wants_a_reason(letters):
    """In the body or the query; it is journalled."""
    refused = await letters.call("DELETE", "/v1/dead-letters/1")
    by_body = await letters.call("DELETE", "/v1/dead-letters/1", {"reason": "a test"})
    by_query = await letters.call("DELETE", "/v1/dead-letters/2?reason=a%20test")
    gone = await letters.call("DELETE", "/v1/dead-letters/2?reason=again")

    assert [answer.status for answer in (refused, by_body, by_query, gone)] == [400, 204, 204, 404]
    assert [entry.action for entry in letters.store.entries[-2:]] == ["dead_letter_discarded"] * 2
    assert letters.bookkeeper.dead_letters == 1


@pytest.mark.parametrize("number", ["x", "-1", "1.5", "9" * 19, "%EF%BC%91"])
async def test_a_dead_letter_has_a_whole_number(letters, number):
    """Anything else is a problem, not a search."""
    assert (await letters.get(f"/v1/dead-letters/{number}")).status == 400
