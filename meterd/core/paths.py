"""JSONPaths (RFC 9535) of the configuration: where in an event's data something stands.

Plain names, the usual case, are walked directly. The library that knows the whole language takes as
long to load as all else together, so it is loaded for the first path that needs it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonpath import CompoundJSONPath, JSONPath

_PLAIN = re.compile(r"\$(?:\.[A-Za-z_][A-Za-z0-9_]*)*\Z", re.ASCII)


class BadPath(ValueError):
    """A text that is no JSONPath; the message says why, in one line."""


class Path:
    """One path, compiled. Raises `BadPath`."""

    def __init__(self, text: str) -> None:
        self._names = text.split(".")[1:] if _PLAIN.match(text) else None
        self._compiled = None if self._names is not None else _compile(text)

    def find(self, data: Any) -> Sequence[Any]:
        """All values that the path finds in decoded JSON."""
        if self._compiled is not None:
            return self._compiled.findall(data)
        assert self._names is not None
        for name in self._names:
            if type(data) is not dict or name not in data:
                return ()
            data = data[name]
        return (data,)


def _compile(text: str) -> JSONPath | CompoundJSONPath:
    import jsonpath  # noqa: PLC0415  # See above.

    try:
        # The standard's language alone: not the library's own `|`, `&` and the like.
        return jsonpath.JSONPathEnvironment(strict=True).compile(text)
    except jsonpath.JSONPathError as error:
        raise BadPath(str(error).partition("\n")[0]) from None
