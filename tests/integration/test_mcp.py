"""`/mcp` of a real daemon and of a real sandbox, asked by the official SDK's own client."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx2
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError

from tests.acceptance.stage import Node, configuration, paid, until
from tests.documents import ROOT, blocks
from tests.processes import PAYER_KEY, PROVIDER_KEY, Sandbox, call

ESCROW_TOOLS = ["escrow_create", "escrow_release", "escrow_status", "escrow_list"]
METER_TOOLS = ["meter_status", "meter_usage", "meter_quote"]
READ_TOKEN, ADMIN_TOKEN = "read-0123456789abcdef0123", "both-0123456789abcdef0123"
TOKENS = f"""
[[http.tokens]]
name = "looker"
token = "{READ_TOKEN}"
scopes = ["read"]
[[http.tokens]]
name = "agent"
token = "{ADMIN_TOKEN}"
scopes = ["read", "admin"]
"""
OPENABLE = """
[plans.stream]
pattern = "streaming"
rates = [{ meter = "units", price = "0.001" }]
settle = { amount = "1000" }
deposit = "2.00"
at_close = "leave"
"""
WITH_PAYER = f"""
agent_id = "agent_provider"
payer_api_key = "{PAYER_KEY}"
discover_interval = "200ms"
"""


class Agent:
    """An agent with its session at one door."""

    def __init__(self, client: Client) -> None:
        self.client = client

    async def tools(self) -> dict[str, Any]:
        """Its tools by name."""
        return {tool.name: tool for tool in (await self.client.list_tools()).tools}

    async def use(self, tool: str, **arguments: Any) -> Any:
        """Use a tool that must do what is asked; what it says."""
        result = await self.client.call_tool(tool, arguments)
        assert not result.is_error, result.content[0].text
        assert json.loads(result.content[0].text) == result.structured_content
        return result.structured_content

    async def refused(self, tool: str, **arguments: Any) -> str:
        """Use a tool that must refuse; its sentence."""
        result = await self.client.call_tool(tool, arguments)
        assert result.is_error, result.structured_content
        return str(result.content[0].text)


@asynccontextmanager
async def agent_at(origin: str, token: str = "", mode: str = "auto") -> AsyncIterator[Agent]:
    """Connect an agent as its SDK does; `mode`: how the two agree on the protocol's version."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with httpx2.AsyncClient(headers=headers, timeout=30) as http:
        transport = streamable_http_client(f"{origin}/mcp", http_client=http)
        async with Client(transport, mode=mode) as client:
            yield Agent(client)


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    """A sandbox of the test's own."""
    with Sandbox(tmp_path / "sandbox") as running:
        yield running


@pytest.fixture
def node(tmp_path: Path, sandbox: Sandbox) -> Iterator[Node]:
    """An open daemon that may lock with the payer's key."""
    with Node(tmp_path, configuration(sandbox, escrow=WITH_PAYER, plans=OPENABLE)) as daemon:
        daemon.wait_ready()
        yield daemon


@pytest.fixture
def guarded(tmp_path: Path, sandbox: Sandbox) -> Iterator[Node]:
    """A daemon with tokens."""
    text = configuration(sandbox, escrow=WITH_PAYER, plans=OPENABLE, rest=TOKENS)
    with Node(tmp_path, text) as daemon:
        daemon.wait_ready()
        yield daemon


def found_and_active(node: Node, name: str) -> None:
    """Wait for an agreement that is not there before its escrow is found."""
    until(lambda: node.agreement(name).get("state") == "active", f"{name} to be active")


def created(sandbox: Sandbox) -> list[Any]:
    """Every escrow that was ever locked, by the service's own log."""
    rows = call("GET", f"{sandbox.base}/_operations?limit=1000")["operations"]
    return [row for row in rows if row["kind"] == "create"]


# -- The daemon ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_daemon_offers_its_seven_tools_in_either_age_of_the_protocol(node, mode):
    """Clients that shake hands first see the same as those that do not."""
    async with agent_at(node.url, mode=mode) as agent:
        tools = await agent.tools()
        status = await agent.use("meter_status")

    assert list(tools) == [*ESCROW_TOOLS, *METER_TOOLS]
    assert status["flow"]["word"] == "idle"
    for name in ("escrow_create", "escrow_release"):
        assert "reuse the same id" in tools[name].description
        assert not tools[name].annotations.read_only_hint
    for name in set(tools) - {"escrow_create", "escrow_release"}:
        assert tools[name].annotations.read_only_hint
    for tool in tools.values():
        assert tool.input_schema["type"] == "object"
        assert tool.input_schema["additionalProperties"] is False


async def test_no_tool_takes_money_as_a_number(node, sandbox):
    """Neither in what it says that it takes, nor when it is sent one."""
    async with agent_at(node.url) as agent:
        daemons = await agent.tools()
        said = await agent.refused("escrow_create", id="a-1", plan="stream", deposit=2.5)
    async with agent_at(sandbox.base, PAYER_KEY) as agent:
        sandboxs = await agent.tools()
        also = await agent.refused("escrow_create", id="a", to_agent_id="b", amount=2.5)

    schemas = json.dumps([tool.input_schema for tool in (*daemons.values(), *sandboxs.values())])
    assert '"number"' not in schemas
    assert "Expected `str | null`, got `float` - at `$.deposit`" in said
    assert "Expected `str`, got `float` - at `$.amount`" in also
    assert created(sandbox) == []


async def test_an_agreement_lives_from_opening_to_payment_by_tools_alone(node, sandbox):
    """Open, use, look, settle: paid is exactly what was used."""
    async with agent_at(node.url) as agent:
        opened = await agent.use("escrow_create", id="customer-1", plan="stream", payer="Ada")
        escrow = opened["escrows"][0]["id"]
        node.wait_state("customer-1", "active")
        node.use("customer-1", 12, "e-1")
        usage = await agent.use("meter_usage", id="customer-1")
        shown = await agent.use("escrow_status", id=escrow)
        listed = await agent.use("escrow_list")
        asked = await agent.use("escrow_release", id="customer-1", everything_accrued=True)
        node.wait_agreement("customer-1", released="0.012")
        after = await agent.use("escrow_status", id="customer-1")
        status = await agent.use("meter_status")

    assert (opened["repeated"], opened["said"]) == (False, "it is locked")
    assert [("units", "12", "0.012")] == [
        (item["meter"], item["quantity"], item["accrued"]) for item in usage["items"]
    ]
    assert (usage["accrued"], usage["next"]) == ("0.012", None)
    assert (shown["id"], shown["unsettled"], shown["releases"]) == ("customer-1", "0.012", [])
    assert [item["id"] for item in listed["items"]] == ["customer-1"]
    assert "is being released" in asked["said"]
    assert (after["unsettled"], after["releases"][0]["amount"]) == ("0.00", "0.012")
    assert status["totals"]["released"] == "0.012"
    assert paid(sandbox, escrow) == Decimal("0.012")


async def test_retry_with_the_same_id_locks_one_escrow(node, sandbox):
    """Over a kill of the daemon too: the agent just asks again."""
    wish = {"id": "customer-1", "plan": "stream", "deposit": "3.00"}
    async with agent_at(node.url) as agent:
        first = await agent.use("escrow_create", **wish)
        again = await agent.use("escrow_create", **wish)
        node.kill()
        node.start()
        node.wait_ready()
        behind = await agent.use("escrow_create", **wish)
        await agent.use("escrow_status", id="customer-1")
        other = await agent.use("escrow_create", **wish | {"id": "customer-2"})

    assert (first["repeated"], again["repeated"], behind["repeated"]) == (False, True, True)
    assert first["escrows"][0]["id"] == again["escrows"][0]["id"] == behind["escrows"][0]["id"]
    assert other["escrows"][0]["id"] != first["escrows"][0]["id"]
    assert [row["amount"] for row in created(sandbox)] == ["3.00", "3.00"]


async def test_retry_locks_once_when_the_answer_was_lost_on_the_way(node, sandbox):
    """The service has locked and said 500: the agent is told so, asks again, and one is there."""
    sandbox.fault(kind="error_500_after", call="create")
    async with agent_at(node.url) as agent:
        first = await agent.use("escrow_create", id="customer-1", plan="stream")
        again = await agent.use("escrow_create", id="customer-1", plan="stream")
        found_and_active(node, "customer-1")
        found = await agent.use("escrow_status", id="customer-1")

    assert first["state"] in {"opening", "adopting", "active"}
    assert again["repeated"]
    assert [found["escrows"][0]["id"]] == [row["escrow_id"] for row in created(sandbox)]


async def test_retry_locks_once_when_the_daemon_was_killed_in_the_middle(node, sandbox):
    """The call had left and no answer came: the agent asks the next daemon, and one is there."""
    sandbox.fault(kind="delay_answer", call="create", seconds=20)
    wish = {"id": "customer-1", "plan": "stream"}
    body = {"name": "escrow_create", "arguments": wish}
    said = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": body}
    async with httpx2.AsyncClient(timeout=30) as client:
        cut_off = asyncio.create_task(client.post(f"{node.url}/mcp", json=said))
        while not created(sandbox):
            await asyncio.sleep(0.02)
        node.kill()
        with pytest.raises(httpx2.TransportError):
            await cut_off
    node.start()
    node.wait_ready()
    async with agent_at(node.url) as agent:
        again = await agent.use("escrow_create", **wish)
        found_and_active(node, "customer-1")
        found = await agent.use("escrow_status", id="customer-1")

    assert again["repeated"]
    assert [found["escrows"][0]["id"]] == [row["escrow_id"] for row in created(sandbox)]


async def test_an_id_counts_once_when_many_ask_at_once(node, sandbox):
    """At the daemon and at the sandbox alike."""
    wish = {"id": "order-1", "to_agent_id": "agent_provider", "amount": "1.00"}
    async with agent_at(node.url) as agent:
        opened = await asyncio.gather(
            *(agent.use("escrow_create", id="customer-1", plan="stream") for _ in range(8))
        )
        found_and_active(node, "customer-1")
    (own,) = created(sandbox)
    async with agent_at(sandbox.base, PAYER_KEY) as agent:
        locked = await asyncio.gather(*(agent.use("escrow_create", **wish) for _ in range(8)))
        escrow = locked[0]["escrow_id"]
        payment = {"id": "pay-1", "escrow_id": escrow, "amount": "0.10"}
        await asyncio.gather(*(agent.use("escrow_release", **payment) for _ in range(8)))

    assert [one["repeated"] for one in opened].count(False) == 1
    assert {one["escrow_id"] for one in locked} == {escrow}
    assert [own["escrow_id"], escrow] == [row["escrow_id"] for row in created(sandbox)]
    assert paid(sandbox, escrow) == Decimal("0.10")


async def test_release_pays_once_when_it_is_asked_for_again(node, sandbox):
    """By what is unsettled, not by how often somebody asks; an amount is a condition."""
    escrow = sandbox.lock("10.00")
    node.bind(escrow, "stream", "customer-1")
    node.use("customer-1", 500, "e-1")
    async with agent_at(node.url) as agent:
        await agent.use("escrow_release", id="customer-1", amount="0.50")
        for _ in range(3):  # Before it is paid, while, and after: each time it is paid once.
            await agent.client.call_tool("escrow_release", {"id": "customer-1", "amount": "0.50"})
        node.wait_agreement("customer-1", released="0.50")
        said = await agent.refused("escrow_release", id="customer-1", amount="0.50")
        await agent.use("escrow_release", id="customer-1", everything_accrued=True)
        node.use("customer-1", 1, "e-2")

    assert said.startswith("0.00 USDC is unsettled, not 0.50: nothing was done.")
    assert paid(sandbox, escrow) == Decimal("0.50")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "give exactly one of amount"),
        ({"amount": None}, "give exactly one of amount"),
        ({"everything_accrued": False}, "give exactly one of amount"),
        ({"amount": "0.50", "everything_accrued": True}, "give exactly one of amount"),
        ({"amount": ""}, "amount: "),
        ({"amount": "0"}, "amount: more than 0"),
        ({"amount": "-1"}, "amount: "),
        ({"amount": "1e-1"}, "amount: "),
        ({"amount": "0.60"}, "0.50 USDC is unsettled, not 0.60: nothing was done."),
        ({"amount": "0.40"}, "0.50 USDC is unsettled, not 0.40: nothing was done."),
        ({"amount": 0.5}, "Expected `str | null`, got `float`"),
        ({"amount": 0}, "Expected `str | null`, got `int`"),
        ({"everything_accrued": "yes"}, "Expected `bool`, got `str`"),
        ({"full": True}, "Object contains unknown field `full`"),
    ],
)
async def test_daemon_releases_nothing_for_wrong_arguments(asked_of, arguments, sentence):
    """Never does something left out, empty or misspelt mean everything."""
    daemon, sandbox, escrow = asked_of
    async with agent_at(daemon.url) as agent:
        said = await agent.refused("escrow_release", id="customer-1", **arguments)

    assert said.startswith(sentence)
    assert daemon.agreement("customer-1")["unsettled"] == "0.50"
    assert paid(sandbox, escrow) == 0


@pytest.fixture(scope="module")
def asked_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Sandbox, str]]:
    """A daemon with half a dollar unsettled, of which nobody gets anything."""
    directory = tmp_path_factory.mktemp("asked")
    with Sandbox(directory / "sandbox") as sandbox:
        text = configuration(sandbox, escrow=WITH_PAYER, plans=OPENABLE)
        with Node(directory, text) as daemon:
            daemon.wait_ready()
            escrow = sandbox.lock("10.00")
            daemon.bind(escrow, "stream", "customer-1")
            daemon.use("customer-1", 500, "e-1")
            yield daemon, sandbox, escrow


async def test_tools_say_the_sentences_of_the_api(asked_of):
    """What the API's problems say in their detail, a tool says as its error."""
    daemon, _, _ = asked_of
    async with agent_at(daemon.url) as agent:
        tool = await agent.refused("escrow_create", id="x", plan="nonesuch")
        nobody = await agent.refused("meter_usage", id="nobody")
        status = await agent.refused("escrow_status", id="nobody")
        odd = await agent.refused("escrow_status", id="no body")
        page = await agent.refused("escrow_list", cursor="no such")
        many = await agent.refused("escrow_list", limit=1000)
        unpriced = await agent.refused(
            "meter_quote", plan="stream", usage=[{"meter": "teapots", "quantity": 1}]
        )
        with pytest.raises(MCPError, match="there is no such tool; known: escrow_create"):
            await agent.client.call_tool("escrow_burn", {})

    body = {"id": "x", "plan": "nonesuch"}
    assert tool == daemon.ask("POST", "/v1/agreements", body).json["detail"]
    assert nobody == daemon.get("/v1/agreements/nobody/usage")["detail"]
    assert status == "there is no agreement nobody; list them: escrow_list"
    assert odd == "id: 1 to 128 letters, digits, _ . : or -"
    assert page == daemon.get("/v1/agreements?cursor=no%20such")["detail"]
    assert many.startswith("Expected `int` <= 100 - at `$.limit`; escrow_list takes for example")
    question = {"plan": "stream", "usage": [{"meter": "teapots", "quantity": 1}]}
    assert unpriced == daemon.ask("POST", "/v1/quote", question).json["detail"]


async def test_quote_by_tool_is_that_of_the_api(asked_of):
    """Quantities as whole numbers or as exact texts; a float is refused."""
    daemon, _, _ = asked_of
    usage = [{"meter": "units", "quantity": 1500}, {"meter": "units", "quantity": "0.5"}]
    async with agent_at(daemon.url) as agent:
        quoted = await agent.use("meter_quote", plan="stream", usage=usage)
        said = await agent.refused(
            "meter_quote", plan="stream", usage=[{"meter": "units", "quantity": 0.5}]
        )
        when = await agent.refused("meter_quote", plan="stream", at="yesterday")

    assert quoted == daemon.ask("POST", "/v1/quote", {"plan": "stream", "usage": usage}).json
    assert quoted["total"] == "1.5005"
    assert "got `float` - at `$.usage[0].quantity`" in said
    assert when == 'at: a time with its zone, such as "2026-11-23T12:00:00Z"'


async def test_lists_come_in_pages(asked_of):
    """An agent reads as much as it asks for."""
    daemon, sandbox, _ = asked_of
    for name in ("page-1", "page-2", "page-3"):
        daemon.bind(sandbox.lock("1.00"), "stream", name)
    seen: list[str] = []
    async with agent_at(daemon.url) as agent:
        page = await agent.use("escrow_list", limit=2)
        while page["next"]:
            seen += [item["id"] for item in page["items"]]
            page = await agent.use("escrow_list", limit=2, cursor=page["next"])
        seen += [item["id"] for item in page["items"]]
        filtered = await agent.use("escrow_list", plan="nonesuch", state="active")

    assert {"page-1", "page-2", "page-3"} <= set(seen)
    assert sorted(seen) == seen
    assert filtered["items"] == []


async def test_token_that_may_only_look_changes_nothing(guarded, sandbox):
    """Each tool that changes something asks for admin; the door itself asks for read."""
    async with agent_at(guarded.url, READ_TOKEN) as agent:
        status = await agent.use("meter_status")
        locked = await agent.refused("escrow_create", id="customer-1", plan="stream")
        settled = await agent.refused("escrow_release", id="x", everything_accrued=True)
    async with agent_at(guarded.url, ADMIN_TOKEN) as agent:
        opened = await agent.use("escrow_create", id="customer-1", plan="stream")

    assert status["agreements"]["total"] == 0
    assert locked == settled == "this needs a token with the scope admin"
    assert [opened["escrows"][0]["id"]] == [row["escrow_id"] for row in created(sandbox)]
    journal = [row["detail"] for row in guarded.logged() if "detail" in row]
    texts = json.dumps([locked, settled, status, opened, journal])
    assert not re.search(f"{READ_TOKEN}|{ADMIN_TOKEN}|{PAYER_KEY}|{PROVIDER_KEY}", texts)


def test_door_is_guarded_as_every_call_is(guarded, asked_of):
    """Without a token 401; without tokens at all, a page of another origin gets nothing."""
    open_daemon, _, _ = asked_of
    said = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    json_type = {"Content_Type": "application/json"}
    nobody = guarded.ask("POST", "/mcp", said, **json_type)
    named = open_daemon.ask("POST", "/mcp", said, Host="evil.example", **json_type)
    page = open_daemon.ask("POST", "/mcp", said, Origin="https://evil.example", **json_type)
    form = open_daemon.ask("POST", "/mcp", said, Content_Type="text/plain")
    long = open_daemon.ask("POST", "/mcp", b" " * 300_000, **json_type)
    looked = open_daemon.ask("GET", "/mcp")

    kinds = [one.json["type"].rpartition(":")[2] for one in (nobody, named, page, form, long)]
    assert kinds == [
        "token-missing",
        "host-refused",
        "origin-refused",
        "content-type",
        "body-too-large",
    ]
    assert (looked.status, looked.headers["Allow"]) == (405, "POST")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"7", b'"x"', b"\xff", b"[" * 5000, b'{"jsonrpc": "2.0", "id": {}}'],
)
@pytest.mark.parametrize("version", ["", "2025-06-18", "2026-07-28", "1999-01-01"])
def test_daemon_outlives_what_is_no_message(asked_of, body, version):
    """It is refused as the protocol has it, and the daemon goes on."""
    daemon, _, _ = asked_of
    headers = {"Content_Type": "application/json", "Accept": "application/json"}
    headers |= {"MCP_Protocol_Version": version} if version else {}
    answer = daemon.ask("POST", "/mcp", body, **headers)

    assert answer.status == 400, answer.raw
    assert daemon.get("/healthz") == {"status": "ok"}


def test_a_call_without_a_session_is_enough(asked_of):
    """Nothing is remembered between two requests, so a restart loses nothing."""
    daemon, _, _ = asked_of
    asked = {"name": "escrow_status", "arguments": {"id": "customer-1"}}
    said = {"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": asked}
    answer = daemon.ask(
        "POST", "/mcp", said, Content_Type="application/json", Accept="application/json"
    )

    assert (answer.status, answer.json["id"]) == (200, 7)
    assert answer.json["result"]["structuredContent"]["unsettled"] == "0.50"
    assert "Mcp-Session-Id" not in answer.headers


def test_without_the_extra_both_doors_name_the_command(tmp_path):
    """501 and pip's command, and everything else works as ever."""
    broken = tmp_path / "without" / "mcp"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text('raise ModuleNotFoundError("mcp", name="mcp")')
    env = {"PYTHONPATH": str(broken.parent)}
    said = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    with (
        Sandbox(tmp_path / "sandbox", **env) as sandbox,
        Node(tmp_path, configuration(sandbox), **env) as daemon,
    ):
        daemon.wait_ready()
        answer = daemon.ask("POST", "/mcp", said, Content_Type="application/json")
        escrow = sandbox.lock("1.00")
        daemon.bind(escrow, "stream", "customer-1")
        daemon.use("customer-1", 20, "e-1")
        until(lambda: paid(sandbox, escrow) == Decimal("0.02"), "the release")
        request = httpx2.Request("POST", f"{sandbox.base}/mcp", json=said)
        request.headers["Authorization"] = f"Bearer {PAYER_KEY}"
        with httpx2.Client() as client:
            sandboxs = client.send(request)

    assert (answer.status, answer.headers["Content-Type"]) == (501, "application/problem+json")
    assert "pip install 'meterd[mcp]'" in answer.json["detail"]
    assert sandboxs.status_code == 501
    assert sandboxs.headers["Content-Type"] == "application/problem+json"
    assert sandboxs.json()["detail"] == answer.json["detail"]


@pytest.mark.parametrize("version", ["2025-11-25", "2026-07-28"])
def test_half_a_character_is_no_argument(asked_of, version):
    """A text that nobody could write down again is refused, and nothing fails for it."""
    daemon, _, _ = asked_of
    envelope = {
        "io.modelcontextprotocol/protocolVersion": version,
        "io.modelcontextprotocol/clientCapabilities": {},
    }
    asked = {
        "name": "meter_quote",
        "arguments": {"plan": "stream", "usage": [{"meter": "\ud800"}]},
        "_meta": envelope,
    }
    said = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": asked}
    headers = {"MCP_Protocol_Version": version, "Mcp_Method": "tools/call"}
    headers |= {"Mcp_Name": "meter_quote", "Content_Type": "application/json", "Accept": "*/*"}
    answer = daemon.ask("POST", "/mcp", said, **headers)

    assert answer.status in {200, 400}, answer.raw
    assert answer.status == 400 or answer.json["result"]["isError"], answer.raw


async def test_client_that_is_configured_as_documented_comes_in(guarded):
    """The address and the header are what a client needs."""
    (block,) = [one for one in blocks(ROOT / "docs" / "mcp.md") if one.language == "json"]
    (server,) = json.loads(block.text)["mcpServers"].values()
    (token,) = server["headers"].values()
    address = server["url"].replace("http://127.0.0.1:8787", guarded.url)
    headers = {"Authorization": token.replace("${METERD_TOKEN}", READ_TOKEN)}
    async with (
        httpx2.AsyncClient(headers=headers) as http,
        Client(streamable_http_client(address, http_client=http)) as client,
    ):
        tools = (await client.list_tools()).tools

    assert server["type"] == "http"
    assert [tool.name for tool in tools] == [*ESCROW_TOOLS, *METER_TOOLS]


def test_document_names_every_tool_and_every_argument_that_there_is():
    """Row by row, for both services."""
    from meterd.api import agent_tools
    from meterd.sandbox import agents

    text = (ROOT / "docs" / "mcp.md").read_text()
    _, rest = text.split("## The daemon's tools")
    daemons, sandboxs = rest.split("## The sandbox's tools")
    wanted = (
        (daemons, "Create Release One Listed Nothing UsageOf QuoteOf", agent_tools),
        (sandboxs, "Create Release One Listed", agents),
    )
    for part, types, room in wanted:
        rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", part, flags=re.MULTILINE)
        assert [name for name, _ in rows] == list(room.TEXTS)
        for (_, arguments), name in zip(rows, types.split(), strict=True):
            assert set(re.findall(r"`(\w+)`", arguments)) == {
                *getattr(room, name).__struct_fields__
            }


# -- The sandbox -----------------------------------------------------------------------------------


async def test_sandbox_offers_the_four_tools_of_the_contract(sandbox):
    """It meters nothing, so it has no meters to ask."""
    async with agent_at(sandbox.base, PAYER_KEY) as agent:
        tools = await agent.tools()
        with pytest.raises(MCPError, match="there is no such tool"):
            await agent.client.call_tool("meter_status", {})

    assert list(tools) == ESCROW_TOOLS
    for name in ("escrow_create", "escrow_release"):
        assert "reuse the same id" in tools[name].description
    assert {"amount", "full"} <= set(tools["escrow_release"].input_schema["properties"])


async def test_escrow_lives_from_lock_to_full_release_by_tools_alone(sandbox):
    """An amount first, then all that remains."""
    async with agent_at(sandbox.base, PAYER_KEY) as agent:
        locked = await agent.use(
            "escrow_create", id="order-1", to_agent_id="agent_provider", amount="10.00", memo="m"
        )
        escrow = locked["escrow_id"]
        part = await agent.use("escrow_release", id="pay-1", escrow_id=escrow, amount="0.01")
        shown = await agent.use("escrow_status", escrow_id=escrow)
        listed = await agent.use("escrow_list", limit=1)
        rest = await agent.use("escrow_release", id="pay-2", escrow_id=escrow, full=True)

    assert (part["remaining"], part["release"]["gross_amount"]) == ("9.99", "0.01")
    assert (shown["status"], shown["memo"]) == ("partially_released", "m")
    assert [one["escrow_id"] for one in listed["escrows"]] == [escrow]
    assert (rest["remaining"], rest["status"]) == ("0.00", "released")
    assert [row["amount"] for row in sandbox.operations(escrow)] == ["0.01", "9.99"]


async def test_an_id_counts_once_at_the_sandbox_over_a_kill_too(sandbox):
    """One escrow, one payment, however often the agent asks."""
    wish = {"id": "order-1", "to_agent_id": "agent_provider", "amount": "10.00"}
    async with agent_at(sandbox.base, PAYER_KEY) as agent:
        first = await agent.use("escrow_create", **wish)
        payment = {"id": "pay-1", "escrow_id": first["escrow_id"], "amount": "0.50"}
        await agent.use("escrow_release", **payment)
        sandbox.kill()
        sandbox.start()
        sandbox.wait_ready()
        again = await agent.use("escrow_create", **wish)
        repeated = await agent.use("escrow_release", **payment)
        more = await agent.refused("escrow_release", **payment | {"amount": "0.60"})
        everything = await agent.refused(
            "escrow_release", id="pay-1", escrow_id=first["escrow_id"], full=True
        )
        dearer = await agent.refused("escrow_create", **wish | {"amount": "11.00"})
        other = await agent.refused("escrow_create", **wish | {"to_agent_id": "agent_other"})

    assert again["escrow_id"] == first["escrow_id"]
    assert repeated["remaining"] == "9.50"
    for said in (more, everything, dearer, other):
        assert said == "idempotency_key_reused: this key stands for another request"
    assert len(created(sandbox)) == 1
    assert paid(sandbox, first["escrow_id"]) == Decimal("0.50")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "give exactly one of amount"),
        ({"amount": None}, "give exactly one of amount"),
        ({"full": False}, "give exactly one of amount"),
        ({"amount": "0.01", "full": True}, "give exactly one of amount"),
        ({"amount": ""}, "amount: "),
        ({"amount": "0"}, "amount must be greater than 0"),
        ({"amount": "1e-1"}, "amount: "),
        ({"amount": "0.0000001"}, "amount has more than 6 decimals"),
        ({"amount": "99.00"}, "insufficient_remaining: "),
        ({"amount": 0.01}, "Expected `str | null`, got `float`"),
        ({"amount": 0}, "Expected `str | null`, got `int`"),
        ({"full": "true"}, "Expected `bool`, got `str`"),
        ({"everything": True}, "Object contains unknown field `everything`"),
        ({"full": True, "id": ""}, "Expected `str` matching regex"),
        ({"full": True, "id": "a\n"}, "Idempotency-Key: 1 to 255 visible characters"),
        ({"full": True, "escrow_id": "esc_nobodys"}, "escrow_not_found: "),
    ],
)
async def test_sandbox_releases_nothing_for_wrong_arguments(asked_of, arguments, sentence):
    """Never does something left out, empty or misspelt mean everything."""
    _, sandbox, _ = asked_of
    escrow = sandbox.lock("10.00")
    usual = {"id": "pay-1", "escrow_id": escrow}
    async with agent_at(sandbox.base, PAYER_KEY) as agent:
        said = await agent.refused("escrow_release", **usual | arguments)

    assert said.removeprefix("invalid_amount: ").startswith(sentence)
    assert sandbox.operations(escrow) == []


async def test_sandbox_knows_an_agent_by_its_key(sandbox):
    """Without a key nobody comes in, and nobody sees another's escrow or key."""
    escrow = sandbox.lock("10.00")
    async with agent_at(sandbox.base, PROVIDER_KEY) as agent:
        mine = await agent.use("escrow_list")
        seen = await agent.use("escrow_status", escrow_id=escrow)
    async with httpx2.AsyncClient() as client:
        said = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
        refused = await client.post(f"{sandbox.base}/mcp", json=said)

    assert [one["escrow_id"] for one in mine["escrows"]] == [escrow]
    assert refused.status_code == 401
    assert not re.search(f"{PAYER_KEY}|{PROVIDER_KEY}", json.dumps([mine, seen]) + refused.text)
