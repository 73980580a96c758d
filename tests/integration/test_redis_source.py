from __future__ import annotations

import asyncio

import pytest
import redis

from meterd.core.events import Reason
from meterd.errors import SourceUnavailable
from meterd.sources.redis_streams import Position, RedisStreamSettings, RedisStreamSource
from tests.servers import RedisServer, free_port

STREAM = "meterd:usage"
GROUP = "meterd"
MODES = ("exclusive", "group")


@pytest.fixture
def server():
    with RedisServer() as running:
        yield running


@pytest.fixture
def client(server):
    with redis.Redis(port=server.port, retry=None) as connected:
        yield connected


@pytest.fixture
async def make(server):
    """Sources that are closed at the end, whatever happened."""
    made = []

    def one(mode="exclusive", **settings):
        settings = {"url": server.url, "block_ms": 200, "connect_timeout_s": 2.0, **settings}
        made.append(RedisStreamSource(RedisStreamSettings("r", mode=mode, **settings)))
        return made[-1]

    yield one
    for source in made:
        await source.close()


def add(client, *payloads, stream=STREAM):
    return [client.xadd(stream, {"event": payload}).decode() for payload in payloads]


async def take(source, count):
    """Read and ack until `count` payloads came."""
    payloads, last = [], None
    while len(payloads) < count:
        last = await source.read()
        payloads += last.payloads
        await source.ack(last)
    return payloads, last


def group_of(client):
    return client.xinfo_groups(STREAM)[0]


@pytest.mark.parametrize("mode", MODES)
async def test_source_reads_what_is_there_and_leaves_no_lag(client, make, mode):
    """A backlog of several batches comes in order, whole, once; the group shows no lag after."""
    sent = [b'{"id":"%d"}' % number for number in range(25)]
    ids = add(client, *sent)
    source = make(mode, batch=10)
    warnings = await source.connect(None)
    lag_before = await source.lag()
    payloads, last = await take(source, 25)

    assert (list(warnings), lag_before, payloads) == ([], 25, sent)
    assert list(last.ids) == ids[-len(last.payloads) :]
    assert (await source.lag(), group_of(client)["lag"], group_of(client)["pending"]) == (0, 0, 0)


@pytest.mark.parametrize("mode", MODES)
async def test_source_waits_longer_than_its_block_when_nothing_comes(client, make, mode):
    """A quiet stream is no error, and the first entry wakes the read."""
    source = make(mode, block_ms=20, answer_timeout_s=0.5)
    await source.connect(None)
    reading = asyncio.create_task(source.read())
    done, _ = await asyncio.wait([reading], timeout=0.7)
    assert not done
    add(client, b"{}")

    assert (await reading).payloads == [b"{}"]


@pytest.mark.parametrize("mode", MODES)
async def test_cancelled_read_loses_nothing(client, make, mode):
    """What a cancelled read would have returned comes with the next call."""
    source = make(mode)
    await source.connect(None)
    for number in range(3):
        reading = asyncio.create_task(source.read())
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])
        add(client, b"%d" % number)
    payloads, _ = await take(source, 3)

    assert payloads == [b"0", b"1", b"2"]


async def test_exclusive_source_goes_on_behind_its_position(client, make):
    """A new source with the stored position reads only what came after it, acked or not."""
    add(client, b"1", b"2")
    first = make()
    await first.connect(None)
    position = (await first.read()).position
    await first.close()
    add(client, b"3")
    second = make()
    warnings = await second.connect(position)
    payloads, _ = await take(second, 1)

    assert (list(warnings), payloads) == ([], [b"3"])


async def test_group_source_gets_its_own_pending_again_first(client, make):
    """What was read and not acked comes again before anything new, and is then done."""
    add(client, b"1", b"2", b"3")
    first = make("group", batch=2)
    await first.connect(None)
    await first.ack(await first.read())
    await first.read()
    await first.close()
    add(client, b"4")
    second = make("group", batch=2)
    await second.connect(None)
    payloads, _ = await take(second, 2)

    assert payloads == [b"3", b"4"]
    assert group_of(client)["pending"] == 0


async def test_group_source_claims_what_a_dead_consumer_left(client, make):
    """Entries pending with another consumer for too long are taken over."""
    add(client, b"1", b"2")
    dead = make("group", consumer="dead")
    await dead.connect(None)
    await dead.read()
    await dead.close()
    heir = make("group", consumer="heir", claim_idle_s=0.05, claim_interval_s=0.05, block_ms=20)
    await heir.connect(None)
    payloads, _ = await take(heir, 2)

    assert payloads == [b"1", b"2"]
    assert group_of(client)["pending"] == 0


async def test_two_consumers_share_a_stream(client, make):
    """Two live sources of one group get every entry once between them."""
    one, two = (make("group", consumer=name, batch=3) for name in "ab")
    await one.connect(None)
    await two.connect(None)
    sent = [b"%d" % number for number in range(9)]
    add(client, *sent)
    # A source that got a full batch has the next one under way already.
    reads = [await one.read(), await two.read(), await one.read()]

    assert sorted(payload for read in reads for payload in read.payloads) == sent


@pytest.mark.parametrize("claim", [False, True])
async def test_entry_deleted_while_pending_is_a_fault(client, make, claim):
    """An entry that is gone before it was acked is told as a dead letter, not passed over."""
    (entry_id,) = add(client, b"1")
    first = make("group", consumer="a")
    await first.connect(None)
    await first.read()
    await first.close()
    client.xdel(STREAM, entry_id)
    second = make("group", consumer="b" if claim else "a", claim_idle_s=0.0, claim_interval_s=0.01)
    await second.connect(None)
    deliveries = await second.read()
    await second.ack(deliveries)

    assert (list(deliveries.ids), deliveries.faults[0].reason) == ([entry_id], Reason.MALFORMED)
    assert group_of(client)["pending"] == 0


@pytest.mark.parametrize("mode", MODES)
async def test_bad_entries_are_faults_among_good_ones(client, make, mode):
    """Flat fields, missing fields and JSON come in one batch, each for itself."""
    add(client, b"{}")
    client.xadd(STREAM, {"escrow_id": "e", "meter": "tokens", "quantity": "12", "id": "x"})
    client.xadd(STREAM, {"colour": "blue"})
    source = make(mode)
    await source.connect(None)
    deliveries = await source.read()

    assert deliveries.payloads[:2] == [
        b"{}",
        b'{"escrow_id":"e","meter":"tokens","quantity":"12","id":"x"}',
    ]
    assert list(deliveries.faults) == [2]


@pytest.mark.parametrize("mode", MODES)
async def test_killed_server_ends_the_read_and_nothing_is_lost(server, client, make, mode):
    """A kill ends the read soon; after the restart what was not acked, and only that, comes."""
    add(client, b"1", b"2")
    source = make(mode, batch=2)
    await source.connect(None)
    done = await source.read()
    await source.ack(done)
    reading = asyncio.create_task(source.read())
    await asyncio.sleep(0)
    server.kill()
    with pytest.raises(SourceUnavailable, match=str(server.port)):
        await reading
    with pytest.raises(SourceUnavailable, match="refused"):
        await source.connect(done.position)
    server.start()
    add(client, b"3")
    warnings = await source.connect(done.position)
    again = (await source.read()).payloads
    while b"3" not in again:
        again += (await source.read()).payloads

    assert [payload for payload in again if payload not in done.payloads] == [b"3"]
    # Another run of the server: exclusive mode looks back a minute, and says so.
    assert ["restarted" in text for text in warnings] == [True] * (mode == "exclusive")


@pytest.mark.parametrize("mode", MODES)
async def test_ack_to_a_killed_server_is_unavailable(server, client, make, mode):
    """An ack that cannot be told raises, and so does the next read."""
    add(client, b"1", b"2")
    source = make(mode, batch=1)
    await source.connect(None)
    deliveries = await source.read()
    server.kill()
    with pytest.raises(SourceUnavailable):
        await source.ack(deliveries)
    with pytest.raises(SourceUnavailable):
        await source.read()


async def test_trimmed_entries_are_told_on_connecting(client, make):
    """Entries trimmed while nobody read are counted and told once."""
    add(client, b"1", b"2")
    source = make()
    await source.connect(None)
    _, last = await take(source, 2)
    await source.close()
    add(client, *(b"%d" % number for number in range(10)))
    client.xtrim(STREAM, maxlen=4, approximate=False)
    warnings = await source.connect(last.position)
    payloads, last = await take(source, 4)

    assert len(warnings) == 1
    assert "6 entries left it" in warnings[0]
    assert payloads == [b"6", b"7", b"8", b"9"]
    assert list(await source.connect(last.position)) == []


async def test_trimmed_entries_are_told_while_reading(client, make):
    """A loss between two reads ends the connection once, and the next one tells it."""
    add(client, b"1")
    source = make()
    await source.connect(None)
    await take(source, 1)
    add(client, b"2", b"3", b"4")
    client.xtrim(STREAM, maxlen=1, approximate=False)
    _, last = await take(source, 1)
    with pytest.raises(SourceUnavailable, match="2 entries left it"):
        await source.read()
    warnings = await source.connect(last.position)

    assert len(warnings) == 1
    assert "2 entries left it" in warnings[0]
    add(client, b"5")
    payloads, last = await take(source, 1)
    assert payloads == [b"5"]
    assert list(await source.connect(last.position)) == []


async def test_recreated_stream_is_read_from_before_with_a_warning(client, make):
    """A deleted and recreated stream is noticed, and nothing in it is passed over."""
    add(client, b"1", b"2", b"3")
    source = make()
    await source.connect(None)
    _, last = await take(source, 3)
    await source.close()
    client.delete(STREAM)
    client.xadd(STREAM, {"event": b"new"}, id="5-1")
    warnings = await source.connect(last.position)
    payloads, _ = await take(source, 1)

    assert "stands before the position" in warnings[0]
    assert payloads == [b"new"]
    assert await source.lag() == 0


@pytest.mark.parametrize("entries", [(), ("5-1",)])
async def test_stream_recreated_with_smaller_ids_is_noticed_while_nothing_comes(
    client, make, entries
):
    """A read that waits behind an id which is gone does not wait for ever."""
    add(client, b"1", b"2", b"3")
    source = make()
    await source.connect(None)
    _, before = await take(source, 3)
    client.delete(STREAM)
    for entry in entries:
        client.xadd(STREAM, {"event": b"new"}, id=entry)
    with pytest.raises(SourceUnavailable, match=r"deleted|recreated"):
        await source.read()
    warnings = await source.connect(before.position)
    client.xadd(STREAM, {"event": b"newer"}, id="6-1")
    payloads, _ = await take(source, len(entries) + 1)

    assert "stands before the position" in warnings[0]
    assert payloads == [b"new", b"newer"][-len(payloads) :]
    assert await source.lag() == 0


async def test_stream_deleted_under_way_is_noticed_after_the_next_commit(client, make):
    """Another stream under the same key does not pass for the one that was read."""
    add(client, b"1", b"2", b"3")
    source = make()
    await source.connect(None)
    _, before = await take(source, 3)
    client.delete(STREAM)
    add(client, b"4")
    deliveries = await source.read()
    with pytest.raises(SourceUnavailable):
        await source.ack(deliveries)
    warnings = await source.connect(before.position)
    payloads, _ = await take(source, 1)

    assert "recreated" in warnings[0]
    assert payloads == [b"4"]


async def test_group_that_was_deleted_is_made_again_with_a_warning(client, make):
    """In group mode a lost group means reading from the start, and a person is told."""
    add(client, b"1")
    source = make("group")
    await source.connect(None)
    await take(source, 1)
    client.xgroup_destroy(STREAM, GROUP)
    with pytest.raises(SourceUnavailable, match="deleted"):
        await source.read()
    warnings = await source.connect(None)

    assert "the group was gone" in warnings[0]
    assert (await take(source, 1))[0] == [b"1"]


@pytest.mark.parametrize("mode", MODES)
async def test_wrong_type_at_the_key_says_what_to_do(client, make, mode):
    """A string at the stream's key is no stream: the message names key and command."""
    client.set(STREAM, "x")
    source = make(mode)
    with pytest.raises(SourceUnavailable, match=f"redis-cli TYPE {STREAM}"):
        await source.connect(None)


async def test_server_that_is_down_is_unavailable_with_its_address(make):
    """A refused connection names host and port."""
    port = free_port()
    source = make(url=f"redis://:s3cret@127.0.0.1:{port}")
    with pytest.raises(SourceUnavailable, match=str(port)) as caught:
        await source.connect(None)

    assert "s3cret" not in str(caught.value)


async def test_server_that_never_answers_is_unavailable_in_time(make):
    """A listener that accepts and stays silent ends in the connect time-out."""
    writers = []
    silent = await asyncio.start_server(lambda _, writer: writers.append(writer), "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    source = make(url=f"redis://127.0.0.1:{port}", connect_timeout_s=0.2)
    with pytest.raises(SourceUnavailable, match=r"no answer|Timeout"):
        await source.connect(None)
    for writer in writers:
        writer.close()
    silent.close()


async def test_wrong_password_is_unavailable_and_is_not_shown():
    """A refused password never appears in the error."""
    with RedisServer(password="right-s3cret") as server:
        url = server.url.replace("right", "wrong")
        source = RedisStreamSource(RedisStreamSettings("r", url))
        with pytest.raises(SourceUnavailable) as caught:
            await source.connect(None)
        good = RedisStreamSource(RedisStreamSettings("r", server.url))
        await good.connect(None)
        await good.close()

    assert "s3cret" not in str(caught.value)


async def test_position_of_another_source_is_refused(make):
    """A stored position that no Redis source wrote is not guessed at."""
    with pytest.raises(SourceUnavailable, match="stored position"):
        await make().connect("session meterd-m")


async def test_options_in_the_url_cannot_undo_the_rules(server, client, make):
    """A socket time-out in the URL shorter than the block does not end a quiet read."""
    source = make(url=f"{server.url}?socket_timeout=0.05&protocol=3", block_ms=300)
    await source.connect(None)
    reading = asyncio.create_task(source.read())
    done, _ = await asyncio.wait([reading], timeout=0.5)
    assert not done
    add(client, b"1")

    assert Position.parse((await reading).position).counted == 1
