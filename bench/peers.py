"""The peers: what others do with the same input, and what they leave out. Run as processes.

Each says `ready` when it is connected and waiting, works when the backlog is there, and prints one
line of JSON with the monotonic moment at which it was done. None of them keeps anything: no
decoding (but for HTTP), no prices, no memory of identities, nothing durable.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from aiohttp import web
from redis.asyncio import Redis

from meterd.sources.mqtt import Inbox, Link5, MqttSettings
from tests.processes import PROVIDER_KEY

COUNT = 1000


def ready() -> None:
    print("ready", flush=True)


def done(**facts: object) -> None:
    print(json.dumps({"finished": time.monotonic(), **facts}), flush=True)


async def redis_group(url: str, stream: str, events: int) -> None:
    """XREADGROUP and XACK, 1000 at a time, as the client library gives them; thrown away."""
    async with Redis.from_url(url, socket_timeout=None) as client:
        await client.ping()
        ready()
        read = 0
        while read < events:
            reply: Any = await client.xreadgroup("bare", "one", {stream: ">"}, count=COUNT, block=0)
            entries = reply[0][1]
            await client.xack(stream, "bare", *[entry[0] for entry in entries])
            read += len(entries)
        done(events=read)


async def redis_read(url: str, stream: str, events: int) -> None:
    """XREAD, 1000 at a time: nobody knows afterwards what was read."""
    async with Redis.from_url(url, socket_timeout=None) as client:
        await client.ping()
        ready()
        read, last = 0, b"0"
        while read < events:
            reply: Any = await client.xread({stream: last}, count=COUNT, block=0)
            entries = reply[0][1]
            last = entries[-1][0]
            read += len(entries)
        done(events=read)


async def mqtt_engine(port: int, wanted: str, events: int) -> None:
    """The engine that meterd uses, receiving and acknowledging at once."""
    settings = MqttSettings("bare", "127.0.0.1", port, client_id="bare")
    inbox = Inbox(max(settings.receive_maximum, settings.batch))
    link = Link5(settings, wanted, None, inbox)
    await link.open()
    ready()
    read = 0
    while read < events:
        while not inbox.arrivals:
            inbox.changed.clear()
            await inbox.changed.wait()
        batch = inbox.arrivals[: settings.batch]
        del inbox.arrivals[: len(batch)]
        link.resume()
        link.acknowledge([message.packet_id for message in batch if message.packet_id])
        read += len(batch)
    done(events=read)
    await link.close()


async def mqtt_aiomqtt(port: int, wanted: str, events: int) -> None:
    """The usual library, as its documentation shows it; it acknowledges before it hands over."""
    import aiomqtt  # noqa: PLC0415  # Not everybody has it, and only this peer wants it.

    async with aiomqtt.Client("127.0.0.1", port, protocol=aiomqtt.ProtocolVersion.V5) as client:
        await client.subscribe(wanted, qos=1)
        ready()
        read = 0
        async for _ in client.messages:
            read += 1
            if read == events:
                break
        done(events=read)


async def redis_paced(url: str, stream: str, payloads: Sequence[bytes], rate: int) -> None:
    """A producer: adds events at a steady rate, a hundredth each 10 ms."""
    size = max(1, rate // 100)
    async with Redis.from_url(url) as client:
        await client.ping()
        ready()
        began = time.monotonic()
        for number, first in enumerate(range(0, len(payloads), size)):
            await asyncio.sleep(began + number / 100 - time.monotonic())
            pipe = client.pipeline(transaction=False)
            for payload in payloads[first : first + size]:
                pipe.execute_command("XADD", stream, "*", "event", payload)
            await pipe.execute()
        done(events=len(payloads))


class _Event(msgspec.Struct, gc=False):
    id: str
    escrow_id: str
    meter: str
    quantity: int
    time: str
    dimensions: dict[str, str]


async def http_parse(port: int) -> None:
    """An aiohttp handler that parses the list into typed objects, and answers."""
    decoder = msgspec.json.Decoder(list[_Event])

    async def post(request: web.Request) -> web.Response:
        events = decoder.decode(await request.read())
        return web.Response(
            body=msgspec.json.encode({"accepted": len(events), "duplicates": 0, "rejected": []}),
            content_type="application/json",
        )

    application = web.Application()
    application.router.add_post("/v1/events", post)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    ready()
    await asyncio.Event().wait()


async def pairs(api: str, escrows: Sequence[str], concurrency: int, amount: str) -> None:
    """GET and POST for each escrow, a new connection for each POST; answers are not looked at."""
    headers = {"Authorization": f"Bearer {PROVIDER_KEY}"}
    waiting = iter(escrows)

    async def worker(reads: aiohttp.ClientSession, posts: aiohttp.ClientSession) -> None:
        for escrow in waiting:
            async with reads.get(f"{api}/escrow/{escrow}") as answer:
                await answer.read()
            url = f"{api}/escrow/{escrow}/release-partial"
            async with posts.post(url, json={"amount": amount}) as answer:
                await answer.read()
                answer.raise_for_status()

    async with (
        aiohttp.ClientSession(headers=headers) as reads,
        aiohttp.ClientSession(
            headers=headers, connector=aiohttp.TCPConnector(force_close=True)
        ) as posts,
    ):
        ready()
        started = time.monotonic()
        await asyncio.gather(*(worker(reads, posts) for _ in range(concurrency)))
        done(seconds=time.monotonic() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what")
    parser.add_argument("--url", default="")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--topic", default="")
    parser.add_argument("--events", type=int, default=0)
    parser.add_argument("--file", type=Path, default=Path())
    parser.add_argument("--rate", type=int, default=0)
    parser.add_argument("--escrows-file", default="")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--amount", default="")
    given = parser.parse_args()
    if given.what == "redis-group":
        asyncio.run(redis_group(given.url, given.topic, given.events))
    elif given.what == "redis-paced":
        payloads = given.file.read_bytes().split(b"\n")
        asyncio.run(redis_paced(given.url, given.topic, payloads, given.rate))
    elif given.what == "redis-read":
        asyncio.run(redis_read(given.url, given.topic, given.events))
    elif given.what == "mqtt-engine":
        asyncio.run(mqtt_engine(given.port, given.topic, given.events))
    elif given.what == "mqtt-aiomqtt":
        asyncio.run(mqtt_aiomqtt(given.port, given.topic, given.events))
    elif given.what == "http-parse":
        asyncio.run(http_parse(given.port))
    elif given.what == "pairs":
        escrows = Path(given.escrows_file).read_text().split()
        asyncio.run(pairs(given.url, escrows, given.concurrency, given.amount))
    else:
        parser.error(f"there is no peer {given.what!r}")


if __name__ == "__main__":
    main()
