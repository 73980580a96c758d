from __future__ import annotations

import json
from typing import Any

import pytest

from meterd.api import ApiSettings, ApiToken, Scope
from meterd.core.openings import Opening, OpeningStatus
from meterd.errors import Refused, StoreFailed, Unavailable
from meterd.mcp import door
from meterd.mcp.tools import Tool

READ = "token-of-a-looker-0123456789"
BOTH = "token-of-an-agent-0123456789"
SETTINGS = ApiSettings(
    tokens=(
        ApiToken("looker", READ, frozenset({Scope.READ})),
        ApiToken("agent", BOTH, frozenset({Scope.READ, Scope.ADMIN})),
    )
)
HEADERS = {"Content-Type": "application/json", "Accept": "application/json"}


async def use(world, tool: str, arguments: Any = None, token: str = "") -> tuple[bool, Any]:
    """Use a tool; whether it did what was asked, and what it says."""
    asked = {"name": tool, "arguments": arguments or {}}
    message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": asked}
    headers = HEADERS | ({"Authorization": f"Bearer {token}"} if token else {})
    answer = await world.post("/mcp", message, headers=headers)
    assert answer.status == 200, answer.body
    result = answer.json["result"]
    text = result["content"][0]["text"]
    return (False, text) if result["isError"] else (True, json.loads(text))


def waiting(agreement: str) -> Opening:
    """An opening of which nobody knows yet whether it has locked anything."""
    return Opening(
        id="open_1",
        agreement=agreement,
        plan="stream",
        payer="",
        role="main",
        amount=10**6,
        provider="agent_provider",
        hours=None,
        memo="m",
        why="asked",
        status=OpeningStatus.IN_DOUBT,
        created_at=1,
        changed_at=1,
    )


async def test_what_changes_something_asks_for_admin_at_each_call(make_world):
    """The door is open to read; neither money nor a wish for it moves without admin."""
    world = await make_world(SETTINGS)
    await world.bind()
    looked = await use(world, "escrow_status", {"id": "esc_1"}, READ)
    order = {"id": "a-1", "plan": "stream"}
    locked = await use(world, "escrow_create", order, READ)
    everything = {"id": "esc_1", "everything_accrued": True}
    settled = await use(world, "escrow_release", everything, READ)

    assert looked[0]
    assert locked == settled == (False, "this needs a token with the scope admin")
    assert world.opener.wishes == []
    assert [entry.action for entry in world.store.entries] == ["agreement_bound"]


async def test_journal_names_the_token_of_the_agent(make_world):
    """Who acted by a tool is kept as who acted by a call."""
    world = await make_world(SETTINGS)
    await world.bind()
    arguments = {"id": "esc_1", "everything_accrued": True, "reason": "the week is over"}
    done, _ = await use(world, "escrow_release", arguments, BOTH)
    entry = world.store.entries[-1]

    assert done
    assert (entry.actor, entry.action) == ("agent", "settlement_asked")
    assert entry.detail == "the week is over"


async def test_opening_in_doubt_is_shown_and_not_made_again(world):
    """The agent learns that nobody knows yet, and where to look."""
    world.opener.unfinished = [waiting("a-1")]
    order = {"id": "a-1", "plan": "stream"}
    _, said = await use(world, "escrow_create", order)
    _, shown = await use(world, "escrow_status", {"id": "a-1"})
    _, listed = await use(world, "escrow_list")

    assert (said["state"], said["repeated"]) == ("opening", True)
    assert "ask escrow_status, with this id" in said["said"]
    assert said["openings"][0]["status"] == "in_doubt"
    assert shown == {"id": "a-1", "state": "opening", "openings": said["openings"]}
    assert listed["opening"] == ["a-1"]


@pytest.mark.parametrize("error", [Refused("not so; type this"), Unavailable("the disk is full")])
async def test_what_is_refused_is_said_in_its_own_words(world, error):
    """As the API's problem has it; the daemon goes on."""
    world.opener.answer = error
    answer = await use(world, "escrow_create", {"id": "a-1", "plan": "stream"})

    assert answer == (False, str(error))
    assert world.fatal == []


@pytest.mark.parametrize("error", [StoreFailed("the disk is gone"), KeyError("a mistake of ours")])
async def test_mistake_behind_a_change_ends_the_process(world, error):
    """Memory may be ahead of the disk: as for every call, the next process starts from there."""
    world.opener.answer = error
    done, said = await use(world, "escrow_create", {"id": "a-1", "plan": "stream"})

    assert (done, world.fatal) == (False, [error])
    assert said == "meterd stops and starts again from its disk; send this again"


async def test_mistake_behind_a_look_is_only_said(world, monkeypatch):
    """Nothing was changed, so nothing is ahead of the disk."""
    monkeypatch.setattr(world.overview, "refresh", lambda: 1 // 0)
    done, said = await use(world, "meter_status")

    assert (done, world.fatal) == (False, [])
    assert said == "meterd made a mistake; its log says which"


async def test_mistake_of_the_protocol_is_no_mistake_of_the_ledger(world, monkeypatch):
    """The daemon does not end for it: no tool was behind it."""

    async def fails(*_: object) -> None:
        raise ExceptionGroup("of the SDK", [ZeroDivisionError()])

    assert (await use(world, "meter_status"))[0]
    monkeypatch.setattr("meterd.mcp.asgi.answer", fails)
    answer = await world.post("/mcp", {}, headers=HEADERS)

    assert (answer.status, answer.json["type"]) == (500, "urn:meterd:problem:internal")
    assert world.fatal == []


async def test_door_says_what_to_install_and_opens_once_it_is_there(world, monkeypatch):
    """A missing extra is looked for again at the next call."""

    def missing(_: door.Door) -> None:
        raise ImportError

    with monkeypatch.context() as patched:
        patched.setattr(door.Door, "_load", missing)
        answer = await world.post("/mcp", {}, headers=HEADERS)

    assert (answer.status, answer.json["type"]) == (501, "urn:meterd:problem:not-installed")
    assert "pip install 'meterd[mcp]'" in answer.json["detail"]
    assert (await use(world, "meter_status"))[0]


async def test_notification_is_taken_and_not_answered(world):
    """Clients that shake hands say so when they are done."""
    message = {"jsonrpc": "2.0", "method": "notifications/initialized"}
    answer = await world.post("/mcp", message, headers=HEADERS)

    assert (answer.status, answer.body) == (202, b"")


async def test_schema_of_a_tool_has_parts_where_its_type_has():
    """A list of lines is described line by line."""
    from meterd.api.agent_tools import QuoteOf

    async def answer(_: object, __: object) -> dict[str, Any]:
        return {}

    schema = Tool("q", "", "", QuoteOf, "{}", answer).schema()

    assert schema["properties"]["usage"]["items"] == {"$ref": "#/$defs/Used"}
    assert set(schema["$defs"]) == {"Used"}
