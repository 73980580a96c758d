"""Logs: sentences for people, `action` and fields for machines, and never a secret.

The rule: everything that is written goes through one chain, ours and what libraries say by the
stdlib's logging. The chain turns whatever it is given into plain values, masks every text
registered by `hide` in them (in keys, in nested values, in tracebacks), escapes control characters,
and only then writes. A line that cannot be written is lost; it neither stops the daemon nor leaves
by another way.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import sys
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Literal, TextIO
from urllib.parse import quote, quote_plus

import structlog

Format = Literal["auto", "console", "json"]

MASK = "***"
EXCERPT_BYTES = 200
DEPTH_MAX = 8
ITEMS_MAX = 1000
INTEGER_BITS_MAX = 256  # Python refuses to write out very long ones, and the line would be lost.

# Libraries whose everyday remarks would drown ours; at "debug" they may speak.
_TALKATIVE = ("aiohttp.access", "asyncio", "mcp")
# What this one calls an error is a request that is not HTTP: whoever reaches the port could fill
# the disk with its tracebacks. What goes wrong in a handler of ours, the API logs itself.
_ALARMIST = "aiohttp.server"

EventDict = MutableMapping[str, Any]
# The chain itself makes these; they hold nothing that was given.
_OUR_OWN = frozenset({"level", "timestamp"})
_FIRST = ("timestamp", "level", "logger", "event")  # The order in which JSON lines are read best.


# Secrets


class _Hidden:
    """The texts that may not be shown, as one pattern; the longest first, so that no tail stays."""

    def __init__(self) -> None:
        self._texts: set[str] = set()
        self._pattern: re.Pattern[str] | None = None

    def add(self, texts: set[str]) -> None:
        self._texts |= texts
        longest_first = sorted(self._texts, key=lambda text: (-len(text), text))
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))

    def mask(self, text: str) -> str:
        return text if self._pattern is None else self._pattern.sub(MASK, text)


_hidden = _Hidden()


def hide(secret: str) -> None:
    """Mask `secret` from now on wherever it would be logged.

    That includes how it looks once it was quoted for an address, for JSON or by `repr`. An empty
    text is a `ValueError`.
    """
    if not secret:
        raise ValueError("an empty text cannot be hidden")
    forms = {
        secret,
        quote(secret, errors="surrogatepass"),
        quote(secret, safe="", errors="surrogatepass"),
        quote_plus(secret, errors="surrogatepass"),
        json.dumps(secret)[1:-1],
        repr(secret)[1:-1],
        repr(secret.encode(errors="surrogatepass"))[2:-1],
        _escaped(secret),
    }
    _hidden.add(forms)


def masked(text: str) -> str:
    """Mask every hidden secret in `text`: for what is printed or answered instead of logged."""
    return _hidden.mask(text)


# Texts of others

# C0 and C1 controls, line and paragraph separators, marks that turn the direction of text, lone
# surrogates.
_CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def _escaped(text: str) -> str:
    return _CONTROL.sub(_escape, text)


def excerpt(text: bytes | str, limit: int = EXCERPT_BYTES) -> str:
    """Give the beginning of what somebody sent, fit for a log: one line of at most `limit` bytes.

    The text is masked before it is cut, so that a secret at the cut leaves no half behind.
    """
    whole = text if isinstance(text, str) else text.decode(errors="backslashreplace")
    shown = _escaped(masked(whole)).encode()
    if len(shown) <= limit:
        return shown.decode()
    ellipsis = "…".encode()
    return shown[: max(0, limit - len(ellipsis))].decode(errors="ignore") + "…"


# The chain


def _plain(value: object, depth: int = 0) -> Any:
    """Turn a value into text, numbers, lists and dicts, masked and escaped all the way down."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        bits = value.bit_length()
        return int(value) if bits <= INTEGER_BITS_MAX else f"an integer of {bits} bits"
    if isinstance(value, float) and math.isfinite(value):
        return value
    if depth < DEPTH_MAX and isinstance(value, Mapping):
        items = list(value.items())[:ITEMS_MAX]
        return {str(_plain(str(key))): _plain(item, depth + 1) for key, item in items}
    if depth < DEPTH_MAX and isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, depth + 1) for item in list(value)[:ITEMS_MAX]]
    return _escaped(masked(_text_of(value)))


def _text_of(value: object) -> str:
    if isinstance(value, bytes | bytearray):
        return value.decode(errors="backslashreplace")
    try:
        return str(value)
    except Exception as error:  # noqa: BLE001 (a value that cannot be shown must not cost the line)
        return f"<{type(value).__name__} that cannot be shown: {type(error).__name__}>"


def _make_plain(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Mask and escape everything that the event holds, except what the chain itself made."""
    trace = event.pop("exception", None)
    stack = event.pop("stack", None) or event.pop("stack_info", None)
    first = {key: event.pop(key) for key in _FIRST if key in event}
    plain: dict[str, Any] = {
        _name(key): value if key in _OUR_OWN else _plain(value)
        for key, value in (first | dict(event)).items()
    }
    for key, lines in (("exception", trace), ("stack", stack)):
        if lines is not None:
            plain[key] = _plain_lines(str(lines))
    return plain


def _name(key: str) -> str:
    return key if key in _FIRST else _escaped(masked(key))


def _plain_lines(text: str) -> str:
    """Mask and escape a traceback but keep its lines, indented so that none looks like a log's."""
    return "\n".join("    " + _escaped(line) for line in masked(text).split("\n"))


def _remember_logger(logger: logging.Logger | None, _method: str, event: EventDict) -> EventDict:
    record = event.get("_record")
    name = record.name if isinstance(record, logging.LogRecord) else getattr(logger, "name", None)
    if name:
        event["logger"] = name
    return event


_BOTH: tuple[Callable[..., Any], ...] = (
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    _remember_logger,
)


class _Handler(logging.StreamHandler[TextIO]):
    """Writes lines; one that fails is not printed unmasked, which is what the stdlib does."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the stdlib's name)
        kind = sys.exc_info()[0]
        with contextlib.suppress(Exception):
            name = kind.__name__ if kind is not None else "unknown"
            self.stream.write(f"a line of the log could not be written: {name} at {record.name}\n")


def configure(
    level: str = "info",
    format: Format = "auto",  # noqa: A002 (the key in the file has this name)
    stream: TextIO | None = None,
) -> None:
    """Send every log of this process to `stream`, or to standard error, from `level` up.

    "auto" writes for people on a terminal and one JSON object a line otherwise. `level` is one of
    debug, info, warning, error; anything else is a `ValueError`. Called again, it changes both,
    also for loggers that exist.
    """
    target = sys.stderr if stream is None else stream
    on_terminal = target.isatty()
    as_console = format == "console" or (format == "auto" and on_terminal)
    handler = _Handler(target)
    handler.setFormatter(_formatter(as_console=as_console, colors=as_console and on_terminal))
    root = logging.getLogger()
    root.setLevel(level.upper())
    for old in [each for each in root.handlers if isinstance(each, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.NOTSET if level == "debug" else logging.WARNING)
    logging.getLogger(_ALARMIST).setLevel(logging.NOTSET if level == "debug" else logging.CRITICAL)
    _configure_structlog()


def _formatter(*, as_console: bool, colors: bool) -> logging.Formatter:
    renderer: Any = structlog.processors.JSONRenderer()
    if as_console:
        renderer = structlog.dev.ConsoleRenderer(
            colors=colors, exception_formatter=structlog.dev.plain_traceback, pad_event_to=0
        )
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=_BOTH,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            # The plain formatter: the richer ones show the values of local variables.
            structlog.processors.ExceptionRenderer(),
            _make_plain,
            renderer,
        ],
    )


def _configure_structlog() -> None:
    """Lead structlog into the stdlib, whose level and handler can change under its loggers."""
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_BOTH,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.processors.StackInfoRenderer(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """Give the logger called `name`; write `log.info("a sentence", action="…", field=…)`."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger
