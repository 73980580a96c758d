"""The description of the API tells the truth about the calls that there are."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from meterd.api import agreements, backup, dead_letters, numbers, openapi, releases
from meterd.api.settings import Scope
from tests.documents import ROOT

KINDS = {
    "Binding": agreements.Binding,
    "Why": agreements.Why,
    "MaybeWhy": agreements.Why,
    "Resolution": releases.Resolution,
    "Replay": dead_letters.Replay,
    "Wanted": backup.Wanted,
    "GiveUp": numbers.GiveUp,
}


@pytest.fixture
async def document(make_world: Any) -> Any:
    """The document, as a client reads it."""
    world = await make_world()
    answer = await world.get(openapi.PATH)
    assert answer.status == 200
    return answer.json, world


async def test_every_call_is_described_and_every_described_call_exists(document):
    """Neither more nor less than the routes of the application."""
    described, world = document
    routes = {
        f"{route.method} {route.resource.canonical}"
        for route in world.runner.app.router.routes()
        if route.method != "HEAD"
    }

    assert set(openapi.CALLS) == routes
    assert routes == {
        f"{method.upper()} {path}" for path, calls in described["paths"].items() for method in calls
    }


async def test_description_names_the_scope_and_the_parameters_of_a_call(document):
    """What a token needs, what stands in the path, and how errors come."""
    paths = document[0]["paths"]
    bind = paths["/v1/agreements/{id}"]["put"]

    assert Scope.ADMIN.value == bind["x-scope"]
    assert [{"token": []}, {}] == bind["security"]
    assert [("id", "path"), ("Idempotency-Key", "header")] == [
        (one["name"], one["in"]) for one in bind["parameters"]
    ]
    assert ["application/problem+json"] == list(bind["responses"]["409"]["content"])
    assert [] == paths["/healthz"]["get"]["security"]
    assert "x-scope" not in paths["/healthz"]["get"]


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_body_is_described_with_the_members_that_are_read(name, kind):
    """A member more would be refused; one less, nobody would find."""
    described = openapi.SCHEMAS[name]

    assert {one.encode_name for one in msgspec.structs.fields(kind)} == set(described["properties"])
    needed = {one.encode_name for one in msgspec.structs.fields(kind) if one.required}
    assert needed <= set(described["required"])


@pytest.mark.parametrize(
    ("call", "example"),
    [(name, one.example) for name, one in openapi.CALLS.items() if one.body in KINDS],
)
def test_example_of_a_body_is_one_that_is_read(call, example):
    """Whoever copies it is not refused for its form."""
    assert msgspec.convert(example, KINDS[openapi.CALLS[call].body])


async def test_description_names_the_key_where_a_call_takes_one(document):
    """Calls that change something, apart from events, whose ids do the same."""
    paths = document[0]["paths"]

    def named(path, method):
        return "Idempotency-Key" in {one["name"] for one in paths[path][method]["parameters"]}

    assert named("/v1/authorize", "post")
    assert named("/v1/agreements/{id}", "put")
    assert named("/v1/dead-letters/{number}", "delete")
    assert "422" in paths["/v1/agreements"]["post"]["responses"]
    assert not named("/v1/events", "post")
    assert not named("/v1/agreements", "get")


async def test_page_of_the_api_lists_every_call_with_its_scope(document):
    """docs/api.md is where people look; its last table is the whole of it."""
    listed = {}
    for line in (ROOT / "docs" / "api.md").read_text().partition("## Every call")[2].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            listed[cells[0].strip("`")] = cells[1]
    scopes = {
        f"{method.upper()} {path}": call.get("x-scope", "-")
        for path, calls in document[0]["paths"].items()
        for method, call in calls.items()
    }

    assert listed == scopes
