"""`@metered` on all four kinds of functions, and each way in which a stream can end."""

from __future__ import annotations

import asyncio
import gc
from contextlib import aclosing, closing
from contextvars import ContextVar
from decimal import Decimal
from types import SimpleNamespace

import pytest

from meterd.sdk import AsyncGate, BadUsage, Denied, Gate, Meter, metered

CUSTOMER: ContextVar[str] = ContextVar("customer")


class Told(Meter):
    """A meter that notes what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, str, str, dict[str, str], str]] = []

    def emit(self, agreement, meter, quantity=1, *, dimensions=None, hold="", **_):
        self.told.append((agreement, meter, quantity, dict(dimensions or {}), hold))
        return "id"

    @property
    def sums(self) -> list[str]:
        return [quantity for _, _, quantity, _, _ in self.told]


@pytest.fixture
def meter() -> Told:
    return Told()


def chunk(tokens: int, kind: str = "output"):
    return SimpleNamespace(usage=SimpleNamespace(output_tokens=tokens), kind=kind)


def test_function_is_counted_by_its_result(meter):
    """By attributes, by keys, by a function of it; by one call where nothing is said."""

    @metered(meter, "tokens", agreement="customer", count="usage.output_tokens")
    def by_path(prompt, customer="nobody"):
        return prompt

    @metered(meter, "chars", agreement=lambda text: f"c-{text[0]}", quantity=len)
    def by_function(text):
        return text

    @metered(meter, "calls", agreement=CUSTOMER, dimensions={"model": "m"})
    def by_call():
        return None

    CUSTOMER.set("c-7")
    by_path(chunk(12), customer="c-1")
    by_path({"usage": {"output_tokens": Decimal("0.5")}})
    by_function("abc")
    by_call()

    assert meter.told == [
        ("c-1", "tokens", "12", {}, ""),
        ("nobody", "tokens", "0.5", {}, ""),
        ("c-a", "chars", "3", {}, ""),
        ("c-7", "calls", "1", {"model": "m"}, ""),
    ]


async def test_coroutine_is_counted_by_its_result(meter):
    """And one that raises gave nothing."""

    @metered(meter, "tokens", agreement="customer", count="n")
    async def answer(customer, n):
        await asyncio.sleep(0)
        if n < 0:
            raise ValueError
        return {"n": n}

    assert await answer("c-1", 3) == {"n": 3}
    with pytest.raises(ValueError, match=r"^$"):
        await answer("c-1", -1)

    assert meter.sums == ["3"]


def stream_of(meter, given, **options):
    """A sync and an async stream of these chunks; an exception among them is raised."""

    @metered(meter, "tokens", agreement="customer", count="usage.output_tokens", **options)
    def waits(customer):
        for one in given:
            if isinstance(one, Exception):
                raise one
            yield one

    @metered(meter, "tokens", agreement="customer", count="usage.output_tokens", **options)
    async def awaits(customer):
        for one in given:
            await asyncio.sleep(0)
            if isinstance(one, Exception):
                raise one
            yield one

    return waits, awaits


CHUNKS = [chunk(1), SimpleNamespace(), chunk(2), chunk(4)]


async def test_stream_that_is_read_to_its_end_is_one_event_with_the_sum(meter):
    """Chunks without a figure count nothing."""
    waits, awaits = stream_of(meter, CHUNKS)

    assert len(list(waits("c-1"))) == len([one async for one in awaits("c-1")]) == 4
    assert meter.sums == ["7", "7"]


async def test_stream_with_a_running_total_counts_the_last_one(meter):
    """As those of some models."""
    waits, awaits = stream_of(meter, CHUNKS, chunks="last")
    list(waits("c-1"))
    _ = [one async for one in awaits("c-1")]

    assert meter.sums == ["4", "4"]


async def test_consumer_who_has_enough_pays_for_what_he_was_given(meter):
    """Closed early, both kinds, once."""
    waits, awaits = stream_of(meter, CHUNKS)
    with closing(waits("c-1")) as stream:
        next(stream)
    async with aclosing(awaits("c-1")) as stream:
        async for one in stream:
            if one is CHUNKS[2]:
                break

    assert meter.sums == ["1", "3"]


async def test_stream_that_is_dropped_unclosed_is_counted_when_it_is_collected(meter):
    """A break without a close."""
    waits, awaits = stream_of(meter, CHUNKS)
    for _ in waits("c-1"):
        break
    stream = awaits("c-1")
    await anext(stream)
    del stream
    gc.collect()
    for _ in range(10):
        await asyncio.sleep(0)

    assert meter.sums == ["1", "1"]


async def test_client_who_goes_away_is_charged_for_what_was_made_for_him(meter):
    """The task that serves him is cancelled while the next chunk is awaited."""
    waiting = asyncio.Event()

    @metered(meter, "tokens", agreement="customer")
    async def stream(customer):
        yield "a"
        yield "b"
        waiting.set()
        await asyncio.Event().wait()

    async def serve():
        async for _ in stream("c-1"):
            pass

    task = asyncio.create_task(serve())
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert meter.sums == ["2"]


@pytest.mark.parametrize(("policy", "told"), [("count", ["1"]), ("forget", [])])
async def test_stream_that_breaks_off_by_itself_follows_the_policy(meter, policy, told):
    """What was given before is counted, unless its owner forgets it."""
    waits, awaits = stream_of(meter, [chunk(1), ValueError("broken")], on_error=policy)
    with pytest.raises(ValueError, match="broken"):
        list(waits("c-1"))
    with pytest.raises(ValueError, match="broken"):
        [one async for one in awaits("c-1")]

    assert meter.sums == told * 2


def test_stream_with_several_dimensions_is_one_event_for_each_set(meter):
    """And no more."""
    chunks = [chunk(1, "input"), chunk(2), chunk(3)]
    waits, _ = stream_of(meter, chunks, dimensions=lambda one: {"kind": one.kind})
    list(waits("c-1"))

    assert [(told[2], told[3]["kind"]) for told in meter.told] == [("1", "input"), ("5", "output")]


def test_who_pays_is_known_when_the_function_is_called(meter):
    """And not when somebody reads the stream, elsewhere."""

    @metered(meter, "tokens", agreement=CUSTOMER)
    def stream():
        yield 1

    CUSTOMER.set("c-1")
    given = stream()
    CUSTOMER.set("c-2")
    list(given)

    assert [told[0] for told in meter.told] == ["c-1"]


def test_stream_in_which_nothing_was_found_is_warned_of(meter, caplog):
    """A path with a slip would be free usage for ever."""
    waits, _ = stream_of(meter, [SimpleNamespace(usge=1)])
    list(waits("c-1"))

    assert meter.told == []
    assert "nothing was counted" in caplog.text


def test_quantity_that_is_none_is_an_error_at_the_call(meter):
    """What came before it is counted."""

    @metered(meter, "tokens", agreement="customer", quantity=lambda one: one)
    def stream(customer):
        yield 1
        yield 0.5

    with pytest.raises(BadUsage, match="float"):
        list(stream("c-1"))
    assert meter.sums == ["1"]


def test_decorator_that_cannot_be_meant_is_refused_where_it_stands(meter, meterd):
    """Not at the first customer."""

    def function(customer):
        return customer

    async def coroutine(customer):
        return customer

    with Gate(meterd.url) as gate:
        for bad, applied in (
            ({"agreement": "payer"}, function),
            ({"agreement": "customer", "count": "a", "quantity": len}, function),
            ({"agreement": "customer", "chunks": "first"}, function),
            ({"agreement": "customer", "gate": gate}, coroutine),
            ({"agreement": "customer", "gate": AsyncGate(meterd.url)}, function),
        ):
            with pytest.raises(BadUsage):
                metered(meter, "tokens", **bad)(applied)


async def test_gate_is_asked_before_and_the_usage_captures_the_hold(meter, meterd):
    """In both worlds; what a customer cannot pay is never begun."""
    begun = []
    with Gate(meterd.url) as gate:
        options = {"agreement": "customer", "gate": gate, "estimate": 5}

        @metered(meter, "tokens", **options)
        def stream(customer):
            begun.append(customer)
            yield 1
            yield 1

        list(stream("c-1"))
        meterd.headroom = 4
        with pytest.raises(Denied, match="headroom"):
            list(stream("c-2"))

    async with AsyncGate(meterd.url) as gate:

        @metered(meter, "tokens", **{**options, "gate": gate, "estimate": 2})
        async def awaited(customer):
            begun.append(customer)
            return 1

        await awaited("c-3")

    assert begun == ["c-1", "c-3"]
    assert [(told[0], told[2]) for told in meter.told] == [("c-1", "2"), ("c-3", "1")]
    assert [told[4] for told in meter.told] == list(meterd.holds)


async def test_hold_of_work_that_gave_nothing_is_voided(meter, meterd):
    """Its customer has his headroom back at once."""
    with Gate(meterd.url) as gate:

        @metered(meter, "tokens", agreement="customer", gate=gate)
        def broken(customer):
            raise ValueError("broken")

        with pytest.raises(ValueError, match="broken"):
            broken("c-1")

    async with AsyncGate(meterd.url) as gate:

        @metered(meter, "tokens", agreement="customer", gate=gate, on_error="forget")
        async def stream(customer):
            yield 1
            raise ValueError("broken")

        with pytest.raises(ValueError, match="broken"):
            _ = [one async for one in stream("c-1")]

    assert meter.told == []
    assert list(meterd.holds.values()) == ["void:all", "void:all"]


def test_decorated_function_keeps_its_name(meter):
    """For whoever reads a traceback."""
    waits, awaits = stream_of(meter, [])

    assert (waits.__name__, awaits.__name__) == ("waits", "awaits")
