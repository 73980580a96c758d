"""Where each fuzzer begins: good inputs, and the bad ones that somebody thought of already.

Each is small: a fuzzer grows them itself. What a fuzzer once found goes in here, so that it is
tried at every run from then on.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from meterd import config
from meterd.otlp.reading import Encoding
from tests import otlp
from tests.fuzz.targets import CUT, KEY, STATUSES

CONFIGURATIONS = Path(__file__).resolve().parent.parent / "config"

GOOD = {"id": "e-1", "agreement": "a", "meter": "tokens", "quantity": 12}

# Documents that are no event, no answer and no request, whoever reads them.
NO_DOCUMENT = (
    b"",
    b" ",
    b"null",
    b"[]",
    b"{}",
    b'"str"',
    b"true",
    b"12",
    b'{"id": "e-1"',
    b'{"id": "e-1"} x',
    b'{"id": "e-1"} {"id": "e-2"}',
    b'{"id": "e-1"}, {"id": "e-2"}',
    b"\xef\xbb\xbf{}",
    '{"id": "e-1"}'.encode("utf-16"),
    b'{"id": "\xff\xfe"}',
    b'{"id": "\\ud800"}',
    b'{"id": "a\\u0000b"}',
    b"[" * 2_000,
    b'{"a":' * 2_000,
    b'{"id": "' + b"x" * 70_000 + b'"}',
    gzip.compress(b"0" * 10_000),
    b'{"id": "a", "id": "b"}',
    json.dumps({f"k{place}": place for place in range(1_000)}).encode(),
    b"<html>502 Bad Gateway</html>",
)
NUMBERS = (
    b"NaN",
    b"-Infinity",
    b'"NaN"',
    b'"sNaN"',
    b"1e400",
    b"1e999999999",
    b'"1e1000000"',
    b"-1",
    b"-0",
    b"0",
    b"true",
    b"null",
    b'" 5\\n"',
    b'"1_000"',
    '"\uff11\uff12"'.encode(),
    b'"0x10"',
    b'"\xa4"',
    b'"1\\u0030"',
    b"9007199254740993",
    b"9223372036854775807",
    b"9223372036854775808",
    b"1180591620717411303424",
    b"1000000000000000",
    b"1000000000000000.000000001",
    b"9" * 5_000,
    b"0." + b"3" * 5_000,
    b"0." + b"0" * 29 + b"1",
    b"0.000000001",
    b'"12.500"',
    b"1.5",
)
NAMES = ("", "x" * 257, "../admin", "a\r\nX: y", "'; DROP TABLE", "\u202e", "\ud7ff", "a b")
TIMES = (
    "1969-12-31T23:59:59Z",
    "9999-12-31T23:59:59.999999Z",
    "0001-01-01T00:00:00+23:59",
    "9999-12-31T23:59:59-23:59",
    "2026-11-18T12:00:00",
    "2026-11-18T12:00:00Z",
    "2026-11-18",
    "24:00",
    1_795_000_000,
)


def _events() -> Iterator[bytes]:
    good = json.dumps(GOOD).encode()
    yield good
    for number in NUMBERS:
        yield good.replace(b"12", number)
    for name in NAMES:
        for key in ("id", "agreement", "meter", "source", "type"):
            yield json.dumps({**GOOD, key: name}).encode()
    for time in TIMES:
        yield json.dumps({**GOOD, "time": time}).encode()
    yield json.dumps({**GOOD, "dimensions": {"kind": "output", "": "\n"}}).encode()
    yield json.dumps({**GOOD, "dimensions": {f"d{place}": "" for place in range(40)}}).encode()
    # Parts that make a whole only together, and parts that shift their neighbours' places.
    yield CUT.join((good, b'{"id": "e-2"', b'"quantity": 1}', good))
    # Never with the separator itself, which nobody outside can know.
    yield CUT.join((good, b"{},123456789012,{}", b"{}"))
    yield CUT.join((b"[", b"]"))
    yield CUT.join((good, good.replace(b"12", b"13"), good.replace(b"e-1", b"e-2")))
    yield from NO_DOCUMENT


def _redis() -> Iterator[bytes]:
    flat = [part.encode() for key, value in GOOD.items() for part in (key, str(value))]
    whole = b"\0".join((b"event", json.dumps(GOOD).encode()))
    yield b"\0".join(flat)
    yield whole
    yield CUT.join((whole, b"\0".join(flat), whole))
    yield b"\0".join((*flat, b"dimensions.kind", b"output", b"dimensions", b'{"x": "y"}'))
    yield b"\0".join((*flat, b"dimensions.kind", b"a", b"dimensions.kind", b"b"))
    yield b"\0".join((*flat, b"dimensions", b"[" * 2_000))
    yield b"\0".join((*flat, b"dimensions", b"{}", b"dimensions.", b"x"))
    yield b"\0".join((*flat, b"id", b"again"))
    yield b"\0".join((*flat, b"odd"))
    yield b"\0".join((*flat, b"event", b"{}"))
    yield b"\0".join((b"quantity", b"1"))
    for number in NUMBERS:
        yield b"\0".join((*flat[:-1], number.strip(b'"')))
    for document in NO_DOCUMENT:
        yield b"\0".join((b"event", document))


def _topics() -> Iterator[bytes]:
    template, topic = b"meterd/usage/{escrow_id}/{meter}", b"meterd/usage/esc_a/tokens"
    event = b'{"id": "e-1", "quantity": 12}'
    for flags in range(16):
        yield bytes([flags]) + CUT.join((template, topic, b"", event))
        yield bytes([flags]) + CUT.join((template, topic, b"e-1", b"80"))
    for number in (*NUMBERS, b"", b" 5 ", b"+5", b".5", b"5 6"):
        yield b"\x08" + CUT.join((template, topic, b"e-1", number))
    for wrong in (b"meterd/usage/esc_a", b"meterd/usage//tokens", b"/", b"", b"$SYS/a/b/c"):
        yield b"\x08" + CUT.join((template, wrong, b"e-1", event))
    for text in (
        b"{a}/{a}",
        b"{meter}/{meter}",
        b"#",
        b"a/+/{meter}",
        b"{agreement}/{meter}",
        b"{",
    ):
        yield b"\x08" + CUT.join((text, b"a/b/c", b"e-1", event))


def _bodies() -> Iterator[bytes]:
    good = json.dumps(GOOD).encode()
    for body in (good, b"[%s, %s]" % (good, good), b"%s\n%s\n" % (good, good), *NO_DOCUMENT):
        yield b"\0" + body
        yield b"\1" + body
    yield b"\0[%s, 12, null, [%s]]" % (good, good)
    yield b"\0%s\n{\n" % good


def _spans() -> Iterator[bytes]:
    odd = {**otlp.CALL, "gen_ai.usage.input_tokens": "12.5", "meterd.agreement": ["a"]}
    values = (0, 12.0, 12.5, float("nan"), True, None, "", -1, 2**63 - 1)
    calls = [
        otlp.CALL,
        odd,
        {},
        *({**otlp.CALL, "gen_ai.usage.input_tokens": value} for value in values),
        *({**otlp.CALL, "gen_ai.operation.name": name} for name in ("invoke_agent", "x", "")),
    ]
    for call in calls:
        for flags, message in (
            (0, otlp.traces(otlp.span(call), otlp.span({}, trace="", span_id=""))),
            (1, otlp.logs(otlp.record(call), otlp.record(call, name="", at_ns=0))),
        ):
            yield bytes([flags]) + otlp.written(message, Encoding.PROTOBUF)
            yield bytes([flags | 2]) + otlp.written(message, Encoding.JSON)
    for document in NO_DOCUMENT:
        for flags in range(4):
            yield bytes([flags]) + document


def _configuration() -> Iterator[bytes]:
    yield config.example().encode()
    for path in sorted(CONFIGURATIONS.rglob("*.toml")):
        yield path.read_bytes()
    small = b'[escrow]\nbase_url = "https://e.example/api/v1"\napi_key = "pf_live_0123456789"\n'
    yield small
    for number in NUMBERS:
        yield small + b"release_max = " + number
    for table in (b"meters", b"plans", b"sources", b"agreements", b"http", b"daemon", b"log"):
        yield small + table + b" = 1\n"
        yield small + b"[%s]\n" % table
        yield small + b"[[%s]]\n" % table
        yield small + b"[%s.x]\ny = [[[[]]]]\n" % table
    yield b"a = " + b"[" * 500
    yield b"a." * 500 + b"a = 1"
    yield b"x = 0x" + b"f" * 5_000


def _answers() -> Iterator[bytes]:
    figures = {"amount": "10.00", "released": "0.03", "remaining": "9.97"}
    status = {"escrow_id": "esc_1", "status": "active", "currency": "USDC", **figures}
    row = {"memo": "meterd rl-1", "gross_amount": "0.01", "status": "completed"}
    bodies: list[object] = [
        status,
        {**status, "remaining": "11"},
        {**status, "released": "11", "remaining": "-1"},
        {**status, "escrow_id": "esc_2"},
        {**status, "releases": [row]},
        {"escrow": status},
        {"data": [status, {}, 1]},
        {"escrows": [status], "next_cursor": "abc"},
        {"gross_amount": "0.01"},
        {"released_total": "0.03"},
        {"released_total": 0.03, "total_released": "0.030"},
        {"amount": "0.01", "status": "queued"},
        {"release": {**row, "id": "rl-2"}},
        {"error": {"code": "escrow_exhausted", "message": f"your key {KEY} is refused"}},
        {"error": KEY.upper()},
        {"success": False},
        *({**status, "deadline": time} for time in TIMES),
    ]
    for number in range(len(STATUSES)):
        for body in bodies[:: 1 if number == 0 else 5]:
            yield bytes([number]) + json.dumps(body).encode()
    for number_text in NUMBERS:
        yield b'\0{"escrow_id": "esc_1", "status": "active", "amount": 10, "released": %s}' % (
            number_text
        )
    for wait in (b"120", b"-1", b"1e9", b"9" * 40, b"Wed, 21 Oct 2026 07:28:00 GMT", b"x"):
        yield bytes([STATUSES.index(429)]) + wait + CUT + b"{}"
    for document in NO_DOCUMENT:
        yield b"\0" + document


def _requests() -> Iterator[bytes]:
    good = {"to_agent_id": "agent_provider", "amount": "10.00", "memo": "m"}
    yield b"key-1" + CUT + json.dumps(good).encode()
    yield json.dumps({**good, "auto_release_hours": 24, "on_deadline": "refund"}).encode()
    yield json.dumps({**good, "auto_release_hours": 2**70, "on_deadline": []}).encode()
    yield b"x" * 300 + CUT + b"{}"
    yield b"\r\n" + CUT + b"{}"
    for number in NUMBERS:
        yield b'{"amount": %s, "auto_release_hours": %s}' % (number, number)
    for name in NAMES:
        yield json.dumps({**good, "memo": name, "to_agent_id": name}).encode()
    yield from NO_DOCUMENT


_SEEDS: Mapping[str, Callable[[], Iterator[bytes]]] = {
    "events": _events,
    "redis": _redis,
    "topics": _topics,
    "bodies": _bodies,
    "spans": _spans,
    "configuration": _configuration,
    "answers": _answers,
    "requests": _requests,
}


def seeds(target: str) -> list[bytes]:
    """The inputs that a target begins with."""
    return list(dict.fromkeys(_SEEDS[target]()))


def write(target: str, directory: Path) -> None:
    """Put them where a fuzzer looks for them."""
    for place, seed in enumerate(seeds(target)):
        (directory / f"seed-{place:04}").write_bytes(seed)
