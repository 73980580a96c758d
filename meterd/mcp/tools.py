"""What a tool is, before any protocol: its name, its text, what it takes, and who answers.

The rule kept here: the schema that an agent reads is made of the very type that reads its
arguments, so that the two cannot differ; and an argument that the type does not name is refused,
never ignored.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

SENTENCE_CHARS_MAX = 300  # Of what is said about arguments that cannot be read.

Caller = TypeVar("Caller")


class WrongArguments(Exception):
    """The arguments of a tool cannot be read; the message says why and shows right ones."""


@dataclass(frozen=True, slots=True)
class Tool(Generic[Caller]):
    """One tool.

    text     what an agent reads before it decides to call it.
    takes    a msgspec Struct that refuses unknown members.
    example  arguments that are right, as JSON.
    answer   what does it; told of the caller and the arguments. Whatever it raises is explained.
    changes  whether something is different afterwards.
    """

    name: str
    title: str
    text: str
    takes: type[msgspec.Struct]
    example: str
    answer: Callable[[Caller, Any], Awaitable[Mapping[str, Any]]]
    changes: bool = False

    def schema(self) -> dict[str, Any]:
        """Describe the arguments as JSON Schema, with an object at its root."""
        (root,), parts = msgspec.json.schema_components([self.takes], ref_template="#/$defs/{name}")
        own = dict(parts.pop(root["$ref"].rpartition("/")[2]))
        own.pop("title", None)
        return {**own, "$defs": parts} if parts else own

    def read(self, arguments: Mapping[str, Any]) -> Any:
        """Read the arguments. Raises `WrongArguments`."""
        try:
            msgspec.json.encode(
                arguments
            )  # Half a character cannot be: nobody could be told of it.
            return msgspec.convert(arguments, self.takes)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            said = str(error)[:SENTENCE_CHARS_MAX]
            said = said if said.isprintable() else said.encode("unicode_escape").decode("ascii")
            raise WrongArguments(f"{said}; {self.name} takes for example {self.example}") from None


def one_line(text: str) -> str:
    """Join a text that is written over several lines."""
    return " ".join(text.split())


Explain = Callable[[Exception, Tool[Any]], str]
"""Say in a sentence why a tool failed. It also does what such a failure calls for."""
