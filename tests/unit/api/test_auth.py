from __future__ import annotations

import pytest

from meterd.api import ApiSettings, ApiToken, Scope

TOKENS = {scope: f"token-of-{scope.value}-0123456789" for scope in Scope}
SETTINGS = ApiSettings(
    tokens=tuple(ApiToken(scope.value, text, frozenset({scope})) for scope, text in TOKENS.items())
)

# Every call of the API and the scope that it asks for; None: open to everybody.
CALLS = (
    ("POST", "/v1/events", Scope.INGEST),
    ("POST", "/api/v1/events", Scope.INGEST),
    ("POST", "/v1/traces", Scope.INGEST),
    ("POST", "/v1/logs", Scope.INGEST),
    ("POST", "/v1/backup", Scope.ADMIN),
    ("POST", "/v1/authorize", Scope.GATE),
    ("GET", "/v1/authorize", Scope.GATE),
    ("GET", "/v1/holds", Scope.READ),
    ("POST", "/v1/holds/hold_1/capture", Scope.GATE),
    ("POST", "/v1/holds/hold_1/void", Scope.GATE),
    ("POST", "/v1/quote", Scope.READ),
    ("POST", "/v1/agreements", Scope.ADMIN),
    ("GET", "/v1/openings", Scope.READ),
    ("GET", "/v1/agreements", Scope.READ),
    ("GET", "/v1/agreements/esc_1", Scope.READ),
    ("GET", "/v1/agreements/esc_1/usage", Scope.READ),
    ("GET", "/v1/agreements/esc_1/releases", Scope.READ),
    ("GET", "/v1/agreements/esc_1/receipts", Scope.READ),
    ("GET", "/v1/receipts/key", Scope.READ),
    ("PUT", "/v1/agreements/esc_1", Scope.ADMIN),
    ("POST", "/v1/agreements/esc_1/settle", Scope.ADMIN),
    ("POST", "/v1/agreements/esc_1/close", Scope.ADMIN),
    ("POST", "/v1/agreements/esc_1/freeze", Scope.ADMIN),
    ("POST", "/v1/agreements/esc_1/resume", Scope.ADMIN),
    ("GET", "/v1/releases", Scope.READ),
    ("POST", "/v1/releases/rel_1/resolve", Scope.ADMIN),
    ("GET", "/v1/dead-letters", Scope.ADMIN),
    ("GET", "/v1/dead-letters/1", Scope.ADMIN),
    ("POST", "/v1/dead-letters/replay", Scope.ADMIN),
    ("POST", "/v1/dead-letters/1/replay", Scope.ADMIN),
    ("DELETE", "/v1/dead-letters/1", Scope.ADMIN),
    ("GET", "/v1/producers", Scope.READ),
    ("POST", "/v1/producers/give-up", Scope.ADMIN),
    ("GET", "/v1/journal", Scope.ADMIN),
    ("GET", "/v1/plans", Scope.READ),
    ("GET", "/v1/status", Scope.READ),
    ("GET", "/v1/stream?seconds=0", Scope.READ),
    ("POST", "/mcp", Scope.READ),
    ("GET", "/healthz", None),
    ("GET", "/readyz", None),
    ("GET", "/metrics", None),
    ("GET", "/openapi.json", None),
    ("GET", "/", None),
    ("GET", "/dashboard/app.js", None),
    ("GET", "/dashboard/style.css", None),
)


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


@pytest.mark.parametrize(("method", "path", "scope"), CALLS)
async def test_each_call_takes_its_own_scope_and_no_other(make_world, method, path, scope):
    """A token opens what is listed for it; admin opens nothing but what asks for admin."""
    world = await make_world(SETTINGS)
    nobody = await world.call(method, path)
    allowed = {
        given
        for given, text in TOKENS.items()
        if (await world.call(method, path, headers=bearer(text))).status not in {401, 403}
    }

    if scope is None:
        assert nobody.status == 200
        assert allowed == set(Scope)
    else:
        assert (nobody.status, nobody.headers["WWW-Authenticate"]) == (401, 'Bearer realm="meterd"')
        assert allowed == {scope}


async def test_the_table_of_calls_is_whole(make_world):
    """A call that is added without its scope in the table above fails here."""
    world = await make_world(SETTINGS)
    served = {
        (route.method, route.resource.canonical)
        for route in world.runner.app.router.routes()
        if route.resource is not None
    }

    assert len(served) == len(CALLS)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        f"Basic {TOKENS[Scope.READ]}",
        TOKENS[Scope.READ],
        f"Bearer {TOKENS[Scope.READ]}x",
        f"Bearer {TOKENS[Scope.READ][:-1]}",
        "Bearer \udcff\udcfe",
        f"Bearer {'x' * 8000}",
    ],
)
async def test_an_unknown_token_is_refused_and_never_repeated(make_world, header):
    """No half, no other scheme, no long or odd token; the answer shows none of it."""
    world = await make_world(SETTINGS)
    raw = (
        header.encode("utf-8", "surrogateescape").decode("latin-1")
        if "\udcff" in header
        else header
    )
    answer = await world.get("/v1/status", headers={"Authorization": raw})

    assert (answer.status, answer.json["type"]) == (401, "urn:meterd:problem:token-missing")
    assert b"token-of" not in answer.body


async def test_a_token_of_a_megabyte_is_refused(make_world):
    """The limit on headers stands before everything else."""
    world = await make_world(SETTINGS)
    answer = await world.get("/v1/status", headers=bearer("x" * 1_000_000))

    assert answer.status == 400


async def test_the_word_bearer_may_be_written_in_any_case(make_world):
    """As RFC 9110 has it."""
    world = await make_world(SETTINGS)
    headers = {"Authorization": f"bEaReR {TOKENS[Scope.READ]}"}

    assert (await world.get("/v1/status", headers=headers)).status == 200


async def test_a_token_shows_in_no_repr():
    """What is printed by mistake holds no secret."""
    assert TOKENS[Scope.READ] not in repr(SETTINGS)


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8787", "127.0.0.1:1", "127.9.9.9", "[::1]:8787"]
)
async def test_without_tokens_this_machine_may_ask(make_world, host):
    """Names of loopback are let in."""
    world = await make_world()

    assert (await world.get("/v1/status", headers={"Host": host})).status == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", "[::", "x@"],
)
async def test_without_tokens_a_foreign_host_name_is_refused(make_world, host):
    """A name that somebody made resolve to 127.0.0.1 is not this machine."""
    world = await make_world()
    answer = await world.get("/v1/status", headers={"Host": host})

    assert (answer.status, answer.json["type"]) == (403, "urn:meterd:problem:host-refused")


async def test_without_tokens_a_foreign_page_cannot_post(make_world):
    """A form of another origin changes nothing; our own page may ask."""
    world = await make_world()
    foreign = {"Origin": "https://evil.example", "Content-Type": "text/plain"}
    refused = await world.post("/v1/events", b'{"id": "a"}', headers=foreign)
    null = await world.post("/v1/events", b'{"id": "a"}', headers={"Origin": "null"})
    own = await world.get("/v1/status", headers={"Origin": world.base})

    assert refused.json["type"] == null.json["type"] == "urn:meterd:problem:origin-refused"
    assert own.status == 200
    assert world.store.commits == 0


async def test_with_tokens_any_host_name_will_do(make_world):
    """Behind a proxy the Host is the proxy's affair."""
    world = await make_world(SETTINGS)
    headers = {**bearer(TOKENS[Scope.READ]), "Host": "meter.example"}

    assert (await world.get("/v1/status", headers=headers)).status == 200


async def test_the_journal_names_the_token(make_world):
    """Who acted is kept with the act."""
    world = await make_world(SETTINGS)
    await world.bind()
    await world.post(
        "/v1/agreements/esc_1/freeze", {"reason": "a test"}, headers=bearer(TOKENS[Scope.ADMIN])
    )

    assert (world.store.entries[-1].actor, world.store.entries[-1].detail) == ("admin", "a test")
