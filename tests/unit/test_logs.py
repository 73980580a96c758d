"""Logs: what they look like, and what never stands in them."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from meterd import logs

CANARY = "pf_live_canary/7f3a+é'\"\\ok"


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test begins with nothing hidden and leaves the process's logging as it found it."""
    root = logging.getLogger()
    level = root.level
    monkeypatch.setattr(logs, "_hidden", logs._Hidden())
    yield
    root.setLevel(level)
    root.handlers[:] = [each for each in root.handlers if not isinstance(each, logs._Handler)]
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def configured(format: logs.Format = "json", level: str = "info") -> io.StringIO:  # noqa: A002
    stream = io.StringIO()
    logging.getLogger().handlers.clear()  # Those of pytest raise where the stdlib would complain.
    logs.configure(level, format, stream)
    return stream


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_for_programs_has_time_level_logger_sentence_and_fields():
    """JSON carries the sentence, `action` and the fields, with an ISO time in UTC in front."""
    stream = configured()
    logs.get_logger("meterd.settler").info("Released 0.10 USDC", action="released", amount="0.10")
    (line,) = lines(stream)
    time = line.pop("timestamp")

    assert line == {
        "level": "info",
        "logger": "meterd.settler",
        "event": "Released 0.10 USDC",
        "action": "released",
        "amount": "0.10",
    }
    assert time.endswith("Z")
    assert time[10] == "T"


def test_a_line_for_people_is_one_line_without_colours_off_a_terminal():
    """The console format in a file has no escape sequences."""
    stream = configured("console")
    logs.get_logger("x").warning("Escrow frozen", action="frozen", escrow="esc_1")

    assert "Escrow frozen" in stream.getvalue()
    assert "escrow=esc_1" in stream.getvalue()
    assert stream.getvalue().count("\n") == 1
    assert "\x1b" not in stream.getvalue()


def test_auto_is_console_on_a_terminal_and_json_otherwise():
    """The stream decides."""
    terminal, file = Terminal(), io.StringIO()
    logs.configure("info", "auto", terminal)
    logs.get_logger("x").info("hello")
    logs.configure("info", "auto", file)
    logs.get_logger("x").info("hello")

    assert "\x1b[" in terminal.getvalue()
    assert lines(file)[0]["event"] == "hello"


def test_the_level_holds_and_changes_under_existing_loggers():
    """What is below the level is not written; a reload changes that for every logger."""
    log = logs.get_logger("x")
    first = configured(level="warning")
    log.info("quiet")
    logging.getLogger("aiohttp.server").info("quiet")
    second = configured(level="debug")
    log.debug("heard")

    assert first.getvalue() == ""
    assert [line["event"] for line in lines(second)] == ["heard"]


def test_an_unknown_level_is_refused():
    """A misspelt level is no silence."""
    with pytest.raises(ValueError, match="LOUD"):
        logs.configure("loud", "json", io.StringIO())


def test_what_libraries_say_goes_through_the_same_chain():
    """The stdlib's logging is written in the same form, its arguments masked."""
    logs.hide(CANARY)
    stream = configured()
    logging.getLogger("aiohttp.client").warning("odd request: %s", CANARY)
    (line,) = lines(stream)

    assert (line["logger"], line["level"]) == ("aiohttp.client", "warning")
    assert line["event"] == "odd request: ***"


class Holder:
    def __init__(self, secret: str) -> None:
        self.secret = secret

    def __repr__(self) -> str:
        return f"Holder({self.secret!r})"


def fail(text: str) -> None:
    raise ValueError(text)


def say_it_everywhere(secret: str) -> None:
    """Log `secret` in every way that somebody might by accident."""
    log = logs.get_logger("meterd.canary")
    structlog.contextvars.bind_contextvars(context=secret)
    log = log.bind(bound=[secret])
    sentence = f"Calling with {secret}"
    log.info(sentence, action="call", key=secret)
    log.info("Calling with %s", secret)
    log.info("deep", deep={"a": [{"b": (secret, {secret})}], secret: 1}, raw=secret.encode())
    log.info("odd", value=Holder(secret), error=ValueError(secret), **{secret: secret})
    log.info("address", url=f"redis://u:{quote(secret, safe='')}@host", text=json.dumps(secret))
    log.warning("stack", stack_info=True, far=[[[[[[[[[[secret]]]]]]]]]])
    try:
        try:
            fail(f"401 for Bearer {secret}")
        except ValueError as error:
            error.add_note(f"note: {secret}")
            raise ExceptionGroup(secret, [error, KeyError(secret)]) from error
    except ExceptionGroup:
        log.exception("It failed", action="failed")
        logging.getLogger("aiohttp.client").exception("failed with %r", {"key": secret})
    logging.getLogger("x").warning(
        "%d", secret
    )  # A mistake of formatting, which the stdlib prints.


@pytest.mark.parametrize("format", ["json", "console"])
@pytest.mark.parametrize("secret", [CANARY, "pf_live_0123", "x y", "a\nb\x1b[0mc", "ключ-é"])
def test_a_hidden_secret_never_appears(
    format: logs.Format,  # noqa: A002
    secret: str,
    capsys: pytest.CaptureFixture[str],
):
    """The canary is in no line, key, value, traceback, stack or complaint, however quoted."""
    logs.hide(secret)
    stream = configured(format)
    say_it_everywhere(secret)
    printed = capsys.readouterr()
    shown = stream.getvalue() + printed.out + printed.err

    assert "***" in shown
    assert "It failed" in shown
    for form in (secret, quote(secret, safe=""), repr(secret)[1:-1], json.dumps(secret)[1:-1]):
        assert form not in shown


def test_a_secret_inside_a_longer_one_leaves_no_tail():
    """The longest hidden text is masked first."""
    logs.hide("hunter2")
    logs.hide("hunter2-and-more")

    assert logs.masked("hunter2-and-more hunter2") == "*** ***"


def test_an_empty_text_cannot_be_hidden():
    """Hiding nothing would mask everything."""
    with pytest.raises(ValueError, match="empty"):
        logs.hide("")


@pytest.mark.parametrize("format", ["json", "console"])
def test_control_characters_cannot_forge_a_line(format: logs.Format):  # noqa: A002
    """Line ends, escape sequences and direction marks of others are written as escapes."""
    stream = configured(format)
    logs.get_logger("x").info("bad id a\nb", id="a\r\n2026 [info] Released\x1b[2J\u202e\u2028\x85")

    assert stream.getvalue().count("\n") == 1
    assert "\\x0a2026" in stream.getvalue().replace("\\\\", "\\")
    assert not [c for c in stream.getvalue()[:-1] if not c.isprintable()]


def test_a_line_inside_a_traceback_cannot_pass_for_a_line_of_the_log():
    """Lines of a traceback are indented, also those that an error's text makes."""
    stream = configured("console")
    try:
        fail("x\n2026-01-01T00:00:00Z [info     ] Released 10.00")
    except ValueError:
        logs.get_logger("x").exception("It failed")
    first, *rest = stream.getvalue().splitlines()

    assert "It failed" in first
    assert [line for line in rest if not line.startswith("    ")] == []


class Unshowable:
    def __str__(self) -> str:
        raise RuntimeError("no")


def test_values_that_json_cannot_hold_do_not_cost_the_line():
    """NaN, endless numbers, cycles, lone surrogates and objects that raise are written somehow."""
    stream = configured()
    cycle: list[object] = []
    cycle.append(cycle)
    logs.get_logger("x").info(
        "odd",
        nan=float("nan"),
        large=10**5000,
        cycle=cycle,
        surrogate="\ud800",
        unshowable=Unshowable(),
        fine=1.5,
        none=None,
    )
    (line,) = lines(stream)

    assert (line["nan"], line["fine"], line["none"]) == ("nan", 1.5, None)
    assert line["large"] == "an integer of 16610 bits"
    assert line["surrogate"] == "\\ud800"
    assert line["unshowable"] == "<Unshowable that cannot be shown: RuntimeError>"


class Broken(io.StringIO):
    def write(self, _text: str) -> int:
        raise BrokenPipeError


def test_a_stream_that_is_gone_does_not_stop_the_caller(capsys: pytest.CaptureFixture[str]):
    """A line that cannot be written is lost, and appears nowhere else."""
    logs.hide(CANARY)
    logs.configure("info", "json", Broken())
    logs.get_logger("x").info("lost", key=CANARY)
    printed = capsys.readouterr()

    assert printed.out + printed.err == ""


@pytest.mark.parametrize(
    ("text", "limit", "shown"),
    [
        ("short", 200, "short"),
        (b"bytes \xff\x00", 200, "bytes \\xff\\x00"),
        ("a\nb", 200, "a\\x0ab"),
        ("x" * 201, 200, "x" * 197 + "…"),
        ("é" * 10, 10, "ééé…"),
        ("abc", 0, "…"),
    ],
)
def test_an_excerpt_is_one_line_of_few_bytes(text: bytes | str, limit: int, shown: str):
    """What others sent is cut and escaped before it is logged."""
    assert logs.excerpt(text, limit) == shown


def test_an_excerpt_masks_before_it_cuts():
    """A secret at the cut leaves no half."""
    logs.hide("pf_live_0123456789")

    assert logs.excerpt("key: pf_live_0123456789", 12) == "key: ***"


@given(text=st.binary(max_size=400) | st.text(max_size=400), limit=st.integers(3, 250))
def test_any_excerpt_is_printable_and_short(text: bytes | str, limit: int):
    """No input makes an excerpt longer than its limit or lets a control character through."""
    shown = logs.excerpt(text, limit)

    assert len(shown.encode()) <= limit
    assert logs._CONTROL.search(shown) is None
