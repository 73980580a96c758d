from __future__ import annotations

import pytest

from meterd.core.settlement import AnswerKind, Closing, Due


def usage(**changes):
    return {"id": "a", "escrow_id": "esc_1", "meter": "tokens", "quantity": 1234567, **changes}


async def test_an_agreement_shows_its_money_as_decimal_texts(world):
    """Accrued is exact, the rest in micros; headroom is remaining less unsettled."""
    await world.post("/v1/events", usage())
    shown = (await world.get("/v1/agreements/esc_1")).json

    assert shown["accrued"] == "2.469134"
    assert shown["unsettled"] == "2.469134"
    assert shown["headroom"] == "7.530866"
    assert (shown["released"], shown["in_doubt"], shown["uncollectible"]) == (
        "0.00",
        "0.00",
        "0.00",
    )
    assert (shown["state"], shown["next"]) == ("active", None)
    assert shown["escrows"][0]["total"] == "10.00"
    assert shown["opened_at"] == "2026-11-23T12:00:00.000Z"


async def test_an_agreement_that_used_more_than_is_left_is_exhausted(world):
    """Headroom goes below zero, visibly, and the rest is uncollectible."""
    await world.post("/v1/events", usage(quantity=6_000_000))
    shown = (await world.get("/v1/agreements/esc_1")).json

    assert (shown["state"], shown["headroom"], shown["uncollectible"]) == (
        "exhausted",
        "-2.00",
        "2.00",
    )
    assert shown["next"] == "meterd bind NEW_ESCROW --plan stream"


async def test_an_escrow_that_is_not_adopted_has_no_headroom_yet(make_world):
    """What was never read is null, not zero."""
    world = await make_world()
    await world.call("PUT", "/v1/agreements/esc_9", {"plan": "stream"})
    shown = (await world.get("/v1/agreements/esc_9")).json

    assert (shown["state"], shown["headroom"]) == ("adopting", None)


async def test_agreements_are_handed_out_in_pages(make_world):
    """Following `next` shows each agreement once, in order, also when some are bound meanwhile."""
    world = await make_world()
    for number in range(7):
        await world.bind(f"esc_{number}")
    seen, cursor = [], ""
    while cursor is not None:
        page = (await world.get(f"/v1/agreements?limit=3&cursor={cursor}")).json
        seen += [item["id"] for item in page["items"]]
        cursor = page["next"]
        await world.bind("esc_0a") if len(seen) == 3 else None

    assert seen == [f"esc_{number}" for number in range(7)]


async def test_agreements_are_filtered_by_state_and_plan(make_world):
    """`?state=frozen` is what a person asks first."""
    world = await make_world()
    for name, plan in (("a", "stream"), ("b", "model"), ("c", "stream")):
        await world.bind(name, plan)
    await world.post("/v1/agreements/c/freeze", {"reason": "dispute"})
    frozen = (await world.get("/v1/agreements?state=frozen")).json
    model = (await world.get("/v1/agreements?plan=model")).json

    assert [item["id"] for item in frozen["items"]] == ["c"]
    assert [item["id"] for item in model["items"]] == ["b"]


BAD_QUERIES = (
    "limit=0",
    "limit=1001",
    "limit=-1",
    "limit=x",
    "limit=",
    "limit=1e3",
    "cursor=%00",
    "cursor=..%2F",
)


@pytest.mark.parametrize("query", BAD_QUERIES)
@pytest.mark.parametrize(
    "path", ["/v1/agreements", "/v1/releases", "/v1/dead-letters", "/v1/plans"]
)
async def test_a_bad_page_is_a_problem(world, path, query):
    """Every list has its limit."""
    answer = await world.get(f"{path}?{query}")

    assert (answer.status, answer.json["type"]) == (400, "urn:meterd:problem:bad-query")


async def test_usage_is_shown_by_meter_and_dimension(make_world):
    """Each counter with its exact share of what is owed."""
    world = await make_world()
    await world.bind("esc_1", "model")
    for name in ("large", "large", "small"):
        await world.post("/v1/events", usage(id=name, quantity=2, dimensions={"model": name}))
    [item] = (await world.get("/v1/agreements/esc_1/usage")).json["items"]

    assert (item["meter"], item["dimensions"]) == ("tokens", {"model": "large"})
    assert (item["quantity"], item["events"], item["accrued"]) == ("2", 1, "0.002")


async def test_usage_is_handed_out_in_pages(world):
    """Two counters, a page each."""
    await world.post("/v1/events", [usage(), usage(id="b", meter="calls")])
    first = (await world.get("/v1/agreements/esc_1/usage?limit=1")).json
    second = (await world.get(f"/v1/agreements/esc_1/usage?limit=1&cursor={first['next']}")).json

    assert [page["items"][0]["meter"] for page in (first, second)] == ["calls", "tokens"]
    assert (first["next"], second["next"]) == ("1", None)


async def test_releases_show_their_history(world):
    """Each state with its time, oldest first."""
    await world.post("/v1/events", usage())
    await world.release("esc_1", "rel_1", AnswerKind.CONFIRMED)
    [release] = (await world.get("/v1/agreements/esc_1/releases")).json["items"]

    assert (release["amount"], release["status"], release["agreement"]) == (
        "2.469134",
        "confirmed",
        "esc_1",
    )
    assert [entry["status"] for entry in release["history"]] == ["intended", "sent", "confirmed"]
    assert (await world.get("/v1/agreements/esc_1")).json["released"] == "2.469134"


# -- Binding


BINDING = {"plan": "stream", "payer": "ada", "escrows": {"main": "esc_7"}}


async def test_binding_again_changes_nothing(world):
    """201 the first time, 200 after it, and one entry in the journal."""
    answers = [await world.call("PUT", "/v1/agreements/agr-7", BINDING) for _ in range(3)]

    assert [answer.status for answer in answers] == [201, 200, 200]
    assert answers[0].json == answers[2].json
    bound = [entry for entry in world.store.entries if entry.subject == "agr-7"]
    assert [(entry.actor, entry.action) for entry in bound] == [("http", "agreement_bound")]


async def test_a_binding_that_leaves_things_out_keeps_what_is_there(world):
    """The payer, the escrows and who bound it first stay."""
    account = world.bookkeeper.ledger.account("esc_1")
    before = account.agreement
    answer = await world.call("PUT", "/v1/agreements/esc_1", {"plan": "stream"})

    assert (answer.status, account.agreement) == (200, before)


async def test_binding_without_escrows_takes_the_agreements_id(world):
    """Where there is one escrow, its id is the agreement's."""
    answer = await world.call("PUT", "/v1/agreements/esc_8", {"plan": "stream"})

    assert [escrow["id"] for escrow in answer.json["escrows"]] == ["esc_8"]


CONFLICTS = {
    "another role": ("/v1/agreements/esc_1", {"plan": "stream", "escrows": {"base": "esc_1"}}),
    "two roles": ("/v1/agreements/c", {"plan": "stream", "escrows": {"main": "a", "overage": "b"}}),
    "an escrow of another": (
        "/v1/agreements/new",
        {"plan": "stream", "escrows": {"main": "esc_1"}},
    ),
}


@pytest.mark.parametrize("name", CONFLICTS)
async def test_a_binding_that_contradicts_is_a_conflict(world, name):
    """What is bound stays bound."""
    path, body = CONFLICTS[name]
    answer = await world.call("PUT", path, body)

    assert (answer.status, answer.json["type"]) == (409, "urn:meterd:problem:refused")


BAD_BINDINGS = {
    "no plan": {"payer": "x"},
    "unknown plan": {"plan": "gold"},
    "unknown member": {"plan": "stream", "price": "0.00"},
    "an unknown role": {"plan": "stream", "escrows": {"spare": "b"}},
    "no escrow": {"plan": "stream", "escrows": {}},
    "an escrow that is a path": {"plan": "stream", "escrows": {"main": "../x"}},
    "a payer of many characters": {"plan": "stream", "payer": "x" * 257},
    "a payer with a line end": {"plan": "stream", "payer": "a\r\nb"},
    "a list": [],
    "a number": 7,
}


@pytest.mark.parametrize("name", BAD_BINDINGS)
async def test_a_bad_binding_is_a_problem_and_binds_nothing(world, name):
    """The sentence says what to send instead."""
    answer = await world.call("PUT", "/v1/agreements/new", BAD_BINDINGS[name])

    assert answer.status == 400
    assert world.bookkeeper.ledger.account("new") is None
    assert world.fatal == []


@pytest.mark.parametrize("name", ["a%20b", "x" * 129, "%E2%98%83", "a;b", "a%0d%0ab"])
async def test_an_odd_id_is_refused(world, name):
    """Ids hold only what is safe in a label and an address."""
    answer = await world.call("PUT", f"/v1/agreements/{name}", {"plan": "stream"})

    assert answer.status == 400


# -- Acts


async def test_settling_asks_for_a_release_below_every_threshold(world):
    """202: it has begun; the escrow is due now."""
    await world.post("/v1/events", usage(quantity=1000))
    account = world.bookkeeper.ledger.account("esc_1")
    before = world.bookkeeper.due(account.escrow)
    answer = await world.post("/v1/agreements/esc_1/settle", {"reason": "end of the month"})

    assert (answer.status, before, world.bookkeeper.due(account.escrow)) == (202, "", "asked")
    assert "esc_1" in world.bookkeeper.take_due()
    assert world.store.entries[-1].detail == "end of the month"


async def test_closing_begins_once_and_is_quiet_when_it_is_done(world):
    """A closed agreement can be closed again without an effect."""
    first = await world.post("/v1/agreements/esc_1/close")
    clock = world.clock
    await world.bind()
    await world.bookkeeper.step("esc_1", Due(0, "close", "rel_0", 0, clock.mono(), clock.wall()))
    again = await world.post("/v1/agreements/esc_1/close")

    assert (first.status, first.json["state"], first.json["closing"]) == (202, "closing", True)
    assert (again.status, again.json["state"]) == (200, "closed")


async def test_freezing_and_resuming_want_a_reason(world):
    """What stops or restarts payments is explained, or not done."""
    for act in ("freeze", "resume"):
        for body in (None, {}, {"reason": "  "}, {"reason": "a\nb"}, {"reason": "x" * 501}):
            answer = await world.post(f"/v1/agreements/esc_1/{act}", body)

            assert answer.status == 400


async def test_a_frozen_agreement_is_not_settled_until_it_is_resumed(world):
    """409 with the command to type."""
    frozen = await world.post("/v1/agreements/esc_1/freeze", {"reason": "dispute"})
    refused = await world.post("/v1/agreements/esc_1/settle")
    resumed = await world.post("/v1/agreements/esc_1/resume", {"reason": "settled by phone"})

    assert (frozen.json["state"], frozen.json["next"]) == (
        "frozen",
        "meterd resume esc_1 --reason TEXT",
    )
    assert (refused.status, "meterd resume esc_1" in refused.json["detail"]) == (409, True)
    assert (resumed.status, resumed.json["state"]) == (200, "active")


async def test_resuming_what_is_not_frozen_is_refused(world):
    """An act that makes no sense in this state is a conflict."""
    answer = await world.post("/v1/agreements/esc_1/resume", {"reason": "x"})

    assert (answer.status, answer.json["detail"]) == (409, "the escrow is active, not frozen")


@pytest.mark.parametrize(
    "path", ["", "/usage", "/releases", "/settle", "/close", "/freeze", "/resume"]
)
async def test_an_unknown_agreement_is_not_found(world, path):
    """404 with the command that lists those there are."""
    method = "POST" if path in {"/settle", "/close", "/freeze", "/resume"} else "GET"
    answer = await world.call(
        method, f"/v1/agreements/nobody{path}", {} if method == "POST" else None
    )

    assert answer.status == 404
    assert "meterd agreements" in answer.json["detail"]


async def test_an_agreement_is_found_by_its_escrow_too(world):
    """A person has either id at hand."""
    await world.call("PUT", "/v1/agreements/agr-7", BINDING)

    assert (await world.get("/v1/agreements/esc_7")).json["id"] == "agr-7"


async def test_a_closing_agreement_says_so(world):
    """The table's own word is shown."""
    await world.bookkeeper.step("esc_1", Closing())

    assert (await world.get("/v1/agreements/esc_1")).json["state"] == "closing"
