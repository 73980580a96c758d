"""Usage events from the command line: one, over any transport, or files of them.

The rule: a line is counted once the daemon says that it is durable, and not before. Nothing is
lost by an end in the middle: what was sent twice is a duplicate, so the same command can be typed
again.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from meterd.cli.daemon import Answer, Daemon, WrongUse
from meterd.cli.options import AsJson, Config, TokenFile, Url, connect
from meterd.cli.screen import plain, print_json, say
from meterd.core import money
from meterd.errors import MeterdError, Unavailable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from meterd.config import MqttSourceSettings, RedisSourceSettings, Settings

NDJSON = "application/x-ndjson"
EVENTS_TARGET = "/v1/events"


class Transport(StrEnum):
    """How one event is sent."""

    HTTP = "http"
    REDIS = "redis"
    MQTT = "mqtt"


# -- One event -----------------------------------------------------------------------------------


def emit(
    agreement: Annotated[str, typer.Argument(metavar="AGREEMENT", help="Its id, or its escrow's.")],
    meter: Annotated[str, typer.Argument(metavar="METER", help="A meter of the configuration.")],
    quantity: Annotated[
        str, typer.Argument(metavar="QUANTITY", help="Such as 1532 or 0.25.")
    ] = "1",
    event_id: Annotated[
        str | None, typer.Option("--id", metavar="ID", help="Its identity; else one is made up.")
    ] = None,
    source: Annotated[str, typer.Option("--source", help="Who says so.")] = "",
    dimension: Annotated[
        list[str] | None,
        typer.Option("--dimension", "-d", metavar="NAME=VALUE", help="Again for another."),
    ] = None,
    at: Annotated[
        str, typer.Option("--time", metavar="TIME", help="ISO 8601 with zone; else on arrival.")
    ] = "",
    to: Annotated[Transport, typer.Option("--to", help="The way that it takes.")] = Transport.HTTP,
    source_name: Annotated[
        str,
        typer.Option(
            "--via", metavar="NAME", help="The [[sources]] entry, where there are several."
        ),
    ] = "",
    as_json: AsJson = False,
    config: Config = None,
    url: Url = None,
    token_file: TokenFile = None,
) -> None:
    """Send one usage event, by HTTP or through the broker that the configuration names."""
    event = {
        "id": event_id or f"emit-{secrets.token_hex(8)}",
        "source": source,
        "agreement": agreement,
        "meter": meter,
        "quantity": _checked(quantity),
        "time": at,
        "dimensions": dict(_pair(text) for text in dimension or ()),
    }
    event = {name: value for name, value in event.items() if value}
    if to is Transport.HTTP:
        with connect(config, url, token_file) as daemon:
            _emit_http(daemon, event, as_json=as_json)
        return
    from meterd import config as configuration

    settings = configuration.load(config, os.environ)
    entry = source_entry(settings, to.value, source_name)
    where = _emit_redis(entry, event) if entry.kind == "redis" else _emit_mqtt(entry, event)
    if as_json:
        print_json({"id": event["id"], "sent_to": where})
    else:
        sys.stdout.write(
            f"{event['id']} is at {plain(where)}. See what became of it: meterd status\n"
        )


def _checked(quantity: str) -> str:
    try:
        money.parse_quantity(quantity)
    except money.BadNumber as error:
        raise WrongUse(f"{plain(quantity)[:40]}: {error}; write one such as 1532 or 0.25") from None
    return quantity


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise WrongUse("write --dimension NAME=VALUE, such as --dimension model=m-large")
    return name, value


def _emit_http(daemon: Daemon, event: Mapping[str, Any], *, as_json: bool) -> None:
    answer = daemon.ask("POST", "v1", "events", body=event)
    if as_json:
        print_json(answer)
    elif answer["rejected"]:
        rejection = answer["rejected"][0]
        say(f"meterd: {event['id']} was rejected: {rejection['reason']}: {rejection['detail']}")
        say("It is kept: meterd dead-letters")
    else:
        word = "accepted" if answer["accepted"] else "a duplicate: it was known already"
        sys.stdout.write(f"{plain(event['id'])} is {word}\n")
    if answer["rejected"]:
        raise typer.Exit(1)


def source_entry(
    settings: Settings, kind: str, name: str
) -> RedisSourceSettings | MqttSourceSettings:
    """Find the source of a kind, and by its name where there are several. Raises `WrongUse`."""
    entries = [entry for entry in settings.sources if entry.kind == kind]
    named = [entry for entry in entries if name in {"", entry.name}]
    if not named:
        wanted = f'kind = "{kind}"' + (f' and name = "{name}"' if name else "")
        raise WrongUse(f"the configuration has no [[sources]] with {wanted}; look: meterd check")
    if len(named) > 1:
        names = ", ".join(entry.name for entry in named)
        raise WrongUse(f"there are several; name one with --via: {names}")
    return named[0]


def _emit_redis(entry: RedisSourceSettings, event: Mapping[str, Any]) -> str:
    import redis

    try:
        with redis.Redis.from_url(entry.url.reveal(), socket_connect_timeout=5) as client:
            client.xadd(entry.stream, {"event": json.dumps(event)})
    except redis.RedisError as error:
        raise Unavailable(f"Redis did not take it ({error}); look: meterd check --live") from None
    return f"the stream {entry.stream}"


MQTT_TIMEOUT_S = 10


def _emit_mqtt(entry: MqttSourceSettings, event: Mapping[str, Any]) -> str:
    topic = entry.topic
    for name in ("escrow_id", "agreement", "meter"):
        value = event["meter"] if name == "meter" else event["agreement"]
        topic = topic.replace(f"{{{name}}}", value)
    topic = topic.replace("+", "emit")
    if set(topic) & set("#\0") or topic.count("/") != entry.topic.count("/"):
        raise WrongUse("an agreement or meter with / + or # cannot stand in an MQTT topic")
    client = mqtt_client(entry)
    try:
        client.connect(entry.host, entry.port)
        client.loop_start()
        sent = client.publish(topic, json.dumps(event), qos=1)
        sent.wait_for_publish(MQTT_TIMEOUT_S)
        if not sent.is_published():
            raise Unavailable(
                f"the broker took it not within {MQTT_TIMEOUT_S} s; look: meterd check --live"
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise Unavailable(
            f"the broker did not take it ({error}); look: meterd check --live"
        ) from None
    finally:
        client.disconnect()
        client.loop_stop()
    return f"the topic {topic}"


def mqtt_client(entry: MqttSourceSettings) -> Any:
    """Make an MQTT client for a source's broker, with its own id: the daemon keeps its session."""
    from paho.mqtt import client as paho
    from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

    modern = entry.protocol == "5"
    version = MQTTProtocolVersion.MQTTv5 if modern else MQTTProtocolVersion.MQTTv311
    name = f"meterd-cli-{secrets.token_hex(6)}"
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=version)
    client.connect_timeout = 5
    if entry.username:
        password = None if entry.password is None else entry.password.reveal()
        client.username_pw_set(entry.username, password)
    if entry.tls:
        paths = (entry.ca_file, entry.cert_file, entry.key_file)
        ca_file, cert_file, key_file = (None if path is None else str(path) for path in paths)
        client.tls_set(ca_file, cert_file, key_file)
    return client


# -- Files of events -----------------------------------------------------------------------------

CHUNK_LINES = 1000
CHUNK_BYTES = 512 * 1024  # Half of the usual http.body_limit.
SHOWN_MAX = 20
# A full disk or a restart takes minutes; then a person should look.
PATIENCE_S = 300


@dataclass(slots=True)
class Totals:
    """What became of the lines so far."""

    accepted: int = 0
    duplicates: int = 0
    rejected: int = 0
    rejections: list[dict[str, Any]] = field(default_factory=list)  # The first of them.

    def add(self, answer: Mapping[str, Any], chunk: Chunk) -> None:
        """Count the daemon's answer to one chunk."""
        self.accepted += answer["accepted"]
        self.duplicates += answer["duplicates"]
        for rejection in answer["rejected"]:
            line = chunk.numbers[rejection["index"]]
            self.reject(chunk.file, line, rejection["reason"], rejection["detail"], rejection["id"])

    def reject(self, file: str, line: int, reason: str, detail: str, event_id: str = "") -> None:
        """Count one rejected line, and keep it where it is one of the first."""
        self.rejected += 1
        if len(self.rejections) < SHOWN_MAX:
            place = {"file": file, "line": line, "id": event_id}
            self.rejections.append({**place, "reason": reason, "detail": detail})

    @property
    def document(self) -> dict[str, Any]:
        """The totals for a program."""
        counts = {"accepted": self.accepted, "duplicates": self.duplicates}
        return {**counts, "rejected": self.rejected, "rejections": self.rejections}


@dataclass(slots=True)
class Chunk:
    """Some lines of one file and their numbers; `read` bytes of the file are behind them."""

    file: str
    numbers: list[int] = field(default_factory=list)
    lines: list[bytes] = field(default_factory=list)
    size: int = 0
    read: int = 0


def replay(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE…", help="NDJSON, one event a line; - is standard input."),
    ],
    as_json: AsJson = False,
    config: Config = None,
    url: Url = None,
    token_file: TokenFile = None,
) -> None:
    """Bring in usage events from files; what is known counts once. Exit 1 if some are rejected."""
    totals = Totals()
    with ExitStack() as stack:
        opened = [(name, stack.enter_context(open_file(name))) for name in files]
        daemon = stack.enter_context(connect(config, url, token_file))
        progress, task = _progress(opened)
        with progress:
            for name, file in opened:
                for chunk in chunks(name, file):
                    _send(daemon, chunk, totals)
                    progress.update(task, advance=chunk.read, events=_count(totals))
    if as_json:
        print_json(totals.document)
    else:
        _print(totals)
    if totals.rejected:
        raise typer.Exit(1)


def open_file(name: str) -> IO[bytes]:
    """Open a file of events, or standard input. Raises `WrongUse`."""
    if name == "-":
        return os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    try:
        return Path(name).open("rb")
    except OSError as error:
        raise WrongUse(f"{name}: {error.strerror}; name a file, or - for standard input") from None


def chunks(name: str, file: Iterable[bytes]) -> Iterator[Chunk]:
    """Cut a file into chunks of whole lines that the daemon takes at once, without blank ones."""
    chunk = Chunk(name)
    for number, line in enumerate(file, start=1):
        event = line.strip()
        if len(chunk.lines) >= CHUNK_LINES or (
            chunk.lines and chunk.size + len(event) > CHUNK_BYTES
        ):
            yield chunk
            chunk = Chunk(name)
        chunk.read += len(line)
        if event:
            chunk.numbers.append(number)
            chunk.lines.append(event)
            chunk.size += len(event) + 1
    if chunk.lines:
        yield chunk


def _send(daemon: Daemon, chunk: Chunk, totals: Totals) -> None:
    """Send one chunk until it is taken. Raises `MeterdError` when it cannot be."""
    answer = _until_taken(daemon, chunk)
    if answer.status == 413 and len(chunk.lines) == 1:
        totals.reject(chunk.file, chunk.numbers[0], "too_large", "larger than http.body_limit")
    elif answer.status == 413:
        for half in _halves(chunk):
            _send(daemon, half, totals)
    elif answer.status >= 300:
        raise _broken_off(daemon.explain(answer), chunk)
    else:
        totals.add(answer.body, chunk)


def _broken_off(error: MeterdError, chunk: Chunk) -> MeterdError:
    """Say where it broke off, and that going on from the beginning does no harm."""
    place = f"{plain(chunk.file)} from line {chunk.numbers[0]} on is missing, or may be"
    return type(error)(f"{error}. {place}; type the same command again: what is in counts once")


def _until_taken(daemon: Daemon, chunk: Chunk) -> Answer:
    """A daemon that is full says when to come again; events have ids, so that is safe."""
    body = b"\n".join(chunk.lines) + b"\n"
    give_up = time.monotonic() + PATIENCE_S
    while True:
        try:
            answer = daemon.call("POST", EVENTS_TARGET, body, NDJSON)
        except Unavailable as error:
            raise _broken_off(error, chunk) from None
        if answer.status not in {429, 503} or time.monotonic() > give_up:
            return answer
        time.sleep(min(answer.retry_after or 1, 30))


def _halves(chunk: Chunk) -> list[Chunk]:
    middle = len(chunk.lines) // 2
    return [
        Chunk(chunk.file, chunk.numbers[part], chunk.lines[part])
        for part in (slice(0, middle), slice(middle, None))
    ]


def _progress(opened: Sequence[tuple[str, IO[bytes]]]) -> tuple[Progress, TaskID]:
    """A bar with rate and time left, on standard error of a terminal alone."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    screen = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.fields[events]} events"),
        BarColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=screen,
        disable=not screen.is_terminal,
    )
    sizes = [os.fstat(file.fileno()).st_size for name, file in opened if name != "-"]
    known = len(sizes) == len(opened)
    return progress, progress.add_task("replay", total=sum(sizes) if known else None, events=0)


def _count(totals: Totals) -> str:
    return f"{totals.accepted + totals.duplicates + totals.rejected:,}"


def _print(totals: Totals) -> None:
    for entry in totals.rejections:
        say(f"{entry['file']}:{entry['line']}: {entry['reason']}: {entry['detail']}")
    if totals.rejected > len(totals.rejections):
        say(f"… and {totals.rejected - len(totals.rejections)} more: meterd dead-letters")
    sys.stdout.write(
        f"{totals.accepted} accepted, {totals.duplicates} duplicates, {totals.rejected} rejected\n"
    )


COMMANDS: dict[str, Callable[..., Any]] = {"emit": emit, "replay": replay}
