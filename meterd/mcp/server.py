"""The official SDK behind the bridge. Importing this module imports the SDK: see `door`.

The rule kept here: nothing is remembered between two requests. Each has a transport of its own and
is answered with one JSON document, so that no restart loses a session; what an agent must not do
twice is told apart by the ids in its arguments, which are durable.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import mcp_types as types
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.shared.exceptions import MCPError

from meterd.mcp.asgi import CALLER, Receive, Scope, Send
from meterd.mcp.tools import Explain, Tool, WrongArguments


class AgentServer:
    """An ASGI application that offers these tools."""

    def __init__(
        self,
        name: str,
        version: str,
        instructions: str,
        tools: Sequence[Tool[Any]],
        explain: Explain,
        body_limit: int,
    ) -> None:
        self._tools = {tool.name: tool for tool in tools}
        self._schemas = {tool.name: tool.schema() for tool in tools}
        self._listed = [_listed(tool, self._schemas[tool.name]) for tool in tools]
        self._explain = explain
        self._body_limit = body_limit
        self._server: Server[Any] = Server(
            name,
            version=version,
            instructions=instructions,
            get_tool_input_schema=self._schemas.get,
            on_list_tools=self._list,
            on_call_tool=self._call,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, with all that it starts ended when this returns."""
        sessions = StreamableHTTPSessionManager(
            self._server,
            json_response=True,
            stateless=True,
            max_request_body_size=self._body_limit,
        )
        async with sessions.run():
            await sessions.handle_request(scope, receive, send)

    async def _list(
        self, _: ServerRequestContext[Any], __: types.PaginatedRequestParams | None
    ) -> types.ListToolsResult:
        return types.ListToolsResult(tools=self._listed)

    async def _call(
        self, context: ServerRequestContext[Any], asked: types.CallToolRequestParams
    ) -> types.CallToolResult:
        tool = self._tools.get(asked.name)
        if tool is None:
            known = ", ".join(self._tools)
            raise MCPError(types.INVALID_PARAMS, f"there is no such tool; known: {known}")
        assert context.request is not None
        caller = context.request.scope[CALLER]
        try:
            arguments = tool.read(asked.arguments or {})
            said = dict(await tool.answer(caller, arguments))
        except WrongArguments as error:
            return _failed(str(error))
        except Exception as error:  # noqa: BLE001  # Every failure has its sentence, made by the face.
            return _failed(self._explain(error, tool))
        # Clients of before 2025-06-18 read the text, later ones what is structured.
        return types.CallToolResult(content=[_text(json.dumps(said))], structured_content=said)


def _failed(sentence: str) -> types.CallToolResult:
    return types.CallToolResult(content=[_text(sentence)], is_error=True)


def _text(text: str) -> types.TextContent:
    return types.TextContent(type="text", text=text)


def _listed(tool: Tool[Any], schema: dict[str, Any]) -> types.Tool:
    """Show a tool. All of them may be called again with the same arguments: nothing happens twice.

    None reaches beyond the two services, whose world is closed.
    """
    return types.Tool(
        name=tool.name,
        title=tool.title,
        description=tool.text,
        input_schema=schema,
        annotations=types.ToolAnnotations(
            read_only_hint=not tool.changes,
            destructive_hint=tool.changes,
            idempotent_hint=True,
            open_world_hint=False,
        ),
    )
