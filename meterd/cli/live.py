"""What `meterd check --live` asks of what the configuration names.

The rule: nothing moves money and nothing disturbs a running daemon. The escrow service is asked
for an escrow that does not exist; brokers are asked under a name of our own, so that the daemon
keeps its session.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from meterd.cli.events import mqtt_client
from meterd.cli.screen import plain
from meterd.errors import MeterdError

if TYPE_CHECKING:
    from redis import Redis

    from meterd.config import MqttSourceSettings, RedisSourceSettings, Settings

TIMEOUT_S = 5


def ask(settings: Settings) -> int:
    """Ask each service and print a line for each; the exit code, 1 when one cannot be used."""
    failures = 0
    for name, answers in _questions(settings):
        try:
            for answer in answers:
                sys.stdout.write(f"{plain(name)}: {plain(answer)}\n")
        except MeterdError as error:
            failures += 1
            sys.stdout.write(f"{plain(name)}: FAILED: {plain(error)}\n")
    return 1 if failures else 0


def _questions(settings: Settings) -> Iterator[tuple[str, Iterator[str]]]:
    yield f"escrow {settings.escrow.base_url}", _escrow(settings)
    for entry in settings.sources:
        if entry.kind == "redis":
            yield f"source {entry.name}", _redis(entry)
        else:
            yield f"source {entry.name}", _mqtt(entry)


def _escrow(settings: Settings) -> Iterator[str]:
    yield asyncio.run(_probe(settings))


async def _probe(settings: Settings) -> str:
    from meterd.app import escrow_api_of
    from meterd.escrow.client import EscrowClient

    async with EscrowClient(escrow_api_of(settings)) as client:
        return await client.probe()


def _redis(entry: RedisSourceSettings) -> Iterator[str]:
    import redis

    try:
        with redis.Redis.from_url(
            entry.url.reveal(), socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S
        ) as client:
            yield f"Redis {client.info('server')['redis_version']} answers"
            kind = _text(client.type(entry.stream))
            if kind not in {"stream", "none"}:
                raise MeterdError(f"{entry.stream} holds a {kind}, no stream; name another")
            entries = client.xlen(entry.stream) if kind == "stream" else 0
            yield f"{entry.stream} has {entries:,} entries"
            yield from _redis_durability(client)
    except redis.RedisError as error:
        raise MeterdError(f"{error}; check url of this source") from None


def _redis_durability(client: Redis) -> Iterator[str]:
    import redis

    try:
        given = client.config_get("appendonly", "appendfsync")
    except redis.ResponseError:
        yield "it does not tell its settings; see that appendonly is on"
        return
    settings = {_text(name): _text(value) for name, value in given.items()}
    if settings.get("appendonly") != "yes":
        yield "warning: appendonly is off: a crash of Redis loses events that it took"
    elif settings.get("appendfsync") != "always":
        yield "warning: appendfsync is not always: a crash loses up to a second of events"


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _mqtt(entry: MqttSourceSettings) -> Iterator[str]:
    client = mqtt_client(entry)
    answered = threading.Event()
    codes: list[str] = []

    def on_connect(_: object, __: object, ___: object, code: object, ____: object) -> None:
        codes.append(str(code))
        answered.set()

    client.on_connect = on_connect
    try:
        client.connect(entry.host, entry.port)
        client.loop_start()
        if not answered.wait(TIMEOUT_S):
            raise MeterdError(f"no answer within {TIMEOUT_S} s; check host, port and tls")
    except OSError as error:
        raise MeterdError(f"{error}; check host, port and tls") from None
    finally:
        client.disconnect()
        client.loop_stop()
    if codes != ["Success"]:
        raise MeterdError(f"the broker says {codes[0]}; check username and password")
    yield f"an MQTT {entry.protocol} broker answers"
    yield "see that it keeps what waits for a daemon that is away: docs/operations.md"
