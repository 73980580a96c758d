"""Dead letters: rejected events that a person looks at, tries again, or throws away.

One act at a time: two tries of one letter at the same moment would both find it there.
"""

from __future__ import annotations

import asyncio
from typing import Annotated

import msgspec
from aiohttp import web

from meterd.api.auth import ACTOR
from meterd.api.events import results
from meterd.api.parts import Parts
from meterd.api.problems import Problem
from meterd.api.settings import Scope
from meterd.api.views import dead_letter_view
from meterd.api.wire import (
    LIMIT_DEFAULT,
    LIMIT_MAX,
    Call,
    json_answer,
    page_answer,
    read_command,
    read_filter,
    read_page,
    read_reason,
)
from meterd.core.events import Reason
from meterd.errors import NotFound

NUMBER_DIGITS_MAX = 18
REPLAY_EXAMPLE = '{"reason": "unknown_meter"}'
DISCARD_EXAMPLE = '{"reason": "a test of the producer"}'
NOT_THERE = "there is no such dead letter; list them: meterd dead-letters"


class Replay(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /v1/dead-letters/replay`: which letters, and how many at most."""

    reason: str
    limit: Annotated[int, msgspec.Meta(ge=1, le=LIMIT_MAX)] = LIMIT_DEFAULT
    before: int | None = None


class Discard(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `DELETE /v1/dead-letters/{number}`."""

    reason: str = ""


class DeadLetters:
    """The room of `/v1/dead-letters`."""

    def __init__(self, parts: Parts) -> None:
        self._bookkeeper = parts.bookkeeper
        self._one_at_a_time = asyncio.Lock()

    def calls(self) -> list[Call]:
        """List the calls of this room."""
        one = "/v1/dead-letters/{number}"
        return [
            Call("GET", "/v1/dead-letters", Scope.ADMIN, self._list),
            Call("POST", "/v1/dead-letters/replay", Scope.ADMIN, self._replay_all),
            Call("GET", one, Scope.ADMIN, self._get),
            Call("POST", f"{one}/replay", Scope.ADMIN, self._replay),
            Call("DELETE", one, Scope.ADMIN, self._discard),
        ]

    async def _list(self, request: web.Request) -> web.Response:
        page = read_page(request)
        reason = read_filter(request, "reason")
        if reason is not None:
            reason = _known(reason)
        letters = await self._bookkeeper.store.dead_letters(
            limit=page.limit + 1, before=page.number or None, reason=reason
        )
        shown = letters[: page.limit]
        following = str(shown[-1].number) if len(letters) > page.limit else None
        return page_answer([dead_letter_view(letter, whole=False) for letter in shown], following)

    async def _get(self, request: web.Request) -> web.Response:
        letter = await self._bookkeeper.store.dead_letter(_number(request))
        if letter is None:
            raise NotFound(NOT_THERE)
        return json_answer(dead_letter_view(letter, whole=True))

    async def _replay(self, request: web.Request) -> web.Response:
        number = _number(request)
        async with self._one_at_a_time:
            recorded = await self._bookkeeper.replay(number)
        return json_answer(results(recorded))

    async def _replay_all(self, request: web.Request) -> web.Response:
        """Try letters of one reason again, oldest of the page first; `next` goes on behind them."""
        command = await read_command(request, Replay, example=REPLAY_EXAMPLE)
        reason = _known(command.reason)
        tried = accepted = duplicates = 0
        rejected = []
        async with self._one_at_a_time:
            letters = await self._bookkeeper.store.dead_letters(
                limit=command.limit, before=command.before, reason=reason
            )
            for letter in reversed(letters):
                recorded = await self._bookkeeper.replay(letter.number)
                tried += 1
                accepted += recorded.accepted
                duplicates += recorded.duplicates
                rejected += [
                    {
                        "id": letter.number,
                        "reason": rejection.reason.value,
                        "detail": rejection.detail,
                    }
                    for rejection in recorded.rejections
                ]
        following = letters[-1].number if len(letters) == command.limit else None
        return json_answer(
            {
                "tried": tried,
                "accepted": accepted,
                "duplicates": duplicates,
                "rejected": rejected,
                "next": following,
            }
        )

    async def _discard(self, request: web.Request) -> web.Response:
        """Throw one away.

        The reason is in the body, or in the query where a client sends no body.
        """
        number = _number(request)
        text = request.query.get("reason")
        if text is None:
            text = (await read_command(request, Discard, example=DISCARD_EXAMPLE)).reason
        reason = read_reason(text)
        async with self._one_at_a_time:
            await self._bookkeeper.discard(number, request[ACTOR], reason)
        return web.Response(status=204)


def _number(request: web.Request) -> int:
    text = request.match_info["number"]
    if not (text.isascii() and text.isdecimal() and len(text) <= NUMBER_DIGITS_MAX):
        raise Problem(400, "bad-id", "a dead letter has a whole number")
    return int(text)


def _known(reason: str) -> str:
    if reason not in tuple(Reason):
        raise Problem(400, "bad-query", f"reason: one of {', '.join(Reason)}")
    return reason
